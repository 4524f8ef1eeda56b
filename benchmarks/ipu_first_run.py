"""Measure on IPUs what this project can only predict: run it once on a POD4, send the file back.

    python -m benchmarks.ipu_first_run [--out FILE] [--quick] [section.key=value ...]

Compares losses with the CPU, then compiles, trains and evaluates ViT-B/16 (random weights,
synthetic images) in several settings: seconds of compilation, images/s, cycles, memory per IPU from
Poplar's report, beside the planner's prediction. Each measurement is a process of its own with a
time limit; one that fails is recorded and the rest goes on. With the same --out, what is recorded
is not repeated.

The run folders are beside FILE, for `plan --calibrate`; FILE has a copy of what it reads, which
`--unpack FILE` writes out again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from cxr_vit.cli import run, split_overrides
from cxr_vit.config import BatchPlan, load_config
from cxr_vit.config.schema import BatchSection
from cxr_vit.errors import ConfigError, CxrVitError, DeviceError
from cxr_vit.files import remove, write_text
from cxr_vit.planner.estimate import Plan, make_plan, plan_evaluation

REPOSITORY = Path(__file__).resolve().parents[1]
#: Files of a run that `plan --calibrate` reads; the JSON file holds them.
RUN_FILES = ("config.yaml", "environment.json", "metrics.jsonl")

#: 16 updates of 32 images and two validations of `vit-micro`, without dropout.
EQUALITY = (
    "data.sample_images=400",
    "model.pooling=class",
    "augment.horizontal_flip=0",
    "batch.gradient_accumulation=8",
    "optim.lr=1e-3",
    "data.val_fraction=0.2",
    "train.steps=16",
    "train.eval_every_steps=8",
    "train.checkpoint_every_steps=16",
    "train.log_every_steps=1",
    "engine.executable_cache=null",
    "loggers=[jsonl]",
)
#: Largest difference of a loss in fp32. Both compute GELU in its tanh form, so only the order of
#: sums and the IPU's own exp and tanh differ, which 16 updates amplify a little. Without hardware
#: the same libraries compute both.
TOLERANCE = {"hardware": 1e-3, "other": 1e-5}
#: What all settings share, on top of the configuration.
COMMON = (
    "model.name=vit-base",
    "model.patch_size=16",
    "data.image_size=224",
    "data.sample_images=4096",
    "data.split=official",
    "data.val_fraction=0.3",
    "engine.name=poptorch",
    "engine.log_cycles=true",
    "engine.executable_cache=null",
    "train.log_every_steps=1",
    "train.eval_every_steps=1000000",
    "train.checkpoint_every_steps=1000000",
    "loggers=[jsonl]",
)
#: fp16 weights with the optimizer of configs/vit_pod4_fp16.yaml.
FP16 = ("engine.weights=fp16", "optim.accumulator=fp16", "optim.first_moment=fp32")
#: Name -> images of a micro-batch, None for the configuration's; other overrides.
SETTINGS: Dict[str, Tuple[Optional[int], Tuple[str, ...]]] = {
    "base": (None, ()),
    "weights_fp16_micro8": (8, FP16),
    "weights_fp16": (None, FP16),
    "micro4": (4, ()),
    "micro8": (8, ()),
    "micro16": (16, ()),
    "recompute_stage_inputs": (None, ("pipeline.recompute=stage_inputs",)),
    "recompute_every_layer": (None, ("pipeline.recompute=every_layer",)),
    "recompute_attention_mlp": (None, ("pipeline.recompute=attention_mlp",)),
    "recompute_none": (None, ("pipeline.recompute=none",)),
}
#: Name -> images of a micro-batch in evaluation, micro-batches of a host call.
EVALUATIONS = {
    "eval_1x4": (1, 4),
    "eval_1x64": (1, 64),
    "eval_4x32": (4, 32),
    "eval_16x32": (16, 32),
    "eval_32x16": (32, 16),
}
QUICK = ("equality_fp32", "base", "weights_fp16_micro8")
NAMES = ("equality_fp32", "equality_fp16", *SETTINGS, *EVALUATIONS)


class Item(NamedTuple):
    """A measurement: what the worker does, with which configuration."""

    name: str
    kind: str
    files: List[str]
    overrides: List[str]
    tolerance: Dict[str, Optional[float]]

    @property
    def setting(self) -> str:
        """The name without ``/memory``."""
        return self.name.partition("/")[0]


def items_of(arguments: argparse.Namespace, folder: Path) -> List[Item]:
    """Return the measurements of the command line, the most important ones first."""
    wanted = QUICK if arguments.quick else arguments.only or NAMES
    files, own = arguments.files, arguments.overrides
    items = []
    for name, tolerance in (("fp32", TOLERANCE), ("fp16", {"hardware": None, "other": None})):
        overrides = [*EQUALITY, f"data.root={folder / 'data_64'}", f"engine.precision={name}"]
        demo = [str(REPOSITORY / "configs" / "vit_demo_ipu.yaml")]
        items.append(Item(f"equality_{name}", "equality", demo, overrides, tolerance))
    shared = [*COMMON, f"data.root={folder / 'data_224'}", f"train.steps={arguments.steps}", *own]
    batch = load_config(list(map(Path, files)), shared).batch
    trained = [
        Item(name, "training", files, [*shared, *batch_of(batch, micro), *more], {})
        for name, (micro, more) in SETTINGS.items()
    ]
    items += trained
    for name, (images, iterations) in EVALUATIONS.items():
        more = [
            f"batch.eval_micro_batch_size={images}",
            f"batch.eval_device_iterations={iterations}",
        ]
        items.append(Item(name, "evaluation", files, [*shared, *more], {}))
    if arguments.memory:
        items += [item._replace(name=f"{item.name}/memory", kind="memory") for item in trained]
    return [item for item in items if item.setting in wanted]


def batch_of(batch: BatchSection, micro: Optional[int]) -> List[str]:
    """Return overrides that keep the global batch with another micro-batch."""
    if micro is None:
        return []
    plan = BatchPlan.from_section(batch)
    accumulation = max(1, plan.micro_batch_size * plan.gradient_accumulation // micro)
    return [
        f"batch.micro_batch_size={micro}",
        f"batch.gradient_accumulation={accumulation}",
        "batch.global_batch_size=null",  # of the command line, perhaps
    ]


def predict(item: Item) -> Dict[str, Any]:
    """Return the planner's prediction of training and of evaluation."""
    try:
        config = load_config(list(map(Path, item.files)), item.overrides)
        evaluation = plan_evaluation(config)
        assert evaluation is not None, "COMMON has engine.name=poptorch"
        plans = {"evaluation": evaluation.plan}
        if item.kind == "training":
            plans["training"] = make_plan(config)
    except CxrVitError as error:
        return {"error": " ".join(str(error).split())}
    return {name: numbers_of(plan) for name, plan in plans.items()}


