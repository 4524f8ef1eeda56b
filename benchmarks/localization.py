"""How well maps find boxes: collect what `localize` wrote for several runs and methods.

    python -m benchmarks.localization NAME=DIR ... [--out FILE]

Each DIR has a localization.json; NAME is what the row is called. Prints a row each and writes a
JSON file.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, Dict, Sequence

from benchmarks.machine import describe_machine
from cxr_vit.checkpoint_files import run_of_checkpoint
from cxr_vit.cli import run
from cxr_vit.config import load_config
from cxr_vit.data.datamodule import read_listed, training_images
from cxr_vit.evaluation.localization import ALL, MACRO, MAPS, SCORES

#: How the two runs were trained, and their maps scored.
RUNS = [
    "python train.py --config configs/vit_demo.yaml run.dir=demo",
    "python train.py data.root=<folder> data.split=patient data.test_fraction=0.3"
    " data.val_fraction=0.15 data.image_size=112 model.name=<DINOv2 ViT-S> model.head_bias=prior"
    " model.drop_path=0.1 pipeline.layers_per_stage=[12] batch.micro_batch_size=32"
    " batch.gradient_accumulation=1 optim.lr=2e-4 optim.layer_decay=0.7 optim.weight_decay=0.05"
    " schedule.warmup_ratio=0.1 train.steps=200 engine.name=torch engine.device=cpu"
    " engine.precision=fp32 run.seed=1 run.dir=real",
    "python -m cxr_vit localize demo --method <method> --out demo_<method>",
    "python -m cxr_vit localize real --method <method> --out real_<method> data.split=all",
]


def row_of(folder: Path) -> Dict[str, Any]:
    """Return the figures of a folder that `localize` wrote: of all pairs, and some by finding."""
    found = json.loads((folder / "localization.json").read_text(encoding="utf-8"))
    versions = {
        **found["scores"],
        **{f"{MAPS} - {name}": scores for name, scores in found["differences"].items()},
    }
    sanity = found["sanity"]
    return {
        "method": found["method"],
        "step": found["step"],
        **_of_run(Path(found["checkpoint"]), found["step"], found["changed_since_training"]),
        "counts": found["counts"],
        "resamples": found["intervals"]["resamples"],
        "level_percent": 100 * found["intervals"]["level"],
        "scores": {
            score: {
                name: {group: _rounded(scores[score][group]) for group in (ALL, MACRO)}
                for name, scores in versions.items()
            }
            for score in SCORES
        },
        "pointing_game_by_finding": {
            group: [
                _rounded(found["scores"][name]["pointing_game"][group]) for name in found["scores"]
            ]
            for group in found["counts"]["findings"]
        },
        "sanity_images": sanity["images"],
        "sanity": {step["randomised"]: _rounded(step["correlation"]) for step in sanity["steps"]},
    }


def _rounded(value: Dict[str, Any]) -> str:
    """Return ``"value [low, high]"`` with three digits, or the value alone."""
    shown, *limits = (round(number, 3) for number in value.values() if number is not None)
    return f"{shown} {limits}" if limits else str(shown)


def _of_run(checkpoint: Path, step: int, changed: Sequence[str]) -> Dict[str, Any]:
    """Return the validation score, and how many boxed images the run was trained with."""
    folder = run_of_checkpoint(checkpoint)
    assert folder is not None, checkpoint
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [event for event in map(json.loads, lines) if "val/auroc_macro" in event]
    (score,) = [event["val/auroc_macro"] for event in events if event["step"] == step]
    model = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    sizes = {key: model[key] for key in ("image_size", "patch_size")}
    facts = {"val_auroc_macro": round(score, 3), **sizes}
    if "split_sha256" not in changed:
        return facts
    data = load_config([folder / "config.yaml"], []).data
    _, records = read_listed(data)
    images = records.table["image"].iloc[records.boxes["row"].unique()]
    return {**facts, "images_of_training": sum(map(training_images(data), images))}


def main(argv: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.localization")
    parser.add_argument("folders", nargs="+", metavar="NAME=DIR")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    rows = {}
    for text in arguments.folders:
        name, _, folder = text.partition("=")
        rows[name] = row_of(Path(folder))
        print(f"{name:24} {json.dumps(rows[name]['scores']['pointing_game'])}")
    if arguments.out is not None:
        facts = describe_machine("torch", "transformers", "numpy")
        command = "python -m benchmarks.localization <name>=<folder> ..."
        result = {"command": command, **facts, "runs": RUNS, "results": rows}
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(main)
