"""Types of the keys that describe a table: its files, its columns and its labels."""

from __future__ import annotations

import re
from typing import Dict, List, Optional, Sequence, Union

from pydantic import BaseModel, ConfigDict, Field, field_validator
from typing_extensions import Annotated, Literal

SplitName = Literal["train", "val", "test"]

_Name = Annotated[str, Field(min_length=1, max_length=200)]


class PatternColumn(BaseModel):
    """A column of which a part counts: the first group of a regular expression, or its match."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    column: _Name
    pattern: Annotated[str, Field(min_length=1, max_length=200)]

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return pattern

    def __str__(self) -> str:
        return self.column


Column = Union[_Name, PatternColumn]


class Columns(BaseModel):
    """Names of a table's columns.

    `labels` is for one column that holds all labels of an image; a table with a column per label
    needs no name for them but `data.labels`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: Column
    patient: Column
    split: Optional[Column] = None
    sex: Optional[Column] = None
    age: Optional[Column] = None
    view: Optional[Column] = None
    labels: Optional[Column] = None


COLUMNS_WORDS = (
    "a mapping of image, patient (both needed), split, sex, age, view, labels to the name of a"
    " column, or to {column: name, pattern: regular expression}"
)

#: A label's name is a tag of the logs, a column of predictions.csv and text on the terminal: no
#: characters that control it or the direction of text.
LONGEST_LABEL = 100
_CONTROLS = r"\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069"
LABEL_PATTERN = rf"^[^\s{_CONTROLS}]([^{_CONTROLS}]*[^\s{_CONTROLS}])?$"
LabelName = Annotated[str, Field(min_length=1, max_length=LONGEST_LABEL, pattern=LABEL_PATTERN)]
#: The names in order, or a pattern such as ``"finding_*"`` that names columns.
Labels = Union[Annotated[List[LabelName], Field(min_length=1, max_length=1000)], LabelName]
LABELS_WORDS = "a list of names, or a pattern such as finding_* that matches columns"

LabelMap = Dict[LabelName, Union[LabelName, Annotated[List[LabelName], Field(min_length=1)]]]
LABEL_MAP_WORDS = "a mapping of a label to a label of the model or to a list of them"

#: What an uncertain (-1) or blank label means.
Meaning = Literal["negative", "positive", "unknown"]


#: Columns of predictions.csv beside those of the labels.
IMAGE_COLUMNS = ("image", "patient", "split")


def probability_column(name: str) -> str:
    """Return the column of predictions.csv that has the probabilities of a label."""
    return f"{name}_probability"


def repeated_name(names: Sequence[str]) -> Optional[str]:
    """Return which two columns of predictions.csv would differ in case at most, or None."""
    seen: Dict[str, str] = {}
    for name in names:
        if name.lower() in seen:
            return f"the labels {seen[name.lower()]!r} and {name!r} differ in case at most"
        seen[name.lower()] = name
    taken = {*IMAGE_COLUMNS, *(probability_column(name).lower() for name in names)}
    for name in names:
        if name.lower() in taken:
            return f"the label {name!r} has the name of another column of predictions.csv"
    return None


#: NIH's label of images without a finding.
NO_FINDING = "No Finding"


def is_no_finding(name: str) -> bool:
    """Whether a label says that there is no finding; it counts in no mean over findings."""
    return name.lower().replace("_", " ") == NO_FINDING.lower()
