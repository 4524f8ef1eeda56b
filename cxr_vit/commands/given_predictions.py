"""Report predictions: those of a model, or those of a file (evaluate.py --predictions)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from cxr_vit.config import Config, read_config
from cxr_vit.evaluation.bootstrap import Resamples
from cxr_vit.evaluation.operating_points import OPERATING_POINTS, OperatingPoints
from cxr_vit.evaluation.page import PageContext
from cxr_vit.evaluation.predictions import Predictions, read_predictions
from cxr_vit.evaluation.report import METRICS, print_table, sha256_of, write_report
from cxr_vit.files import make_folder
from cxr_vit.regular_files import MOST_METRICS, read_json
from cxr_vit.training.run_folder import package_versions

#: The folder beside a predictions.csv that its scores are written to.
RECOMPUTED = "recomputed"


def show_report(
    out: Path,
    predictions: Predictions,
    config: Config,
    context: PageContext,
    origin: Dict[str, Any],
    points: Optional[OperatingPoints],
    source: Optional[Path] = None,
) -> None:
    """Write the report and print its table; see `write_report`."""
    metrics = write_report(
        out,
        predictions,
        context,
        resamples=Resamples(config.evaluation.resamples),
        origin=origin,
        points=points,
        source=source,
    )
    print_table(metrics)
    print(f"report: {out}")


def score_predictions(path: Path, given: Optional[Path], overrides: Sequence[str]) -> int:
    """Score a predictions.csv, by default into `recomputed/` beside it; return the exit status.

    If the report beside the file is of these predictions, its operating points are used, and what
    it says of checkpoint and data is kept.
    """
    config = read_config([], overrides)
    predictions = read_predictions(path)
    out = make_folder(given, path.parent / RECOMPUTED)
    print(f"{path}: {len(predictions)} images, {len(predictions.names)} labels", flush=True)
    report = _report_of(path)
    context = PageContext(f"Report of {path.name}", "", package_versions())
    points = _points(path, report.pop("operating_points_sha256", None))
    show_report(out, predictions, config, context, report, points, source=path)
    return 0


def _points(path: Path, sha256: Optional[str]) -> Optional[OperatingPoints]:
    """Return the operating points beside a file if they have the hash that its report says."""
    stored = path.parent / OPERATING_POINTS
    if not stored.is_file():
        return None
    if sha256 is not None and sha256_of(stored) == sha256:
        return OperatingPoints.read(stored)
    print(
        f"{stored} is not used: no {METRICS} beside it says that it belongs to {path.name} as both"
        " are now",
        flush=True,
    )
    return None


def _report_of(path: Path) -> Dict[str, Any]:
    """Return the content of the metrics.json beside a file if it belongs to it, else nothing.

    The scores in it are computed again; the others are facts about checkpoint and data.
    """
    try:
        found = read_json(path.parent / METRICS, limit=MOST_METRICS)
    except (OSError, ValueError):
        return {}
    return found if found.pop("predictions_sha256", None) == sha256_of(path) else {}
