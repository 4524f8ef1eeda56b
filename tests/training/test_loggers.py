import io
import json
import time

import pytest
import torch
from matplotlib.figure import Figure
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_callbacks import step_end

from cxr_vit.training.loggers import JsonlLogger, TensorBoardLogger, Window
from cxr_vit.training.progress import ProgressDisplay
from cxr_vit.training.trainer import EvalEnd


def events(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def figure(*_):
    drawn = Figure(figsize=(1, 1))
    drawn.subplots().plot([0, 1], [0, 1])
    return drawn


@pytest.fixture
def tensorboard(tmp_path):
    return TensorBoardLogger(
        tmp_path,
        config_text="optim: {lr: 0.1}\n",
        hparams={"optim.lr": 0.1, "model.name": "vit-micro"},
        figures=lambda: {"train/images": figure(), "plan/timeline": figure()},
        roc=figure,
    )


def read_back(folder):
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    accumulator.Reload()
    return accumulator


def evaluated(step=4):
    scores = {"auroc_macro": 0.5, "auroc_defined": 13, "num_findings": 14}
    empty = torch.zeros(2, 1)
    return EvalEnd(step, 0.1, scores, empty, empty, 1.0)


def test_every_event_has_its_step_and_flat_keys(tmp_path):
    sink = JsonlLogger(tmp_path / "metrics.jsonl")
    sink.start(0)
    sink.scalars(3, {"train/loss": 0.25, "val/auroc/Hernia": None})
    assert events(sink.path) == [{"step": 3, "train/loss": 0.25, "val/auroc/Hernia": None}]


def test_a_non_finite_number_is_null_and_not_invalid_json(tmp_path):
    sink = JsonlLogger(tmp_path / "metrics.jsonl")
    sink.scalars(1, {"train/grad_norm": float("nan")})
    assert events(sink.path) == [{"step": 1, "train/grad_norm": None}]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path):
    sink = JsonlLogger(tmp_path / "metrics.jsonl")
    for step in (2, 4, 6):
        sink.scalars(step, {"train/loss": 1.0})
    with sink.path.open("a") as file:
        file.write('{"step": 4, "train/lo')  # the process was killed here
    sink.start(4)
    assert [event["step"] for event in events(sink.path)] == [2, 4]


def test_tensorboard_has_scalars_under_the_same_tags(tensorboard):
    tensorboard.start(0)
    tensorboard.scalars(2, {"train/loss": 0.5, "val/auroc/Hernia": None})
    tensorboard.scalars(4, {"train/loss": 0.25})
    tensorboard.close({})
    board = read_back(tensorboard.folder)
    assert [(e.step, e.value) for e in board.Scalars("train/loss")] == [(2, 0.5), (4, 0.25)]
    assert "val/auroc/Hernia" not in board.Tags()["scalars"]


def test_tensorboard_has_images_roc_config_and_hparams(tensorboard):
    tensorboard.start(0)
    tensorboard.evaluated(evaluated())
    tensorboard.close({"val/auroc_macro": 0.5, "val/auroc/Hernia": 0.25})
    board = read_back(tensorboard.folder)
    assert board.Tags()["images"] == ["train/images", "plan/timeline", "val/roc"]
    (text,) = board.Tensors("config/text_summary")
    assert b"lr: 0.1" in text.tensor_proto.string_val[0]
    plugins = board.SummaryMetadata("_hparams_/session_start_info").plugin_data
    assert plugins.plugin_name == "hparams"
    assert b"vit-micro" in plugins.content
    experiment = board.SummaryMetadata("_hparams_/experiment").plugin_data.content
    assert b"val/auroc_macro" in experiment
    assert b"val/auroc/Hernia" not in experiment


def test_a_resumed_board_purges_later_steps(tensorboard, tmp_path):
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


def test_summary_is_the_mean_over_the_window():
    window = Window()
    for losses in ([1.0, 2.0], [6.0]):
        window.add(step_end(losses))
    values = window.summary()
    assert values["train/loss"] == pytest.approx(3.0)
    assert values["perf/samples_per_s"] == pytest.approx(6 / 2.0)
    assert values["perf/data_wait_pct"] == 0.0
    assert "train/grad_norm" not in values, "a device that cannot report it logs none"


class Run:
    """What a display asks a trainer."""

    step = 0
    durations = type("Durations", (), {"total_steps": 4})

    def is_due(self, first_step, every):
        return self.step % every == 0


def shown(console, steps=4):
    display, run = ProgressDisplay(every=2, console=console), Run()
    display.on_fit_start(run)
    for first in range(steps):
        run.step = first + 1
        display.on_step_end(run, step_end([0.5], first_step=first))
    display.on_eval_end(run, evaluated())
    display.on_fit_end(run)
    return console.file.getvalue()


def test_without_a_terminal_there_are_plain_lines():
    text = shown(Console(file=io.StringIO(), force_terminal=False))
    lines = text.splitlines()
    assert lines[0].startswith("step 2/4  loss 0.5000  lr 1.00e-03  2 samples/s")
    assert "eta 0:00:0" in lines[0]
    assert len(lines) == 3
    assert "macro AUROC 0.5000 (13 of 14 findings)" in lines[2]
    assert "\x1b" not in text


def test_on_a_terminal_there_is_a_bar():
    text = shown(Console(file=io.StringIO(), force_terminal=True, width=160))
    assert "\x1b" in text
    for part in ("4/4", "loss 0.5000", "samples/s", "eta"):
        assert part in text
