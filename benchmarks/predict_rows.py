"""Measure memory and speed of `predict` for 1,000, 10,000 and 100,000 files.

    OMP_NUM_THREADS=1 python -m benchmarks.predict_rows [--root DIR] [--out FILE]

A thousand synthetic images of 64 pixels are hard-linked under other names, so that each file is
read and decoded. The model is vit-micro after one step of training. The exit status is 1 if an
output has another number of rows, or if 100,000 files take more than 1.5 times the memory of 1,000.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, Sequence

from benchmarks.machine import describe_machine
from benchmarks.nih_size import Runs
from cxr_vit.data.synthetic.dataset import write_sample

COMMAND = "OMP_NUM_THREADS=1 python -m benchmarks.predict_rows"
FILES = (1_000, 10_000, 100_000)
SIDE = 64
MOST_GROWTH = 1.5


def link(sample: Path, folder: Path, count: int) -> None:
    """Link the images of the sample under `count` names."""
    images = sorted((sample / "images").iterdir())
    folder.mkdir()
    for number in range(count):
        os.link(images[number % len(images)], folder / f"{number:06d}.png")


def measure(runs: Runs, root: Path, count: int) -> Dict[str, Any]:
    """Predict `count` files; return seconds, rows and memory of all processes."""
    folder, out = root / f"files_{count}", root / f"rows_{count}.csv"
    link(root / "sample", folder, count)
    words = ("-m", "cxr_vit", "predict", str(root / "run"), str(folder), "--out", str(out))
    _, figures = runs.run(f"predict_{count}", *words)
    with out.open(encoding="utf-8") as file:
        rows = sum(1 for _ in file) - 1
    largest, children = figures["largest_child_peak_memory_mb"], figures["child_processes"]
    return {
        "files": count,
        "rows": rows,
        "seconds": round(figures["seconds"], 1),
        "images_per_s": round(count / figures["seconds"]),
        "main_peak_memory_mb": round(figures["peak_memory_mb"]),
        "child_processes": children,
        "largest_child_peak_memory_mb": round(largest),
    }


def main(argv: Sequence[str]) -> int:
    """Measure, print a table, write the JSON file; return 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, metavar="DIR", help="default: a temporary folder")
    parser.add_argument("--out", type=Path, default=Path("predict_rows.json"), metavar="FILE")
    arguments = parser.parse_args(argv)
    root = Path(tempfile.mkdtemp(prefix="predict_rows_", dir=arguments.root))
    try:
        write_sample(root / "sample", num_images=1000, image_size=SIDE, seed=0)
        runs = Runs(root / "logs")
        runs.run(
            *("train", "train.py", "--config", "vit_demo", f"data.root={root / 'sample'}"),
            *(f"run.dir={root / 'run'}", "model.name=vit-micro", "train.steps=1"),
            *(f"data.image_size={SIDE}", "model.patch_size=16", "schedule.warmup_steps=0"),
        )
        steps = [measure(runs, root, count) for count in FILES]
    finally:
        shutil.rmtree(root)
    for step in steps:
        print(
            f"{step['files']:>8,} files {step['seconds']:7.1f} s {step['images_per_s']:6.0f} /s"
            f" {step['main_peak_memory_mb']:6.0f} MB, {step['child_processes']} other processes of"
            f" {step['largest_child_peak_memory_mb']:.0f} MB"
        )
    facts = describe_machine("torch", "numpy", "pillow")
    result = {"command": COMMAND, **facts, "image_side": SIDE, "results": steps}
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    growth = steps[-1]["main_peak_memory_mb"] / steps[0]["main_peak_memory_mb"]
    is_right = growth <= MOST_GROWTH and all(step["rows"] == step["files"] for step in steps)
    print("each file has its row, in bounded memory" if is_right else f"wrong: {growth:.1f}, rows")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
