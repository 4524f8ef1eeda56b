"""Train the demo with one option of the recipes changed at a time, over several seeds.

    python -m benchmarks.recipe_ablation [--seeds 0 1 2] [--only NAME ...] [--jobs N]
        [--folder DIR] [--out FILE]

Each case is `train.py` and `evaluate.py` with configs/vit_demo.yaml and its overrides: the
same images, steps and micro-batches for all. Prints a row per case and writes a JSON file. Finished
runs in the folder are not repeated.
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

#: The demo before these options: the base that every case changes.
BASE: Tuple[str, ...] = (
    *("optim.lr=1e-3", "optim.weight_decay=0.05", "schedule.warmup_ratio=0.1"),
    *("model.pooling=class", "augment.crop=1", "augment.shift=0", "augment.scale=0"),
)
#: Name of a case -> what it changes.
CASES: Dict[str, Tuple[str, ...]] = {
    "the demo before": (),
    "pooling: mean": ("model.pooling=mean",),
    "pooling: both": ("model.pooling=both",),
    "drop path 0.1": ("model.drop_path=0.1",),
    "layer decay 0.75": ("optim.layer_decay=0.75",),
    "head rate x 10": ("optim.head_lr_scale=10",),
    "min_lr 1e-4": ("schedule.min_lr=1e-4",),
    "loss: weighted BCE": ("loss.name=weighted_bce",),
    "loss: focal": ("loss.name=focal",),
    "loss: asymmetric": ("loss.name=asymmetric",),
    "crop 0.5": ("augment.crop=0.5", "augment.crop_ratio=1.33"),
    "crop 0.08, bicubic": (
        *("augment.crop=0.08", "augment.crop_ratio=1.33", "augment.interpolation=bicubic"),
    ),
    "RandAugment 2 x 6": ("augment.rand_augment=2",),
    "shift, scale 0.1": ("augment.shift=0.1", "augment.scale=0.1"),
    "horizontal flip": ("augment.horizontal_flip=0.5",),
    "mean, shift, scale": ("model.pooling=mean", "augment.shift=0.1", "augment.scale=0.1"),
    "mean, crop 0.5": ("model.pooling=mean", "augment.crop=0.5", "augment.crop_ratio=1.33"),
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
            print(f"{name:24} {row['mean']:.4f} +- {row['sd'] or 0:.4f}  {change}", flush=True)
    if arguments.out is not None:
        result = {**describe_machine("torch", "transformers"), "base": list(BASE), "rows": rows}
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run(main)
