"""Summarise finished runs: read their files, group those that differ in the seed only, and compare.

A value that is undefined in a run stays None; means are over the runs where it is defined, and
their number is given.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from matplotlib.figure import Figure

from cxr_vit.checkpoint_files import CONFIG
from cxr_vit.config import Config, read_config
from cxr_vit.config.fields import less_is_better
from cxr_vit.errors import ConfigError, DataError
from cxr_vit.files import is_lock_file
from cxr_vit.regular_files import MOST_METRICS, read_bytes, read_json

#: Bytes of a metrics.jsonl and of an environment.json.
_MOST_EVENTS, _MOST_JSON = 2**26, 2**22
#: Settings in which the runs of one group may differ: seed, names, folders, and what only changes
#: how images are read.
_OF_RUN = {
    "run.seed", "run.name", "run.dir", "run.root", "data.root", "data.images", "data.cache",
    "data.cache_dir", "data.cache_workers", "data.num_workers", "data.worker_timeout_s",
    "engine.executable_cache", "engine.profile_dir", "loggers",
}  # fmt: skip
_MACRO, _OF_LABEL = "val/auroc_macro", "val/auroc/"
#: Columns of numbers of a run, and their headings.
MEASURES = {
    "val_auroc": "val AUROC",
    "test_auroc": "test AUROC",
    "images_per_s": "images/s",
    "minutes": "minutes",
}
_STYLES = "os^Dv<>pP*"


class UnusableRun(Exception):
    """A folder is no run that can be summarised; the message says why."""


class Run(NamedTuple):
    """What is known of a run; a score is None where it is undefined.

    `minutes` are those of the training without validations. `test` are the scores by label of
    `report/metrics.json`, None if there is no report of the test split, and `doubts` what it was
    scored otherwise with. `facts` are the hashes of the data.
    """

    path: Path
    config: Config
    best_step: int
    last_step: int
    val_auroc: Optional[float]
    test_auroc: Optional[float]
    images_per_s: Optional[float]
    minutes: Optional[float]
    val: Dict[str, Optional[float]]
    test: Optional[Dict[str, Optional[float]]]
    doubts: List[str]
    facts: Dict[str, Any]


class Spread(NamedTuple):
    """Mean, standard deviation (n - 1), smallest and largest of the defined values."""

    num_defined: int
    num_undefined: int
    mean: Optional[float]
    sd: Optional[float]
    smallest: Optional[float]
    largest: Optional[float]

    @classmethod
    def of(cls, values: Sequence[Optional[float]]) -> Spread:
        """Describe values, of which some may be None."""
        known = [value for value in values if value is not None]
        undefined = len(values) - len(known)
        if not known:
            return cls(0, undefined, None, None, None, None)
        sd = statistics.stdev(known) if len(known) > 1 else None
        return cls(len(known), undefined, statistics.fmean(known), sd, min(known), max(known))


class Group(NamedTuple):
    """Runs whose configurations differ in seed, name and folders only.

    `name` is a letter, `settings` what the configuration has where groups differ.
    """

    name: str
    runs: List[Run]
    settings: Dict[str, str]

    def spread(self, measure: str) -> Spread:
        """Describe one of `MEASURES`; a run without a report has no test AUROC to be undefined."""
        runs = [run for run in self.runs if run.test is not None or measure != "test_auroc"]
        return Spread.of([getattr(run, measure) for run in runs])

    def of_label(self, split: str, name: str) -> Spread:
        """Describe the AUROC of a label in ``"val"`` or ``"test"``."""
        return Spread.of([(getattr(run, split) or {}).get(name) for run in self.runs])


# Reading


def read_run(path: Path) -> Run:
    """Read the files of a run's folder. Raises UnusableRun with the reason."""
    if not (path / CONFIG).is_file():
        raise UnusableRun(f"it is no run's folder: it has no {CONFIG}")
    if is_lock_file(path / ".lock"):
        raise UnusableRun("it is being written, or was killed before it ended")
    try:
        config = read_config([path / CONFIG])
    except ConfigError as error:
        raise UnusableRun(str(error).split("\n")[0]) from error
    events = _events(path / "metrics.jsonl")
    scored = [event for event in events if _MACRO in event]
    if not scored:
        raise UnusableRun("metrics.jsonl has no validation: it has not come that far")
    best = _best(scored, config.train.monitor)
    speeds = [event for event in events if event.get("perf/samples_per_s")]
    test = _test_scores(path / "report" / "metrics.json")
    labels = {tag[len(_OF_LABEL) :]: best[tag] for tag in best if tag.startswith(_OF_LABEL)}
    return Run(
        path=path,
        config=config,
        best_step=int(best["step"]),
        last_step=int(max(event["step"] for event in events)),
        val_auroc=best[_MACRO],
        test_auroc=test["auroc_macro"] if test else None,
        images_per_s=_images_per_s(speeds),
        minutes=_minutes(speeds, config.batch.images_per_update),
        val=labels,
        test=test["auroc"] if test else None,
        doubts=_doubts(test, config, int(best["step"])) if test else [],
        facts=_data_facts(path / "environment.json"),
    )


