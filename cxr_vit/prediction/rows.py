"""A row of the result for each image, as text: CSV, JSON lines, or a line of a table."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import dataclass, field
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from cxr_vit.config.columns import probability_column
from cxr_vit.data.text_files import csv_line, original_text
from cxr_vit.evaluation.operating_points import OperatingPoints
from cxr_vit.evaluation.scaling import scaled

#: Control characters, those that reverse the direction of text or separate lines, and bytes of a
#: name that are no UTF-8. Without them a row is one line, and gives no orders to a terminal.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_HIGHEST = 3


def plain(text: str) -> str:
    """Return text with escapes in place of characters that are not safe to write."""
    return _UNSAFE.sub(lambda found: ascii(found.group())[1:-1], text)


def plain_path(path: str) -> str:
    """Return a path as rows have it: another text for each path, since backslashes are doubled."""
    return plain(path.replace("\\", "\\\\"))


@dataclass(frozen=True)
class Decider:
    """The findings and the calibrated probabilities of a model's probabilities.

    Attributes
    ----------
    labels
        In the order of the probabilities.
    thresholds
        By label; those of one operating point. A finding has ``probability >= threshold``. The
        thresholds are of the probabilities that are not calibrated.
    scales
        Slope and intercept of the logits, by label: Platt scaling where it was fitted, else one
        over the temperature.
    """

    labels: List[str]
    thresholds: Dict[str, float] = field(default_factory=dict)
    scales: Dict[str, Tuple[float, float]] = field(default_factory=dict)

    @classmethod
    def of(cls, labels: List[str], points: Optional[OperatingPoints], kind: Any) -> Decider:
        """Return what operating points say, `kind` being that of the thresholds."""
        if points is None:
            return cls(labels)
        by_temperature = {name: (1 / value, 0.0) for name, value in points.temperature.items()}
        fitted = {**by_temperature, **points.platt}
        scales = {name: fitted[name] for name in labels if name in fitted}
        return cls(labels, points.of_kind(kind), scales)

    def never_found(self) -> List[str]:
        """Return the labels that have no threshold, and are in no finding of any image."""
        return [name for name in self.labels if name not in self.thresholds]

    def findings(self, probabilities: np.ndarray) -> List[List[str]]:
        """Return the labels at or over their threshold of each image, ``[n, C]``."""
        limits = np.array([self.thresholds.get(name, np.inf) for name in self.labels])
        # In float64, where a threshold that was read from a file is what it was.
        above = probabilities.astype(np.float64) >= limits
        return [[name for name, is_above in zip(self.labels, row) if is_above] for row in above]

    def calibrated(self, probabilities: np.ndarray) -> Dict[str, np.ndarray]:
        """Return the calibrated probabilities of ``[n, C]`` by label, float32 ``[n]``."""
        return {
            name: scaled(probabilities[:, self.labels.index(name)], *scale).astype(np.float32)
            for name, scale in self.scales.items()
        }


class Row(NamedTuple):
    """What is known of one image; an image that cannot be read has an error and no numbers."""

    image: str
    #: By label; empty with an error.
    probabilities: Dict[str, float]
    calibrated: Dict[str, float]
    findings: List[str]
    warnings: List[str]
    error: Optional[str]
    tags: Dict[str, str]


class Done(NamedTuple):
    """What an output says of an image."""

    image: str
    has_error: bool


class CsvRows:
    """Rows of a CSV with a header.

    Text is safe in a spreadsheet program: `cxr_vit.data.text_files.csv_line`.
    """

    def __init__(self, decider: Decider, keep: Sequence[str]) -> None:
        self._decider, self._keep = decider, keep
        labels, scales = decider.labels, decider.scales
        findings = ["findings"] if decider.thresholds else []
        self.columns = [
            *("image", *map(probability_column, labels), *map(calibrated_column, scales)),
            *(*findings, "warnings", "error", *(f"dicom_{keyword}" for keyword in keep)),
        ]
        self.header = csv_line(self.columns)

    def line(self, row: Row) -> str:
        """Return the line of a row."""
        findings = ["|".join(row.findings)] if self._decider.thresholds else []
        return csv_line(
            [
                row.image,
                *(row.probabilities.get(name) for name in self._decider.labels),
                *(row.calibrated.get(name) for name in self._decider.scales),
                *findings,
                *("; ".join(row.warnings), row.error or ""),
                *(row.tags.get(keyword, "") for keyword in self._keep),
            ]
        )

    def done(self, line: str) -> Done:
        """Return what a line says. Raises ValueError if it is not one that `line` wrote."""
        try:
            (cells,) = csv.reader([line], strict=True)
        except csv.Error as error:
            raise ValueError(str(error)) from error
        if len(cells) != len(self.columns):
            raise ValueError(f"{len(cells)} of {len(self.columns)} fields")
        return Done(original_text(cells[0]), bool(cells[self.columns.index("error")]))


class JsonRows:
    """Rows of JSON lines: an object for each image, without a header.

    `findings` is null where none could be decided: without thresholds, and of an image that could
    not be read.
    """

    columns = (
        *("image", "probabilities", "calibrated", "findings"),
        *("warnings", "error", "tags"),
    )
    header = ""

    def __init__(self, decider: Decider) -> None:
        self._decider = decider

    def line(self, row: Row) -> str:
        """Return the line of a row."""
        content = row._asdict()
        if not self._decider.thresholds or row.error is not None:
            content["findings"] = None
        return json.dumps(content, ensure_ascii=False, allow_nan=False) + "\n"

    def done(self, line: str) -> Done:
        """Return what a line says. Raises ValueError if it is not one that `line` wrote."""
        content = json.loads(line)
        if not isinstance(content, dict) or tuple(content) != self.columns:
            raise ValueError("other keys")
        return Done(str(content["image"]), content["error"] is not None)


class TableRows:
    """Lines for people: the findings of each image, or its highest probabilities."""

    header = ""

    def __init__(self, decider: Decider) -> None:
        self._decider = decider

    def line(self, row: Row) -> str:
        """Return the line of a row."""
        doubt = f"  [{'; '.join(row.warnings)}]" if row.warnings else ""
        if row.error is not None:
            return f"{row.image}: not read: {row.error}\n"
        if row.findings:
            return f"{row.image}: {_listed(row, row.findings)}{doubt}\n"
        names = sorted(row.probabilities, key=lambda name: -row.probabilities[name])[:_HIGHEST]
        return f"{row.image}: {self._no_finding()}highest {_listed(row, names)}{doubt}\n"

    def _no_finding(self) -> str:
        if not self._decider.thresholds:
            return ""
        labels = len(self._decider.labels)
        decided = labels - len(self._decider.never_found())
        return f"no finding among {decided} of {labels} labels; "


def _listed(row: Row, names: Sequence[str]) -> str:
    return ", ".join(f"{name} {row.probabilities[name]:.2f}" for name in names)


def calibrated_column(label: str) -> str:
    """Return the column of a label's calibrated probability."""
    return f"{label}_calibrated"
