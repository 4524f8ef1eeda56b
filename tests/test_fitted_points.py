"""Where evaluate.py takes its operating points from, and where it stores them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Callable, Optional, Tuple

import pytest

import layouts
from conftest import SMALL
from cxr_vit.checkpoint_files import checkpoint_of, verify_checkpoint
from cxr_vit.cli import evaluate_arguments
from cxr_vit.commands import train
from cxr_vit.commands.fitted_points import operating_points_of
from cxr_vit.commands.members import Members
from cxr_vit.commands.scored_data import scored_data
from cxr_vit.data.dataset import ChestXrayDataset
from cxr_vit.data.synthetic.dataset import write_sample
from cxr_vit.errors import DataError
from cxr_vit.evaluation.operating_points import OPERATING_POINTS, OperatingPoints
from cxr_vit.evaluation.predictions import Predictions, predictions_of
from cxr_vit.training.checkpoint import CheckpointStore, load_checkpoint
from cxr_vit.training.run_folder import config_of_checkpoint
from cxr_vit.training.scoring import ensemble

Call = Callable[..., Tuple[Optional[OperatingPoints], str]]


@pytest.fixture(scope="module")
def sample_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A synthetic data set that is large enough for thresholds: ten positives of a finding."""
    root = tmp_path_factory.mktemp("data") / "sample"
    write_sample(root, num_images=700, image_size=32, seed=0)
    return root


