"""Fit the constants of the speed to logged runs."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

from cxr_vit.config import Config, read_config
from cxr_vit.console import columns, percent, prose, signed_percent
from cxr_vit.errors import ConfigError
from cxr_vit.planner.estimate import speed_of
from cxr_vit.planner.hardware import Target, make_target
from cxr_vit.planner.speed import RELATIVE, Measured, SpeedModel, Workload, fit, workload

_SPEED, _WAIT, _CYCLES = "perf/samples_per_s", "perf/data_wait_pct", "perf/ipu_cycles"
#: Fields of environment.json["engine"] that are read.
_FACTS = ("name", "device", "precision")


class Calibration(NamedTuple):
    """Runs, and the constants before and after they were fitted to them."""

    runs: List[Measured]
    before: SpeedModel
    after: SpeedModel

    def target_for(self, planned: Target) -> Target:
        """Return what is planned for, with the runs' name of the device and their precision.

        Raises ConfigError if the runs had another engine, device or precision.
        """
        advice = (
            "Plan a configuration of the runs' engine (engine.name, engine.device,"
            " engine.precision, --hardware); planner.device_memory_gib plans for a GPU that is not"
            " in this machine."
        )
        _check_alike(self.runs[0], planned, "the configuration is planned for", advice)
        target = self.runs[0].work.target
        return planned._replace(name=target.name, precision=target.precision)


def _check_alike(run: Measured, other: Target, what: str, advice: str) -> None:
    """Raise if engine, device or precision differ; what is unknown does not."""
    own = run.work.target
    is_unnamed = own.kind == other.kind and "GPU" in (own.name, other.name)
    is_open = "auto" in (own.precision, other.precision)
    differing = {
        "engine": own.engine != other.engine,
        "device": own.name != other.name and not is_unnamed,
        "precision": own.precision != other.precision and not is_open,
    }
    names = ", ".join(name for name, differs in differing.items() if differs)
    if names:
        raise ConfigError(
            f"--calibrate: {run.name} is a run of {own.describe()}, and {what} {other.describe()}:"
            f" they differ in {names}. {advice}"
        )


def config_of_run(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """Return a run's configuration, with the engine that ran it."""
    return _read_run(folder, overrides)[0]


def calibrate(folders: Sequence[Path], overrides: Sequence[str] = ()) -> Calibration:
    """Fit the constants to the logs of runs; overrides may name their IPU (`planner.hardware`).

    Raises ConfigError if a folder holds no run, a run logged no speed, or the runs differ in
    engine, device or precision.
    """
    runs = [_measure(folder, overrides) for folder in folders]
    target = runs[0].work.target
    advice = "Constants hold for one engine, device and precision; calibrate such runs separately."
    for run in runs[1:]:
        _check_alike(runs[0], run.work.target, f"{run.name} of", advice)
    before = speed_of(target)
    after = fit(runs, before)
    if target.ipu:
        part = after.constants.flops_per_s / target.ipu.peak_flops(target.precision)
        if part > 1:
            raise ConfigError(
                f"{', '.join(run.name for run in runs)}: this speed needs {100 * part:,.0f} % of"
                f" the peak of {target.name}. Is it another device (--hardware)?"
            )
    return Calibration(runs, before, after)


def _read_run(folder: Path, overrides: Sequence[str]) -> Tuple[Config, Target]:
    """Return a run's configuration and what it ran on."""
    if not (folder / "config.yaml").is_file():
        what = "it has no config.yaml" if folder.is_dir() else "there is no such folder"
        raise ConfigError(f"--calibrate {folder}: {what}. Give a run's folder, e.g. runs/<name>.")
    facts = _read_facts(folder)
    name, device, precision = (str(facts[key]) for key in _FACTS)
    ran = [f"engine.name={name}", f"engine.precision={precision}"]
    if name != "poptorch":
        ran.append(f"engine.device={'cpu' if device == 'CPU' else 'cuda'}")
    config = read_config([folder / "config.yaml"], [*ran, *overrides])
    return config, make_target(name, device, precision, config.planner.hardware)


def _read_facts(folder: Path) -> Any:
    try:
        environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"--calibrate {folder}: its environment.json is missing or unreadable. Give another"
            " run."
        ) from error
    facts = environment.get("engine") if isinstance(environment, dict) else None
    if not isinstance(facts, dict) or not set(_FACTS) <= set(facts):
        raise ConfigError(
            f"--calibrate {folder}: its environment.json does not name engine, device and"
            " precision: the run was written by an older version. Repeat it for a few steps:"
            f" python train.py --config {folder / 'config.yaml'}"
        )
    if facts.get("hardware") is False:
        raise ConfigError(
            f"--calibrate {folder}: the run was not on IPUs: a stand-in for PopTorch computed on"
            " the CPU. Give a run on IPUs."
        )
    return facts


def _measure(folder: Path, overrides: Sequence[str]) -> Measured:
    """Take the median over the log's events but the first, in which caches warm up."""
    config, target = _read_run(folder, overrides)
    work, iterations = workload(config, target), config.batch.device_iterations
    path = folder / "metrics.jsonl"
    # The last line of a killed run may end in half a character.
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = [_seconds_of(line, work, iterations) for line in text.splitlines()]
    seconds = [value for value in found if value is not None]
    if not seconds:
        raise ConfigError(
            f"--calibrate {folder}: no {_SPEED} in its metrics.jsonl. Train for more steps than"
            " train.log_every_steps."
        )
    seconds = seconds[1:] or seconds
    median = statistics.median(seconds)
    if median <= work.update_s:
        raise ConfigError(
            f"--calibrate {folder}: an update took {1e3 * median:.3g} ms, less than"
            f" {work.target.name} is predicted to take for the weights alone. Is it another device"
            " (--hardware)?"
        )
    scatter = statistics.median(abs(value - median) for value in seconds) / median
    return Measured(folder.name, work, median, scatter)


def _seconds_of(line: str, work: Workload, device_iterations: int) -> Optional[float]:
    """Return the seconds per update of a log line, or None if it has none.

    The device's own cycle count wins over the host's clock.
    """
    try:
        event = json.loads(line)
        cycles = event.get(_CYCLES)
        if cycles and work.target.ipu:
            return float(cycles) / work.target.ipu.clock_hz.value / device_iterations
        busy = 1 - float(event.get(_WAIT) or 0.0) / 100
        seconds = work.batch.global_batch_size / float(event[_SPEED]) * busy
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return None  # another event, or the half line of a killed run
    return seconds if math.isfinite(seconds) and seconds > 0 else None


def calibration_lines(calibration: Calibration) -> List[str]:
    """Compare the measured speed of the runs with the one predicted before and after."""
    rows = [["run", "measured", "published constants", "fitted", "measured over it"]]
    for name, work, seconds, _ in calibration.runs:
        images = work.batch.global_batch_size
        measured, fitted = images / seconds, images / work.seconds(calibration.after.constants)
        published = f"{images / work.seconds(calibration.before.constants):,.1f}"
        if calibration.before is RELATIVE:
            published = "none"
        row = [name, f"{measured:,.1f}", published, f"{fitted:,.1f}"]
        # One factor meets one run exactly, which shows nothing.
        is_alone = len(calibration.runs) == 1
        rows.append([*row, "-" if is_alone else signed_percent(measured / fitted - 1)])
    ran, error = calibration.runs[0].work.target.describe(), percent(calibration.after.error)
    text = f"{ran}; predictions are stated with an error of {error} either way"
    lines = ["calibration, samples/s without waiting for data", *columns(rows)]
    return [*lines, *prose("", text)]
