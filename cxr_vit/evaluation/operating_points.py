"""Thresholds and scaling of each label, fitted on validation images and applied to others."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError, model_validator
from typing_extensions import Annotated, Literal, TypedDict

from cxr_vit.config.columns import LabelName
from cxr_vit.data.records import UNKNOWN
from cxr_vit.errors import DataError
from cxr_vit.evaluation.bootstrap import Interval, Resamples, intervals
from cxr_vit.evaluation.predictions import Predictions
from cxr_vit.evaluation.scaling import (
    LEAST_SCALE,
    MOST_SCALE,
    fit_platt,
    fit_temperature,
    has_enough,
)
from cxr_vit.evaluation.statistics import Statistic, joined, ratios
from cxr_vit.files import write_text
from cxr_vit.regular_files import read_bytes

T = TypeVar("T")

#: The file in the folder of a checkpoint or of a report.
OPERATING_POINTS = "operating_points.json"
_LARGEST = 2**24  # bytes
_RATE = 0.95

_Kind = Literal["youden", "f1", "specificity_95", "sensitivity_95"]
_Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Scale = Annotated[float, Field(ge=LEAST_SCALE, le=MOST_SCALE, allow_inf_nan=False)]
_Sha256 = Annotated[str, Field(pattern="^([0-9a-f]{64})?$")]
_Count = Annotated[int, Field(ge=1, le=2**53)]


class FittedOn(TypedDict):
    """The images of a fit: split, how many, hash of images and labels, and hash of the model."""

    split: Annotated[str, Field(max_length=100)]
    images: _Count
    patients: _Count
    sha256: _Sha256
    model_sha256: _Sha256


# As a key of the class, mypy takes it for one of the dictionary.
FittedOn.__pydantic_config__ = ConfigDict(extra="forbid", strict=True)  # type: ignore[attr-defined]


class OperatingPoints(BaseModel):
    """Thresholds, temperature and Platt scaling by label.

    Attributes
    ----------
    labels
        All labels; each of the others may lack some of them.
    fitted_on
        What the validation images were. The hash of the model is empty if it is not known.
    thresholds
        By label and kind. A label is positive at ``probability >= threshold``.
    temperature
        What divides the logits of a label.
    platt
        Slope and intercept of the logits of a label.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    format: Literal[1]
    labels: Annotated[List[LabelName], Field(min_length=1)]
    fitted_on: FittedOn
    thresholds: Dict[str, Dict[_Kind, _Probability]]
    temperature: Dict[str, _Scale]
    platt: Dict[str, Tuple[_Scale, FiniteFloat]]

    @model_validator(mode="after")
    def _has_own_labels_only(self) -> OperatingPoints:
        for key in ("thresholds", "temperature", "platt"):
            unknown = sorted(set(getattr(self, key)) - set(self.labels))
            if unknown:
                raise ValueError(f"{key} has {unknown[0]!r}, which is none of the labels")
        return self

    @classmethod
    def fit(cls, predictions: Predictions, *, model_sha256: str = "") -> OperatingPoints:
        """Fit each label on the images where it is known, of at least one image.

        `model_sha256` is stored, to compare with that of another fit.
        """
        labels = {}
        for column, name in enumerate(predictions.names):
            known = predictions.labels[:, column] != UNKNOWN
            labels[name] = (
                predictions.probabilities[known, column],
                predictions.labels[known, column],
            )
        table = predictions.table
        fitted_on: FittedOn = {
            "split": str(table["split"].iloc[0]),
            "images": len(table),
            "patients": table["patient"].nunique(),
            "sha256": data_sha256(predictions.names, table["image"], predictions.labels),
            "model_sha256": model_sha256,
        }
        return cls(
            format=1,
            labels=list(predictions.names),
            fitted_on=fitted_on,
            thresholds=_fitted(fit_thresholds, labels),
            temperature=_fitted(fit_temperature, labels),
            platt=_fitted(fit_platt, labels),
        )

    def of_kind(self, kind: _Kind) -> Dict[str, float]:
        """Return the threshold of a kind by label."""
        return {name: each[kind] for name, each in self.thresholds.items() if kind in each}

    def write(self, path: Path) -> None:
        """Write the file atomically; `read` returns the same. Raises OSError if that fails."""
        write_text(path, json.dumps(self.model_dump(), indent=2, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: Path) -> OperatingPoints:
        """Read a file. Raises DataError if it is not one that `write` wrote, in form and range."""
        try:
            return cls.model_validate_json(read_bytes(path, limit=_LARGEST))
        except OSError as error:
            reason = error.strerror or str(error)
        except ValidationError as error:
            detail = error.errors(include_url=False)[0]
            where = ".".join(map(str, detail["loc"]))
            reason = f"{where}: {detail['msg']}" if where else detail["msg"]
        raise DataError(
            f"{path}: no operating points can be read ({reason}). Remove it: evaluate.py fits them"
            " again on the validation images."
        )


def _fitted(
    fit: Callable[[np.ndarray, np.ndarray], Optional[T]],
    labels: Mapping[str, Tuple[np.ndarray, np.ndarray]],
) -> Dict[str, T]:
    """Fit each label, given its probabilities and truth; leave out those without a result."""
    fits = {name: fit(*label) for name, label in labels.items()}
    return {name: found for name, found in fits.items() if found}


def data_sha256(names: Sequence[str], images: Sequence[str], labels: np.ndarray) -> str:
    """Return the SHA-256 of labels int8 ``[N, C]`` with their names and those of the images."""
    text = json.dumps([list(names), list(images)])
    return hashlib.sha256(text.encode() + labels.astype(np.int8).tobytes()).hexdigest()


def fit_thresholds(probabilities: np.ndarray, truth: np.ndarray) -> Dict[_Kind, float]:
    """Return the best threshold of each kind, empty with less than 10 positives or 10 negatives.

    Parameters
    ----------
    probabilities, truth
        ``[n]``; truth is 0 or 1.

    The candidates are the probabilities, and an image is positive at ``probability >= threshold``.
    `youden` has the largest sensitivity + specificity (Youden, Cancer 3, 1950), `f1` the largest F1
    score; `specificity_95` the largest sensitivity at a specificity of at least 0.95, and
    `sensitivity_95` the reverse. Of several that are best, the highest threshold counts.
    `specificity_95` is left out if more than 5 % of the negatives share the highest probability.
    """
    if not has_enough(truth):
        return {}
    order = np.argsort(-probabilities, kind="stable")
    values = probabilities[order]
    ends = np.flatnonzero(np.append(values[1:] != values[:-1], True))
    hits = np.cumsum(truth[order] == 1)[ends]
    misses = ends + 1 - hits
    positives, negatives = hits[-1], misses[-1]
    is_specific = (negatives - misses) / negatives >= _RATE
    is_sensitive = hits / positives >= _RATE
    # Each has its first maximum at the best threshold. Integers, where ties are to be exact.
    goals: Dict[_Kind, np.ndarray] = {
        "youden": hits * negatives - misses * positives,
        "f1": 2 * hits / (hits + misses + positives),
        "specificity_95": np.where(is_specific, hits, -1),
        "sensitivity_95": np.where(is_sensitive, negatives - misses, -1),
    }
    best = {kind: int(goal.argmax()) for kind, goal in goals.items()}
    if not is_specific.any():
        del best["specificity_95"]
    return {kind: float(values[ends[index]]) for kind, index in best.items()}


#: Name -> the counts that are its numerator, and those that it is divided by.
_RATIOS = {
    "sensitivity": (["true_positives"], ["true_positives", "false_negatives"]),
    "specificity": (["true_negatives"], ["true_negatives", "false_positives"]),
    "ppv": (["true_positives"], ["true_positives", "false_positives"]),
    "npv": (["true_negatives"], ["true_negatives", "false_negatives"]),
}


def apply(
    points: OperatingPoints, predictions: Predictions, resamples: Resamples
) -> Dict[str, Any]:
    """Score the decisions of each threshold: the section `operating_points` of metrics.json.

    A ratio without a denominator is None. Labels that `points` or `predictions` lack are left out.
    """
    counts: Dict[str, Dict[_Kind, Dict[str, np.ndarray]]] = {}
    statistics: Dict[str, Statistic] = {}
    patients = predictions.patients
    for column, name in enumerate(predictions.names):
        for kind, threshold in points.thresholds.get(name, {}).items():
            label = predictions.probabilities[:, column], predictions.labels[:, column]
            decided = counts.setdefault(name, {})[kind] = _decisions(*label, threshold)
            statistics[f"{name}/{kind}"] = _ratios(decided, patients)
    number = int(patients.max()) + 1 if len(patients) else 0
    found = intervals(joined(statistics), number, resamples) if statistics else {}
    applied = {
        name: {
            kind: {
                "threshold": points.thresholds[name][kind],
                **{ratio: _stated(found.get(f"{name}/{kind}/{ratio}")) for ratio in _RATIOS},
                **{count: int(images.sum()) for count, images in decided.items()},
            }
            for kind, decided in of_label.items()
        }
        for name, of_label in counts.items()
    }
    fitted_on = {key: points.fitted_on[key] for key in ("split", "images", "sha256")}
    return {"fitted_on": fitted_on, "points": applied}


def _decisions(
    probabilities: np.ndarray, labels: np.ndarray, threshold: float
) -> Dict[str, np.ndarray]:
    """Return which images, bool ``[N]``, each of the four counts has; unknown ones are in none."""
    # In float64, where a threshold that was read from a file is what it was.
    is_above = probabilities.astype(np.float64) >= threshold
    return {
        "true_positives": is_above & (labels == 1),
        "false_positives": is_above & (labels == 0),
        "true_negatives": ~is_above & (labels == 0),
        "false_negatives": ~is_above & (labels == 1),
    }


def _ratios(decided: Dict[str, np.ndarray], patients: np.ndarray) -> Statistic:
    above, below = (
        np.stack([sum(decided[count] for count in part) for part in parts], axis=1)
        for parts in zip(*_RATIOS.values())
    )
    return ratios(above, below, patients, list(_RATIOS))


def _stated(interval: Optional[Interval]) -> Optional[Dict[str, Any]]:
    """Return a ratio as metrics.json has it."""
    return None if interval is None else interval._asdict()
