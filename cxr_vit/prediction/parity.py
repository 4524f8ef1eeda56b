"""How far an exported model is from its checkpoint."""

from __future__ import annotations

from typing import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from cxr_vit.data.views import CENTER, VIEWS, View
from cxr_vit.errors import ModelError
from cxr_vit.model.module import ViTModule

#: The most that a probability, or a logit of a folder for transformers, may differ.
LIMIT = 1e-4

#: Maps uint8 ``[n, S, S]`` to float32 ``[n, C]``.
Scorer = Callable[[np.ndarray], np.ndarray]


class CheckpointScorer:
    """A module on the CPU in fp32, as the torch engine computes it there.

    Its parts of the images are cut by `View`, as those of every evaluation, not by a graph.
    """

    def __init__(self, module: ViTModule) -> None:
        self.module = module
        self.size = module.config.data.image_size

    def pixels(self, images: np.ndarray, view: View = CENTER) -> Tensor:
        """Return a part of uint8 ``[n, S, S]`` as the module takes it, uint8 ``[n, 1, H, W]``."""
        return torch.from_numpy(view.of(images, self.size)).unsqueeze(1)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Return the logits of the middle."""
        with torch.no_grad():
            logits: np.ndarray = self.module(self.pixels(images)).numpy()
        return logits

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Return the mean of the probabilities of the views of `evaluation.views`."""
        views = VIEWS[self.module.config.evaluation.views]
        with torch.no_grad():
            each = [torch.sigmoid(self.module(self.pixels(images, view))) for view in views]
        mean: np.ndarray = torch.stack(each).mean(dim=0).numpy()
        return mean


def largest_difference(reference: Scorer, other: Scorer, images: Iterable[np.ndarray]) -> float:
    """Return the largest absolute difference over chunks of images.

    Raises ModelError if it is above `LIMIT`, or not finite.
    """
    largest = 0.0
    for chunk in images:
        difference = float(np.abs(reference(chunk) - other(chunk)).max())
        if not difference <= LIMIT:
            raise ModelError(
                f"the exported model differs from the checkpoint by {difference:.2g}, and {LIMIT:g}"
                " is allowed. Nothing was kept. Report it with the versions that"
                " environment.json of the run names."
            )
        largest = max(largest, difference)
    return largest
