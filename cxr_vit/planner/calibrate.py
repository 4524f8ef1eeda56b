"""Refits the constants of the speed to runs of one's own, from what they logged.

Imports no torch.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from cxr_vit.config import Config, load_config
from cxr_vit.console import columns, prose, signed_percent
from cxr_vit.errors import ConfigError
from cxr_vit.planner.estimate import choose_hardware
from cxr_vit.planner.hardware import Hardware
from cxr_vit.planner.speed import Measured, SpeedModel, Workload, fit, published_model, workload

__all__ = ["Calibration", "RunSpeed", "calibrate", "calibration_lines", "config_of_run"]

_SPEED, _WAIT, _CYCLES = "perf/samples_per_s", "perf/data_wait_pct", "perf/ipu_cycles"


class RunSpeed(NamedTuple):
    """A run's own speed: the seconds of an update without waiting for data, the median."""

    name: str
    device: str
    work: Workload
    seconds: float


class Calibration(NamedTuple):
    """The runs, and the constants before and after they were fitted to them."""

    runs: List[RunSpeed]
    before: SpeedModel
    after: SpeedModel


def config_of_run(folder: Path, overrides: Sequence[str] = ()) -> Config:
    """Return a run's configuration, its engine the one that ran it.

    Raises
    ------
    ConfigError
        If the folder holds no run.
    """
    return _read_run(folder, overrides)[0]


def calibrate(folders: Sequence[Path], overrides: Sequence[str] = ()) -> Calibration:
    """Fit the constants to the logs of runs.

    With runs of one kind both constants are scaled by one factor; runs of unlike micro-batches tell
    them apart.

    Parameters
    ----------
    folders
        The runs' folders.
    overrides
        Of their configurations, such as ``planner.hardware=bow``.

    Raises
    ------
    ConfigError
        If a folder holds no run, a run logged no speed, or they were made on unlike devices.
    """
    runs = [_measure(folder, overrides) for folder in folders]
    hardware = runs[0].work.hardware
    for run in runs[1:]:
        if _kind(run.device) != _kind(runs[0].device):
            raise ConfigError(
                f"{runs[0].name} ran on {_kind(runs[0].device)} and {run.name} on"
                f" {_kind(run.device)}: one device has one set of constants. Calibrate them one at"
                " a time."
            )
    before = published_model(hardware)
    names = ", ".join(run.name for run in runs)
    measured = [Measured(run.work, run.seconds) for run in runs]
    after = fit(measured, before, f"fitted to {names}")
    if after.efficiency > 1:
        raise ConfigError(
            f"{names}: as fast as {100 * after.efficiency:,.0f} % of the peak of {hardware.name}"
            " would be. Is it another device (--hardware)?"
        )
    return Calibration(runs, before, after)


def _kind(device: str) -> str:
    """Return what a run was on, of the line that its engine says of itself."""
    found = re.search(r"engine on (?:\d+ )?(.+?)(?: \(| in )", device)
    return found.group(1) if found else device


def _read_run(folder: Path, overrides: Sequence[str]) -> Tuple[Config, str]:
    """Return a run's configuration and the line that says what it ran on."""
    if not (folder / "config.yaml").is_file():
        what = "it has no config.yaml" if folder.is_dir() else "there is no such folder"
        raise ConfigError(f"--calibrate {folder}: {what}. Give a run's folder, e.g. runs/<name>.")
    try:
        environment: Dict[str, Any] = json.loads(
            (folder / "environment.json").read_text(encoding="utf-8")
        )
        device = str(environment["device"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"--calibrate {folder}: its environment.json does not say what it ran on."
        ) from error
    ran = [f"engine.name={device.split(' ')[0]}"]  # "torch engine on CPU in fp32 (...)"
    precision = re.search(r" in (fp32|bf16|fp16)\b", device)
    if precision:
        ran.append(f"engine.precision={precision.group(1)}")
    return load_config([folder / "config.yaml"], [*ran, *overrides]), device


def _measure(folder: Path, overrides: Sequence[str]) -> RunSpeed:
    config, device = _read_run(folder, overrides)
    hardware = choose_hardware(config)
    if hardware.is_ipu != (config.engine.name == "poptorch"):
        raise ConfigError(
            f"--calibrate {folder}: it ran on {_kind(device)}, and that tells nothing of"
            f" {hardware.name}. Leave --hardware out, or give runs on that device."
        )
    work = workload(config, hardware)
    seconds = _update_seconds(folder, work, hardware, config.batch.device_iterations)
    return RunSpeed(folder.name, device, work, seconds)


def _update_seconds(
    folder: Path, work: Workload, hardware: Hardware, device_iterations: int
) -> float:
    """Return the median over the log's events but the first, in which things warm up."""
    path = folder / "metrics.jsonl"
    # A killed run's last line may end in half a character.
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = [_seconds_of(line, work, hardware, device_iterations) for line in text.splitlines()]
    seconds = [value for value in found if value is not None]
    if not seconds:
        raise ConfigError(
            f"--calibrate {folder}: no {_SPEED} in its metrics.jsonl. Let it train for more steps"
            " than train.log_every_steps."
        )
    median = statistics.median(seconds[1:] or seconds)
    if median <= max(work.update_s):
        raise ConfigError(
            f"--calibrate {folder}: an update took {1e3 * median:.3g} ms, less than"
            f" {hardware.name} is predicted to take for the weights alone. Is it another device"
            " (--hardware)?"
        )
    return median


def _seconds_of(
    line: str, work: Workload, hardware: Hardware, device_iterations: int
) -> Optional[float]:
    """Return the seconds of an update, by the device's own clock where it was counted.

    None where a line of the log does not tell them.
    """
    try:
        event = json.loads(line)
        cycles = event.get(_CYCLES)
        if cycles:
            return float(cycles) / hardware.clock_hz.value / device_iterations
        busy = 1 - float(event.get(_WAIT) or 0.0) / 100
        seconds = work.samples / float(event[_SPEED]) * busy
    except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError):
        return None  # another event, or the half line of a killed run
    return seconds if math.isfinite(seconds) and seconds > 0 else None


def calibration_lines(calibration: Calibration) -> List[str]:
    """Hold the runs' measured speed against what was and what is now predicted."""
    rows = [["run", "measured", "published constants", "refitted", "measured over it"]]
    for run in calibration.runs:
        refitted_s = run.work.seconds(calibration.after)
        rows.append(
            [
                run.name,
                f"{run.work.samples / run.seconds:,.1f}",
                f"{run.work.samples / run.work.seconds(calibration.before):,.1f}",
                f"{run.work.samples / refitted_s:,.1f}",
                signed_percent(refitted_s / run.seconds - 1),
            ]
        )
    lines = ["calibration, samples/s without waiting for data", *columns(rows)]
    for run in calibration.runs:
        lines += prose("", f"{run.name}: {run.device.split(' (')[0]}")
    if any(" on CPU " in run.device for run in calibration.runs):
        name = calibration.runs[0].work.hardware.name
        lines += prose("", f"The times are a CPU's; memory below is the {name}'s, of the table.")
    return lines
