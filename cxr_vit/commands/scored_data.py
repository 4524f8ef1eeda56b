"""What evaluate.py scores: a split of the run's own data, or another data set (`--data`)."""

from __future__ import annotations

import hashlib
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, Mapping, Optional, Sequence, Tuple

from cxr_vit.cli import EvaluateArguments
from cxr_vit.config import Config, check, read_config
from cxr_vit.errors import ConfigError, CxrVitError
from cxr_vit.training.run_folder import report_folder

if TYPE_CHECKING:
    from cxr_vit.data.datamodule import ChestXrayDataModule
    from cxr_vit.evaluation.label_match import LabelMatch
    from cxr_vit.evaluation.metrics import EvalOutputs

logger = logging.getLogger(__name__)

#: Settings of the data that belong to the model.
_OF_MODEL = ("image_size", "resize", "resample")
#: Settings of the data that the engine reads from the configuration of the run.
_OF_ENGINE = ("num_workers", "worker_timeout_s")


@dataclass(frozen=True)
class ScoredData:
    """A split of the run's own data.

    Attributes
    ----------
    run
        The configuration of the run, for the trainer and the module.
    config
        That of the data.
    """

    run: Config
    config: Config

    def folder(
        self, checkpoint: Path, split: str, *, default: str, is_ensemble: bool
    ) -> Tuple[Path, int]:
        """Return the folder of the report, and how many of its folders are in the run."""
        return report_folder(checkpoint, split, default=default, is_ensemble=is_ensemble), 1

    def facts(
        self, data: ChestXrayDataModule, match: LabelMatch, state: Mapping[str, Any], split: str
    ) -> Dict[str, Any]:
        """Return JSON-able facts for metrics.json; warn of what makes the scores wrong."""
        if split == "val" and len(data.splits.test) == 0:
            logger.warning(
                "no test images: scoring the validation images, which also chose the best"
                " checkpoint"
            )
        changed = data.warn_if_changed(state)
        size = self.config.data.read_size
        trained = state.get("read_size", size)  # an older checkpoint does not say
        if trained != size:
            text = "images are read at %d pixels, and those of the training were at %d: data.resize"
            logger.warning(text, size, trained)
            changed.append("read_size")
        return {**data.fingerprint(), "changed_since_training": changed}

    def named(self, outputs: EvalOutputs) -> EvalOutputs:
        """Return the outputs under the name of what was scored."""
        return outputs


@dataclass(frozen=True)
class OtherData(ScoredData):
    """Another data set: the files and overrides of its data section, and the split to score."""

    files: Sequence[Path]
    overrides: Sequence[str]
    split: Optional[str]

    def folder(
        self, checkpoint: Path, split: str, *, default: str, is_ensemble: bool
    ) -> Tuple[Path, int]:
        """Return a folder in that of the run's report, with the name of the first file."""
        name = re.sub(r"[^\w-]+", "_", self.files[0].stem).strip("_") or "data"
        suffix = "" if self.split is None else f"_{split}"
        report = report_folder(checkpoint, default, default=default, is_ensemble=is_ensemble)
        return report / f"{name}{suffix}", 2

    def facts(
        self, data: ChestXrayDataModule, match: LabelMatch, state: Mapping[str, Any], split: str
    ) -> Dict[str, Any]:
        """Return files, hashes and the map of the labels; warn of images of the training."""
        files = {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in data.files}
        given = {"config": [str(path) for path in self.files], "overrides": list(self.overrides)}
        shared = self._count_training_images(data.dataset(split).image_names)
        about = {**given, "files": files, "images_of_training": shared}
        return {**data.fingerprint(), "data": about, **match.facts()}

    def named(self, outputs: EvalOutputs) -> EvalOutputs:
        """Return the outputs under the name of the split, `all` if none was given."""
        return replace(outputs, split=self.split or "all")

    def _count_training_images(self, images: Sequence[str]) -> Optional[int]:
        """Count the images that have names of the training's; None if its data are not here."""
        from cxr_vit.data.datamodule import training_images

        try:
            is_trained = training_images(self.run.data)
        except CxrVitError as error:
            reason = str(error).split("\n")[0]
            print(f"not compared with the images of the training, which cannot be read: {reason}")
            return None
        shared = sum(map(is_trained, images))
        if shared:
            advice = " If the data set has splits of its own, give --split test."
            logger.warning(
                "%d of %d images have the names of images that the model was trained or validated"
                " with: the scores are too high.%s",
                *(shared, len(images), advice if self.split is None else ""),
            )
        return shared


def scored_data(run: Config, arguments: EvaluateArguments) -> ScoredData:
    """Return what the arguments ask for: the data of the run, or those of `--data`.

    Of another data set every image is scored unless a split is given. Raises ConfigError if its
    section is invalid, or asks for images that the model does not take.
    """
    files, overrides, split = arguments.files, arguments.data_overrides, arguments.split
    if not files:
        return ScoredData(run, run)
    given = read_config(files, overrides)
    data = given.data
    for key in _OF_MODEL:
        own, other = getattr(run.data, key), getattr(data, key)
        if key in data.model_fields_set and other != own:
            raise ConfigError(
                f"data.{key}={other} of the data is not that of the model, {own}. Leave it out:"
                " the model's is used."
            )
    changed: Dict[str, Any] = {key: getattr(run.data, key) for key in _OF_MODEL}
    changed["sample_images"] = None  # scoring writes no data set
    if split is None:
        changed["split"] = "all"
    config = check(run.model_copy(update={"data": data.model_copy(update=changed)}))
    # Either file may say that its images are not to be shown.
    images = run.report.images and given.report.images
    shown = given.report.model_dump(include={"saliency"}, exclude_unset=True)
    of_engine = {key: getattr(data, key) for key in _OF_ENGINE}
    run = run.changed(data=of_engine, report={"images": images, **shown})
    return OtherData(run, config, files, overrides, split)
