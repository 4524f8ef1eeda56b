"""The pictures of `predict --saliency`."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Dict, List, Sequence

import numpy as np

from cxr_vit.commands.checkpoint_predictor import Opened
from cxr_vit.commands.map_model import explainer_of
from cxr_vit.data.images import read_original
from cxr_vit.errors import ConfigError, DataError, suggestion
from cxr_vit.files import replacing
from cxr_vit.prediction.outputs import file_name, make_picture_folder, safe_name
from cxr_vit.prediction.run import Predicted, Watcher
from cxr_vit.saliency.overlay import beside

logger = logging.getLogger(__name__)


def saliency_pictures(
    folder: Path, opened: Opened, *, method: str, findings: Sequence[str], resumes: bool
) -> Watcher:
    """Make the folder; return what writes pictures into it: an image, and a map over the same.

    Those of an image are of the given findings; without any, of what is at or over its threshold,
    or else of the label with the highest probability.

    Raises ConfigError if the model does not know a finding, DataError if the folder has files and
    `resumes` is not set.
    """
    module = opened.module
    assert module is not None and module.checkpoint is not None, "an export is refused before"
    chosen = [_column(name, module.names) for name in findings]
    config, data = module.config, module.config.data
    how: Dict[str, Any] = {"max_megapixels": data.max_megapixels, "dicom_window": data.dicom_window}
    explainer = explainer_of(module.checkpoint, config, method)
    make_picture_folder("--saliency", folder, resumes=resumes)

    def write(predicted: Predicted) -> None:
        for index in np.flatnonzero(predicted.usable):
            path, scores = predicted.paths[index], predicted.probabilities[index]
            own = [module.names.index(name) for name in predicted.findings[index]]
            columns = chosen or own or [int(scores.argmax())]
            try:
                original = read_original(path, **how)
            except DataError as error:  # it was there a moment ago; its row is not to be lost
                logger.warning("no picture in %s: %s", folder, error)
                continue
            overlays = explainer().overlays(original, predicted.pixels[index], columns)
            for column, covered in zip(columns, overlays):
                end = f"_{safe_name(module.names[column])}_{scores[column]:.3f}.png"
                name = file_name(predicted.first + int(index), path, end)
                with replacing(folder / name) as temporary:
                    beside(original, covered).save(temporary, "PNG")

    return write


def _column(name: str, names: Sequence[str]) -> int:
    if name not in names:
        known: List[str] = list(names)
        raise ConfigError(
            f"--findings {name}: the model does not know it.{suggestion(name, known)} It knows"
            f" {', '.join(known[:20])}."
        )
    return names.index(name)
