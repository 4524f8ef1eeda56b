"""How a model is laid out on a number of devices, as part of a configuration. Imports no torch."""

from __future__ import annotations

import math
from itertools import chain, combinations
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
import yaml

from cxr_vit.config import Config
from cxr_vit.errors import ConfigError

__all__ = ["Layout", "Placement", "all_cuts", "kept_choices"]

#: Whether the optimizer's state is on the chip, and whether the replicas share it out.
Placement = Tuple[bool, bool]
#: More cuts than this take too long, and too much memory.
_MOST_CUTS = 2_000_000


class Layout(NamedTuple):
    """What is searched: how a model is laid out on a number of devices."""

    layers_per_stage: List[int]
    micro_batch_size: int
    gradient_accumulation: int
    recompute: List[Any]
    on_chip: bool
    sharded: bool

    @classmethod
    def of_stages(
        cls,
        layers: Sequence[int],
        kept: Sequence[Sequence[int]],
        *,
        micro_batch_size: int,
        gradient_accumulation: int,
        placement: Placement,
    ) -> Layout:
        """Make a layout of each stage's layers and the outputs it keeps, counted from its first."""
        recompute: List[Any] = []
        start = 0
        for stage, (count, own) in enumerate(zip(layers, kept)):
            # The next stage keeps what the last layer of this one gives.
            whole = count if stage == len(layers) - 1 else count - 1
            if not own:
                recompute.append("stage_inputs")
            elif len(own) >= whole:
                recompute.append("every_layer")
            else:
                recompute.append([start + layer for layer in own])
            start += count
        return cls(list(layers), micro_batch_size, gradient_accumulation, recompute, *placement)

    def overlay(self, *, on_ipus: bool) -> Dict[str, Dict[str, Any]]:
        """Return it as sections and keys of a configuration."""
        overlay: Dict[str, Dict[str, Any]] = {
            "pipeline": {"layers_per_stage": self.layers_per_stage},
            "batch": {
                "micro_batch_size": self.micro_batch_size,
                "gradient_accumulation": self.gradient_accumulation,
            },
        }
        if on_ipus:
            overlay["pipeline"]["recompute"] = self.recompute
            overlay["engine"] = {
                "optimizer_state_on_chip": self.on_chip,
                "replicated_tensor_sharding": self.sharded,
            }
        return overlay

    def applied_to(self, config: Config, *, on_ipus: bool) -> Config:
        """Return a configuration laid out so."""
        overlay = self.overlay(on_ipus=on_ipus)
        overlay["batch"]["global_batch_size"] = None
        return config.changed(**overlay)

    def write(self, path: Path, *, on_ipus: bool, comment: Sequence[str]) -> None:
        """Write it as a configuration to be laid over another; never over a file that is there.

        Parameters
        ----------
        path
            The file.
        on_ipus
            Whether the keys of IPUs are meant.
        comment
            Lines for its head.

        Raises
        ------
        ConfigError
            If the file exists or cannot be written.
        """
        text = "".join(f"# {line}".rstrip() + "\n" for line in comment)
        text += yaml.safe_dump(
            self.overlay(on_ipus=on_ipus), sort_keys=False, default_flow_style=None
        )
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError as error:
            raise ConfigError(f"{path} exists; name a new file, or remove it.") from error
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be written: {error.strerror}. Name a place you may write to."
            ) from error


def all_cuts(num_layers: int, stages: int) -> np.ndarray:
    """Return all cuts, int16 ``[cuts, stages]``: only the first and the last may have no layers.

    Raises
    ------
    ConfigError
        If there are fewer layers than stages that need one, or too many cuts.
    """
    free = num_layers - max(0, stages - 2)
    if free < 0:
        raise ConfigError(
            f"{num_layers} layers cannot be cut into {stages} stages: each but the first and the"
            " last needs one."
        )
    count = math.comb(free + stages - 1, stages - 1)
    if count > _MOST_CUTS:
        raise ConfigError(
            f"{num_layers} layers can be cut into {stages} stages in {count:,} ways, too many to"
            f" try (at most {_MOST_CUTS:,}). Search fewer stages, or plan cuts of your own."
        )
    numbers = chain.from_iterable(combinations(range(free + stages - 1), stages - 1))
    bars = np.fromiter(numbers, dtype=np.int16).reshape(count, stages - 1)
    first, last = (np.full((count, 1), end, np.int16) for end in (-1, free + stages - 1))
    cuts: np.ndarray = np.diff(np.hstack([first, bars, last]), axis=1) - 1
    cuts[:, 1:-1] += 1
    return cuts


def kept_choices(num_layers: int) -> List[Tuple[int, ...]]:
    """Return which outputs may be kept: none, evenly spaced ones, all."""
    choices = {
        tuple(sorted({-(-num_layers * part // (count + 1)) - 1 for part in range(1, count + 1)}))
        for count in range(num_layers)
    }
    return sorted({*choices, tuple(range(num_layers))}, key=len)
