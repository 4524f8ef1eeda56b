import json
import time

import pytest
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_callbacks import eval_end, step_end

from cxr_vit.training.loggers import JsonlLogger, Logger, MetricsLogging, TensorBoardLogger, Window


def events(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def figure():
    drawn = Figure(figsize=(1, 1))
    drawn.subplots().plot([0, 1], [0, 1])
    return drawn


@pytest.fixture
def tensorboard(tmp_path):
    return TensorBoardLogger(
        tmp_path,
        config_text="optim: {lr: 0.1}\n",
        hparams={"optim.lr": 0.1, "model.name": "vit-micro"},
    )


def read_back(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


# JsonlLogger


def test_event_has_its_step_and_flat_keys(tmp_path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.start(0)
    logger.scalars(3, {"train/loss": 0.25, "val/auroc/Hernia": None})
    assert events(logger.path) == [{"step": 3, "train/loss": 0.25, "val/auroc/Hernia": None}]


def test_non_finite_number_is_null_in_json(tmp_path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.scalars(1, {"train/grad_norm": float("nan")})
    assert events(logger.path) == [{"step": 1, "train/grad_norm": None}]


def test_resumed_log_drops_the_events_after_the_checkpoint(tmp_path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    for step in (2, 4, 6):
        logger.scalars(step, {"train/loss": 1.0})
    with logger.path.open("a") as file:
        file.write('{"step": 4, "train/lo')  # the process was killed here
    logger.start(4)
    assert [event["step"] for event in events(logger.path)] == [2, 4]


# TensorBoardLogger


def test_tensorboard_has_scalars_under_the_same_tags(tensorboard):
    tensorboard.start(0)
    tensorboard.scalars(2, {"train/loss": 0.5, "val/auroc/Hernia": None})
    tensorboard.scalars(4, {"train/loss": 0.25})
    tensorboard.close({})
    board = read_back(tensorboard.folder)
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(2, 0.5), (4, 0.25)]
    assert "val/auroc/Hernia" not in board.Tags()["scalars"]


def test_tensorboard_has_figures_config_and_hparams(tensorboard):
    tensorboard.start(0)
    tensorboard.figures(0, {"train/images": figure(), "plan/timeline": figure()})
    tensorboard.figures(4, {"val/roc": figure()})
    tensorboard.close({"val/auroc_macro": 0.5, "val/auroc/Hernia": 0.25})
    board = read_back(tensorboard.folder)
    assert board.Tags()["images"] == ["train/images", "plan/timeline", "val/roc"]
    assert [event.step for event in board.Images("val/roc")] == [4]
    (text,) = board.Tensors("config/text_summary")
    assert b"lr: 0.1" in text.tensor_proto.string_val[0]
    plugins = board.SummaryMetadata("_hparams_/session_start_info").plugin_data
    assert plugins.plugin_name == "hparams"
    assert b"vit-micro" in plugins.content
    experiment = board.SummaryMetadata("_hparams_/experiment").plugin_data.content
    assert b"val/auroc_macro" in experiment
    assert b"val/auroc/Hernia" not in experiment


def test_resumed_board_purges_later_steps(tensorboard, tmp_path):
    tensorboard.start(0)
    for step in (2, 4, 6):
        tensorboard.scalars(step, {"train/loss": float(step)})
    tensorboard.close({})
    # TensorBoard reads files in the order of their names: the second they were made in, then a
    # counter as text, where 10 comes before 9. A resumed run is another process, seconds later.
    time.sleep(1)
    tensorboard.start(4)
    tensorboard.scalars(6, {"train/loss": 60.0})
    tensorboard.close({})
    values = [(e.step, e.value) for e in read_back(tmp_path).Scalars("train/loss")]
    assert values == [(2, 2.0), (4, 4.0), (6, 60.0)]


# MetricsLogging


class FigureRecorder(Logger):
    """Records the figures by step."""

    def __init__(self):
        self.recorded = []

    def figures(self, step, figures):
        self.recorded.append((step, sorted(figures)))


class FakeTrainer:
    """A trainer that starts at a step."""

    compile_s = 0.0

    def __init__(self, step):
        self.step = step


@pytest.mark.parametrize(("step", "expected"), [(0, [(0, ["start"])]), (4, [])])
def test_start_figures_are_drawn_in_new_runs_only(step, expected):
    recorder = FigureRecorder()
    logging = MetricsLogging(
        [recorder],
        every=1,
        start_figures=lambda trainer: {"start": figure()},
        eval_figures=lambda event: {"roc": figure()},
    )
    trainer = FakeTrainer(step)
    logging.on_fit_start(trainer)
    logging.on_eval_end(trainer, eval_end(0.5, step=6))
    assert recorder.recorded == [*expected, (6, ["roc"])]


# Window


def test_summary_is_the_mean_over_the_window():
    window = Window()
    for losses in ([1.0, 2.0], [6.0]):
        window.add(step_end(losses))
    values = window.summary()
    assert values["train/loss"] == pytest.approx(3.0)
    assert values["perf/samples_per_s"] == pytest.approx(6 / 2.0)
    assert values["perf/data_wait_pct"] == 0.0
    assert "train/grad_norm" not in values, "a device that cannot report it logs none"


def test_window_is_restored_from_json_and_reset_by_an_empty_state():
    window, restored = Window(), Window()
    window.add(step_end([1.0, 2.0]))
    restored.load_state_dict(json.loads(json.dumps(window.state_dict())))
    assert restored.summary() == window.summary()
    restored.load_state_dict({})
    assert restored.state_dict() == Window().state_dict()
