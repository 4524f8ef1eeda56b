"""Report predictions: those of a model, or those of a file (evaluate.py --predictions)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, Optional, Sequence

from cxr_vit.config import Config, read_config
from cxr_vit.errors import DataError
from cxr_vit.evaluation.bootstrap import Resamples
from cxr_vit.evaluation.operating_points import OPERATING_POINTS, OperatingPoints
from cxr_vit.evaluation.page import PageContext
from cxr_vit.evaluation.predictions import Predictions, read_predictions
from cxr_vit.evaluation.report import METRICS, print_table, sha256_of, write_report
from cxr_vit.files import make_folder, writing_to
from cxr_vit.regular_files import MOST_METRICS, read_json
from cxr_vit.training.run_folder import package_versions


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
    """Score a predictions.csv, by default into its own folder; return the exit status.

    The operating points are those beside the file. What the report beside it says of checkpoint and
    data is kept. Raises DataError if the report
    is of other predictions and would be replaced.
    """
    config = read_config([], overrides)
    predictions = read_predictions(path)
    origin = _origin(path)
    beside = path.parent / METRICS
    if origin is None and given is None and beside.exists():
        raise DataError(
            f"{beside} is not the report of {path.name} as it is now, and would be replaced. Give"
            " another folder with --out."
        )
    out = make_folder(given, path.parent)
    print(f"{path}: {len(predictions)} images, {len(predictions.names)} labels", flush=True)
    stored = path.parent / OPERATING_POINTS
    points = OperatingPoints.read(stored) if stored.exists() else None
    if points is not None:
        with writing_to(out):
            points.write(out / OPERATING_POINTS)
    images = (lambda name: None) if config.report.images else None  # their names alone
    context = PageContext(f"Report of {path.name}", "", package_versions(), images)
    show_report(out, predictions, config, context, origin or {}, points, source=path)
    return 0


def _origin(path: Path) -> Optional[Dict[str, Any]]:
    """Return the content of the metrics.json beside a file if it belongs to it.

    The scores in it are computed again; the others are facts about checkpoint and data.
    """
    try:
        found = read_json(path.parent / METRICS, limit=MOST_METRICS)
    except (OSError, ValueError):
        return None
    return found if found.get("predictions_sha256") == sha256_of(path) else None
