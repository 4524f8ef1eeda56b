"""Fields of the sections of a configuration: their types, and the base class of a section."""

import os
import re
from typing import Any, ClassVar, Dict, List, Optional, Tuple, Type, Union

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    model_validator,
)
from typing_extensions import Annotated, Literal

from cxr_vit.config.columns import (
    SplitName,
)

#: Legal values of `data.image_size`, pixels.
SMALLEST_IMAGE, LARGEST_IMAGE = 8, 2048

#: Characters of a path, Linux's limit.
_LONGEST_PATH = 4096
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def option(default: Any, text: str, **limits: Any) -> Any:
    """Make a field; `text` is its description in ``train.py --help``."""
    return Field(default, description=text, **limits)


def less_is_better(score: str) -> bool:
    """Whether the name of a score is that of a loss; of all others, more is better.

    The name may begin with `val/`. A label may end in `loss`: ``"auroc/volume loss"`` is none.
    """
    return re.match("(val/)?[^/]*loss(/|$)", score) is not None


def _expand(text: str) -> str:
    """Replace `${VARIABLE:-default}` and a leading `~`; an unset variable needs a default."""

    def value(match: "re.Match[str]") -> str:
        name, default = match.groups()
        # As in a shell, `:-` also covers a variable that is set but empty.
        found = os.environ.get(name) or default
        if found is None:
            raise ValueError(
                f"environment variable {name} is not set; set it or write ${{{name}:-default}}"
            )
        return found

    path = os.path.expanduser(_VARIABLE.sub(value, text)) if len(text) <= _LONGEST_PATH else text
    if len(path) > _LONGEST_PATH:
        raise ValueError(f"longer than a path can be, {_LONGEST_PATH} characters")
    if re.search("[\0\ud800-\udfff]", path):
        raise ValueError("a path must be UTF-8 text; rename the file or its folder")
    return path


PathText = Annotated[str, Field(min_length=1), AfterValidator(_expand)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Change = Annotated[float, Field(ge=0, le=0.5)]
Probability = Annotated[float, Field(ge=0, le=1)]
Proportion = Annotated[float, Field(gt=0, le=1)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
InnerFraction = Annotated[float, Field(gt=0, lt=1)]
Gamma = Annotated[float, Field(ge=0, le=100)]
FloatType = Literal["fp32", "fp16"]
OnProblem = Literal["error", "skip"]
Execution = Literal["pipelined", "sharded"]
TableFiles = Union[PathText, Dict[SplitName, PathText]]
LayerCounts = Annotated[List[Annotated[int, Field(ge=-1)]], Field(min_length=1)]
RecomputeWord = Literal["stage_inputs", "every_layer", "attention_mlp"]
RandAugmentOperation = Literal[
    "auto_contrast", "equalize", "rotate", "posterize", "contrast", "brightness", "sharpness",
    "shear_x", "shear_y", "translate_x", "translate_y", "invert", "solarize", "solarize_add",
]  # fmt: skip
ChannelMeans = Annotated[List[InnerFraction], Field(min_length=1)]
ChannelDeviations = Annotated[List[Proportion], Field(min_length=1)]
Proportions = Optional[Union[Proportion, List[Proportion]]]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, values are immutable and finite."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    #: Keys of which exactly one counts: giving another one replaces the first's default.
    exclusive: ClassVar[Tuple[Tuple[str, ...], ...]] = ()

    #: Key -> owner: a later layer that gives the owner resets the key.
    belongs_to: ClassVar[Dict[str, str]] = {}
    #: Key -> number that switches it on: a later layer that switches it off resets the key.
    needs: ClassVar[Dict[str, str]] = {}
    #: Keys with a mapping of which a later file or an override may give single keys.
    merged: ClassVar[Dict[str, Type[BaseModel]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _one_of_each_group(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for first, *others in cls.exclusive:
            given = [key for key in (first, *others) if data.get(key) is not None]
            if len(given) > 1:
                raise ValueError(f"give '{given[0]}' or '{given[1]}', not both")
            if given and given[0] in others:
                data[first] = None
            elif first in data and not given:
                del data[first]  # `epochs: null` beside no `steps` means the default
        return data
