"""Searches the cuts, micro-batches, accumulations, recomputations and placements of a pipeline.

All cuts are tried. What a stage takes depends on its place and its own layers alone, and no update
is quicker than its slowest stage lets it be, so the outputs to keep are chosen stage by stage, and
the cuts are ranked by that bound. For IPUs it is the time itself; a pipeline of processes is then
timed, the most promising first, until no other can be faster. Imports no torch.
"""

from __future__ import annotations

from functools import cached_property
from heapq import merge
from itertools import product
from typing import Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from cxr_vit.config import BatchPlan, Config
from cxr_vit.config.ipu_rules import ipu_problems
from cxr_vit.config.process_rules import schedule_problem
from cxr_vit.errors import ConfigError
from cxr_vit.planner.costs import ModelShape
from cxr_vit.planner.estimate import Plan, choose_hardware, make_plan
from cxr_vit.planner.layout import Layout, Placement, all_cuts
from cxr_vit.planner.speed import SpeedModel, Workload, published_model, workload
from cxr_vit.planner.stage_choices import UNFIT, Choice, StageChoices
from cxr_vit.planner.timeline import num_cycles

__all__ = ["Candidate", "Found", "search"]

_TOP = 10


class Candidate(NamedTuple):
    """A layout that fits and is not refused, and its plan."""

    layout: Layout
    plan: Plan


class Found(NamedTuple):
    """What a search found.

    Attributes
    ----------
    best
        The fastest that fit and are not refused, the fastest first.
    tried
        Number of combinations of cut, batch and placement.
    refused
        Accumulations that are refused, each with the reason.
    too_large
        The smallest micro-batch that fits in no cut; None where all fit in some.
    """

    best: List[Candidate]
    tried: int
    refused: Dict[int, str]
    too_large: Optional[int]


class _Ranked(NamedTuple):
    """A combination by what it is ranked by, before it is planned."""

    seconds_a_film: float
    preference: int
    share: float
    layers: Tuple[int, ...]
    micro_batch_size: int
    accumulation: int
    placement: Placement
    kept: Tuple[Tuple[int, ...], ...]


def search(
    config: Config,
    *,
    micro_batches: Optional[Sequence[int]] = None,
    accumulations: Optional[Sequence[int]] = None,
    model: Optional[SpeedModel] = None,
) -> Found:
    """Find the fastest layouts of a configuration's pipeline.

    Parameters
    ----------
    config
        Says all that is not searched, the number of stages and replicas among it.
    micro_batches
        Sizes to try; None for all that divide the global batch.
    accumulations
        To try with each of them; None for the one that gives the configuration's global batch.
    model
        Constants of the speed; None for those fitted to published runs.

    Raises
    ------
    ConfigError
        If the configuration has no pipeline to cut, the model's shape is unknown, there are too
        many cuts to try, or PopTorch would refuse it however it is laid out.
    """
    hardware = choose_hardware(config)
    stages = len(config.pipeline.layers_per_stage)
    cuts = all_cuts(ModelShape.from_config(config).num_layers, stages)
    even = [int(count) for count in cuts[np.argmin(cuts.max(axis=1))]]
    neutral = _neutral(config, even)
    work = workload(neutral, hardware)
    _check(neutral, work)
    pairs = _pairs(config, micro_batches, accumulations)
    refused = _refused(neutral, work, sorted({count for _, count in pairs}))
    legal = [(size, count) for size, count in pairs if count not in refused]
    placements = _placements(config, work)
    constants = model or published_model(hardware)
    every_choice = StageChoices(neutral, constants)
    tables: Dict[int, _Table] = {}
    fitting = set()
    ranked: List[Iterator[_Ranked]] = []
    for placement, (size, count) in product(placements, legal):
        batch = work._replace(micro_batch_size=size, micro_batches=count)
        choices = every_choice.of(batch, placement)
        table = tables.setdefault(id(choices), _Table(cuts, choices, placement))
        if np.isfinite(table.share).any():
            fitting.add(size)
            ranked.append(table.ranked(batch, preference=placements.index(placement)))
    unfit = sorted({size for size, _ in legal} - fitting)
    return Found(
        best=_best(config, merge(*ranked), model, work),
        tried=len(cuts) * len(pairs) * len(placements),
        refused=refused,
        too_large=unfit[0] if unfit else None,
    )


