"""Measure the speed of training and evaluation against every peer, in interleaved rounds.

    python -m benchmarks.throughput [--device cuda] [--precision bf16] [--model vit-base-224] ...
    python -m benchmarks.throughput --scale

Every way is a process of its own. They are warmed up one after another; then, in each round, each
of them trains a number of steps while the others wait. A ratio is the median of the ratios of the
rounds. Peers that are not installed are left out (requirements-benchmarks.txt has them). With
--scale, this project alone is timed against the number of images, tokens and processes. Prints a
table and writes a JSON file.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

import numpy as np
import torch
import yaml
from PIL import Image

from benchmarks.linked_images import write_linked_set
from benchmarks.machine import describe_machine
from benchmarks.nih_size import family, peak_memory_mb
from benchmarks.throughput_worker import LEARNING_RATE, WEIGHT_DECAY
from cxr_vit import load_config
from cxr_vit.cli import run
from cxr_vit.config.schema import EngineSection
from cxr_vit.data.cache import CachePaths
from cxr_vit.planner.costs import ModelShape

REPOSITORY = Path(__file__).resolve().parents[1]
#: Name -> model.name, model.patch_size and data.image_size.
MODELS = {
    "micro-32": ("vit-micro", 8, 32),
    "ti8-64": ("vit-tiny", 8, 64),
    "vit-small-224": ("vit-small", 16, 224),
    "vit-base-224": ("vit-base", 16, 224),
    "vit-large-224": ("vit-large", 16, 224),
}
#: Different images; the others are links to these.
ORIGINALS = 64
#: Seconds until a process must have made its first steps, and steps of no end.
PATIENCE_S, NEVER = 1800.0, 10**7
#: What the answer to `go` says besides the time.
MEMORY = ("gpu_peak_mb", "page_faults_per_step")
TRAINER, COMPILED, LIMIT, PEAK = "trainer", "trainer-compiled", "limit", "peak"


class Way(NamedTuple):
    """A way to train: what it is, its name in benchmarks.throughput_worker, and its package.

    `worker` None is this project's train.py, with `compile` as its engine.compile.
    """

    what: str
    worker: Optional[str] = None
    compile: Optional[str] = None
    package: Optional[str] = None


WAYS = {
    "ours": Way("train.py"),
    "ours-layers": Way("train.py, engine.compile=layers", compile="layers"),
    "ours-whole": Way("train.py, engine.compile=whole", compile="whole"),
    LIMIT: Way("plain loop, images on the device", "limit"),
    "limit-compiled": Way("the same, torch.compile", "limit", "whole"),
    TRAINER: Way("transformers.Trainer", "trainer", package="accelerate"),
    COMPILED: Way("transformers.Trainer, torch_compile", "trainer", "whole", "accelerate"),
    "lightning": Way("Lightning", "lightning", package="lightning"),
    "lightning-compiled": Way("Lightning, torch.compile", "lightning", "whole", "lightning"),
    "timm": Way("timm's ViT in the plain loop", "timm", package="timm"),
    "timm-compiled": Way("the same, torch.compile", "timm", "whole", "timm"),
}


def unavailable(way: Way) -> Optional[str]:
    """Return why a way cannot be measured here, or None."""
    if way.package and importlib.util.find_spec(way.package) is None:
        return f"{way.package} is not installed"
    if way.worker is None and way.compile and "compile" not in EngineSection.model_fields:
        return "there is no engine.compile"
    return None


class Failed(Exception):
    """A process ended, or did not answer, before it had measured."""


class Process:
    """A way's process: starts it, and sends it commands.

    `seconds` until the first step, and what else it said when it was warm, are in `ready`.
    """

    def __init__(
        self, name: str, folder: Path, threads: int, variables: Optional[Dict[str, str]] = None
    ) -> None:
        self.folder = folder / name
        self.folder.mkdir()
        self.log = self.folder / "log.txt"
        self.threads = threads
        self.variables = variables or {}  # of the environment
        self.ready: Dict[str, Any] = {}
        self.peak_mb = 0.0

    def start(self, words: Sequence[str], task: Dict[str, Any]) -> None:
        """Run Python with these words, and wait until it is warm. Raises Failed."""
        address = str(self.folder / "socket")
        task = {**task, "socket": address, "folder": str(self.folder), "began": time.time()}
        (self.folder / "task.json").write_text(json.dumps(task), encoding="utf-8")
        environment = {
            **os.environ,
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads)),
            "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [python_path()])]),
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "compiled"),
            **self.variables,
        }
        with socket.socket(socket.AF_UNIX) as listener, self.log.open("wb") as log:
            listener.bind(address)
            listener.listen()
            listener.settimeout(0.2)
            self.process = subprocess.Popen(
                [sys.executable, *words],
                cwd=str(REPOSITORY),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
            self.connection = self._accept(listener)
        self.connection.settimeout(PATIENCE_S)
        self._answers = self.connection.makefile("r", encoding="utf-8")
        self.ready = self._read()

    def _accept(self, listener: socket.socket) -> socket.socket:
        deadline = time.monotonic() + PATIENCE_S
        while self.process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(socket.timeout):
                return listener.accept()[0]
        raise Failed(self.last_line())

    def ask(self, command: str) -> Dict[str, Any]:
        """Send a command and return the answer. Raises Failed."""
        with contextlib.suppress(OSError):
            self.connection.sendall(f"{command}\n".encode())
        return self._read()

    def _read(self) -> Dict[str, Any]:
        line = ""
        with contextlib.suppress(OSError):
            line = self._answers.readline()
        if not line:
            raise Failed(self.last_line())
        found: Dict[str, Any] = json.loads(line)
        self.peak_mb = max(map(peak_memory_mb, family(self.process.pid)))
        return found

    def last_line(self) -> str:
        """Return the last line that the process printed."""
        text = self.log.read_text(encoding="utf-8", errors="replace").strip()
        return text.splitlines()[-1] if text else "it ended without a word"

    def stop(self) -> None:
        """End the process."""
        if not hasattr(self, "process"):
            return
        with contextlib.suppress(OSError, AttributeError):  # it may never have connected
            self.connection.sendall(b"stop\n")
            self._answers.close()
            self.connection.close()
        try:
            self.process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.terminate()  # torchrun ends its processes
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=40)
            self.process.kill()


def python_path() -> str:
    """Return PYTHONPATH, which may hold the peers."""
    return os.environ.get("PYTHONPATH", "")


def write_images(root: Path, count: int, size: int) -> Path:
    """Write a data set of images of noise in NIH's layout and build its cache; return its folder.

    All its patients have one image. Few of the images differ, but the cache holds all of them.
    """
    drawn = root / "drawn"
    drawn.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (ORIGINALS, size, size), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(drawn / f"{index}.png")
    write_linked_set(root / "data", sorted(drawn.glob("*.png")), count)
    words = [f"data.root={root / 'data'}", f"data.image_size={size}"]
    subprocess.run(
        [sys.executable, "-m", "cxr_vit", "prepare", *words],
        cwd=str(REPOSITORY),
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    return root / "data"


class Settings(NamedTuple):
    """What all ways have in common."""

    model: str
    patch_size: int
    image_size: int
    root: Path
    micro_batch: int
    device: str
    precision: str
    threads: int
    workers: int
    warm: int
    settle: int
    steps: int
    val_fraction: float = 0.1  # of 4,096 images: starting to evaluate takes less than a per cent

    def config(
        self, folder: Path, *, compile_: Optional[str] = None, replicas: int = 1
    ) -> Dict[str, Any]:
        """Return this project's configuration, with the callback that paces it."""
        engine = {"name": "torch", "device": self.device, "precision": self.precision}
        if compile_:
            engine["compile"] = compile_
        never = {"eval_every_steps": NEVER, "checkpoint_every_steps": NEVER}
        return {
            "run": {"dir": str(folder / "run")},
            "data": {
                "root": str(self.root),
                "image_size": self.image_size,
                "val_fraction": self.val_fraction,
                "test_fraction": 0.0,
                "num_workers": self.workers,
                "cache": "require",
            },
            "model": {"name": self.model, "patch_size": self.patch_size},
            "pipeline": {"layers_per_stage": [-1]},
            "batch": {
                "replicas": replicas,
                "micro_batch_size": self.micro_batch,
                "eval_micro_batch_size": self.micro_batch,
            },
            "optim": {"lr": LEARNING_RATE, "weight_decay": WEIGHT_DECAY},
            "train": {"steps": NEVER, **never},
            "engine": engine,
            "callbacks": [
                {
                    "class": "benchmarks.throughput_worker.Paced",
                    "args": {"task": str(folder / "task.json")},
                }
            ],
        }

    @property
    def shape(self) -> ModelShape:
        """Sizes of the model."""
        return ModelShape.from_config(
            load_config(
                [],
                [
                    f"model.name={self.model}",
                    f"model.patch_size={self.patch_size}",
                    f"data.image_size={self.image_size}",
                    "pipeline.layers_per_stage=[-1]",
                ],
            )
        )

    def task(self, way: Way) -> Dict[str, Any]:
        """Return what a process of benchmarks.throughput_worker needs."""
        shape = self.shape
        return {
            **shape._asdict(),
            "kind": None,
            "way": way.worker,
            "compile": bool(way.compile),
            "pixels": str(CachePaths.of(self.root / "cxr_vit_cache", self.image_size).pixels),
            "total_steps": NEVER,
            **{
                name: getattr(self, name)
                for name in (
                    *("micro_batch", "device", "precision", "threads", "workers"),
                    *("warm", "settle", "steps"),
                )
            },
        }

    def start(self, process: Process, way: Way, processes: int = 1) -> None:
        """Start a way and wait until it is warm. Raises Failed."""
        words = ["-m", "benchmarks.throughput_worker", str(process.folder / "task.json")]
        if way.worker is None:
            file = process.folder / "config.yaml"
            config = self.config(process.folder, compile_=way.compile, replicas=processes)
            file.write_text(yaml.safe_dump(config), encoding="utf-8")
            words = ["train.py", "--config", str(file)]
            if processes > 1:
                launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
                words = [*launcher, str(processes), *words]
        process.start(words, self.task(way))


