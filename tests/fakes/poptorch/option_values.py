"""OptionValues: named values that keep their type and can be frozen."""

from __future__ import annotations

import copy
from typing import Any, Dict


class OptionValues:
    """Values by name. Only names passed to the constructor exist, and they keep their type.

    Public attributes are the values. Private attributes belong to the object and must be set
    before `_values`.
    """

    def __init__(self, **values: Any) -> None:
        self._is_frozen = False
        self._values: Dict[str, Any] = values

    def checkIsFrozen(self, option: Any = None) -> None:
        if option != "_is_frozen" and self.__dict__.get("_is_frozen", False):
            raise AttributeError("Can't modify frozen Options")

    def set(self, **kwargs: Any) -> None:
        self.checkIsFrozen()
        for name, value in kwargs.items():
            assert name in self._values, (
                f"Invalid option {name}, valid options are {self._values.keys()}"
            )
            wanted = type(self._values[name])
            assert isinstance(value, wanted), (
                f"Unexpected type {type(value)} for option {name}. Expected {wanted}"
            )
            self._values[name] = value

    def createOrSet(self, **kwargs: Any) -> None:
        self.checkIsFrozen()
        for name, value in kwargs.items():
            if name in self._values:
                self.set(**{name: value})
            else:
                self._values[name] = value

    def exists(self, option: str) -> bool:
        return option in self._values

    def deleteIfExists(self, option: str) -> None:
        self._values.pop(option, None)

    def update(self, other: Dict[str, Any]) -> Dict[str, Any]:
        """Add the values to `other`, which must not have any of the names."""
        assert not set(self._values).intersection(other), (
            "Can't merge dictionaries, they have some keys in common"
        )
        other.update(self._values)
        return other

    def toDict(self) -> Dict[str, Any]:
        return self.update({})

    def _freeze(self) -> None:
        self._set_frozen(True)

    def _unfreeze(self) -> None:
        self._set_frozen(False)

    def _set_frozen(self, state: bool) -> None:
        self.__dict__["_is_frozen"] = state
        for value in self.__dict__.values():
            if "_is_frozen" in getattr(value, "__dict__", {}):
                value.__dict__["_is_frozen"] = state

    def __call__(self, option: str) -> Any:
        return getattr(self, option)

    def __setattr__(self, name: str, value: Any) -> None:
        self.checkIsFrozen(name)
        if not name.startswith("_"):
            self.set(**{name: value})
            return
        if "_values" in self.__dict__ and name not in self.__dict__:
            raise AttributeError(
                f"Invalid private attribute {name}. Valid attributes: {list(self.__dict__)}"
            )
        super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        values = self.__dict__.get("_values", {})
        if name.startswith("_") or name not in values:
            raise AttributeError(f"Invalid attribute {name}.")
        return values[name]

    def __deepcopy__(self, memory: Dict[int, Any]) -> Any:
        # A copy is not frozen.
        other = self.__class__.__new__(self.__class__)
        memory[id(self)] = other
        for name, value in self.__dict__.items():
            other.__dict__[name] = False if name == "_is_frozen" else copy.deepcopy(value, memory)
        return other

    def __getstate__(self) -> Dict[str, Any]:
        return self.__dict__

    def __setstate__(self, state: Dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value!r}" for name, value in self._values.items())
        return f"{type(self).__name__}({values})"
