"""Compute the effects of GELU's tanh form and of fp16 gradients that docs/ipu.md quotes.

    python -m benchmarks.ipu_numerics --checkpoint runs/<name>/checkpoints/best [--out FILE]

GELU: the scores of the checkpoint's test images with the exact and the tanh form. Gradients: those
of the hidden states of ViT-B/16 at the start of fine-tuning, computed in fp32, and the fraction
that fp16 rounds to zero at each loss scaling. Prints a table and writes a JSON file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Dict, List

import torch

from benchmarks.machine import describe_machine
from cxr_vit.checkpoint_files import config_of
from cxr_vit.cli import run
from cxr_vit.config import BatchPlan, Config, load_config, read_config
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.engines.choice import build_engine, choose_engine
from cxr_vit.engines.processes import Launch
from cxr_vit.evaluation.metrics import flat_scores
from cxr_vit.model.loss import multi_label_loss
from cxr_vit.model.module import ViTModule

#: Half of fp16's smallest positive number; smaller magnitudes round to zero.
LOST_BELOW = 2.0**-25
SCALINGS = (1, 16, 128, 1024, 16384)


def gelu_difference(checkpoint: Path) -> Dict[str, float]:
    """Score the test split with both forms and compare."""
    config = read_config([config_of(checkpoint)], ["engine.name=torch", "engine.precision=fp32"])
    data = ChestXrayDataModule(config)
    dataset = data.dataset(data.default_split())
    launch, batch = Launch(), BatchPlan.from_section(config.batch)
    logits, scores = {}, {}
    for form in ("gelu", "gelu_pytorch_tanh"):
        model = config.model.model_copy(update={"hidden_act": form})
        changed: Config = config.model_copy(update={"model": model})
        module = ViTModule(changed, checkpoint=checkpoint)
        module.setup()
        choice = choose_engine(changed, launch)
        with build_engine(changed, module, choice, batch, launch) as engine:
            logits[form], labels = engine.predict_dataset(dataset)
        scores[form] = flat_scores(logits[form], labels, data.names)["auroc_macro"]
    exact, tanh = logits.values()
    return {
        "images": float(len(exact)),
        "largest_logit": float(exact.abs().max()),
        "largest_logit_difference": float((exact - tanh).abs().max()),
        "largest_probability_difference": float((exact.sigmoid() - tanh.sigmoid()).abs().max()),
        "auroc_macro_exact": float(scores["gelu"] or 0.0),
        "auroc_macro_tanh": float(scores["gelu_pytorch_tanh"] or 0.0),
    }


def gradients_lost(num_images: int) -> Dict[str, Dict[str, float]]:
    """Return loss scaling -> fraction of the hidden states' gradients that fp16 rounds to zero."""
    config = load_config([], ["model.name=vit-base"])
    module = ViTModule(config)
    module.setup()
    model = module.model
    hidden: List[torch.Tensor] = []

    def keep(module: Any, inputs: Any, output: Any) -> None:
        state = output[0] if isinstance(output, tuple) else output
        state.retain_grad()
        hidden.append(state)

    for layer in model.layers:
        layer.register_forward_hook(keep)
    generator = torch.Generator().manual_seed(0)
    shape = (1, 1, config.data.image_size, config.data.image_size)
    for image in range(num_images):  # micro-batches of one, as in vit_pod4.yaml
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        labels = torch.zeros(1, 14)
        labels[0, image % 14] = 1
        multi_label_loss(model(images), labels).backward()
    gradients = torch.cat([state.grad[state.grad != 0].abs() for state in hidden])
    return {
        str(scaling): {
            "lost": float((gradients * scaling < LOST_BELOW).float().mean()),
            "largest": float(gradients.max() * scaling),
        }
        for scaling in SCALINGS
    }


def main(argv: List[str]) -> int:
    """Measure, print a table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR")
    parser.add_argument("--images", type=int, default=4, metavar="N")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON")
    arguments = parser.parse_args(argv)
    result: Dict[str, Any] = {
        **describe_machine("torch", "transformers"),
        "gelu": gelu_difference(arguments.checkpoint),
        "fp16_gradients": gradients_lost(arguments.images),
    }
    for name, value in result["gelu"].items():
        print(f"{name:32} {value:.6g}")
    for scaling, values in result["fp16_gradients"].items():
        print(
            f"loss scaling {scaling:>6}: {100 * values['lost']:6.2f} % of the hidden states'"
            f" gradients lost, largest {values['largest']:.3g}"
        )
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(main)