def numbers_of(plan: Plan) -> Dict[str, Any]:
    """Return what is compared with measurements; an update of evaluation is a host call."""
    return {
        "for": plan.target.describe(),
        "samples_per_s": plan.samples_per_s,
        "samples_per_s_range": plan.speed_range,
        "seconds_per_update": plan.seconds,
        "bubble": plan.bubble,
        "fits": plan.fits,
        "stages": [
            {"bytes": stage.memory.total, "share": stage.memory.share} for stage in plan.stages
        ],
    }


class Session:
    """The JSON file and the folder beside it: `runs`, `logs`, `reports`."""

    def __init__(self, out: Path, minutes: float) -> None:
        self.out = out
        self.folder = out.parent / out.stem
        self.minutes = minutes
        self.content: Dict[str, Any] = {"format": 1, "facts": {}, "items": {}}
        if out.exists():
            try:
                self.content.update(json.loads(out.read_text(encoding="utf-8")))
                assert self.content["format"] == 1
            except (ValueError, AssertionError, TypeError) as error:
                raise ConfigError(f"--out {out}: not a file of this script. Name another.") from (
                    error
                )

    def save(self) -> None:
        """Write the JSON file."""
        items = self.content["items"].values()
        # A worker that crashed or took too long does not say.
        known = [
            item["result"]["from_hardware"] for item in items if "from_hardware" in item["result"]
        ]
        self.content["from_hardware"] = bool(known) and all(known)
        write_text(self.out, json.dumps(self.content, indent=1) + "\n")

    def is_recorded(self, item: Item) -> bool:
        """Whether the file has a result of this item with the same settings."""
        known = self.content["items"].get(item.name)
        return known is not None and known["settings"] == [*item.files, *item.overrides]

    def work(self, item: Item) -> Dict[str, Any]:
        """Measure an item in a process of its own, and record it."""
        begun = self.folder / "unfinished" / item.name.replace("/", "_")
        remove(begun)
        begun.mkdir(parents=True)
        result = self.start(item, begun / "run")
        if "error" not in result and item.kind == "training":
            finished = self.folder / "runs" / item.name
            remove(finished)
            finished.parent.mkdir(exist_ok=True)
            (begun / "run").rename(finished)
        if item.kind != "memory":  # its report is for PopVision
            remove(begun)
        record = {"kind": item.kind, "settings": [*item.files, *item.overrides]}
        if item.kind in ("training", "evaluation"):
            record["predicted"] = predict(item)
        self.content["items"][item.name] = {**record, "result": result}
        self.save()
        return result

    def start(self, item: Item, folder: Path) -> Dict[str, Any]:
        """Run the worker; return its result, or what ended it."""
        out = folder.parent / "result.json"
        job = {**item._asdict(), "folder": str(folder), "out": str(out)}
        path = folder.parent / "job.json"
        path.write_text(json.dumps(job), encoding="utf-8")
        log = self.folder / "logs" / f"{item.name.replace('/', '_')}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        ended = run_limited([*WORKER, str(path)], log, 60 * self.minutes)
        result: Dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            result = json.loads(out.read_text(encoding="utf-8"))
        if ended and "error" not in result:
            result["error"] = ended
        return result