def training_flops(shape: ModelShape) -> int:
    """Return the operations of the matrix products of a training step, per image.

    Forward and backward: two operations per weight and token forward, four backward, which is the
    "6 N" of Kaplan et al. 2020 (arXiv:2001.08361, section 2.1), and the products of attention, as
    in Chowdhery et al. 2022 (PaLM, arXiv:2204.02311, appendix B). The images need no gradient: the
    patch embedding has four operations per weight.
    """
    head = 2 * shape.head_size * shape.num_labels
    return 2 * shape.embedding_flops() + 3 * (shape.num_layers * shape.layer_flops() + head)


class Round(NamedTuple):
    """What a round measured of a way: images per second, in training and in evaluation."""

    training: float
    evaluation: Optional[float]


def measure_round(process: Process, micro_batch: int, *, evaluates: bool) -> Round:
    """Let a process train, and evaluate if it is asked to."""
    answer = process.ask("go")
    training = answer["steps"] * micro_batch / answer["seconds"]
    process.ready.update({key: answer[key] for key in MEMORY if key in answer})
    if not evaluates:
        return Round(training, None)
    answer = process.ask("evaluate")
    return Round(training, answer["images"] / answer["seconds"])


def ratios(rates: Sequence[float], base: Sequence[float]) -> Dict[str, float]:
    """Return the median, the lowest and the highest of the ratios of the rounds."""
    found = [rate / other for rate, other in zip(rates, base)]
    return {
        "median": round(statistics.median(found), 3),
        "lowest": round(min(found), 3),
        "highest": round(max(found), 3),
    }


