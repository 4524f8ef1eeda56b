"""Measure one item of benchmarks.ipu_first_run, in a process of its own.

    python -m benchmarks.ipu_first_run_worker JOB.json

JOB.json has `kind`, `files`, `overrides`, `folder` and `out`. Writes `out`: what was measured, or
``{"error": ...}``.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence

import torch

from benchmarks.ipu_first_run import RUN_FILES
from benchmarks.machine import describe_machine
from cxr_vit import Batch, Callback, ChestXrayDataModule, Trainer, TrainOutputs, ViTModule
from cxr_vit.cli import run
from cxr_vit.config import BatchPlan, Config, load_config
from cxr_vit.data.dataset import ChestXrayDataset
from cxr_vit.engines.base import process_peak_gib
from cxr_vit.engines.choice import build_engine, choose_engine
from cxr_vit.engines.ipu.options import on_hardware
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import CxrVitError, DeviceError
from cxr_vit.files import remove, write_text

#: Environment variables that change where or how PopTorch runs.
VARIABLES = re.compile(r"(IPUOF|POPTORCH|POPLAR|POPART|POPLIBS|POPDIST|PVTI)_")
COUNTS = (1, 2, 4, 8, 16, 32, 64)
_NO_REPORT = "PopTorch wrote no profile.pop; only a real compilation for IPUs does"
_NO_PVA = "the module pva is missing: it comes with the Poplar SDK and needs the SDK's own Python"


class Measure(Callback):
    """Record losses and times of every host call, and time a second pass of each validation."""

    def __init__(self) -> None:
        self.compile_s = 0.0
        self.losses: List[float] = []
        self.calls: List[Dict[str, float]] = []
        self.validations: List[Dict[str, Any]] = []

    def setup(self, trainer: Any, module: ViTModule, stage: str) -> None:
        """Compile the inference graph where nothing is trained; `fit` compiles both."""
        if stage == "validate":
            engine, size = trainer.engine, trainer.config.data.image_size
            images = torch.zeros(engine.local_batch.eval_host_batch_size, 1, size, size)
            start = time.perf_counter()
            engine.graphs.inference(images.to(torch.uint8))
            self.compile_s = time.perf_counter() - start

    def on_train_batch_end(
        self, trainer: Any, module: ViTModule, outputs: TrainOutputs, batch: Batch, batch_idx: int
    ) -> None:
        """Record a host call."""
        self.losses += outputs.losses.tolist()
        call = {
            "samples": outputs.num_samples,
            "seconds": outputs.seconds,
            "wait_s": outputs.wait_s,
        }
        cycles = trainer.engine.device_stats().get("perf/ipu_cycles")
        if cycles is not None:
            call["cycles"] = cycles
        self.calls.append(call)

    def on_validation_end(self, trainer: Any, module: ViTModule) -> None:
        """Record the scores and score again: the graph is compiled and attached now."""
        scored = trainer.validation_outputs
        dataset: ChestXrayDataset = trainer.datamodule.dataset("val")
        size = trainer.engine.batch.eval_host_batch_size
        start = time.perf_counter()
        trainer.engine.predict_dataset(dataset)
        self.validations.append(
            {
                "step": scored.step,
                "loss": scored.loss,
                "auroc_macro": scored.scores.get("auroc_macro"),
                "images": len(dataset),
                "images_with_padding": -(-len(dataset) // size) * size,
                "first_pass_s": scored.seconds,
                "second_pass_s": time.perf_counter() - start,
            }
        )


def take_facts(job: Dict[str, Any]) -> Dict[str, Any]:
    """Return machine, versions, IPUs and environment."""
    import poptorch

    counts = [count for count in COUNTS if poptorch.ipuHardwareIsAvailable(count)]
    return {
        **describe_machine("torch", "transformers", "numpy"),
        "poptorch": str(poptorch.__version__),
        "from_hardware": on_hardware(),
        "ipu_hardware_version": poptorch.ipuHardwareVersion() if 1 in counts else None,
        "numbers_of_ipus_that_answer": counts,
        "has_pva": importlib.util.find_spec("pva") is not None,
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if VARIABLES.match(name)
        },
    }


def fit(config: Config) -> Measure:
    """Train a new run in `run.dir`; leave what `plan --calibrate` reads, not the checkpoints."""
    measure = Measure()
    trainer = Trainer(config, callbacks=[measure])
    data = ChestXrayDataModule(config)
    trainer.fit(ViTModule(config, data), data)
    remove(trainer.run.checkpoints)
    measure.compile_s = trainer.compile_s
    return measure


def compare_engines(job: Dict[str, Any]) -> Dict[str, Any]:
    """Train on the IPUs, then with the torch engine on the CPU in fp32, and compare."""
    runs = {}
    for name, engine in (
        ("ipu", ["engine.name=poptorch"]),
        ("cpu", ["engine.name=torch", "engine.device=cpu", "engine.precision=fp32"]),
    ):
        overrides = [*job["overrides"], *engine, f"run.dir={job['folder']}/{name}"]
        runs[name] = fit(load_config(job["files"], overrides))
    ipu, cpu = runs["ipu"], runs["cpu"]
    result: Dict[str, Any] = {
        "train_loss": {name: run.losses for name, run in runs.items()},
        "validations": {name: run.validations for name, run in runs.items()},
        "difference": {"train_loss": largest(ipu.losses, cpu.losses)},
    }
    for key in ("loss", "auroc_macro"):
        values = [[scored[key] for scored in run.validations] for run in (ipu, cpu)]
        if None not in values[0] + values[1]:
            result["difference"][f"val_{key}"] = largest(*values)
    tolerance = job["tolerance"]["hardware" if on_hardware() else "other"]
    if tolerance is not None:
        differences = [result["difference"][key] for key in ("train_loss", "val_loss")]
        result.update(tolerance=tolerance, equal=max(differences) <= tolerance)
    return result


def largest(left: Sequence[float], right: Sequence[float]) -> float:
    """Return the largest difference of two lists of the same length."""
    assert len(left) == len(right), (left, right)
    return max(abs(a - b) for a, b in zip(left, right))


def measure_training(job: Dict[str, Any]) -> Dict[str, Any]:
    """Compile and train; time every host call but the first."""
    config = load_config(job["files"], [*job["overrides"], f"run.dir={job['folder']}"])
    measure = fit(config)
    later = measure.calls[1:]
    busy_s, wait_s = (sum(call[key] for call in later) for key in ("seconds", "wait_s"))
    samples = sum(call["samples"] for call in later)
    cycles = [call["cycles"] for call in later if "cycles" in call] if on_hardware() else []
    folder = Path(job["folder"])
    return {
        "compile_s": measure.compile_s,
        "samples_per_s": samples / (busy_s + wait_s) if later else None,
        "samples_per_s_without_wait": samples / busy_s if later else None,
        "cycles_per_call": sorted(cycles)[len(cycles) // 2] if cycles else None,
        "updates_per_call": config.batch.device_iterations,
        "calls": measure.calls,
        "losses": measure.losses,
        **_evaluation(measure),
        "run": {name: (folder / name).read_text(encoding="utf-8") for name in RUN_FILES},
    }


def measure_evaluation(job: Dict[str, Any]) -> Dict[str, Any]:
    """Compile the inference graph only and score the validation images twice."""
    config = load_config(job["files"], job["overrides"])
    measure = Measure()
    data = ChestXrayDataModule(config)
    Trainer(config, callbacks=[measure]).validate(ViTModule(config, data), data)
    return {"compile_s": measure.compile_s, **_evaluation(measure)}


def _evaluation(measure: Measure) -> Dict[str, Any]:
    """Return the speed with the padding of the last host batch, as the planner predicts it."""
    last = measure.validations[-1]
    return {
        "eval_images": last["images"],
        "eval_images_with_padding": last["images_with_padding"],
        "eval_samples_per_s": last["images_with_padding"] / last["second_pass_s"],
    }


def measure_memory(job: Dict[str, Any]) -> Dict[str, Any]:
    """Compile for an IPU that need not be there, with a report, and read memory from the report.

    A graph that does not fit leaves a report too.
    """
    folder = Path(job["folder"])
    # The report of the graph needs no instrumentation on the device; that of its execution does.
    os.environ["POPLAR_ENGINE_OPTIONS"] = '{"autoReport.outputExecutionProfile":"false"}'
    own = [f"engine.profile_dir={folder}", "engine.log_cycles=false"]
    config = load_config(job["files"], [*job["overrides"], *own])
    result: Dict[str, Any] = {}
    try:
        result["compile_with_report_s"] = compile_offline(config)
    except DeviceError as error:
        result["error"] = one_line(error)
    for graph in ("training", "inference"):
        result[graph] = read_report(folder / graph / "profile.pop")
    return result


def compile_offline(config: Config) -> float:
    """Compile both graphs without attaching to an IPU; return the seconds that took."""
    launch, batch, module = Launch(), BatchPlan.from_section(config.batch), ViTModule(config)
    choice = choose_engine(config, launch, offline=True)
    module.setup(for_ipu=True)
    with build_engine(config, module, choice, batch, launch, offline=True) as engine:
        size, image_size = engine.local_batch.host_batch_size, config.data.image_size
        example = Batch.zeros(size, image_size=image_size, num_classes=len(module.names))
        return engine.compile(example)


def read_report(path: Path) -> Dict[str, Any]:
    """Return memory per IPU of a compiled graph, bytes, from Poplar's report."""
    if not path.is_file():
        return {"not_measured": _NO_REPORT}
    try:
        pva = importlib.import_module("pva")
    except ImportError:
        return {"not_measured": _NO_PVA, "report": str(path)}
    report = pva.openReport(str(path))
    compilation, target = report.compilation, report.compilation.target
    ipus = []
    for ipu in compilation.ipus:
        with_gaps = [int(tile.memory.total.includingGaps) for tile in ipu.tiles]
        used = [int(tile.memory.total.excludingGaps) for tile in ipu.tiles]
        ipus.append(
            {
                "tiles": len(used),
                "total_bytes": sum(used),
                "total_bytes_with_gaps": sum(with_gaps),
                "fullest_tile_bytes": max(used),
                "fullest_tile_bytes_with_gaps": max(with_gaps),
            }
        )
    return {
        "poplar": str(report.poplarVersion.string),
        "clock_hz": float(target.clockFrequency),
        "bytes_per_tile": int(target.bytesPerTile),
        "ipus": ipus,
    }


