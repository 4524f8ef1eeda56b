"""The configurations that the planner's tests plan, and what published systems kept in bytes."""

from __future__ import annotations

from pathlib import Path
from typing import List

from cxr_vit.config import Config, load_config
from cxr_vit.planner.costs import ModelShape, StageCost, stage_cost

ROOT = Path(__file__).resolve().parents[2]
POD4 = ROOT / "configs" / "vit_pod4.yaml"
#: Three fp16 channels of 224 x 224, as Graphcore's own ViT sends them.
FP16_RGB = 3 * 224 * 224 * 2


def pod4(*overrides: str) -> Config:
    """Return configs/vit_pod4.yaml with overrides."""
    return load_config([POD4], overrides)


def base_shape(image_bytes: int = FP16_RGB) -> ModelShape:
    """Return ViT-B/16 at 224 pixels with 14 labels."""
    return ModelShape.from_config(pod4())._replace(image_bytes=image_bytes)


def quarters(*, keeps_all: bool) -> List[StageCost]:
    """Return the four stages of three layers; each keeps every layer's output, or none."""
    return [
        stage_cost(
            base_shape(),
            num_layers=3,
            is_first=stage == 0,
            is_last=stage == 3,
            kept=(0, 1, 2) if keeps_all else (),
        )
        for stage in range(4)
    ]