def summarise(
    ready: Dict[str, Dict[str, Any]],
    rounds: Dict[str, List[Round]],
    peaks: Sequence[float],
    flops: int,
) -> Dict[str, Dict[str, Any]]:
    """Return the figures of each way; `peaks` are the operations per second of each round."""
    bases = {TRAINER: "ratio_to_trainer", COMPILED: "ratio_to_compiled_trainer"}
    bases[LIMIT] = "ratio_to_limit"
    summary: Dict[str, Dict[str, Any]] = {}
    for name, measured in rounds.items():
        if not measured:
            continue
        rates = [found.training for found in measured]
        figures: Dict[str, Any] = {
            "images_per_s": round(statistics.median(rates), 2),
            "images_per_s_by_round": [round(rate, 2) for rate in rates],
        }
        shares = [rate * flops / peak for rate, peak in zip(rates, peaks)]
        if shares:
            figures["share_of_peak"] = round(statistics.median(shares), 4)
        for base, key in bases.items():
            if rounds.get(base) and base != name:
                figures[key] = ratios(rates, [found.training for found in rounds[base]])
        scored = [found.evaluation for found in measured if found.evaluation is not None]
        if scored:
            figures["evaluated_images_per_s"] = round(statistics.median(scored), 2)
            figures["evaluation_to_training"] = ratios(scored, rates)
        summary[name] = {**figures, **ready[name]}
    return summary


