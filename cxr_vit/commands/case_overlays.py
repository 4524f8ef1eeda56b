"""What the report of evaluate.py draws over the images of its cases."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import List, Optional

import numpy as np
from PIL import Image

from cxr_vit.config import Config
from cxr_vit.engines.devices import choose_device
from cxr_vit.engines.processes import Launch
from cxr_vit.evaluation.cases import Overlays
from cxr_vit.evaluation.label_match import LabelMatch
from cxr_vit.saliency.explainer import Explainer

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
    explainers: List[Explainer] = []  # one, once it is needed; none after a failure
    has_failed = False

    def draw(picture: Image.Image, finding: str) -> Optional[Image.Image]:
        nonlocal has_failed
        if has_failed:
            return None
        pixels = np.asarray(picture)
        try:
            if not explainers:
                device = choose_device(run.engine, Launch.from_environment()).device
                explainers.append(Explainer(checkpoint, run, run.report.saliency, device))
            (explainer,) = explainers
            column = explainer.highest(pixels, match.sources[match.names.index(finding)])
            return explainer.overlays(picture, pixels, [column])[0]
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
        f" {_METHODS[run.report.saliency]} for this finding, computed by torch in fp32 on the host."
        " Yellow is the map's largest value, dark purple a small one; maps are not comparable with"
        " each other. A map is no segmentation, and no proof that the model is right for the right"
        " reason."
    )