WORKER = [sys.executable, "-m", "benchmarks.ipu_first_run_worker"]


def run_limited(command: Sequence[str], log: Path, limit_s: float) -> Optional[str]:
    """Run a command; return None if it succeeds, else in a line how it ended."""
    # A busy IPU is waited for. The cache would hide the time of compilation.
    environment = {**os.environ, "POPTORCH_WAIT_FOR_IPU": "1"}
    environment.pop("POPTORCH_CACHE_DIR", None)
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with log.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(
            command, env=environment, stdout=file, stderr=file, start_new_session=True
        )
        status: Optional[int] = None
        try:
            with signals_interrupt(), contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(limit_s)
        finally:
            stop(process)
    if status == 0:
        return None
    if status is None:
        return f"not finished within {limit_s / 60:g} minutes (--minutes)"
    how = f"exit status {status}" if status > 0 else signal.Signals(-status).name
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "no output")
    return f"the process ended with {how}: {last[:300]}"


def _interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def signals_interrupt() -> Iterator[None]:
    """End like Ctrl-C at SIGTERM and SIGHUP, so that no worker goes on and keeps the IPUs."""
    before = {
        number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process that still runs, and what it has started."""
    for number, wait_s in ((signal.SIGTERM, 20), (signal.SIGKILL, None)):
        if process.poll() is not None:
            return
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            process.wait(wait_s)


def describe(item: Item, result: Dict[str, Any]) -> str:
    """Return a result in one line."""
    if "error" in result:
        return f"failed: {result['error']}"
    if item.kind == "equality":
        differences = ", ".join(f"{k} {v:.2e}" for k, v in result["difference"].items())
        verdict = {True: "equal", False: "NOT EQUAL", None: "not judged"}[result.get("equal")]
        limit = f" (tolerance {result['tolerance']:g})" if "tolerance" in result else ""
        return f"{verdict}{limit}; largest differences: {differences}"
    if item.kind == "memory":
        parts = []
        for graph in ("training", "inference"):
            ipus = result[graph].get("ipus")
            if ipus is None:
                return f"not measured: {result[graph]['not_measured']}"
            megabytes = ", ".join(f"{ipu['total_bytes_with_gaps'] / 1e6:,.0f}" for ipu in ipus)
            parts.append(f"{graph} {megabytes} MB per IPU")
        return "; ".join(parts)
    parts = [f"compiled in {result['compile_s']:.1f} s"]
    if result.get("samples_per_s"):
        parts.append(f"{result['samples_per_s']:,.1f} images/s")
    if result.get("cycles_per_call"):
        parts.append(f"{result['cycles_per_call']:,.0f} cycles per host call")
    parts.append(f"evaluation {result['eval_samples_per_s']:,.1f} images/s")
    return ", ".join(parts) + ("" if result["from_hardware"] else " (NOT from hardware)")


def check_facts(session: Session) -> None:
    """Record versions, IPUs and environment; DeviceError if PopTorch cannot be used."""
    begun = session.folder / "unfinished" / "facts"
    remove(begun)
    begun.mkdir(parents=True)
    facts = session.start(Item("facts", "facts", [], [], {}), begun / "run")
    remove(begun)
    session.content["facts"] = facts
    session.save()
    if "error" in facts:
        raise DeviceError(
            f"PopTorch cannot be used: {facts['error']}. Enable the Poplar SDK, or try the script"
            " without one: PYTHONPATH=tests/fakes"
        )
    counts = facts["numbers_of_ipus_that_answer"]
    print(f"PopTorch {facts['poptorch']}, numbers of IPUs that answer: {counts or 'none'}")
    if not facts["from_hardware"]:
        print("NOT ON HARDWARE: speeds are those of the CPU, and no cycles or memory are measured")
    if not counts:
        raise DeviceError(
            "no IPU answers. See gc-monitor, and that IPUOF_VIPU_API_PARTITION_ID names your"
            f" partition; {session.out} has the environment."
        )


def measure(session: Session, items: Sequence[Item], retries: bool) -> None:
    """Measure what is not recorded yet, one after another."""
    recorded = session.content["items"]
    open_items = [
        item
        for item in items
        if not session.is_recorded(item) or (retries and "error" in recorded[item.name]["result"])
    ]
    print(
        f"{len(items)} items, {len(items) - len(open_items)} of them recorded in {session.out}\n"
        "Each compiles its graphs: minutes for ViT-B/16. The total time on hardware is unknown;\n"
        "Ctrl-C is safe, and the same command continues."
    )
    for index, item in enumerate(open_items, start=1):
        print(
            f"[{index}/{len(open_items)}] {item.name}: {item.kind}, at most"
            f" {session.minutes:g} minutes; {time.strftime('%H:%M:%S')}",
            flush=True,
        )
        print(f"    {describe(item, session.work(item))}", flush=True)


def print_table(session: Session, items: Sequence[Item]) -> None:
    """Print measured and predicted speed of the settings."""
    print(
        f"\n{'images/s':26} {'training':>10} {'predicted':>10} {'evaluation':>11} {'predicted':>10}"
    )
    for item in items:
        if item.kind not in ("training", "evaluation"):
            continue
        record = session.content["items"][item.name]
        result, predicted = record["result"], record["predicted"]
        if "error" in result:
            print(f"{item.name:26} failed: {result['error'][:90]}")
            continue
        values = [
            result.get("samples_per_s"),
            predicted.get("training", {}).get("samples_per_s"),
            result["eval_samples_per_s"],
            predicted.get("evaluation", {}).get("samples_per_s"),
        ]
        texts = ["-" if value is None else f"{value:,.1f}" for value in values]
        print(f"{item.name:26} {texts[0]:>10} {texts[1]:>10} {texts[2]:>11} {texts[3]:>10}")


def unpack(path: Path) -> int:
    """Write the run folders that a JSON file holds; return the exit status."""
    try:
        items = json.loads(path.read_text(encoding="utf-8"))["items"]
        runs = {name: item["result"]["run"] for name, item in items.items() if has_run(item)}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--unpack {path}: no readable file of this script.") from error
    folder = path.parent / f"{path.stem}_runs"
    for name, files in runs.items():
        if not re.fullmatch(r"\w+", name):
            raise ConfigError(f"--unpack {path}: {name!r} is no name of a setting.")
        (folder / name).mkdir(parents=True, exist_ok=True)
        for file in RUN_FILES:
            write_text(folder / name / file, str(files[file]))
    print(f"{len(runs)} run folders: python -m cxr_vit plan --calibrate {folder}/*")
    return 0


def has_run(item: Dict[str, Any]) -> bool:
    """Whether an item of the JSON file holds a run's files."""
    return "run" in item["result"]


def names(text: str) -> List[str]:
    """Parse --only."""
    given = text.split(",")
    unknown = sorted(set(given) - set(NAMES))
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown: {', '.join(unknown)}. Choose from {','.join(NAMES)}"
        )
    return given