def kept(process: Process) -> Dict[str, float]:
    """Return what a process said of itself: seconds and memory."""
    figures: Dict[str, float] = {
        key: round(process.ready[key], 2)
        for key in ("start_s", "compile_s", "first_step_s")
        if key in process.ready
    }
    figures["peak_memory_mb"] = round(process.peak_mb)
    if "gpu_peak_mb" in process.ready:
        figures["gpu_peak_memory_mb"] = round(process.ready["gpu_peak_mb"])
    return figures


@contextlib.contextmanager
def all_stopped(processes: Dict[str, Process]) -> Iterator[None]:
    """End all processes at the end."""
    try:
        yield
    finally:
        for process in processes.values():
            process.stop()


class Turns:
    """Processes that are started, and then measured in turns; one that fails drops out.

    `rounds` are those that a process has finished, and `failed` says why it made no more.
    """

    def __init__(self, processes: Dict[str, Process], start: Callable[[str], None]) -> None:
        self.processes = processes
        self.rounds: Dict[str, List[Round]] = {name: [] for name in processes}
        self.failed: Dict[str, str] = {}
        for name in processes:
            print(f"starting: {name}", file=sys.stderr, flush=True)
            with self._dropping(name):
                start(name)

    @contextlib.contextmanager
    def _dropping(self, name: str) -> Iterator[None]:
        try:
            yield
        except Failed as failure:
            self.failed[name] = f"failed: {failure}"
            print(f"{name} {self.failed[name]}", file=sys.stderr, flush=True)
            self.processes[name].stop()

    def take(self, number: int, measure: Callable[[str], Round]) -> None:
        """Measure each of them once. Rounds begin with different ones."""
        print(f"round {number + 1}", file=sys.stderr, flush=True)
        order = list(self.processes)
        shift = number % len(order)
        for name in order[shift:] + order[:shift]:
            if name not in self.failed:
                with self._dropping(name):
                    self.rounds[name].append(measure(name))