def _events(path: Path) -> List[Dict[str, Any]]:
    """Return the events of metrics.jsonl; a last line may be incomplete, as a kill leaves it."""
    try:
        lines = read_bytes(path, limit=_MOST_EVENTS).split(b"\n")
    except OSError as error:
        raise UnusableRun(f"{path.name}: {error.strerror or error}") from error
    events: List[Dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or not _is_step(event.get("step")):
                raise ValueError
            if not all(value is None or _is_number(value) for value in event.values()):
                raise ValueError
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise UnusableRun(f"{path.name}, line {number}: damaged") from error
        events.append(event)
    return events


def _best(scored: Sequence[Dict[str, Any]], monitor: str) -> Dict[str, Any]:
    """Return the first event with the best score, as training chooses; else the last one."""
    tag, sign = f"val/{monitor}", -1.0 if less_is_better(monitor) else 1.0
    defined = [event for event in scored if event.get(tag) is not None]
    return max(defined, key=lambda event: sign * float(event[tag])) if defined else scored[-1]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**8


def _images_per_s(speeds: Sequence[Dict[str, Any]]) -> Optional[float]:
    return statistics.median(event["perf/samples_per_s"] for event in speeds) if speeds else None


def _minutes(speeds: Sequence[Dict[str, Any]], images: int) -> Optional[float]:
    """Add up the time of the logged windows, each of `images` per step."""
    if not speeds:
        return None
    steps = [0, *(event["step"] for event in speeds)]
    windows = zip(speeds, steps, steps[1:])
    return sum((b - a) * images / event["perf/samples_per_s"] for event, a, b in windows) / 60


def _test_scores(path: Path) -> Optional[Dict[str, Any]]:
    """Return macro AUROC, AUROC by label, and step; None without a report of the test split."""
    try:
        found = read_json(path, limit=MOST_METRICS)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UnusableRun(f"report/{path.name}: {reason}") from error
    if found.get("split") != "test":
        return None
    macro, each, step = (found.get(key) for key in ("auroc_macro", "auroc", "step"))
    values = [macro, *(each.values() if isinstance(each, dict) else ["?"])]
    if not _is_step(step) or not all(value is None or _is_number(value) for value in values):
        raise UnusableRun(f"report/{path.name} is damaged. Run evaluate.py again")
    return {**found, "auroc_macro": macro, "auroc": each, "step": step}


def _doubts(report: Mapping[str, Any], config: Config, best_step: int) -> List[str]:
    """Return what makes a report's scores others than those of the run."""
    lines, views = [], report.get("views", "center")
    if report["step"] != best_step:
        lines.append(f"its report is of step {report['step']}, not of the best one")
    if views != config.evaluation.views:
        lines.append(f"its report has evaluation.views={views}, its configuration another")
    if report.get("changed_since_training"):
        changed = ", ".join(map(str, report["changed_since_training"]))
        lines.append(f"its report is of other data than the training: {changed} changed")
    return lines


def _data_facts(path: Path) -> Dict[str, Any]:
    """Return the hashes of the data; empty if environment.json cannot be read."""
    try:
        found = read_json(path, limit=_MOST_JSON)
    except (OSError, ValueError):
        return {}
    return {key: found.get(key) for key in ("csv_sha256", "split_sha256")}


# Groups


def make_groups(runs: Sequence[Run]) -> List[Group]:
    """Group runs by configuration, in the order of the runs.

    Raises DataError if runs have different labels: their means could not be compared.
    """
    for run in runs[1:]:
        if list(run.val) != list(runs[0].val):
            differing = sorted(set(run.val) ^ set(runs[0].val)) or ["their order"]
            raise DataError(
                f"{runs[0].path} and {run.path} have different labels ({', '.join(differing[:5])})."
                " Summarise runs of the same labels."
            )
    flat = [run.config.flat() for run in runs]
    differing = sorted(
        key for key in flat[0] if key not in _OF_RUN and len({str(f[key]) for f in flat}) > 1
    )
    members: Dict[Tuple[str, ...], List[Run]] = {}
    for run, values in zip(runs, flat):
        members.setdefault(tuple(str(values[key]) for key in differing), []).append(run)
    return [
        Group(_letter(index), group, dict(zip(differing, key)))
        for index, (key, group) in enumerate(members.items())
    ]


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"{chr(ord('A') + index % 26)}{index // 26}"


def warnings_of(groups: Sequence[Group]) -> List[str]:
    """Return lines about what makes a comparison doubtful."""
    runs = [run for group in groups for run in group.runs]
    lines = []
    for key, what in (("csv_sha256", "labels"), ("split_sha256", "images in their splits")):
        if len({str(run.facts.get(key)) for run in runs}) > 1:
            lines.append(f"not all runs have the same {what}: their scores differ for that, too")
    for group in groups:
        if len({run.last_step for run in group.runs}) > 1:
            steps = ", ".join(str(run.last_step) for run in group.runs)
            lines.append(f"the runs of {group.name} ended at different steps: {steps}")
        seeds = [run.config.run.seed for run in group.runs]
        if len(set(seeds)) < len(seeds):
            lines.append(f"runs of {group.name} have the same run.seed: {seeds}")
    return lines + [f"{run.path}: {doubt}" for run in runs for doubt in run.doubts]


def difference(group: Group, first: Group, measure: str) -> Optional[Dict[str, Optional[float]]]:
    """Return the difference of the means and its standard error; None if one is undefined."""
    own, other = group.spread(measure), first.spread(measure)
    if own.mean is None or other.mean is None:
        return None
    error = None
    if own.sd is not None and other.sd is not None:
        error = math.sqrt(own.sd**2 / own.num_defined + other.sd**2 / other.num_defined)
    return {"mean": own.mean - other.mean, "standard_error": error}


def label_split(groups: Sequence[Group]) -> str:
    """Return the split of the scores by label: test if every run has a report of it, else val."""
    return "test" if all(run.test for group in groups for run in group.runs) else "val"


def summary_of(groups: Sequence[Group]) -> Dict[str, Any]:
    """Return what summary.json holds."""
    split = label_split(groups)
    labels = list(groups[0].runs[0].val)
    return {
        "groups": [
            {
                "name": group.name,
                "settings": group.settings,
                "runs": [row_of(run) for run in group.runs],
                **{measure: group.spread(measure)._asdict() for measure in MEASURES},
                "split_of_labels": split,
                "labels": {name: group.of_label(split, name)._asdict() for name in labels},
            }
            for group in groups
        ],
        "differences": [
            {
                "of": group.name,
                "to": groups[0].name,
                **{
                    name: difference(group, groups[0], name) for name in ("val_auroc", "test_auroc")
                },
            }
            for group in groups[1:]
        ],
        "warnings": warnings_of(groups),
    }


def row_of(run: Run) -> Dict[str, Any]:
    """Return the numbers of a run, for tables."""
    steps = {"best_step": run.best_step, "last_step": run.last_step}
    measures = {measure: getattr(run, measure) for measure in MEASURES}
    return {"run": str(run.path), "seed": run.config.run.seed, **steps, **measures}


def summary_figure(groups: Sequence[Group]) -> Figure:
    """Draw the AUROC of each label: a point for each run, mean and standard deviation beside it."""
    split, labels = label_split(groups), list(groups[0].runs[0].val)
    rows = ["mean of findings", *labels]
    height = 0.9 + len(rows) * max(0.28, 0.16 * len(groups))
    figure = Figure(figsize=(7.5, height), dpi=120, layout="constrained")
    axis = figure.subplots()
    for index, group in enumerate(groups):
        offset = (index - (len(groups) - 1) / 2) * 0.8 / len(groups)
        spreads = [group.spread(f"{split}_auroc"), *(group.of_label(split, n) for n in labels)]
        color, style = f"C{index % 10}", _STYLES[index % len(_STYLES)]
        for run in group.runs:
            macro = getattr(run, f"{split}_auroc")
            values = [macro, *((getattr(run, split) or {}).get(name) for name in labels)]
            points = [(v, y + offset) for y, v in enumerate(values) if v is not None]
            axis.plot(*zip(*points), style, color=color, markersize=3.5, alpha=0.45, linestyle="")
        means = [(s.mean, y + offset, s.sd or 0.0) for y, s in enumerate(spreads) if s.num_defined]
        name = f"{group.name}: {len(group.runs)} run{'s' if len(group.runs) > 1 else ''}"
        x, y, sd = zip(*means) if means else ((), (), ())
        axis.errorbar(x, y, xerr=sd, fmt="|", color=color, markersize=9, capsize=2.5, label=name)
    axis.axvline(0.5, color="0.8", linewidth=1, zorder=0)
    axis.set_yticks(range(len(rows)))
    axis.set_yticklabels(rows, fontsize=8, parse_math=False)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.axhline(0.5, color="0.8", linewidth=0.8)
    axis.grid(axis="x", color="0.92")
    axis.set_axisbelow(True)
    axis.set_xlabel(f"AUROC on {split}; lines: mean and standard deviation over the runs")
    axis.legend(loc="best", fontsize=8)
    return figure