def out_file(text: str) -> Path:
    """Parse --out."""
    path = Path(text)
    if path.suffix != ".json" or path.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: name a file that ends in .json")
    return path


def main(argv: Sequence[str]) -> int:
    """Measure all items; the exit status is 1 if an equality fails."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add(
        "--out",
        type=out_file,
        default=Path("ipu_first_run.json"),
        metavar="FILE.json",
        help="the results; runs, logs and reports go into the folder FILE beside it",
    )
    add(
        "--config",
        nargs="+",
        default=["configs/vit_pod4.yaml"],
        metavar="FILE|KEY=VALUE",
        help="the configuration whose settings are varied; default: %(default)s",
    )
    add("--quick", action="store_true", help=f"only {', '.join(QUICK)}")
    add("--only", type=names, metavar="NAME,...", help=f"of {', '.join(NAMES)}")
    add("--steps", type=int, default=20, metavar="N", help="weight updates of a setting")
    add("--minutes", type=float, default=90, metavar="N", help="limit of an item")
    add("--no-memory", dest="memory", action="store_false", help="no compilations with reports")
    add("--retry-failed", action="store_true", help="repeat items that failed")
    add("--unpack", type=Path, metavar="FILE", help="write the run folders that FILE holds")
    add("overrides", nargs="*", metavar="section.key=value", help="for all settings")
    arguments = parser.parse_args(argv)
    if arguments.unpack:
        return unpack(arguments.unpack)
    files, more = split_overrides(arguments.config)
    arguments.files = [str(path.absolute()) for path in files]
    arguments.overrides = [*more, *arguments.overrides]
    session = Session(arguments.out.absolute(), arguments.minutes)
    items = items_of(arguments, session.folder)
    check_facts(session)
    measure(session, items, arguments.retry_failed)
    print_table(session, items)
    print(f"\nwritten: {session.out}; logs and reports are in {session.folder}")
    if session.content["from_hardware"]:
        same_weights = f"{session.folder}/runs/base {session.folder}/runs/micro*"
        print(f"python -m cxr_vit plan --calibrate {same_weights}")
        print("Please attach the file to an issue of the project; read its `facts` first.")
    results = [session.content["items"][item.name]["result"] for item in items]
    return int(any(result.get("equal") is False for result in results))


if __name__ == "__main__":
    run(main)
