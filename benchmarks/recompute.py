"""What `pipeline.recompute` holds for the backward pass, and its time: a ViT-S/16 on one CPU core.

python -m benchmarks.recompute
"""

from __future__ import annotations

import time
from typing import Dict, Set

import torch
from torch import Tensor

from cxr_vit.config import load_config
from cxr_vit.model.module import ViTModule
from cxr_vit.model.stages import StagedViT

WORDS = ("none", "attention_mlp", "every_layer", "stage_inputs")
REPEATS = 4


def held_bytes(model: StagedViT, images: Tensor, weights: Set[int]) -> int:
    """Return the bytes that a forward pass saves beside the weights."""
    held: Dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(images)
    found = sum(held.values())
    del logits
    return found


def seconds(model: StagedViT, images: Tensor) -> float:
    """Return the CPU time of a forward and a backward pass."""
    start = time.process_time()
    model(images).sum().backward()
    model.zero_grad()
    return time.process_time() - start


def main() -> None:
    """Print a line for each word."""
    torch.set_num_threads(1)
    module = ViTModule(load_config([], ["model.name=vit-small", "data.image_size=224"]))
    module.setup()
    model = module.model.train()
    images = torch.randint(0, 256, (8, 1, 224, 224), dtype=torch.uint8)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    times: Dict[str, float] = {}
    held: Dict[str, int] = {}
    for _ in range(REPEATS):
        for word in WORDS:
            model.recompute(model.plan.kept_outputs(word, on_ipus=False))
            held[word] = held_bytes(model, images, weights)
            times[word] = min(times.get(word, float("inf")), seconds(model, images))
    for word in WORDS:
        ratio = times[word] / times["none"]
        print(f"{word:14} {held[word] / 2**20:6.1f} MiB held, {ratio:.2f} of the time of none")


if __name__ == "__main__":
    main()
