"""Configurations that the planner's tests plan, and the shapes of published systems."""

from __future__ import annotations

from pathlib import Path
from typing import List

from cxr_vit.config import Config, read_config
from cxr_vit.planner.costs import ModelShape, StageCost, stage_cost
from cxr_vit.planner.hardware import make_target
from cxr_vit.planner.speed import published_model

ROOT = Path(__file__).resolve().parents[2]
POD4 = ROOT / "configs" / "vit_pod4.yaml"
GPU4 = ROOT / "configs" / "vit_gpu4.yaml"
DEMO = ROOT / "configs" / "vit_demo.yaml"
#: Three fp16 channels of 224 x 224, as in Graphcore's own ViT.
FP16_RGB = 3 * 224 * 224 * 2

MK2 = make_target("poptorch", "IPU", "fp16", "mk2")
BOW = make_target("poptorch", "IPU", "fp16", "bow")
GPU = make_target("pipeline", "GPU", "bf16")
MK2_MODEL, BOW_MODEL = (published_model(target.ipu, "fp16") for target in (MK2, BOW))


def pod4(*overrides: str) -> Config:
    """Return configs/vit_pod4.yaml with overrides."""
    return read_config([POD4], overrides)


def gpu4(*overrides: str) -> Config:
    """Return configs/vit_gpu4.yaml with overrides."""
    return read_config([GPU4], overrides)


def base_shape(image_bytes: int = FP16_RGB) -> ModelShape:
    """Return ViT-B/16 at 224 pixels with 14 labels."""
    return ModelShape.from_config(pod4())._replace(image_bytes=image_bytes)


def quarters(*, keeps_all: bool) -> List[StageCost]:
    """Return four stages of three layers; each keeps every layer's output, or none."""
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
