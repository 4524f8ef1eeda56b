"""Compare the labels of a data set with those of a model that was trained on another one."""

from __future__ import annotations

from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

from cxr_vit.errors import ConfigError, suggestion

#: Names that a message lists.
_SHOWN = 20


class LabelMatch(NamedTuple):
    """The labels of a data set that a model knows, in the order of the data set.

    Attributes
    ----------
    names
        Names of the labels, those of the data set.
    columns
        Their columns in the labels of the data set.
    sources
        Of each, the columns of the model's logits: the highest logit counts.
    data_names, model_names
        All labels of the data set and of the model.
    """

    names: List[str]
    columns: List[int]
    sources: List[List[int]]
    data_names: List[str]
    model_names: List[str]

    @property
    def is_identity(self) -> bool:
        """Whether each label is compared with itself, all in the order of the model."""
        columns = list(range(len(self.model_names)))
        same = self.data_names == self.model_names and self.columns == columns
        return same and self.sources == [[column] for column in columns]

    def select(self, logits: Tensor, labels: Tensor) -> Tuple[Tensor, Tensor]:
        """Return the logits and the labels that are compared, ``[N, C]`` each."""
        if self.is_identity:
            return logits, labels
        highest = [logits[:, source].amax(dim=1) for source in self.sources]
        return torch.stack(highest, dim=1), labels[:, self.columns]

    def facts(self) -> Dict[str, Any]:
        """Return the map and the labels without a counterpart, for metrics.json."""
        own, others = self._unmatched()
        return {
            "label_map": dict(zip(self.names, self._sources())),
            "labels_without_counterpart": {"data": own, "model": others},
        }

    def describe(self) -> List[str]:
        """Return lines: what is compared under other names, and what is not compared.

        There are none for the labels of the model.
        """
        if self.is_identity:
            return []
        own, others = self._unmatched()
        renamed = [
            f"{name} with {' or '.join(source)}"
            for name, source in zip(self.names, self._sources())
            if source != [name]
        ]
        lines = [f"scored labels: {len(self.names)} of the data's {len(self.data_names)}"]
        if renamed:
            lines.append(f"compared: {', '.join(renamed)}")
        if own:
            lines.append(f"labels of the data without a counterpart in the model: {_listed(own)}")
        if others:
            lines.append(f"labels of the model without one in the data: {_listed(others)}")
        return lines

    def _sources(self) -> List[List[str]]:
        return [[self.model_names[column] for column in source] for source in self.sources]

    def _unmatched(self) -> Tuple[List[str], List[str]]:
        used = {column for source in self.sources for column in source}
        others = [name for column, name in enumerate(self.model_names) if column not in used]
        return [name for name in self.data_names if name not in self.names], others

    @classmethod
    def same(cls, names: Sequence[str]) -> LabelMatch:
        """Return the match of labels with themselves."""
        columns = list(range(len(names)))
        return cls(list(names), columns, [[column] for column in columns], list(names), list(names))


def match_labels(
    data_names: Sequence[str],
    model_names: Sequence[str],
    label_map: Mapping[str, Union[str, Sequence[str]]],
) -> LabelMatch:
    """Find the counterpart of each label of a data set among those of a model.

    The first that applies: `label_map`, if the model has all labels that it names; the same name
    but for case, blanks and underscores; those labels of `label_map` that the model has.

    Raises ConfigError if no label has a counterpart, or if the map has a label that the data lack.
    """
    in_data, in_model = _by_plain_name(data_names), _by_plain_name(model_names)
    mapped: Dict[int, List[Optional[int]]] = {}
    for name, targets in label_map.items():
        column = in_data.get(_plain(name))
        if column is None:
            near = suggestion(name, data_names)
            raise ConfigError(
                f"data.label_map: the data have no label {name!r}.{near} They have"
                f" {_listed(data_names)}."
            )
        listed = [targets] if isinstance(targets, str) else targets
        mapped[column] = [in_model.get(_plain(target)) for target in listed]
    sources: Dict[int, List[int]] = {}
    for column, name in enumerate(data_names):
        named = mapped.get(column, [])
        known = list(dict.fromkeys(source for source in named if source is not None))
        same = in_model.get(_plain(name))
        if same is not None and (not named or None in named):
            known = [same]
        if known:
            sources[column] = known
    if not sources:
        raise ConfigError(
            f"the data and the model have no label in common: the data have {_listed(data_names)},"
            f" the model has {_listed(model_names)}. Map them:"
            f" data.label_map={{{data_names[0]}: {model_names[0]}}} and so on."
        )
    names = [data_names[column] for column in sources]
    found = list(sources), list(sources.values())
    return LabelMatch(names, *found, list(data_names), list(model_names))


def _plain(name: str) -> str:
    return "".join(name.replace("_", " ").split()).casefold()


def _by_plain_name(names: Sequence[str]) -> Dict[str, int]:
    """Return the column of each name, the first of two that differ in blanks only."""
    columns: Dict[str, int] = {}
    for column, name in enumerate(names):
        columns.setdefault(_plain(name), column)
    return columns


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
