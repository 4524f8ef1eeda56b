"""Measure seconds and memory of prepare, start, train and evaluate at the size of ChestX-ray14.

    python -m benchmarks.nih_size [--root DIR] [--fresh] [--out FILE]

The 112,120 rows and list files are the real ones; the 21 real images are linked under all names.
The real commands run one after another. Results of earlier calls are kept and an interrupted
`prepare` resumes, unless --fresh is given. The exit status is 1 if a count, the memory or the
startup time is wrong.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Tuple

from benchmarks.linked_images import NIH, link_images, original_images
from benchmarks.machine import describe_machine

REPOSITORY = Path(__file__).resolve().parents[1]
CSV = "Data_Entry_2017_v2020.csv"
LISTS = ("train_val_list.txt", "test_list.txt", "community_val_list.txt")
#: Images in each of NIH's twelve archives.
ARCHIVES = (4999, *[10000] * 10, 7121)
SIZES = {"train": 75312, "val": 11212, "test": 25596}
MOST_MEMORY_MB, LONGEST_START_S = 2000.0, 5.0
#: Seconds between looks at the processes; the system records the peak in between.
POLL_S = 0.1
STARTS = 3
#: Run in a new Python process: what a command does before it reads the first image.
START_UP = """
import json, sys, time
begin = time.perf_counter()
from cxr_vit.config import load_config
from cxr_vit.data.datamodule import ChestXrayDataModule
imported, cpu = time.perf_counter(), time.process_time()
data = ChestXrayDataModule(load_config([], sys.argv[1:]))
data.setup()
done, cpu = time.perf_counter(), time.process_time() - cpu
sizes = {name: len(getattr(data.splits, name)) for name in ("train", "val", "test")}
seconds = {"imports_s": imported - begin, "data_s": done - imported, "data_cpu_s": cpu}
print(json.dumps({**seconds, "sizes": sizes}))
"""


class Runs:
    """Runs commands; records their output in `logs`, and the peak memory of their processes."""

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        logs.mkdir(exist_ok=True)

    def run(self, name: str, *arguments: str) -> Tuple[str, Dict[str, Any]]:
        """Run Python with these arguments; return its output, seconds and peak memory.

        Raises
        ------
        SystemExit
            If it fails.
        """
        log = self.logs / f"{name}.log"
        peaks: Dict[int, float] = {}
        start = time.monotonic()
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=str(REPOSITORY),
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            while process.poll() is None:
                for pid in family(process.pid):
                    peaks[pid] = max(peak_memory_mb(pid), peaks.get(pid, 0.0))
                time.sleep(POLL_S)
        seconds = time.monotonic() - start
        output = log.read_text(encoding="utf-8")
        if process.returncode != 0:
            raise SystemExit(f"{name} failed with {process.returncode}:\n{output[-4000:]}")
        children = [peak for pid, peak in peaks.items() if pid != process.pid]
        figures = {
            "seconds": seconds,
            "peak_memory_mb": peaks.get(process.pid, 0.0),
            "child_processes": len(children),
            "largest_child_peak_memory_mb": max(children, default=0.0),
        }
        return output, figures


def family(pid: int) -> List[int]:
    """Return a process and its running descendants."""
    children: Dict[int, List[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                stat = (folder / "stat").read_text(encoding="utf-8", errors="replace")
            except OSError:  # it has ended
                continue
            parent = int(stat.rpartition(")")[2].split()[1])  # the name may hold anything
            children.setdefault(parent, []).append(int(folder.name))
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return found


def peak_memory_mb(pid: int) -> float:
    """Return the peak resident memory of a process in MB; 0 if it has ended."""
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0.0
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found.group(1)) * 1024 / 1e6 if found else 0.0


def make_set(root: Path, originals: Sequence[Path]) -> None:
    """Unpack the CSV and the lists; link the images under all names into twelve folders."""
    root.mkdir(parents=True, exist_ok=True)
    for name in (CSV, *LISTS):
        with gzip.open(NIH / f"{name}.gz", "rb") as packed, (root / name).open("wb") as plain:
            shutil.copyfileobj(packed, plain)
    lines = (root / CSV).read_text(encoding="utf-8").splitlines()[1:]
    names = sorted(line.partition(",")[0].strip('"') for line in lines)
    assert len(names) == sum(ARCHIVES), f"the CSV has {len(names)} rows, not {sum(ARCHIVES)}"
    paths: List[Path] = []
    for number, size in enumerate(ARCHIVES, start=1):
        folder = root / f"images_{number:03d}" / "images"
        folder.mkdir(parents=True, exist_ok=True)
        paths += [folder / name for name in names[len(paths) : len(paths) + size]]
    link_images(originals, paths)


def data_overrides(root: Path) -> List[str]:
    """Return the overrides of the `data` section for every command."""
    return [
        f"data.root={root}",
        "data.split=official",
        f"data.val_list={root / 'community_val_list.txt'}",
    ]


def prepare(runs: Runs, root: Path) -> Dict[str, Any]:
    """Build the cache, or resume its build."""
    output, figures = runs.run("prepare", "-m", "cxr_vit", "prepare", *data_overrides(root))
    reused = re.search(r"resuming an interrupted cache: (\d+) of", output)
    cached = re.search(r"cached (\d+) images .* (\d+) s\)", output)
    decoded = int(cached.group(1)) - int(reused.group(1) if reused else 0) if cached else 0
    store = next((root / "cxr_vit_cache").glob("films_*.u8"))
    return {
        **figures,
        "images_decoded": decoded,
        "images_per_s": decoded / figures["seconds"],
        "store_gb": store.stat().st_size / 1e9,
    }


def start_up(runs: Runs, root: Path) -> Dict[str, Any]:
    """Make the data module in new processes; return the medians."""
    starts: List[Dict[str, Any]] = []
    for _ in range(STARTS):
        output, figures = runs.run("start_up", "-c", START_UP, *data_overrides(root))
        starts.append({**figures, **json.loads(output.splitlines()[-1])})
    medians = {
        key: statistics.median(values[key] for values in starts)
        for key in ("seconds", "imports_s", "data_s", "data_cpu_s", "peak_memory_mb")
    }
    return {**medians, "sizes": starts[0]["sizes"], "child_processes": 0}


def train(runs: Runs, root: Path, *, workers: int) -> Dict[str, Any]:
    """Train 50 steps of 128 images with a small model, and validate once."""
    folder = run_folder(root, workers)
    shutil.rmtree(folder, ignore_errors=True)
    _, figures = runs.run(
        f"train_{workers}",
        *("train.py", "--config", "configs/vit_pod4.yaml", *data_overrides(root)),
        *(f"run.dir={folder}", f"data.num_workers={workers}", "data.cache=require"),
        *("model.name=vit-micro", "model.patch_size=32", "pipeline.layers_per_stage=[1,1,1,1]"),
        *("engine.name=torch", "batch.micro_batch_size=32", "batch.gradient_accumulation=4"),
        *("batch.eval_micro_batch_size=128", "batch.eval_device_iterations=1"),
        *("train.steps=50", "train.eval_every_steps=50", "train.log_every_steps=10"),
    )
    events = [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    last: Dict[str, Any] = {}
    for event in events:
        last.update(event)
    kept = ("step", "perf/samples_per_s", "perf/data_wait_pct", "val/loss", "val/auroc_macro")
    return {**figures, **{key: last[key] for key in kept if key in last}}


def run_folder(root: Path, workers: int) -> Path:
    """Return the run folder of a training."""
    return root / "runs" / f"train_{workers}_workers"


def evaluate(runs: Runs, root: Path, *, workers: int) -> Dict[str, Any]:
    """Score the test images of the first training."""
    folder = run_folder(root, 0)
    out = folder / "report"
    shutil.rmtree(out, ignore_errors=True)
    checkpoint = folder / "checkpoints" / "last"
    _, figures = runs.run(
        f"evaluate_{workers}",
        *("evaluate.py", "--checkpoint", str(checkpoint), "--split", "test", "--out", str(out)),
        f"data.num_workers={workers}",
    )
    with (out / "predictions.csv").open(encoding="utf-8") as file:
        rows = sum(1 for _ in file) - 1
    return {**figures, "rows": rows, "images_per_s": rows / figures["seconds"]}


def failures(steps: Dict[str, Dict[str, Any]]) -> List[str]:
    """List what is wrong."""
    found = []
    for name, figures in steps.items():
        largest = max(figures["peak_memory_mb"], figures.get("largest_child_peak_memory_mb", 0.0))
        if largest >= MOST_MEMORY_MB:
            found.append(
                f"{name}: a process had {largest:.0f} MB, {MOST_MEMORY_MB:.0f} are allowed"
            )
        if figures.get("sizes", SIZES) != SIZES:
            found.append(f"{name}: the split is {figures['sizes']} and should be {SIZES}")
        if figures.get("rows", SIZES["test"]) != SIZES["test"]:
            found.append(f"{name}: {figures['rows']} rows of {SIZES['test']} test images")
        if figures.get("data_s", 0.0) >= LONGEST_START_S:
            found.append(f"{name}: {figures['data_s']:.1f} s, {LONGEST_START_S:.0f} are allowed")
        if figures.get("step", 50) != 50:
            found.append(f"{name}: ended at step {figures['step']}, not 50")
    return found


def print_table(steps: Dict[str, Dict[str, Any]]) -> None:
    """Print one line per step."""
    shown = {
        "images_per_s": "{:,.0f} images/s",
        "store_gb": "store {:.2f} GB",
        "imports_s": "imports {:.2f} s",
        "data_s": "CSV, index, split, cache {:.2f} s",
        "data_cpu_s": "{:.2f} s of that on the CPU",
        "perf/samples_per_s": "{:,.0f} samples/s",
        "perf/data_wait_pct": "{:.1f} % waiting for data",
        "rows": "{:,} rows of predictions.csv",
    }
    print(f"{'':18} {'seconds':>8} {'peak MB':>8} {'children':>8} {'largest MB':>10}")
    for name, figures in steps.items():
        details = [text.format(figures[key]) for key, text in shown.items() if key in figures]
        print(
            f"{name:18} {figures['seconds']:8.1f} {figures['peak_memory_mb']:8.0f}"
            f" {figures['child_processes']:8}"
            f" {figures.get('largest_child_peak_memory_mb', 0.0):10.0f}   {', '.join(details)}"
        )


def earlier(out: Path, fresh: bool) -> Dict[str, Dict[str, Any]]:
    """Return the results of earlier calls."""
    if fresh or not out.is_file():
        return {}
    steps: Dict[str, Dict[str, Any]] = json.loads(out.read_text(encoding="utf-8"))["steps"]
    return steps


def main(argv: Sequence[str]) -> int:
    """Measure, print a table, write the JSON file; return 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, default=Path("/tmp/nih_size"), metavar="DIR")
    parser.add_argument("--workers", type=int, default=2, help="loader workers of the second run")
    parser.add_argument("--fresh", action="store_true", help="measure everything again")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: <root>/nih_size.json")
    arguments = parser.parse_args(argv)
    root: Path = arguments.root.resolve()
    out: Path = arguments.out or root / "nih_size.json"
    make_set(root, original_images(NIH / "images"))
    if arguments.fresh:
        shutil.rmtree(root / "cxr_vit_cache", ignore_errors=True)
    runs, workers = Runs(root / "logs"), arguments.workers
    to_do: Dict[str, Callable[[], Dict[str, Any]]] = {
        "prepare": lambda: prepare(runs, root),
        "start_up": lambda: start_up(runs, root),
        "train": lambda: train(runs, root, workers=0),
        "evaluate": lambda: evaluate(runs, root, workers=0),
    }
    if workers:
        to_do[f"train, {workers} workers"] = lambda: train(runs, root, workers=workers)
        to_do[f"evaluate, {workers} workers"] = lambda: evaluate(runs, root, workers=workers)
    steps = earlier(out, arguments.fresh)
    for name, measure in to_do.items():
        if name not in steps:
            steps[name] = measure()
            print(f"measured: {name}, {steps[name]['seconds']:.1f} s", flush=True)
            write(out, steps)
    print_table(steps)
    found = failures(steps)
    print("\n".join(found) if found else "counts, start and memory (< 2 GB a process) are right")
    return 1 if found else 0


def write(out: Path, steps: Dict[str, Dict[str, Any]]) -> None:
    """Write the results so far."""
    # Of the commands that this process has waited for, and of their own children.
    largest_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e6
    packages = ("torch", "numpy", "pandas", "pillow", "kornia-rs", "opencv-python-headless")
    result = {**describe_machine(*packages), "largest_process_mb": largest_mb, "steps": steps}
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
