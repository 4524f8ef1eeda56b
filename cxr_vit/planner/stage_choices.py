"""What a stage can do with a number of layers: which outputs to keep, and what that takes.

Imports no torch.
"""

from __future__ import annotations

import math
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

from cxr_vit.config import Config
from cxr_vit.planner.costs import ModelShape, stage_cost
from cxr_vit.planner.layout import Placement, kept_choices
from cxr_vit.planner.memory import Formats, stage_memory
from cxr_vit.planner.speed import SpeedModel, Workload, update_seconds
from cxr_vit.planner.timeline import in_flight

__all__ = ["UNFIT", "Choice", "StageChoices"]


class Choice(NamedTuple):
    """One way: seconds of a micro-batch and of an update, share of the memory, outputs kept."""

    seconds: float
    share: float
    kept: Tuple[int, ...]
    update_s: float


UNFIT = Choice(math.inf, math.inf, (), 0.0)


class StageChoices:
    """All that fit, by stage and number of layers; worked out once for batches alike.

    Parameters
    ----------
    config
        The configuration, but for what `of` takes.
    model
        Constants of the speed.
    """

    def __init__(self, config: Config, model: SpeedModel) -> None:
        self.config, self.model = config, model
        self.shape = ModelShape.from_config(config)
        self._known: Dict[Any, List[List[List[Choice]]]] = {}

    def of(self, work: Workload, placement: Placement) -> List[List[List[Choice]]]:
        """Return what fits of each stage with each number of layers, the fastest first."""
        stages, count = len(work.costs), work.micro_batches
        depths = [in_flight(work.schedule, stage, stages, count) for stage in range(stages)]
        key = (work.micro_batch_size, placement, tuple(depths), count > 1)
        if key not in self._known:
            on_chip, sharded = placement
            config = self.config.changed(batch={"gradient_accumulation": count})
            formats = Formats.from_config(config, work.hardware)._replace(
                on_chip=on_chip, shards=work.replicas if sharded else 1
            )
            self._known[key] = [
                [
                    self._choices(work, formats, stage, layers, depths)
                    for layers in range(self.shape.num_layers + 1)
                ]
                for stage in range(stages)
            ]
        return self._known[key]

    def _choices(
        self, work: Workload, formats: Formats, stage: int, layers: int, depths: Sequence[int]
    ) -> List[Choice]:
        last = len(depths) - 1
        if layers == 0 and 0 < stage < last:
            return []  # in no cut
        choices = []
        for kept in kept_choices(layers) if work.recomputes else [()]:
            cost = stage_cost(
                self.shape,
                num_layers=layers,
                is_first=stage == 0,
                is_last=stage == last,
                kept=kept,
                recomputes=work.recomputes,
            )
            memory = stage_memory(
                cost,
                self.shape,
                formats,
                work.hardware,
                stage=stage,
                depth=depths[stage],
                micro_batch_size=work.micro_batch_size,
            )
            if memory.fits:
                update_s = update_seconds(cost, formats, work.hardware, work.replicas)
                alone = work._replace(costs=(cost,), update_s=(update_s,))
                (time,) = alone.stage_times(self.model)
                choices.append(Choice(time.micro_batch_s, memory.share, kept, update_s))
        return sorted(choices)