def compare(
    arguments: argparse.Namespace, folder: Path, save: Callable[[Dict[str, Any]], None]
) -> Dict[str, Any]:
    """Measure all ways in interleaved rounds, save the results after each, and return them."""
    settings = settings_of(arguments, folder)
    missing = {name: unavailable(WAYS[name]) for name in arguments.ways}
    names = [PEAK, *(name for name in arguments.ways if missing[name] is None)]
    processes = {name: Process(name, folder, arguments.threads) for name in names}
    flops = training_flops(settings.shape)

    def measure(name: str) -> Round:
        if name == PEAK:
            return measure_round(processes[name], 1, evaluates=False)
        evaluates = WAYS[name].worker is None
        return measure_round(processes[name], settings.micro_batch, evaluates=evaluates)

    with all_stopped(processes):
        turns = Turns(
            processes, lambda name: settings.start(processes[name], WAYS.get(name, Way("", PEAK)))
        )
        for number in range(arguments.rounds):
            turns.take(number, measure)
            rounds = dict(turns.rounds)
            peaks = [found.training for found in rounds.pop(PEAK)]
            ready = {name: kept(processes[name]) for name in rounds}
            status = {name: why for name, why in {**missing, **turns.failed}.items() if why}
            summary = summarise(ready, rounds, peaks, flops)
            results: Dict[str, Any] = {"gflops_per_image": round(flops / 1e9, 3)}
            if peaks:
                results["peak_gflops_per_s"] = round(statistics.median(peaks) / 1e9, 1)
                results["peak_gflops_per_s_by_round"] = [round(peak / 1e9, 1) for peak in peaks]
            results["ways"] = {
                name: {
                    "what": WAYS[name].what,
                    **summary.get(name, {}),
                    **({"status": status[name]} if name in status else {}),
                }
                for name in arguments.ways
            }
            save(results)
    return results


def shared_settings(arguments: argparse.Namespace) -> Dict[str, Any]:
    """Return the settings that are options, the same in every comparison."""
    names = ("micro_batch", "device", "precision", "threads", "workers", "warm")
    # Workers have read the settle steps before the round began.
    settle = max(1, 2 * arguments.workers)
    return {"settle": settle, **{name: getattr(arguments, name) for name in names}}


def settings_of(arguments: argparse.Namespace, folder: Path) -> Settings:
    """Write the images; return what all ways have in common."""
    model, patch_size, image_size = MODELS[arguments.model]
    return Settings(
        model=model,
        patch_size=patch_size,
        image_size=image_size,
        root=write_images(folder / "images", arguments.images, image_size),
        steps=arguments.steps,
        # A GPU scores 410 images before the loader's workers have started.
        val_fraction=0.5 if arguments.device == "cuda" else 0.1,
        **shared_settings(arguments),
    )


def print_table(results: Dict[str, Any]) -> None:
    """Print one line per way."""
    peak = results.get("peak_gflops_per_s", "unknown")
    print(f"{results['gflops_per_image']} GFLOP per image; products of matrices: {peak} GFLOP/s")
    heads = ("images/s", "trainer", "compiled", "limit", "peak %", "MB", "start s", "compile s")
    print(f"{'':44} " + " ".join(f"{head:>9}" for head in (*heads, "eval")))
    for figures in results["ways"].values():
        if "status" in figures:
            print(f"{figures['what']:44}   {figures['status']}")
        if "images_per_s" not in figures:
            continue
        cells = [f"{figures['images_per_s']:,.1f}"]
        for base in ("trainer", "compiled_trainer", "limit"):
            ratio = figures.get(f"ratio_to_{base}")
            cells.append(f"{ratio['median']:.2f}x" if ratio else "")
        memory = figures.get("gpu_peak_memory_mb", figures["peak_memory_mb"])
        share = figures.get("share_of_peak")
        cells += ["" if share is None else f"{100 * share:.1f}", f"{memory:,}"]
        cells.append(f"{figures['start_s']:.1f}")
        cells.append(f"{figures.get('compile_s', figures.get('first_step_s', 0)):.1f}")
        evaluation = figures.get("evaluation_to_training")
        cells.append(f"{evaluation['median']:.2f}x" if evaluation else "")
        print(f"{figures['what']:44} " + " ".join(f"{cell:>9}" for cell in cells))


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line; what is not given depends on the device."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--precision", choices=("fp32", "bf16"), help="default: fp32 on a CPU, bf16 on a GPU")
    add("--model", choices=tuple(MODELS), help="default: ti8-64 on a CPU, vit-base-224 on a GPU")
    add("--micro-batch", type=int, metavar="N", help="default: 32 on a CPU, 128 on a GPU")
    add("--threads", type=int, default=os.cpu_count(), metavar="N", help="default: all cores")
    add("--workers", type=int, metavar="N", help="loader processes; default: 0, on a GPU 8")
    add("--images", type=int, metavar="N", help="images; default: 4096, on a GPU 16384")
    add("--rounds", type=int, default=7, metavar="N")
    add("--steps", type=int, metavar="N", help="timed steps per round; default: 8, on a GPU 100")
    add("--warm", type=int, metavar="N", help="steps before; default: 4, on a GPU 30")
    add("--ways", metavar="WAY,...", help=f"default: {', '.join(WAYS)}")
    add("--scale", action="store_true", help="time this project against images, tokens, processes")
    add("--out", type=Path, metavar="FILE", help="default: throughput.json, or scale.json")
    arguments = parser.parse_args(argv)
    set_defaults(arguments, parser)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    if min(arguments.rounds, arguments.steps, arguments.warm - 1, arguments.threads) < 1:
        parser.error("at least one round, one step, two warm steps and one thread are needed")
    return arguments