KINDS: Dict[str, Callable[[Dict[str, Any]], Dict[str, Any]]] = {
    "facts": take_facts,
    "equality": compare_engines,
    "training": measure_training,
    "evaluation": measure_evaluation,
    "memory": measure_memory,
}


def one_line(error: BaseException) -> str:
    """Return the message of an error in one line of a limited length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 500 else f"{text[:500]} ..."


def main(argv: Sequence[str]) -> int:
    """Measure, and write the result or the error; return 1 if there is an error."""
    job = json.loads(Path(argv[0]).read_text(encoding="utf-8"))
    start = time.perf_counter()
    result: Dict[str, Any] = {}
    try:
        result = KINDS[job["kind"]](job)
    except Exception as error:
        result = {"error": one_line(error), "error_class": type(error).__name__}
        if not isinstance(error, CxrVitError):
            raise
    finally:
        with contextlib.suppress(ImportError):
            result.setdefault("from_hardware", on_hardware())
        result["peak_host_memory_gib"] = process_peak_gib()
        result["seconds"] = time.perf_counter() - start
        write_text(Path(job["out"]), json.dumps(result))
    if "error" in result:
        print(f"ERROR: {result['error']}", file=sys.stderr)
    return int("error" in result)


if __name__ == "__main__":
    run(main)
