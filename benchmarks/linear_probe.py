"""Compare the linear probe with scikit-learn's logistic regression, on features of real images.

    pip install scikit-learn
    python -m benchmarks.linear_probe --config FILE [section.key=value ...] [--out FILE]

The configuration names the data and the weights. The features are those that `python -m cxr_vit
probe` keeps beside the cache of the images, and are computed if they are not there. Both fit the
same standardised features; the same is done with 16 x 16 pixels of each image instead of the
features. Prints a table and writes a JSON file.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from benchmarks.machine import describe_machine
from cxr_vit import ChestXrayDataModule, load_config
from cxr_vit.cli import files_and_overrides, run
from cxr_vit.evaluation.metrics import evaluate
from cxr_vit.evaluation.probe import Fit, fit_heads
from cxr_vit.training.features import FeatureReader

SPLITS = ("train", "val", "test")
#: Weight decays at which scikit-learn fits, too.
COMPARED = (1e-3, 1e-2, 1e-1, 1.0)
#: Side of the images of the baseline, pixels.
SIDE = 16


class Part(NamedTuple):
    """A split: features ``[N, F]`` and labels ``[N, C]``."""

    values: Tensor
    labels: Tensor


def main(argv: Sequence[str]) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", nargs="+", required=True)
    parser.add_argument("--out", type=Path, default=Path("linear_probe.json"))
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args(argv)
    config = load_config(*files_and_overrides(arguments))
    data = ChestXrayDataModule(config)
    results: Dict[str, Any] = {
        "config": {key: config.flat()[key] for key in ("model.name", "data.image_size")},
        "images": {
            "all": len(data.records),
            **{split: len(data.dataset(split)) for split in SPLITS},
        },
    }
    reader = FeatureReader(config, data)
    kept = {split: reader.read(split) for split in SPLITS}
    parts = {split: Part(features.values, features.labels) for split, features in kept.items()}
    results["features"] = compare(parts, data.names, config.probe)
    parts = {split: Part(pixels(data, split), parts[split].labels) for split in SPLITS}
    results["pixels"] = {"side": SIDE, **compare(parts, data.names, config.probe)}
    about = {
        "command": "python -m benchmarks.linear_probe",
        **describe_machine("torch", "scikit-learn", "numpy"),
        "results": results,
    }
    arguments.out.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    return 0


def pixels(data: ChestXrayDataModule, split: str) -> Tensor:
    """Return the images of a split at 16 x 16 pixels, ``[N, 256]``."""
    dataset = data.dataset(split)
    blocks = []
    for start in range(0, len(dataset), 1024):
        images = torch.from_numpy(
            dataset.read_images(range(start, min(start + 1024, len(dataset))))
        ).float()
        blocks.append(adaptive_avg_pool2d(images.unsqueeze(1), SIDE).flatten(1))
    return torch.cat(blocks)


def compare(parts: Dict[str, Part], names: List[str], probe: Any) -> Dict[str, Any]:
    """Fit both on the same features; return the AUROCs of both and their largest differences."""
    train = parts["train"]
    start = time.perf_counter()
    decays = sorted({*probe.weight_decays, *COMPARED})
    fits = fit_heads(train.values, train.labels, weight_decays=decays, steps=probe.steps)
    seconds = time.perf_counter() - start
    rows = [row(fit, parts, names) for fit in fits]
    best = max(rows, key=lambda own: own["val"])
    print(f"{train.values.shape[1]} features: {len(fits)} heads in {seconds:.1f} s")
    for fit, own in zip(fits, rows):
        if fit.weight_decay in COMPARED:
            own.update(scikit_learn(fit, parts, names))
        print(json.dumps(own), flush=True)
    return {
        "seconds": round(seconds, 1),
        "num_features": train.values.shape[1],
        "weight_decay": best["weight_decay"],
        "val": best["val"],
        "test": best["test"],
        "heads": rows,
    }


def row(fit: Fit, parts: Dict[str, Part], names: List[str]) -> Dict[str, Any]:
    """Return the macro AUROCs of a head."""
    scores = {
        split: evaluate(fit.head.logits(parts[split].values), parts[split].labels, names)
        for split in ("val", "test")
    }
    macro = {split: round(score["auroc_macro"], 4) for split, score in scores.items()}
    return {"weight_decay": fit.weight_decay, "steps": fit.steps, **macro}


def scikit_learn(fit: Fit, parts: Dict[str, Part], names: List[str]) -> Dict[str, Any]:
    """Return what scikit-learn has at this weight decay, and how far the head is from it."""
    from sklearn.linear_model import LogisticRegression

    train = parts["train"]
    mean, std = train.values.double().mean(0), train.values.double().std(0, unbiased=False)
    logits: Dict[str, List[Tensor]] = {"val": [], "test": []}
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it has converged, or the comparison ends
        for labels in train.labels.unbind(1):
            model = LogisticRegression(
                C=1 / (len(train.values) * fit.weight_decay), tol=1e-6, max_iter=20_000
            )
            model.fit(((train.values.double() - mean) / std).numpy(), labels.numpy())
            for split, columns in logits.items():
                values = (parts[split].values.double() - mean) / std
                columns.append(torch.from_numpy(model.decision_function(values.numpy())))
    seconds = time.perf_counter() - start
    differences: List[Tuple[float, float]] = []
    macro = {}
    for split, columns in logits.items():
        labels = parts[split].labels
        theirs = evaluate(torch.stack(columns, dim=1).float(), labels, names)
        ours = evaluate(fit.head.logits(parts[split].values), labels, names)
        each = [
            abs(ours["auroc"][name] - value)
            for name, value in theirs["auroc"].items()
            if value is not None
        ]
        differences.append((abs(ours["auroc_macro"] - theirs["auroc_macro"]), max(each)))
        macro[split] = round(theirs["auroc_macro"], 4)
    return {
        "scikit_learn": {**macro, "seconds": round(seconds, 1)},
        "largest_difference": {
            "macro": _rounded_up(max(pair[0] for pair in differences)),
            "label": _rounded_up(max(pair[1] for pair in differences)),
        },
    }


def _rounded_up(value: float) -> float:
    return math.ceil(value * 1e6) / 1e6


if __name__ == "__main__":
    run(main)
