"""What the report of evaluate.py draws over the images of its cases."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Optional

import numpy as np
from PIL import Image

from cxr_vit.commands.map_model import explainer_of
from cxr_vit.config import Config
from cxr_vit.evaluation.cases import Overlays
from cxr_vit.evaluation.label_match import LabelMatch

logger = logging.getLogger(__name__)

_METHODS = {
    "relevance": "gradient-weighted attention relevance (Chefer et al. 2021)",
    "grad_cam": "Grad-CAM (Selvaraju et al. 2017)",
}


def case_overlays(
    checkpoint: Path, run: Config, match: LabelMatch, *, is_ensemble: bool
) -> Optional[Overlays]:
    """Return the overlays of the findings that `match` compares, or None if none are wanted.

    After a failure nothing more is drawn: the scores are not to be lost for a picture.
    """
    if run.report.saliency == "none":
        return None
    explainer = explainer_of(checkpoint, run, run.report.saliency)
    has_failed = False

    def draw(picture: Image.Image, finding: str) -> Optional[Image.Image]:
        nonlocal has_failed
        if has_failed:
            return None
        pixels = np.asarray(picture)
        try:
            column = explainer().highest(pixels, match.sources[match.names.index(finding)])
            return explainer().overlays(picture, pixels, [column])[0]
        except Exception as error:
            logger.warning("the report shows no maps (report.saliency): %s", error)
            has_failed = True
            return None

    return Overlays(_about(run, is_ensemble), draw)


def _about(run: Config, is_ensemble: bool) -> str:
    members = " of the first checkpoint of the ensemble" if is_ensemble else ""
    views = ", of the middle of the image alone" if run.evaluation.views != "center" else ""
    return (
        f"Below each image, the same with a map of what the score{members} rests on{views}:"
        f" {_METHODS[run.report.saliency]} for this finding, computed by torch in fp32 on"
        " a CPU or GPU. Yellow is the map's largest value, dark purple a small one; an image that"
        " stays gray has a map without a positive value. Maps are not comparable with each other. A"
        " map is no segmentation, and no proof that the model is right for the right reason."
    )
