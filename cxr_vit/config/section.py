"""Section: the base of a configuration's sections, and the types their fields share.

Imports no torch.
"""

import os
import re
from typing import Any, ClassVar, Dict, Tuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from typing_extensions import Annotated

__all__ = ["PathText", "Section", "Words"]

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class Words:
    """Says what a field takes where its type does not: `Annotated[type, Words("...")]`."""

    def __init__(self, text: str) -> None:
        self.text = text


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

    return os.path.expanduser(_VARIABLE.sub(value, text))


PathText = Annotated[str, Field(min_length=1), AfterValidator(_expand)]


class Section(BaseModel):
    """Base of all sections: closed, immutable, finite numbers only."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )

    #: Pairs of keys of which exactly one counts: giving the second replaces the first's default.
    exclusive: ClassVar[Tuple[Tuple[str, str], ...]] = ()

    #: Keys that mean something only beside another: a later layer that gives the other resets them.
    belongs_to: ClassVar[Dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _one_of_each_pair(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        data = dict(data)
        for first, second in cls.exclusive:
            given = [key for key in (first, second) if data.get(key) is not None]
            if len(given) == 2:
                raise ValueError(f"give '{first}' or '{second}', not both")
            if given == [second]:
                data[first] = None
            elif first in data and not given:
                del data[first]  # `epochs: null` beside no `steps` means the default
        return data
