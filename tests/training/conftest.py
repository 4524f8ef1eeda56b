import pytest

from runs import Run


@pytest.fixture
def make(make_config, tmp_path):
    """Make a run of six steps with given validation scores."""

    def make(*overrides, scores=(), callbacks=(), loggers=(), folder="run"):
        config = make_config(f"run.dir={tmp_path / folder}", *overrides)
        return Run(config, scores, callbacks, loggers)

    return make
