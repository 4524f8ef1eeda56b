"""The checkpoints that evaluate.py scores with: one, or those of an ensemble."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from PIL import Image

from cxr_vit import ChestXrayDataModule, Trainer, ViTModule
from cxr_vit.commands.callbacks import DescribeEngine
from cxr_vit.commands.case_overlays import case_overlays
from cxr_vit.commands.scored_data import ScoredData
from cxr_vit.config import Config, dump_config
from cxr_vit.data.records import Records
from cxr_vit.errors import ConfigError, DataError
from cxr_vit.evaluation.metrics import EvalOutputs
from cxr_vit.evaluation.page import PageContext
from cxr_vit.evaluation.predictions import Predictions, predictions_of
from cxr_vit.training.run_folder import package_versions
from cxr_vit.training.scoring import ensemble, match_of

logger = logging.getLogger(__name__)


class Member:
    """A checkpoint, the content of its trainer_state.json, and the data that it scores."""

    def __init__(self, checkpoint: Path, state: Mapping[str, Any], scored: ScoredData) -> None:
        self.checkpoint, self.state, self.scored = checkpoint, state, scored
        self.trainer = Trainer(scored.run, callbacks=[DescribeEngine()])
        self.data = ChestXrayDataModule(scored.config)
        self.module = ViTModule.load_from_checkpoint(checkpoint, config=scored.run)
        # Now: reading the images may take long.
        self.match = match_of(self.module, self.data, trains=False)
        self.facts: Dict[str, Any] = {}

    def records(self, split: str) -> Records:
        """Return the images of the split. Raises DataError, with the checkpoint, without any."""
        try:
            return self.data.dataset(split).records
        except DataError as error:
            raise DataError(f"{self.checkpoint}: {error}") from error

    def describe(self, split: str) -> None:
        """Collect the facts for metrics.json, and warn of what makes the scores wrong."""
        self.facts = {"checkpoint": str(self.checkpoint), "step": self.state["step"]}
        views = self.scored.run.evaluation.views
        if views != "center":
            self.facts["views"] = views
        self.facts.update(self.scored.facts(self.data, self.match, self.state, split))

    def test(self, split: str) -> EvalOutputs:
        """Score the split."""
        self.trainer.test(self.module, self.data, split=split)
        return self.scored.named(self.trainer.test_outputs)


class Members:
    """One checkpoint, or several whose probabilities of the same images are averaged."""

    def __init__(self, found: Sequence[Tuple[Path, Mapping[str, Any], ScoredData]]) -> None:
        _check_different([checkpoint for checkpoint, _, _ in found])
        self._members = [Member(*each) for each in found]
        self._first = self._members[0]

    @property
    def all(self) -> Sequence[Member]:
        """The members, at least one."""
        return self._members

    @property
    def is_main(self) -> bool:
        """Whether this process writes the report."""
        return self._first.trainer.is_global_zero

    @property
    def config(self) -> Config:
        """The configuration of the first run."""
        return self._first.scored.run

    def context(self, split: str) -> PageContext:
        """Return what the page of the report says and shows beside the scores."""
        run, checkpoint = self.config, self._first.checkpoint
        others = f" and {len(self._members) - 1} more" if self._is_ensemble else ""
        dataset = self._first.data.dataset(split)
        rows = {name: row for row, name in enumerate(dataset.image_names)}

        def image(name: str) -> Optional[Image.Image]:
            try:
                return Image.fromarray(dataset.read_images([rows[name]])[0])
            except DataError as error:  # the scores are not to be lost for a thumbnail
                logger.warning("not shown in the report: %s", error)
                return None

        return PageContext(
            f"{run.run.name}: {checkpoint.name}{others}",
            dump_config(run),
            package_versions(),
            image if run.report.images else None,
            case_overlays(checkpoint, run, self._first.match, is_ensemble=self._is_ensemble),
        )

    @property
    def _is_ensemble(self) -> bool:
        return len(self._members) > 1

    def set_up(self, split: Optional[str]) -> str:
        """Read the data; return the split to score. ConfigError if it is not the same for all."""
        for member in self._members:
            member.trainer.setup_data(member.data)
        split = split or self._first.data.default_split()
        for other in self._members[1:]:
            _check_same(self._first, other, split)
        return split

    def folder(self, split: str) -> Tuple[Path, int]:
        """Return the folder of the report, and how many of its folders are in the run."""
        return self._first.scored.folder(
            self._first.checkpoint,
            split,
            default=self._first.data.default_split(),
            is_ensemble=self._is_ensemble,
        )

    def records(self, split: str) -> Records:
        """Return the images of the split."""
        return self._first.records(split)

    def describe(self, split: str) -> None:
        """Print what is scored; warn of what makes the scores wrong."""
        for member in self._members:
            member.describe(split)
        print(self._first.data.describe(), flush=True)
        if self._is_ensemble:
            count = len(self._members)
            print(f"an ensemble of {count} checkpoints: {count} times the time of one", flush=True)

    def predictions(self, split: str) -> Predictions:
        """Score with each; return the predictions, the mean of their probabilities."""
        outputs = self._test(split)
        return predictions_of(self.records(split), outputs)

    def _test(self, split: str) -> EvalOutputs:
        if not self._is_ensemble:
            return self._first.test(split)
        outputs = []
        for member in self._members:
            outputs.append(member.test(split))
            score = member.facts["auroc_macro"] = outputs[-1].scores.get("auroc_macro")
            if self.is_main and score is not None:
                print(f"{member.checkpoint}: macro AUROC {score:.4f}", flush=True)
        return ensemble(outputs)

    def origin(self) -> Dict[str, Any]:
        """Return facts for metrics.json: of the checkpoint, or a list of those of all members."""
        members: List[Dict[str, Any]] = [member.facts for member in self._members]
        return {"members": members} if self._is_ensemble else members[0]


def _check_different(checkpoints: Sequence[Path]) -> None:
    """Raise ConfigError if a checkpoint is given twice, which would count it twice."""
    given: Dict[Path, Path] = {}
    for checkpoint in checkpoints:
        other = given.setdefault(checkpoint.resolve(), checkpoint)
        if other is not checkpoint:
            raise ConfigError(
                f"{other} and {checkpoint} are the same checkpoint ({checkpoint.resolve()}). Give"
                " each member of an ensemble once."
            )


def _check_same(first: Member, other: Member, split: str) -> None:
    """Raise ConfigError unless both score the same images with the same labels."""
    own, its = first.records(split), other.records(split)
    images, others = list(own.table["image"]), list(its.table["image"])
    if first.match.names != other.match.names:
        differing = sorted(set(first.match.names) ^ set(other.match.names)) or ["their order"]
        reason = f"their labels differ ({', '.join(differing[:5])})"
    elif images != others and sorted(images) == sorted(others):
        reason = "the same images, in another order"
    elif images != others:
        shared = len(set(images) & set(others))
        reason = f"{len(others)} images there, {len(images)} here, {shared} in both"
    elif (own.labels[:, first.match.columns] != its.labels[:, other.match.columns]).any():
        reason = "the images are the same, their labels are not"
    else:
        return
    raise ConfigError(
        f"{other.checkpoint} scores other {split} data than {first.checkpoint}: {reason}. An"
        " ensemble needs the same: override data.root and data.split for all, or score another data"
        " set with --data."
    )
