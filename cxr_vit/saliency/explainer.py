"""Overlays of a model's maps over pictures."""

from __future__ import annotations

from typing import List, Sequence

import numpy as np
import torch
from PIL import Image

from cxr_vit.config import Config
from cxr_vit.data.views import CENTER
from cxr_vit.model.stages import StagedViT
from cxr_vit.saliency.maps import METHODS
from cxr_vit.saliency.overlay import overlay


class Explainer:
    """A model and a method.

    Parameters
    ----------
    model
        In evaluation mode, in fp32 on a torch device, and not compiled.
    config
        That of the run; the images are as its `data.read_size` and `data.image_size` say.
    method
        One of `METHODS`.
    """

    def __init__(self, model: StagedViT, config: Config, method: str) -> None:
        self._model, self._config, self._method = model, config, METHODS[method]

    def overlays(
        self, picture: Image.Image, pixels: np.ndarray, columns: Sequence[int]
    ) -> List[Image.Image]:
        """Return a picture with the map of each of some columns of the logits over it.

        `pixels` are the same image as the data set reads it, uint8 ``[S, S]``, of which the model
        sees the middle. Raises ModelError if the model does not suit the method.
        """
        data = self._config.data
        maps = self._method(self._model, self._seen(pixels), columns)[0].numpy()
        box = CENTER.box(data.read_size, data.image_size)
        return [overlay(picture, values, box) for values in maps]

    def highest(self, pixels: np.ndarray, columns: Sequence[int]) -> int:
        """Return which of some columns has the highest logit for an image."""
        if len(columns) == 1:
            return columns[0]
        with torch.no_grad():
            logits = self._model(self._seen(pixels))[0]
        return max(columns, key=lambda column: float(logits[column]))

    def _seen(self, pixels: np.ndarray) -> torch.Tensor:
        seen = CENTER.of(pixels[None], self._config.data.image_size)
        # A copy: torch warns of pixels that are read-only.
        return torch.from_numpy(np.array(seen))[None].to(next(self._model.parameters()).device)
