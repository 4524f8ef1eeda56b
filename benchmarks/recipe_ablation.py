"""Train the demo with one option of the recipes changed at a time, over several seeds.

    python -m benchmarks.recipe_ablation [--seeds 0 1 2] [--only NAME ...] [--jobs N]
        [--folder DIR] [--out FILE]

Each case is `train.py` and `evaluate.py` with configs/vit_demo.yaml and its overrides, and the same
number of updates. Prints a row per case and writes a JSON file. Finished runs in the folder are not
repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

from benchmarks.machine import describe_machine
from cxr_vit.cli import run

ROOT = Path(__file__).resolve().parents[1]

#: The demo before these options: 588 updates of 32 images.
BASE: Tuple[str, ...] = (
    *("optim.lr=1e-3", "batch.gradient_accumulation=2", "train.epochs=14"),
    *("model.pooling=class", "augment.horizontal_flip=0"),
    *("train.eval_every_epochs=1", "train.checkpoint_every_epochs=1"),
)
#: The same number of updates, with twice the images in each.
_TWICE = ("optim.lr=1.5e-3", "batch.gradient_accumulation=4", "train.epochs=28")
_BOTH, _FLIP = "model.pooling=both", "augment.horizontal_flip=0.5"
#: Name of a case -> what it changes.
CASES: Dict[str, Tuple[str, ...]] = {
    "before": (),
    "both, flip, 64 images": (_BOTH, _FLIP, *_TWICE),
    "flip, 64 images": (_FLIP, *_TWICE),
    "pooling: both": (_BOTH,),
    "horizontal flip": (_FLIP,),
    "64 images": _TWICE,
    "pooling: mean": ("model.pooling=mean",),
    "loss: asymmetric": ("loss.name=asymmetric",),
    "drop path 0.1": ("model.drop_path=0.1",),
    "layer decay 0.75": ("optim.layer_decay=0.75",),
    "crop 0.5": ("augment.crop=0.5", "augment.crop_ratio=1.33"),
    "RandAugment": ("augment.rand_augment=2",),
}


def train_and_score(name: str, seed: int, folder: Path) -> Dict[str, Any]:
    """Return the scores of one run on the test split, from its report."""
    run_folder = folder / f"{name.replace(' ', '_').replace(':', '').replace(',', '')}_{seed}"
    report = run_folder / "report" / "metrics.json"
    if not report.is_file():
        keys = [*BASE, *CASES[name], f"run.seed={seed}", f"run.dir={run_folder}"]
        _call("train.py", "--config", "configs/vit_demo.yaml", *keys)
        _call("evaluate.py", "--checkpoint", str(run_folder))
    scores: Dict[str, Any] = json.loads(report.read_text(encoding="utf-8"))
    return {"seed": seed, "step": scores["step"], "auroc_macro": scores["auroc_macro"]}


def _call(script: str, *arguments: str) -> None:
    command = [sys.executable, script, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run(
        command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=3600
    )


def row_of(name: str, runs: Sequence[Dict[str, Any]], base: Optional[float]) -> Dict[str, Any]:
    """Return mean and standard deviation (n - 1) over the seeds, and the change of the mean."""
    scores = [run["auroc_macro"] for run in runs]
    mean = statistics.mean(scores)
    return {
        "case": name,
        "overrides": list(CASES[name]),
        "mean": round(mean, 4),
        "sd": round(statistics.stdev(scores), 4) if len(scores) > 1 else None,
        "change": None if base is None else round(mean - base, 4),
        "runs": list(runs),
    }


def main(argv: Sequence[str]) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipe_ablation")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "recipe_ablation")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args(argv)
    rows: List[Dict[str, Any]] = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        pending = {
            name: [
                pool.submit(train_and_score, name, seed, arguments.folder)
                for seed in arguments.seeds
            ]
            for name in arguments.only
        }
        for name, runs in pending.items():
            base = rows[0]["mean"] if rows else None
            rows.append(row_of(name, [run.result() for run in runs], base))
            row = rows[-1]
            change = "" if row["change"] is None else f"{row['change']:+.4f}"
            print(f"{name:22} {row['mean']:.4f} +- {row['sd'] or 0:.4f}  {change}", flush=True)
    if arguments.out is not None:
        facts = describe_machine("torch", "transformers")
        sizes = {"images": 2000, "updates": 588, "images_per_update": [32, 64]}
        results = {**sizes, "seeds": arguments.seeds, "base": list(BASE), "rows": rows}
        result = {"command": "python -m benchmarks.recipe_ablation", **facts, "results": results}
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(main)
