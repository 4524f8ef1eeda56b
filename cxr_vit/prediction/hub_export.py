"""A checkpoint as a folder that plain transformers loads and computes as this package does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Dict, List

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from cxr_vit.config.architectures import KINDS
from cxr_vit.errors import ModelError
from cxr_vit.model.key_names import hub_name
from cxr_vit.model.module import ViTModule
from cxr_vit.model.vit import FAMILIES
from cxr_vit.prediction.parity import CheckpointScorer


def refuse_other_models(module: ViTModule) -> None:
    """Raise ModelError for a model that transformers' own class computes differently."""
    own = module.model.pool.pooling
    theirs = KINDS[module.model.config.model_type].pooling
    if own != theirs:
        raise ModelError(
            f"the head takes model.pooling={own}, and transformers computes this kind of model with"
            f" {theirs}. Export it with --to onnx."
        )


def save_weights(module: ViTModule, path: Path) -> None:
    """Write the weights under their names on the hub, fp32."""
    save_file(module.model.weights(), str(path), metadata={"format": "pt"})


class PlainScorer:
    """Transformers' own class with the files of an exported folder.

    Its pixels are those of `CheckpointScorer`, before they are normalised: transformers' own resize
    may round a gray level differently.
    """

    def __init__(self, files: Dict[str, str], weights: Path, scorer: CheckpointScorer) -> None:
        config = json.loads(files["config.json"])
        self._processor = json.loads(files["preprocessor_config.json"])
        self._scorer = scorer
        family = FAMILIES[config["model_type"]]
        self._model = family.model(family.config.from_dict(config)).eval()
        stored, own = load_file(str(weights)), self._model.state_dict()
        names = {name: hub_name(name) for name in own}
        # transformers 4.x gives DINOv2 a mask token, for pretraining.
        kept = {name: stored[names[name]] for name in own if names[name] in stored}
        self._model.load_state_dict(kept, strict=False)

    def logits(self, images: np.ndarray) -> np.ndarray:
        """Return float32 ``[n, C]`` for uint8 ``[n, S, S]``."""
        mean, std = (
            torch.tensor(self._processor[key])[:, None, None] for key in ("image_mean", "image_std")
        )
        gray = self._scorer.pixels(images).float() * self._processor["rescale_factor"]
        with torch.no_grad():
            outputs = self._model(pixel_values=(gray - mean) / std)
        logits: np.ndarray = outputs.logits.numpy()
        return logits


def short_card(title: str, labels: List[str], notice: str) -> str:
    """Return the README.md of a model without a report, with the metadata that the hub reads."""
    rows = "\n".join(f"- `{label}`" for label in labels)
    return (
        "---\nlibrary_name: transformers\npipeline_tag: image-classification\n"
        "tags: [chest-x-ray, medical, research-only]\n---\n\n"
        f"# {title}\n\n**{notice}**\n\nIt has no report of its scores. `evaluate.py` writes one,"
        " and an export after it has its model card.\n\n"
        f"Labels; the sigmoid of a logit is the probability of its label:\n\n{rows}\n"
    )