def set_defaults(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Set what was not given, by the device; refuse what --scale does not read."""
    on_gpu = arguments.device == "cuda"
    defaults: Dict[str, Any] = {
        "precision": "bf16" if on_gpu else "fp32",
        "model": "vit-base-224" if on_gpu else "ti8-64",
        "micro_batch": 128 if on_gpu else 32,
        "workers": 8 if on_gpu else 0,
        "steps": 100 if on_gpu else 8,
        "warm": 30 if on_gpu else 4,
        "images": 16384 if on_gpu else 4096,
        "ways": ",".join(WAYS),
        "out": Path("scale.json" if arguments.scale else "throughput.json"),
    }
    if arguments.scale:
        defaults["steps"] = 100
        for name in ("model", "images", "ways"):
            if getattr(arguments, name) is not None:
                parser.error(f"--scale has models and images of its own: leave out --{name}")
    for name, value in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, value)
    arguments.ways = arguments.ways.split(",")
    unknown = set(arguments.ways) - set(WAYS)
    if unknown:
        parser.error(f"--ways: no {', '.join(sorted(unknown))}. There are {', '.join(WAYS)}.")


def installed(*packages: str) -> List[str]:
    """Return the packages that are installed."""
    found = []
    for name in packages:
        with contextlib.suppress(metadata.PackageNotFoundError):
            metadata.version(name)
            found.append(name)
    return found


def command_of(argv: Sequence[str], name: str = "throughput") -> str:
    """Return the command line without --out, which changes no figure."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--out")
    return " ".join([f"python -m benchmarks.{name}", *parser.parse_known_args(argv)[1]])


def main(argv: Sequence[str]) -> int:
    """Measure, print a table and write the JSON file."""
    from benchmarks import throughput_scale

    arguments = parse(argv)
    packages = installed("torch", "transformers", "accelerate", "lightning", "timm", "numpy")
    gpu = {"gpu": torch.cuda.get_device_name()} if arguments.device == "cuda" else {}
    own = {"out", "scale", *(("model", "images", "ways") if arguments.scale else ())}
    settings = {name: value for name, value in vars(arguments).items() if name not in own}
    head = {
        "command": command_of(argv),
        **describe_machine(*packages),
        **gpu,
        "settings": settings,
    }

    def save(results: Dict[str, Any]) -> None:
        text = json.dumps({**head, "results": results}, indent=2)
        arguments.out.write_text(text + "\n", encoding="utf-8")

    with tempfile.TemporaryDirectory(prefix="throughput-") as folder:
        act = throughput_scale.measure if arguments.scale else compare
        results = act(arguments, Path(folder), save)
    (throughput_scale.print_table if arguments.scale else print_table)(results)
    groups = results.values() if arguments.scale else [results["ways"]]
    failed = [
        name
        for group in groups
        for name, figures in group.items()
        if figures.get("status", "").startswith("failed")
    ]
    return 1 if failed else 0


if __name__ == "__main__":
    run(main)
