"""Types of the keys that describe a table: its files, its columns and its labels."""

from __future__ import annotations

import math
import re
import sys
from importlib import import_module
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Sequence, Union

from pydantic import BaseModel, ConfigDict, Field, field_validator
from typing_extensions import Annotated, Literal

SplitName = Literal["train", "val", "test"]

_Name = Annotated[str, Field(min_length=1, max_length=200)]


#: The parser of regular expressions; its name without the underscore is deprecated.
_PARSER: Any = import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
#: Characters that a pattern searches at most, and at least for a pattern that may be used.
_LONGEST_TEXT, _SHORTEST_TEXT = 1000, 100
#: Steps that the search of one text may take, about a second.
_MOST_STEPS = 2e7


def searchable_length(pattern: str) -> int:
    """Return how many characters a regular expression may search in about a second at most.

    Each repetition without an end can stop at any character, and a search can begin at any unless
    the pattern begins with ``^``: n characters take about n^k / k! steps for k of these. Other
    alternatives multiply. Raises ValueError for a pattern whose steps grow exponentially, or that
    may search less than 100 characters; `re.error` for no regular expression.
    """
    parsed = _PARSER.parse(pattern)
    is_anchored = parsed.state.flags & re.MULTILINE == 0 and [*parsed][:1] in (
        [(_PARSER.AT, _PARSER.AT_BEGINNING)],
        [(_PARSER.AT, _PARSER.AT_BEGINNING_STRING)],
    )
    choices = list(_choices(parsed, in_repeat=False))
    unbounded = sum(math.isinf(number) for number in choices) + (not is_anchored)
    others = math.prod(number for number in choices if math.isfinite(number))
    length = (_MOST_STEPS * math.factorial(unbounded) / others) ** (1 / max(1, unbounded))
    if length < _SHORTEST_TEXT:
        raise ValueError("has too many repetitions and alternatives, which may take very long")
    return min(_LONGEST_TEXT, int(length))


def _choices(items: Any, *, in_repeat: bool) -> Iterator[float]:
    """Yield the number of ways of each item of a parsed pattern that has several."""
    for operator, value in items:
        name = str(operator)
        parts, repeats = _parts(name, value), False
        if name.endswith("_REPEAT"):
            least, most, _ = value
            repeats = most > 1
            if (most > _LONGEST_TEXT and most != _PARSER.MAXREPEAT) or least > _LONGEST_TEXT:
                raise ValueError(f"repeats something more than {_LONGEST_TEXT:,} times")
            yield math.inf if most == _PARSER.MAXREPEAT else most - least + 1
        elif name.startswith("GROUPREF"):
            yield math.inf
        elif name == "BRANCH":
            yield len(parts)
        else:
            for part in parts:
                yield from _choices(part, in_repeat=in_repeat)
            continue
        if in_repeat:
            raise ValueError(
                "has a repetition or alternatives in a repetition, which may take very long"
            )
        for part in parts:
            yield from _choices(part, in_repeat=repeats)


def _parts(name: str, value: Any) -> List[Any]:
    """Return the patterns inside an item of a parsed pattern."""
    if name == "BRANCH":
        return list(value[1])
    if name == "ATOMIC_GROUP":
        return [value]
    if name == "GROUPREF_EXISTS":
        return [part for part in value[1:] if part is not None]
    if name.endswith("_REPEAT") or name in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
        return [value[-1]]
    return []


class Words(NamedTuple):
    """Describe what a field accepts, in place of its type: ``Annotated[type, Words("...")]``."""

    text: str


class PatternColumn(BaseModel):
    """A column of which a part counts: the first group of a regular expression, or its match."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    column: _Name
    pattern: Annotated[str, Field(min_length=1, max_length=200)]

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        try:
            searchable_length(pattern)
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        except ValueError as error:
            raise ValueError(f"{pattern!r} {error}. Write a simpler one.") from error
        return pattern

    def __str__(self) -> str:
        return self.column


Column = Annotated[
    Union[_Name, PatternColumn],
    Words("the name of a column, or {column: name, pattern: regular expression}"),
]


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
    source: Optional[Column] = None
    labels: Optional[Column] = None


COLUMNS_WORDS = (
    "a mapping of image, patient (both needed), split, sex, age, view, source, labels to the"
    " name of a column, or to {column: name, pattern: regular expression}"
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
#: Means over the findings: of all alike, weighted by their positives, and over all their decisions.
MEANS = ("macro", "weighted", "micro")
#: Keys beside those of the labels in the groups of metrics.json.
_COUNTS = ("images", "patients")
#: What predictions.csv says of each image, where it is known.
ABOUT_COLUMNS = ("sex", "age", "view", "follow_up", "source")


def probability_column(name: str) -> str:
    """Return the column of predictions.csv that has the probabilities of a label."""
    return f"{name}_probability"


def relabel_column(name: str) -> str:
    """Return the column of predictions.csv that has a label of Google's radiologists."""
    return f"{name}_google2019"


def repeated_name(names: Sequence[str]) -> Optional[str]:
    """Return which two columns of predictions.csv would differ in case at most, or None."""
    seen: Dict[str, str] = {}
    for name in names:
        if name in seen.values():
            return f"the label {name!r} is listed twice"
        if name.lower() in seen:
            return f"the labels {seen[name.lower()]!r} and {name!r} differ in case at most"
        seen[name.lower()] = name
    taken = {*IMAGE_COLUMNS, *ABOUT_COLUMNS, *(probability_column(name).lower() for name in names)}
    for name in names:
        if name.lower() in taken:
            return f"the label {name!r} has the name of another column of predictions.csv"
        if name.lower() in (*MEANS, *_COUNTS):
            return f"the label {name!r} has the name of a mean or a count of metrics.json"
    return None


#: NIH's label of images without a finding.
NO_FINDING = "No Finding"


def is_no_finding(name: str) -> bool:
    """Whether a label says that there is no finding; it counts in no mean over findings."""
    return name.lower().replace("_", " ") == NO_FINDING.lower()