def _check(neutral: Config, work: Workload) -> None:
    """Raise if there is nothing to search, or all of it would be refused."""
    if len(work.costs) == 1:
        raise ConfigError(
            "there is nothing to search: all stages run on one device. Give a pipeline"
            " (engine.name=poptorch or pipeline, two stages or more)."
        )
    problems = ipu_problems(neutral) if work.hardware.is_ipu else []
    if problems:
        raise ConfigError("\n".join(problems))


def _neutral(config: Config, layers: List[int]) -> Config:
    """Return the configuration with what is searched set to what nobody refuses."""
    return config.changed(
        pipeline={"layers_per_stage": layers, "recompute": "every_layer"},
        batch={"gradient_accumulation": 1_000_000, "global_batch_size": None},
        engine={"optimizer_state_on_chip": True, "replicated_tensor_sharding": False},
    )


def _refused(config: Config, work: Workload, counts: Sequence[int]) -> Dict[int, str]:
    """Return the accumulations that the pipeline cannot have, each with the reason."""
    refused = {}
    for count in counts:
        tried = config.changed(batch={"gradient_accumulation": count})
        if work.hardware.is_ipu:
            problems = ipu_problems(tried)
        else:
            problem = schedule_problem(tried, len(work.costs))
            problems = [problem] if problem else []
        if problems:
            refused[count] = problems[0]
    return refused


