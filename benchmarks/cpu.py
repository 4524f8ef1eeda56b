"""What makes training fast on a CPU, and what does not; and the parts of the start of `train.py`.

    python -m benchmarks.cpu [--rounds 5] [--steps 4] [--starts 3] [--ways usual,...]

The ways differ from `train.py` as usual in one thing. Each is a process of its own; in each round,
each of them trains some steps while the others wait, and a ratio is the median of the ratios of the
rounds. Model and batch are those of benchmarks.throughput on a CPU. The starts are timed in turns,
with built caches. Prints tables and writes a JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

import yaml

from benchmarks.machine import describe_machine
from benchmarks.throughput import (
    MODELS,
    REPOSITORY,
    WAYS,
    Process,
    Settings,
    Turns,
    all_stopped,
    command_of,
    measure_round,
    ratios,
    write_images,
)
from cxr_vit.cli import run

USUAL = "usual"
#: Leaves malloc as it is (cxr_vit/engines/allocator.py); glibc knows no such variable.
PLAIN_MALLOC = {"MALLOC_IS_LEFT_ALONE": "1"}
PARTS = ("imports", "data", "model", "warm_up", "logs", "first_step")


class Variant(NamedTuple):
    """Training with one thing that is other than usual; `threads` is their number times this."""

    what: str
    precision: str = "fp32"
    threads: float = 1.0
    variables: Optional[Dict[str, str]] = None
    is_scored: bool = False  # whether evaluation is timed too


VARIANTS = {
    USUAL: Variant("as usual: all cores, fp32", is_scored=True),
    "plain_malloc": Variant("malloc as it is", variables=PLAIN_MALLOC),
    "plain_adamw": Variant("AdamW that is not fused"),
    "bf16": Variant("bf16", precision="bf16", is_scored=True),
    "half_threads": Variant("half as many threads", threads=0.5),
    "twice_threads": Variant("twice as many threads", threads=2.0),
    "channels_last": Variant("memory format channels_last"),
    "flush_denormal": Variant("set_flush_denormal"),
    "matmul_medium": Variant("set_float32_matmul_precision, medium"),
    "without_mkldnn": Variant("without oneDNN"),
}


def measure_steps(arguments: argparse.Namespace, folder: Path) -> Dict[str, Dict[str, Any]]:
    """Return the figures of each variant."""
    model, patch_size, image_size = MODELS["ti8-64"]
    usual = Settings(
        model=model,
        patch_size=patch_size,
        image_size=image_size,
        root=write_images(folder / "images", arguments.images, image_size),
        micro_batch=32,
        device="cpu",
        precision="fp32",
        threads=arguments.threads,
        workers=0,
        warm=3,
        settle=1,
        steps=arguments.steps,
    )
    processes = {
        name: Process(name, folder, threads_of(name, arguments.threads), VARIANTS[name].variables)
        for name in arguments.ways
    }

    def start(name: str) -> None:
        settings = usual._replace(precision=VARIANTS[name].precision)
        process = processes[name]
        config = settings.config(process.folder)
        config["callbacks"][0]["class"] = "benchmarks.cpu_worker.Altered"
        file = process.folder / "config.yaml"
        file.write_text(yaml.safe_dump(config), encoding="utf-8")
        task = {**settings.task(WAYS["ours"]), "alters": name}
        process.start(["train.py", "--config", str(file)], task)

    faults: Dict[str, List[float]] = {name: [] for name in processes}
    with all_stopped(processes):
        turns = Turns(processes, start)
        for number in range(arguments.rounds):
            turns.take(
                number,
                lambda name: measure_round(
                    processes[name], usual.micro_batch, evaluates=VARIANTS[name].is_scored
                ),
            )
            for name, process in processes.items():
                faults[name].append(process.ready.get("page_faults_per_step", 0.0))
        return {
            name: {
                "what": VARIANTS[name].what,
                **({"status": turns.failed[name]} if name in turns.failed else {}),
                **(figures_of(name, turns, usual.micro_batch) if turns.rounds[name] else {}),
                "page_faults_per_step": round(statistics.median(faults[name])),
                "peak_memory_mb": round(process.peak_mb),
            }
            for name, process in processes.items()
        }


def threads_of(name: str, threads: int) -> int:
    """Return the number of threads of a variant."""
    return max(1, int(threads * VARIANTS[name].threads))


def figures_of(name: str, turns: Turns, micro_batch: int) -> Dict[str, Any]:
    """Return the rates of a variant, and their ratios to the usual ones."""
    own, usual = turns.rounds[name], turns.rounds[USUAL]
    rates = [found.training for found in own]
    figures: Dict[str, Any] = {
        "steps_per_s": round(statistics.median(rates) / micro_batch, 3),
        "speed_to_usual": ratios(rates, [found.training for found in usual]),
    }
    scored = [found.evaluation for found in own if found.evaluation is not None]
    if scored:
        figures["evaluated_images_per_s"] = round(statistics.median(scored), 1)
        others = [found.evaluation for found in usual if found.evaluation is not None]
        figures["evaluation_to_usual"] = ratios(scored, others)
    return figures


def start_words(folder: Path) -> Dict[str, List[str]]:
    """Write the images; return the options of `train.py` of each start that is timed."""
    sample = folder / "sample"
    words = ["-m", "cxr_vit", "sample", "--out", str(sample)]
    subprocess.run(
        [sys.executable, *words], cwd=str(REPOSITORY), check=True, stdout=subprocess.DEVNULL
    )
    demo = ["--config", "configs/vit_demo.yaml", f"data.root={sample}"]
    root = write_images(folder / "large", 64, 224)
    base = [
        f"data.root={root}",
        "data.image_size=224",
        "data.val_fraction=0.2",
        "data.test_fraction=0.2",
        "model.name=vit-base",
        "pipeline.layers_per_stage=[-1]",
        "batch.micro_batch_size=8",
        "batch.gradient_accumulation=1",
        "engine.precision=fp32",
        "train.steps=10",
    ]
    return {"demo": demo, "vit-base": base}


def time_start(words: Sequence[str], folder: Path, threads: int) -> Dict[str, float]:
    """Start `train.py`; return the seconds of its parts up to the end of the first step."""
    stamps, log = folder / "stamps.json", folder / "log.txt"
    callback = {"class": "benchmarks.cpu_worker.Stamps", "args": {"out": str(stamps)}}
    more = [f"run.dir={folder / 'run'}", f"callbacks={json.dumps([callback])}", "engine.device=cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    began = time.time()
    with log.open("wb") as file:
        found = subprocess.run(
            [sys.executable, "train.py", *words, *more],
            cwd=str(REPOSITORY),
            env=environment,
            stdout=file,
            stderr=file,
        )
    if found.returncode or not stamps.exists():
        raise SystemExit(f"train.py failed:\n{log.read_text(encoding='utf-8')[-2000:]}")
    return parts_of(began, json.loads(stamps.read_text(encoding="utf-8")))


def parts_of(began: float, stamps: Dict[str, float]) -> Dict[str, float]:
    """Return the seconds of each part, their sum, and the processor time."""
    ends = [began, *(stamps[name] for name in ("imported", "data", "built", "begun", "done"))]
    imports, data, model, begun, step = (end - start for start, end in zip(ends, ends[1:]))
    warm_up = stamps["warm_up_s"]
    parts = dict(zip(PARTS, (imports, data, model, warm_up, begun - warm_up, step)))
    return {**parts, "total": ends[-1] - began, "cpu": stamps["cpu_s"]}


def measure_starts(arguments: argparse.Namespace, folder: Path) -> Dict[str, Dict[str, float]]:
    """Return the median seconds of the parts of each start."""
    if not arguments.starts:
        return {}
    words = start_words(folder)
    found: Dict[str, List[Dict[str, float]]] = {name: [] for name in words}
    for number in range(1 + arguments.starts):
        for name in words:
            print(f"start {number}: {name}", file=sys.stderr, flush=True)
            own = folder / f"{name}-{number}"
            own.mkdir()
            found[name].append(time_start(words[name], own, arguments.threads))
    return {
        name: {
            f"{part}_s": round(statistics.median(start[part] for start in starts), 2)
            for part in starts[0]
        }
        for name, (_, *starts) in found.items()  # the first one builds the cache
    }


def print_tables(results: Dict[str, Dict[str, Dict[str, Any]]]) -> None:
    """Print a line for each variant and for each start."""
    for figures in results["steps"].values():
        if "steps_per_s" not in figures:
            print(f"{figures['what']:38} {figures.get('status', '')}")
            continue
        speed, scored = figures["speed_to_usual"], figures.get("evaluation_to_usual")
        print(
            f"{figures['what']:38} {figures['steps_per_s']:6.3f} steps/s, {speed['median']:.3f}"
            f" times the usual ({speed['lowest']:.3f} to {speed['highest']:.3f});"
            f" {figures['page_faults_per_step']:,} page faults a step,"
            f" {figures['peak_memory_mb']:,} MB"
            + (f"; evaluates {scored['median']:.3f} times as fast" if scored else "")
        )
    for name, parts in results["starts"].items():
        print(f"{name:10} " + ", ".join(f"{part[:-2]} {s:.2f} s" for part, s in parts.items()))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--threads", type=int, default=os.cpu_count(), metavar="N", help="default: all cores")
    add("--images", type=int, default=4096, metavar="N")
    add("--rounds", type=int, default=5, metavar="N")
    add("--steps", type=int, default=4, metavar="N", help="timed steps per round")
    add("--starts", type=int, default=3, metavar="N", help="of each; 0 times none")
    add("--ways", default=",".join(VARIANTS), metavar="WAY,...", help="default: %(default)s")
    add("--out", type=Path, default=Path("cpu.json"), metavar="FILE")
    arguments = parser.parse_args(argv)
    arguments.ways = list(dict.fromkeys([USUAL, *arguments.ways.split(",")]))
    unknown = set(arguments.ways) - set(VARIANTS)
    if unknown:
        parser.error(f"--ways: no {', '.join(sorted(unknown))}. There are {', '.join(VARIANTS)}.")
    if any(name.startswith("MALLOC_") for name in os.environ):
        parser.error("the environment sets MALLOC_..., so malloc is not as usual")
    return arguments


def main(argv: Sequence[str]) -> int:
    """Measure, print tables and write the JSON file."""
    arguments = parse(argv)
    with tempfile.TemporaryDirectory(prefix="cpu-") as folder:
        results = {
            "steps": measure_steps(arguments, Path(folder)),
            "starts": measure_starts(arguments, Path(folder)),
        }
    head = {"command": command_of(argv, "cpu"), **describe_machine("torch", "transformers")}
    written = {**head, "threads": arguments.threads, "results": results}
    arguments.out.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    print_tables(results)
    return 1 if any("status" in figures for figures in results["steps"].values()) else 0


if __name__ == "__main__":
    run(main)
