"""Overlays of a checkpoint's maps, computed by torch whatever engine predicts."""

from __future__ import annotations

from pathlib import Path
from typing import List, Optional, Sequence

import numpy as np
import torch
from PIL import Image

from cxr_vit.config import Config
from cxr_vit.data.views import CENTER
from cxr_vit.model.module import ViTModule
from cxr_vit.model.stages import StagedViT
from cxr_vit.saliency.maps import METHODS
from cxr_vit.saliency.overlay import overlay


class Explainer:
    """The model of a checkpoint in fp32 on a torch device, in this process, and a method.

    The model is loaded at the first use, and apart from that which predicts: an engine may hold
    only a part of it, compiled, or in another precision.

    Parameters
    ----------
    config
        That of the run; the images are as its `data.read_size` and `data.image_size` say.
    method
        One of `METHODS`.
    """

    def __init__(self, checkpoint: Path, config: Config, method: str, device: torch.device) -> None:
        self._checkpoint, self._config, self._device = checkpoint, config, device
        self._method = METHODS[method]
        self._loaded: Optional[StagedViT] = None

    def overlays(
        self, picture: Image.Image, pixels: np.ndarray, columns: Sequence[int]
    ) -> List[Image.Image]:
        """Return a picture with the map of each of some columns of the logits over it.

        `pixels` are the same image as the data set reads it, uint8 ``[S, S]``, of which the model
        sees the middle. Raises ModelError or CheckpointError as loading the checkpoint does, or if
        the model does not suit the method.
        """
        data = self._config.data
        maps = self._method(self._model(), self._seen(pixels), columns)[0].numpy()
        box = CENTER.box(data.read_size, data.image_size)
        return [overlay(picture, values, box) for values in maps]

    def highest(self, pixels: np.ndarray, columns: Sequence[int]) -> int:
        """Return which of some columns has the highest logit for an image."""
        if len(columns) == 1:
            return columns[0]
        with torch.no_grad():
            logits = self._model()(self._seen(pixels))[0]
        return max(columns, key=lambda column: float(logits[column]))

    def _seen(self, pixels: np.ndarray) -> torch.Tensor:
        seen = CENTER.of(pixels[None], self._config.data.image_size)
        return torch.from_numpy(seen)[None].to(self._device)

    def _model(self) -> StagedViT:
        if self._loaded is None:
            module = ViTModule.load_from_checkpoint(self._checkpoint, config=self._config)
            module.setup()
            self._loaded = module.model.to_device(self._device).eval()
        return self._loaded
