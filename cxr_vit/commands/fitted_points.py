"""The operating points that evaluate.py applies: stored ones, or fitted on validation images."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from pathlib import Path
from typing import Any, Iterable, List, Mapping, Optional, Sequence

from cxr_vit.checkpoint_files import WEIGHTS
from cxr_vit.commands.members import Member, Members
from cxr_vit.commands.scored_data import OtherData
from cxr_vit.config import Config
from cxr_vit.engines.process_group import coordinator
from cxr_vit.errors import DataError
from cxr_vit.evaluation.label_match import LabelMatch
from cxr_vit.evaluation.operating_points import OPERATING_POINTS, OperatingPoints, data_sha256
from cxr_vit.evaluation.predictions import Predictions, predictions_of
from cxr_vit.training.scoring import ensemble

logger = logging.getLogger(__name__)


def operating_points_of(
    members: Members, out: Path, predictions: Predictions
) -> Optional[OperatingPoints]:
    """Return the operating points for a scored split, by its labels, or None with a message.

    They are those of the checkpoint's folder, or those of the report folder `out`, if they were
    fitted with the same model on the validation images at hand. Otherwise the validation images are
    scored, and the points stored in the checkpoint's folder unless it has some, or the data are not
    those of its training. An ensemble's are of its mean probabilities, and in the report alone.
    With another split than that of the training there are none. Another data set (`--data`) uses
    the points of the checkpoint, which it cannot fit.

    All processes call it, after `Members.describe`. A damaged file is not used, with a warning.
    """
    points = _found(members, out, predictions)
    is_other = isinstance(members.all[0].scored, OtherData)
    if points is not None and _is_validation(predictions) and not is_other:
        text = "the operating points are fitted on the images that are scored: they are optimistic"
        _say(members.is_main, text)
    return points


def _found(members: Members, out: Path, predictions: Predictions) -> Optional[OperatingPoints]:
    """Return stored points or new ones, by the labels of the scored data."""
    first, is_main = members.all[0], members.is_main
    own = [] if len(members.all) > 1 else [first.checkpoint / OPERATING_POINTS]
    # The main process decides: scoring takes all of them.
    find = coordinator(first.trainer.launch).call_once
    if isinstance(first.scored, OtherData):
        wanted = _Wanted(members.all, is_other=True)
        text = find("operating points", lambda: _stored(own, wanted))
        if text:
            return _renamed(OperatingPoints.model_validate_json(text), first.match)
        _say(is_main, f"no operating points: {_no_other(first.checkpoint, own)}")
        return None
    reason = _no_fit(members.all)
    if reason:
        _say(is_main, f"no operating points: {reason}")
        return None
    wanted = _Wanted(members.all, is_other=False)
    text = find("operating points", lambda: _stored([*own, out / OPERATING_POINTS], wanted))
    if text:
        return OperatingPoints.model_validate_json(text)
    points = _fit(members, predictions, wanted.model_sha256)
    if is_main and first.match.is_identity and not first.facts["changed_since_training"]:
        _keep(points, own)
    return points


def _no_other(checkpoint: Path, own: Sequence[Path]) -> str:
    """Return why there are no points for another data set, and what to do."""
    command = f"evaluate.py --checkpoint {checkpoint}"
    if not own:
        return "an ensemble has them for the data of its training alone"
    if own[0].exists():  # `_stored` said in what they differ
        return (
            f"{own[0]} does not fit. Remove it, and score the checkpoint's own data with the same"
            f" settings first: {command}"
        )
    return f"none are stored with the checkpoint. Score its own data first: {command}"


def _no_fit(members: Sequence[Member]) -> Optional[str]:
    """Return why there is nothing to fit on, or None."""
    if any(len(member.data.splits.val) == 0 for member in members):
        return "there are no validation images to fit them on"
    if any("split_sha256" in member.facts["changed_since_training"] for member in members):
        return (
            "the split is not that of the training: its validation images may be images that the"
            " model was trained with"
        )
    if len({_validation_sha256(member) for member in members}) > 1:
        return "a member may have been trained with validation images of another"
    return None


def _validation_sha256(member: Member) -> str:
    records = member.records("val")
    labels = records.labels[:, member.match.columns]
    return data_sha256(member.match.names, records.table["image"], labels)


class _Wanted:
    """What points must have been fitted with: labels, model, and data where they are at hand."""

    def __init__(self, members: Sequence[Member], *, is_other: bool) -> None:
        first = members[0]
        match = LabelMatch.same(first.match.model_names) if is_other else first.match
        self.labels: List[str] = match.names
        self.data_sha256 = None if is_other else _validation_sha256(first)
        self.model_sha256 = _sha256(
            _facts(member.state, member.scored.run, match if is_other else member.match)
            for member in members
        )

    def difference(self, points: OperatingPoints) -> Optional[str]:
        """Return in what points differ, or None if they fit."""
        if points.labels != self.labels:
            return "other labels"
        if points.fitted_on["model_sha256"] != self.model_sha256:
            return "other weights, views or image sizes"
        if self.data_sha256 not in (None, points.fitted_on["sha256"]):
            return "other validation images or labels"
        return None


def _facts(state: Mapping[str, Any], config: Config, match: LabelMatch) -> List[Any]:
    """Return what the probabilities of a checkpoint depend on, besides the images."""
    weights = state["sha256"][WEIGHTS]
    return [weights, match.sources, config.data.read_size, config.evaluation.views]


def _sha256(models: Iterable[List[Any]]) -> str:
    return hashlib.sha256(json.dumps(list(models)).encode()).hexdigest()


def points_of_checkpoint(
    checkpoint: Path, state: Mapping[str, Any], config: Config, labels: List[str]
) -> Optional[OperatingPoints]:
    """Return the stored points of a checkpoint for images without labels, or None with a message.

    `labels` are those of the model.
    """
    path, advice = checkpoint / OPERATING_POINTS, f"evaluate.py --checkpoint {checkpoint}"
    if not path.exists():
        logger.warning(
            "no operating points are stored with the checkpoint: neither findings nor calibrated"
            " probabilities. This fits them on its validation images: %s",
            advice,
        )
        return None
    try:
        points = OperatingPoints.read(path)
    except DataError as error:
        logger.warning("not used: %s", error)
        return None
    model = _sha256([_facts(state, config, LabelMatch.same(labels))])
    if (points.labels, points.fitted_on["model_sha256"]) == (labels, model):
        return points
    logger.warning(
        "%s is not used: it was fitted with other labels, weights, views or image sizes. Remove it,"
        " and fit it again: %s",
        *(path, advice),
    )
    return None


def _stored(places: Sequence[Path], wanted: _Wanted) -> str:
    """Return the text of the first file that fits, or nothing; say which do not."""
    for path in filter(Path.exists, places):
        try:
            points = OperatingPoints.read(path)
        except DataError as error:  # the scores of the split are not to be lost
            logger.warning("not used: %s", error)
            continue
        difference = wanted.difference(points)
        if difference is None:
            return points.model_dump_json()
        print(f"{path} is not used: it was fitted with {difference}", flush=True)
    return ""


def _fit(members: Members, predictions: Predictions, model_sha256: str) -> OperatingPoints:
    """Fit on the validation images, which are scored unless the predictions are theirs."""
    if not _is_validation(predictions):
        records = members.records("val")
        text = f"operating points: scoring {len(records)} validation images to fit them"
        _say(members.is_main, text)
        start = time.perf_counter()
        scored = [member.test("val") for member in members.all]
        predictions = predictions_of(records, ensemble(scored) if len(scored) > 1 else scored[0])
        _say(members.is_main, f"scored in {time.perf_counter() - start:.0f} s")
    return OperatingPoints.fit(predictions, model_sha256=model_sha256)


def _is_validation(predictions: Predictions) -> bool:
    return bool((predictions.table["split"] == "val").all())


def _keep(points: OperatingPoints, places: Sequence[Path]) -> None:
    """Store points with the checkpoint; a file that is there stays."""
    for path in places:
        if path.exists():
            continue
        try:
            points.write(path)
        except OSError as error:  # a read-only folder
            reason = error.strerror or error
            print(
                f"{path} cannot be written ({reason}): the report alone has the operating points",
                flush=True,
            )
        else:
            print(f"operating points: {path}", flush=True)


def _renamed(points: OperatingPoints, match: LabelMatch) -> OperatingPoints:
    """Return the points of a model under the names of a data set.

    A label that is compared with several of the model has none: its scores are other ones.
    """
    sources = {
        name: match.model_names[source[0]]
        for name, source in zip(match.names, match.sources)
        if len(source) == 1
    }
    values = {
        key: {name: each[source] for name, source in sources.items() if source in each}
        for key in ("thresholds", "temperature", "platt")
        for each in [getattr(points, key)]
    }
    return points.model_copy(update={"labels": match.names, **values})


def _say(is_main: bool, text: str) -> None:
    if is_main:
        print(text, flush=True)
