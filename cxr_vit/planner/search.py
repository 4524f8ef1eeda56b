"""How a model is laid out on a number of devices, as part of a configuration. Imports no torch."""

from __future__ import annotations

import math
from functools import cached_property
from heapq import merge
from itertools import chain, combinations, product
from pathlib import Path
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import yaml

from cxr_vit.config import BatchPlan, Config
from cxr_vit.config.ipu_rules import ipu_problems
from cxr_vit.config.rules import schedule_problem
from cxr_vit.errors import ConfigError
from cxr_vit.planner.costs import Formats, ModelShape, stage_cost, stage_memory
from cxr_vit.planner.estimate import Plan, choose_hardware, make_plan
from cxr_vit.planner.speed import SpeedModel, Workload, published_model, update_seconds, workload
from cxr_vit.planner.timeline import in_flight, num_cycles

__all__ = [
    "UNFIT",
    "Candidate",
    "Choice",
    "Found",
    "Layout",
    "Placement",
    "StageChoices",
    "all_cuts",
    "kept_choices",
    "search",
]


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

    seconds_a_image: float
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
            f"none of the micro-batches {list(sizes)} divides the {share} images that a replica has"
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
        images = work.micro_batch_size * work.micro_batches * work.replicas
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
                round(float(least_s[row]) / images, 12),
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
        if len(best) >= _TOP and 1 / row.seconds_a_image < best[_TOP - 1].plan.samples_per_s:
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
