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

#: A label's name is a tag of the logs and a column of predictions.csv.
LONGEST_LABEL, LABEL_PATTERN = 100, r"^\S(.*\S)?$"
LabelName = Annotated[str, Field(min_length=1, max_length=LONGEST_LABEL, pattern=LABEL_PATTERN)]
#: The names in order, or a pattern such as ``"finding_*"`` that names columns.
Labels = Union[Annotated[List[LabelName], Field(min_length=1, max_length=1000)], LabelName]
LABELS_WORDS = "a list of names, or a pattern such as finding_* that matches columns"

LabelMap = Dict[LabelName, Union[LabelName, Annotated[List[LabelName], Field(min_length=1)]]]
LABEL_MAP_WORDS = "a mapping of a label to a label of the model or to a list of them"

#: What an uncertain (-1) or blank label means.
Meaning = Literal["negative", "positive", "unknown"]


def repeated_name(names: Sequence[str]) -> Optional[str]:
    """Return which two names differ in upper and lower case at most, or None."""
    seen: Dict[str, str] = {}
    for name in names:
        if name.lower() in seen:
            return f"the labels {seen[name.lower()]!r} and {name!r} differ in case at most"
        seen[name.lower()] = name
    return None


#: NIH's label of images without a finding.
NO_FINDING = "No Finding"


def is_no_finding(name: str) -> bool:
    """Whether a label says that there is no finding; it counts in no mean over findings."""
    return name.lower().replace("_", " ") == NO_FINDING.lower()
