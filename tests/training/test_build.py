import pytest

from cxr_vit.training.build import build_callbacks
from cxr_vit.training.run_folder import RunFolder


@pytest.fixture
def callback_names(make_config, tmp_path):
    def make(*, writes, **engine):
        folder = RunFolder(tmp_path, writes=writes)
        callbacks = build_callbacks(
            make_config().changed(engine=engine),
            folder,
            start_figures=lambda trainer: {},
            eval_figures=lambda event: {},
        )
        return [type(callback).__name__ for callback in callbacks]

    return make


def test_process_that_writes_displays_and_logs(callback_names):
    expected = ["NonFiniteGuard", "EarlyStopping", "ProgressDisplay", "MetricsLogging"]
    assert callback_names(writes=True) == expected


def test_other_process_has_only_the_callbacks_that_can_stop_the_run(callback_names):
    assert callback_names(writes=False) == ["NonFiniteGuard", "EarlyStopping"]


def test_losses_of_synthetic_data_are_not_checked(callback_names):
    assert callback_names(writes=False, synthetic_data=True) == ["EarlyStopping"]
