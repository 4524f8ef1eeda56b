"""What predicts: a checkpoint on an engine, or an exported model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Dict, List, Optional

import numpy as np

from cxr_vit.data.cache import CacheSettings
from cxr_vit.evaluation.operating_points import OperatingPoints


@dataclass(frozen=True)
class Facts:
    """What is known of a model that predicts.

    Attributes
    ----------
    labels
        In the order of the probabilities, C of them.
    settings
        How image files are read: the side of the square image, the filter, the limits.
    image_size
        Side of the part in the middle that the model sees, pixels.
    points
        Thresholds and scaling, or None if none were fitted.
    identity
        JSON-able facts that the probabilities depend on: rows of another identity do not belong
        into the same file.
    """

    labels: List[str]
    settings: CacheSettings
    image_size: int
    points: Optional[OperatingPoints]
    identity: Dict[str, Any]


class Predictor(ABC):
    """A model that is ready to predict."""

    facts: Facts
    #: Images that `probabilities` takes at most; fewer are slower.
    chunk: int

    @abstractmethod
    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Return float32 ``[n, C]`` for uint8 ``[n, S, S]``, S being ``settings.image_size``."""