@pytest.fixture(scope="module")
def trained(sample_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    words = [*SMALL, f"data.root={sample_root}", "train.steps=2", f"run.dir={folder}"]
    assert train.main([*words, "data.val_fraction=0.5"]) == 0
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of a run of two steps."""
    return Path(shutil.copytree(str(trained), str(tmp_path / "run"), symlinks=True))


def _members(*words: Any) -> Tuple[Members, Predictions]:
    """Score as evaluate.py does."""
    arguments = evaluate_arguments(["--checkpoint", *map(str, words)])
    found = []
    for checkpoint in map(checkpoint_of, arguments.checkpoints):
        state = verify_checkpoint(checkpoint, needs_optimizer=False)
        config = config_of_checkpoint(checkpoint, arguments.overrides)
        found.append((checkpoint, state, scored_data(config, arguments)))
    members = Members(found)
    split = members.set_up(arguments.split)
    members.describe(split)
    scored = [member.test(split) for member in members.all]
    outputs = ensemble(scored) if len(scored) > 1 else scored[0]
    return members, predictions_of(members.records(split), outputs)


@pytest.fixture
def call(capsys: Any, tmp_path: Path) -> Call:
    """Return the points that evaluate.py would apply, and what it prints of them."""

    def points_of(*words: Any, out: str = "out") -> Tuple[Optional[OperatingPoints], str]:
        members, predictions = _members(*words)
        capsys.readouterr()
        (tmp_path / out).mkdir(exist_ok=True)
        points = operating_points_of(members, tmp_path / out, predictions)
        if points is not None:  # as the report does
            points.write(tmp_path / out / OPERATING_POINTS)
        return points, capsys.readouterr().out

    return points_of


def test_first_report_scores_the_validation_images_and_later_ones_read(
    run: Path, call: Call
) -> None:
    checkpoint = checkpoint_of(run)
    points, output = call(run)
    assert points is not None and points.thresholds
    assert "scoring 269 validation images" in output
    assert "optimistic" not in output
    assert OperatingPoints.read(checkpoint / OPERATING_POINTS) == points
    again, output = call(run, out="other")
    assert (again, output) == (points, "")
    _, predictions = _members(run, "--split", "val")
    expected = OperatingPoints.fit(predictions)
    assert points.thresholds == expected.thresholds
    assert points.fitted_on["sha256"] == expected.fitted_on["sha256"]


def test_checkpoint_with_points_is_whole_and_is_pruned_with_them(run: Path, call: Call) -> None:
    call(run)
    folder = checkpoint_of(run).resolve()
    assert (folder / OPERATING_POINTS).is_file()
    verify_checkpoint(folder)
    load_checkpoint(folder)
    later = folder.with_name("step_00000099")
    shutil.copytree(str(folder), str(later))
    store = CheckpointStore(run / "checkpoints")
    for name in ("best", "last"):
        store.link(name, later)
    store.prune(1)
    assert not folder.exists() and later.is_dir()
    assert not list((run / "checkpoints").glob(".step*"))


def test_validation_images_are_scored_once_and_said_to_be_optimistic(run: Path, call: Call) -> None:
    points, output = call(run, "--split", "val")
    assert points is not None
    assert "scoring" not in output and "optimistic" in output
    assert call(run) == (points, "")


def test_points_of_other_images_or_weights_are_fitted_again(run: Path, call: Call) -> None:
    stored = checkpoint_of(run) / OPERATING_POINTS
    call(run)
    text = stored.read_text()
    flipped, output = call(run, "evaluation.views=flip")
    assert "other weights, views or image sizes" in output
    assert flipped is not None and flipped != OperatingPoints.read(stored)
    assert stored.read_text() == text
    for key, reason in (("model_sha256", "other weights"), ("sha256", "other validation images")):
        content = json.loads(text)
        content["fitted_on"][key] = "0" * 64
        stored.write_text(json.dumps(content))
        assert f"is not used: it was fitted with {reason}" in call(run, out=key)[1]


def test_validation_images_of_another_split_may_be_those_of_the_training(
    run: Path, call: Call, second: Path
) -> None:
    call(run)
    for members in ([run], [run, second]):
        points, output = call(*members, "data.val_fraction=0.25", out="changed")
        assert points is None and "no operating points: the split is not that of the tr" in output


def test_thumbnail_that_cannot_be_read_is_left_out(
    run: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    members, predictions = _members(run)
    context = members.context("test")
    assert context.images is not None
    name = predictions.table["image"].iloc[0]
    assert context.images(name) is not None

    def fail(*_: Any) -> None:
        raise DataError(f"{name}: the image is not there")

    monkeypatch.setattr(ChestXrayDataset, "read_images", fail)
    assert context.images(name) is None
    assert "not shown in the report" in caplog.text


def test_damaged_file_is_not_used_and_stays(run: Path, call: Call, caplog: Any) -> None:
    stored = checkpoint_of(run) / OPERATING_POINTS
    stored.write_text("{")
    points, output = call(run)
    assert points is not None and "scoring 269" in output
    assert f"not used: {stored}: no operating points can be read (" in caplog.text
    assert "Remove it" in caplog.text
    assert stored.read_text() == "{", "it may be somebody's work"


def test_folder_that_cannot_be_written_leaves_the_points_in_the_report(
    run: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = OperatingPoints.write

    def refuse(self: OperatingPoints, path: Path) -> None:
        if "checkpoints" in path.parts:  # root may write anywhere
            raise PermissionError(13, "Permission denied")
        write(self, path)

    monkeypatch.setattr(OperatingPoints, "write", refuse)
    points, output = call(run)
    assert "cannot be written (Permission denied): the report alone" in output
    assert OperatingPoints.read(tmp_path / "out" / OPERATING_POINTS) == points
    again, output = call(run)
    assert again == points and "scoring" not in output


def test_data_without_validation_images_have_no_points(run: Path, call: Call) -> None:
    call(run)
    points, output = call(run, "data.split=all")
    assert points is None
    assert "no operating points: there are no validation images" in output


@pytest.fixture(scope="module")
def second(sample_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "second"
    words = [*SMALL, f"data.root={sample_root}", "train.steps=1", f"run.dir={folder}"]
    assert train.main([*words, "data.val_fraction=0.5", "run.seed=3"]) == 0
    return folder


def test_ensemble_is_fitted_on_its_mean_probabilities(run: Path, call: Call, second: Path) -> None:
    other = second
    points, output = call(run, other)
    assert points is not None and "scoring 269" in output
    _, predictions = _members(run, other, "--split", "val")
    expected = OperatingPoints.fit(predictions)
    assert points.thresholds == expected.thresholds
    assert not (checkpoint_of(run) / OPERATING_POINTS).exists()
    assert call(run, other) == (points, ""), "read from the report"
    assert "other weights" in call(run, out="out")[1], "those of the ensemble"


def test_fit_leaves_the_facts_of_the_scored_split(run: Path, tmp_path: Path, second: Path) -> None:
    members, predictions = _members(run, second)
    members.all[0].facts["auroc_macro"] = 0.5
    before = json.dumps(members.origin())
    assert operating_points_of(members, tmp_path, predictions) is not None
    assert json.dumps(members.origin()) == before


def test_ensemble_with_other_validation_images_has_no_points(
    run: Path, call: Call, tmp_path: Path, sample_root: Path
) -> None:
    words = [*SMALL, f"data.root={sample_root}", "train.steps=1"]
    assert train.main([*words, "data.val_fraction=0.25", f"run.dir={tmp_path / 'other'}"]) == 0
    points, output = call(run, tmp_path / "other")
    assert points is None and "trained with validation images of another" in output


def test_other_data_use_the_points_of_the_checkpoint_under_their_names(
    run: Path, call: Call, tmp_path: Path
) -> None:
    root = layouts.chexpert(tmp_path / "chexpert")
    data = ("--data", "data/chexpert", f"data.root={root}")
    points, output = call(run, *data)
    assert points is None
    assert "no operating points" in output and f"evaluate.py --checkpoint {run}" in output
    own, _ = call(run)
    points, output = call(run, *data, out="chexpert-report")
    assert own is not None and points is not None and output == ""
    assert points.fitted_on == own.fitted_on
    assert points.thresholds["Pleural Effusion"] == own.thresholds["Effusion"]
    assert "Lung Lesion" not in points.thresholds, "the higher of two outputs"
    assert set(points.thresholds) <= set(points.labels)
    points, output = call(run, *data, "evaluation.views=flip", out="flipped")
    stored = checkpoint_of(run) / OPERATING_POINTS
    assert points is None and "it was fitted with other weights, views" in output
    assert f"{stored} does not fit. Remove it, and score" in output
    stored.unlink()
    call(run, "evaluation.views=flip", out="flipped-own")
    assert call(run, *data, "evaluation.views=flip", out="flipped")[0] is not None
