"""Draw docs/saliency.png: findings of the synthetic sample with their boxes, and both maps.

python -m docs.draw_saliency RUN [section.key=value ...], with a run of configs/vit_demo.yaml.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import List

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from cxr_vit import ChestXrayDataModule, ViTModule
from cxr_vit.checkpoint_files import checkpoint_of
from cxr_vit.commands.map_model import explainer_of, map_model
from cxr_vit.config import load_config
from cxr_vit.data.nih import IMAGE_PIXELS
from cxr_vit.data.records import BOX_SIDES

PICTURE = Path(__file__).with_name("saliency.png")
#: Test images with a box of the finding.
SHOWN = {
    "Pneumothorax": "00000054_000.png",
    "Mass": "00000052_008.png",
    "Effusion": "00000017_001.png",
    "Atelectasis": "00000052_007.png",
}
METHODS = {"relevance": "relevance", "grad_cam": "Grad-CAM"}


def draw(run: Path, overrides: List[str]) -> Figure:
    """Return the figure: a row for each finding, with its probability."""
    config, checkpoint = load_config([run / "config.yaml"], overrides), checkpoint_of(run)
    data = ChestXrayDataModule(config)
    dataset, module = (
        data.dataset("test"),
        ViTModule.load_from_checkpoint(checkpoint, config=config),
    )
    model, boxes = map_model(module), dataset.records.boxes
    figure = Figure(figsize=(6.8, 9.4), dpi=100, layout="constrained")
    axes = figure.subplots(len(SHOWN), 3)
    for row, (finding, image) in zip(axes, SHOWN.items()):
        number, column = dataset.image_names.index(image), module.names.index(finding)
        pixels, seen = dataset.read_images([number])[0], dataset.__getitems__([number]).images
        with torch.no_grad():
            probability = float(
                model(seen.to(next(model.parameters()).device))[0, column].sigmoid()
            )
        picture = Image.fromarray(pixels)
        titled = {f"{finding}: {probability:.2f}": picture}
        for method, title in METHODS.items():
            explainer = explainer_of(checkpoint, config, method)()
            titled[title] = explainer.overlays(picture, pixels, [column])[0]
        is_box = (boxes["row"] == number) & (boxes["finding"] == finding)
        for axis, (title, shown) in zip(row, titled.items()):
            axis.set_axis_off()
            axis.set_title(title, fontsize=10)
            axis.imshow(np.asarray(shown.convert("RGB")), extent=(0, 1, 1, 0))
            for x, y, width, height in boxes.loc[is_box, BOX_SIDES].to_numpy() / IMAGE_PIXELS:
                box = Rectangle((x, y), width, height, fill=False, edgecolor="#56b4e9", lw=1.5)
                axis.add_patch(box)
    return figure


if __name__ == "__main__":
    draw(Path(sys.argv[1]), sys.argv[2:]).savefig(PICTURE)
