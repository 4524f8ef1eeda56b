"""The tables and files of `summarize`: runs, groups of runs, and their difference."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import List, Optional, Sequence

import pandas as pd
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cxr_vit.data.text_files import write_csv
from cxr_vit.errors import DataError
from cxr_vit.evaluation.summary import (
    MEASURES,
    Group,
    Run,
    Spread,
    UnusableRun,
    difference,
    label_split,
    make_groups,
    read_run,
    row_of,
    summary_figure,
    summary_of,
    warnings_of,
)
from cxr_vit.files import make_folder, replacing, write_text

logger = logging.getLogger(__name__)

_DIGITS = {"images_per_s": 1, "minutes": 1}


def summarize_runs(paths: Sequence[Path], out: Optional[Path]) -> Path:
    """Print the tables and write the files; return their folder."""
    groups = make_groups(_read(paths))
    folder = make_folder(out, _beside(paths) / "summary")
    console = Console()
    console.print(_runs_table(groups))
    console.print(_groups_table(groups))
    console.print(_labels_table(groups))
    for line in [*_describe(groups), *warnings_of(groups)]:
        console.print(line, markup=False, highlight=False)
    _write(folder, groups)
    return folder


def _read(paths: Sequence[Path]) -> List[Run]:
    """Read the runs; leave out those that cannot be used, with a warning."""
    unique = {path.resolve(): path for path in reversed(paths)}
    found = [_run_or_none(path) for path in reversed(list(unique.values()))]
    runs = [run for run in found if run is not None]
    if not runs:
        raise DataError("no run is left to summarise. Give the folders of finished runs.")
    return runs


def _run_or_none(path: Path) -> Optional[Run]:
    try:
        return read_run(path)
    except UnusableRun as error:
        logger.warning("%s is left out: %s", path, error)
        return None


def _beside(paths: Sequence[Path]) -> Path:
    """Return the folder that all runs are in."""
    parents = [str(path.absolute().parent) for path in paths]
    common = Path(os.path.commonpath(parents))
    here = Path.cwd()
    return common.relative_to(here) if here in [common, *common.parents] else common


def _runs_table(groups: Sequence[Group]) -> Table:
    table = Table(title="runs")
    table.add_column("run", overflow="fold")
    for heading in ("group", "seed", "best step", *MEASURES.values()):
        table.add_column(heading, justify="right")
    for group in groups:
        for run in group.runs:
            row = row_of(run)
            numbers = [_number(row[measure], _digits(measure)) for measure in MEASURES]
            names = [escape(run.path.name), group.name, str(row["seed"]), str(run.best_step)]
            table.add_row(*names, *numbers)
    return table


def _groups_table(groups: Sequence[Group]) -> Table:
    table = Table(title="over the runs of a group")
    table.add_column("group")
    for heading in ("measure", "runs", "mean", "sd", "min", "max"):
        table.add_column(heading, justify="right")
    for group in groups:
        for measure, heading in MEASURES.items():
            spread, digits = group.spread(measure), _digits(measure)
            values = (spread.mean, spread.sd, spread.smallest, spread.largest)
            numbers = [_number(value, digits) for value in values]
            table.add_row(group.name, heading, _count(spread, len(group.runs)), *numbers)
        table.add_section()
    return table


def _labels_table(groups: Sequence[Group]) -> Table:
    split = label_split(groups)
    table = Table(title=f"AUROC on {split}, mean and standard deviation")
    table.add_column("finding", no_wrap=True)
    for group in groups:
        table.add_column(group.name, justify="right")
    for name in groups[0].runs[0].val:
        spreads = [group.of_label(split, name) for group in groups]
        table.add_row(escape(name), *map(_mean_and_sd, spreads))
    return table


def _describe(groups: Sequence[Group]) -> List[str]:
    """Return lines: in what the groups differ, and by how much."""
    if len(groups) == 1 and len(groups[0].runs) == 1:
        return []
    if len(groups) == 1:
        return ["the configurations differ in seed, name and folders only"]
    lines = []
    for group in groups:
        settings = ", ".join(f"{key}={value}" for key, value in group.settings.items())
        lines.append(f"{group.name}: {settings}")
    for group in groups[1:]:
        for measure in ("val_auroc", "test_auroc"):
            found = difference(group, groups[0], measure)
            if found is not None:
                error = found["standard_error"]
                text = "" if error is None else f", standard error {error:.4f}"
                what = f"{group.name} - {groups[0].name}, {MEASURES[measure]}"
                lines.append(f"{what}: {found['mean']:+.4f}{text}")
    return lines


def _write(out: Path, groups: Sequence[Group]) -> None:
    """Write the three files; an error of the disk is shown as it is."""
    split = label_split(groups)
    rows = [
        {
            "group": group.name,
            **row_of(run),
            **{
                f"{split}_auroc/{name}": value
                for name, value in (getattr(run, split) or {}).items()
            },
        }
        for group in groups
        for run in group.runs
    ]
    write_csv(out / "summary.csv", pd.DataFrame(rows, dtype=object))
    with replacing(out / "summary.png") as temporary:
        summary_figure(groups).savefig(temporary, format="png")
    write_text(out / "summary.json", json.dumps(summary_of(groups), indent=2) + "\n")


def _digits(measure: str) -> int:
    return _DIGITS.get(measure, 4)


def _number(value: Optional[float], digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _count(spread: Spread, runs: int) -> str:
    """Format ``2 (1 undefined, 1 without a report)``."""
    absent = runs - spread.num_defined - spread.num_undefined
    counts = ((spread.num_undefined, "undefined"), (absent, "without a report"))
    others = ", ".join(f"{count} {what}" for count, what in counts if count)
    return f"{spread.num_defined} ({others})" if others else str(spread.num_defined)


def _mean_and_sd(spread: Spread) -> str:
    """Format ``0.8123 ± 0.0040``, with the number of runs where it is undefined."""
    if spread.mean is None:
        return "-"
    sd = "" if spread.sd is None else f" ± {spread.sd:.4f}"
    undefined = f" ({spread.num_undefined} undefined)" if spread.num_undefined else ""
    return f"{spread.mean:.4f}{sd}{undefined}"