def _pairs(
    config: Config, sizes: Optional[Sequence[int]], counts: Optional[Sequence[int]]
) -> List[Tuple[int, int]]:
    """Return the micro-batch sizes and accumulations to try together."""
    batch = BatchPlan.from_section(config.batch)
    share = batch.global_batch_size // batch.replicas
    if sizes is None:
        sizes = [size for size in range(1, share + 1) if share % size == 0]
    if counts is not None:
        return list(product(sizes, counts))
    pairs = [(size, share // size) for size in sizes if share % size == 0]
    if not pairs:
        raise ConfigError(
            f"none of the micro-batches {list(sizes)} divides the {share} films that a replica has"
            " in a weight update. Give others, or --accumulations as well."
        )
    return pairs


def _placements(config: Config, work: Workload) -> List[Placement]:
    """Return where the optimizer's state may lie, (on the chip, sharded), the own place first."""
    if not work.hardware.is_ipu:
        return [(True, False)]
    engine = config.engine
    own = (engine.optimizer_state_on_chip, engine.replicated_tensor_sharding)
    sharded = [False, True] if config.batch.replicas > 1 else [False]
    every = [(on_chip, shard) for on_chip in (True, False) for shard in sharded]
    return sorted(every, key=lambda placement: placement != own)


class _Table:
    """What each cut takes of each stage, at one placement and micro-batch."""

    def __init__(
        self,
        cuts: np.ndarray,
        choices: Sequence[Sequence[Sequence[Choice]]],
        placement: Placement,
    ) -> None:
        self.cuts, self.choices, self.placement = cuts, choices, placement

    @cached_property
    def seconds(self) -> np.ndarray:
        """Seconds of a micro-batch, float64 ``[cuts, stages]``; infinite where it does not fit."""
        return self._of_the_quickest("seconds")

    @cached_property
    def share(self) -> np.ndarray:
        """How full the fullest device is, float64 ``[cuts]``."""
        fullest: np.ndarray = self._of_the_quickest("share").max(axis=1)
        return fullest

    @cached_property
    def update_s(self) -> np.ndarray:
        """Seconds that the weights' update takes, float64 ``[cuts]``."""
        longest: np.ndarray = self._of_the_quickest("update_s").max(axis=1)
        return longest

    def _of_the_quickest(self, field: str) -> np.ndarray:
        table = np.array(
            [
                [getattr((choices or [UNFIT])[0], field) for choices in by_layers]
                for by_layers in self.choices
            ]
        )
        values: np.ndarray = table[np.arange(len(self.choices)), self.cuts]
        return values

    def ranked(self, work: Workload, *, preference: int) -> Iterator[_Ranked]:
        """Yield the cuts that fit, those first of which an update takes the least at least."""
        least_s = self._least_s(work) + self.update_s
        films = work.micro_batch_size * work.micro_batches * work.replicas
        candidates = np.arange(len(least_s))
        if work.schedule in ("lockstep", "in_order") and len(least_s) > _TOP:
            # It takes no more either: the first and all that tie with the last of them will do.
            limit = np.partition(least_s, _TOP)[_TOP]
            candidates = np.flatnonzero(least_s <= limit * (1 + 1e-12))
        order = np.lexsort((self.share[candidates], np.round(least_s[candidates], 12)))
        for row in candidates[order]:
            if not np.isfinite(least_s[row]):
                return
            layers = tuple(int(count) for count in self.cuts[row])
            chosen = self._chosen(work, layers, float(self.seconds[row].max()))
            yield _Ranked(
                round(float(least_s[row]) / films, 12),
                preference,
                max(choice.share for choice in chosen),
                layers,
                work.micro_batch_size,
                work.micro_batches,
                self.placement,
                tuple(choice.kept for choice in chosen),
            )

    def _least_s(self, work: Workload) -> np.ndarray:
        """Return what an update of each cut takes at least, but for the weights' own."""
        own, count = self.seconds, work.micro_batches
        least: np.ndarray
        if work.schedule == "lockstep":
            least = num_cycles(own.shape[1], count) * self._slowest
        elif work.schedule == "in_order":
            least = count * own.sum(axis=1)
        else:
            # Before a stage begins, those before it pass a micro-batch on, and take it back at the
            # end; in between it does its own work.
            before = np.cumsum(np.hstack([np.zeros((len(own), 1)), own[:, :-1]]), axis=1)
            least = (before + count * own).max(axis=1)
        return least

    @cached_property
    def _slowest(self) -> np.ndarray:
        slowest: np.ndarray = self.seconds.max(axis=1)
        return slowest

    def _chosen(self, work: Workload, layers: Tuple[int, ...], slowest_s: float) -> List[Choice]:
        """Choose for each stage what takes the least memory and makes no round longer."""
        chosen = []
        for stage, count in enumerate(layers):
            choices = self.choices[stage][count]
            limit_s = slowest_s if work.schedule == "lockstep" else choices[0].seconds
            quick = [choice for choice in choices if choice.seconds <= limit_s * (1 + 1e-9)]
            chosen.append(min(quick, key=lambda choice: choice.share))
        return chosen


def _best(
    config: Config, ranked: Iterable[_Ranked], model: Optional[SpeedModel], work: Workload
) -> List[Candidate]:
    """Plan the most promising until no other can be among the best."""
    on_ipus = work.hardware.is_ipu
    best: List[Candidate] = []
    seen = set()
    for row in ranked:
        if len(best) >= _TOP and 1 / row.seconds_a_film < best[_TOP - 1].plan.samples_per_s:
            break
        key = (row.layers, row.micro_batch_size, row.accumulation)
        if key in seen:  # no faster with the optimizer's state elsewhere
            continue
        layout = Layout.of_stages(
            row.layers,
            row.kept,
            micro_batch_size=row.micro_batch_size,
            gradient_accumulation=row.accumulation,
            placement=row.placement,
        )
        laid_out = layout.applied_to(config, on_ipus=on_ipus)
        plan = make_plan(laid_out, model=model)
        if plan.fits and not (on_ipus and ipu_problems(laid_out)):
            seen.add(key)
            best.append(Candidate(layout, plan))
            best.sort(key=lambda candidate: -candidate.plan.samples_per_s)
    return best[:_TOP]
