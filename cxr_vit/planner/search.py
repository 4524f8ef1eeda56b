"""Search for the fastest layout of a model on a number of devices, in training and evaluation."""

from __future__ import annotations

import math
from dataclasses import replace
from heapq import merge
from itertools import chain, combinations, product
from typing import (
    Any,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import numpy as np

from cxr_vit.config import BatchPlan, Config
from cxr_vit.config.ipu_rules import eval_layers, ipu_problems
from cxr_vit.config.rules import schedule_problem
from cxr_vit.errors import ConfigError
from cxr_vit.planner.costs import ModelShape, inference_cost, stage_cost
from cxr_vit.planner.estimate import (
    Evaluation,
    Plan,
    Splits,
    make_plan,
    plan_evaluation,
    speed_of,
    split_images,
)
from cxr_vit.planner.hardware import Target, find_target
from cxr_vit.planner.speed import Constants, SpeedModel, Workload, workload
from cxr_vit.planner.timeline import num_cycles, num_pipeline_stages

#: More cuts than this take too much time and memory.
_MOST_CUTS = 2_000_000
#: Number of layouts that are returned, of training and of evaluation.
_TOP, _TOP_EVALUATIONS = 10, 3
#: A searched host call of evaluation takes a second at most, and a validation several calls, so
#: that filling up the last costs little. Of layouts that are about as fast the smallest is best.
LONGEST_CALL_S, FEWEST_CALLS, AS_FAST = 1.0, 8, 0.02
#: Micro-batches and device iterations of evaluation are searched below two to this power.
_MOST_POWERS = 12


class StatePlacement(NamedTuple):
    """Whether the optimizer state is on the chip, and whether the replicas share it."""

    on_chip: bool
    sharded: bool


class Outputs(NamedTuple):
    """Layers of a stage, counted from its first, whose output is kept, and that of attention."""

    layers: Tuple[int, ...]
    attentions: bool = False


class Layout(NamedTuple):
    """A searched layout; `recompute` is `pipeline.recompute`."""

    layers_per_stage: List[int]
    micro_batch_size: int
    gradient_accumulation: int
    recompute: Union[str, List[Any]]
    placement: StatePlacement

    @classmethod
    def of_stages(
        cls,
        layers: Sequence[int],
        kept: Optional[Sequence[Outputs]],
        batch: BatchPlan,
        placement: StatePlacement,
    ) -> Layout:
        """Make a layout that keeps outputs of each stage, or with None recomputes nothing."""
        recompute: List[Any] = []
        start = 0
        for stage, (count, own) in enumerate(zip(layers, kept or ())):
            # The next stage keeps the output of this one's last layer.
            whole = count if stage == len(layers) - 1 else count - 1
            if own.attentions:
                recompute.append("attention_mlp")
            elif not own.layers:
                recompute.append("stage_inputs")
            elif len(own.layers) >= whole:
                recompute.append("every_layer")
            else:
                recompute.append([start + layer for layer in own.layers])
            start += count
        sizes = batch.micro_batch_size, batch.gradient_accumulation
        return cls(list(layers), *sizes, "none" if kept is None else recompute, placement)

    def overlay(self, *, on_ipus: bool) -> Dict[str, Dict[str, Any]]:
        """Return the layout as sections and keys of a configuration."""
        overlay: Dict[str, Dict[str, Any]] = {
            "pipeline": {"layers_per_stage": self.layers_per_stage},
            "batch": {
                "micro_batch_size": self.micro_batch_size,
                "gradient_accumulation": self.gradient_accumulation,
            },
        }
        if on_ipus or self.recompute != "none":
            overlay["pipeline"]["recompute"] = self.recompute
        if on_ipus:
            overlay["engine"] = {
                "optimizer_state_on_chip": self.placement.on_chip,
                "replicated_tensor_sharding": self.placement.sharded,
            }
        return overlay

    def applied_to(self, config: Config, *, on_ipus: bool) -> Config:
        """Return a configuration with this layout."""
        overlay = self.overlay(on_ipus=on_ipus)
        overlay["batch"]["global_batch_size"] = None
        return config.changed(**overlay)


def all_cuts(num_layers: int, stages: int) -> np.ndarray:
    """Return all cuts, int16 ``[cuts, stages]``; only the first and last may have no layers."""
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


class _Choice(NamedTuple):
    """A stage with some outputs kept: seconds per micro-batch, bytes, seconds per update."""

    seconds: float
    memory: float
    update_s: float
    kept: Outputs


_UNFIT = _Choice(math.inf, math.inf, 0.0, Outputs(()))


def _choices(
    work: Workload, constants: Constants, stage: int, layers: int, depth: int
) -> List[_Choice]:
    """Return what fits of a stage with a number of layers, the fastest first."""
    own = work.costs[stage]
    if layers == 0 and not own.is_first and not own.is_last:
        return []  # in no cut
    choices = []
    kept_outputs = [Outputs(())]
    if work.recomputes and work.target.ipu is None:  # the time is the same whatever is kept
        kept_outputs = [Outputs(tuple(range(layers)))]
    elif work.recomputes:
        kept_outputs = [Outputs(kept) for kept in kept_choices(layers)]
        kept_outputs += [Outputs(tuple(range(layers)), attentions=True)] * (layers > 0)
    for kept in kept_outputs:
        cost = stage_cost(
            work.shape,
            num_layers=layers,
            is_first=own.is_first,
            is_last=own.is_last,
            kept=kept.layers,
            attentions=kept.layers if kept.attentions else (),
            recomputes=work.recomputes,
            stashes=work.schedule == "lockstep",
            on_ipu=work.target.ipu is not None,
        )
        memory = work.memory(stage, cost, depth)
        if memory.fits:
            time = work.stage_time(cost, constants)
            choices.append(_Choice(time.micro_batch_s, memory.total, time.update_s, kept))
    return sorted(choices)


class Candidate(NamedTuple):
    """A layout that fits and is not refused, and its plan."""

    layout: Layout
    plan: Plan


class EvaluationCandidate(NamedTuple):
    """A layout of evaluation that fits, as sections and keys of a configuration, and its plan."""

    overlay: Dict[str, Dict[str, Any]]
    evaluation: Evaluation


class Found(NamedTuple):
    """Result of a search: the best layouts, the fastest first, of the `tried` combinations.

    `refused` holds refused accumulations with the reason, `too_large` the smallest micro-batch that
    fits in no cut. `evaluations` has the layouts of evaluation on IPUs for the first of `best`, the
    best first.
    """

    best: List[Candidate]
    tried: int
    refused: Dict[int, str]
    too_large: Optional[int]
    evaluations: List[EvaluationCandidate]

    def overlay(self, *, on_ipus: bool) -> Dict[str, Dict[str, Any]]:
        """Return the best layouts as sections and keys of a configuration."""
        overlay = self.best[0].layout.overlay(on_ipus=on_ipus)
        for found in self.evaluations[:1]:
            for section, keys in found.overlay.items():
                overlay[section].update(keys)
        return overlay


class _Ranked(NamedTuple):
    """A layout before it is planned, and what it is ranked by."""

    seconds_per_image: float
    preference: int
    memory: float
    layout: Layout


def search(
    config: Config,
    *,
    target: Optional[Target] = None,
    micro_batches: Optional[Sequence[int]] = None,
    accumulations: Optional[Sequence[int]] = None,
    model: Optional[SpeedModel] = None,
) -> Found:
    """Find the fastest layouts with a configuration's number of stages and replicas.

    On IPUs every cut is tried with and without recomputation, and evaluation is searched, too.
    Other devices recompute every layer if the configuration recomputes anything.

    Without `micro_batches` all that divide the global batch are tried. If the overhead of a
    micro-batch is unknown, only the configuration's own is: small ones would look too fast. Without
    `accumulations` each size has the one that keeps the global batch. Raises ConfigError if the
    configuration has no pipeline to cut or is refused with any layout, or the cuts are too many.
    """
    target = target or find_target(config)
    model = model or speed_of(target)
    neutral = _neutral(config)
    work = workload(neutral, target)
    if len(work.costs) == 1:
        raise ConfigError(
            "there is nothing to search: all stages run on one device. Give a pipeline"
            " (engine.name=poptorch or pipeline, two stages or more)."
        )
    problems = ipu_problems(neutral) if target.ipu else []
    if problems:
        raise ConfigError("\n".join(map(str, problems)))
    cuts = all_cuts(work.shape.num_layers, len(work.costs))
    batch = BatchPlan.from_section(config.batch)
    if micro_batches is None and model.constants.overhead_s == 0:
        micro_batches = [batch.micro_batch_size]
    pairs = _pairs(batch, micro_batches, accumulations)
    refused = _refused(neutral, work, sorted({count for _, count in pairs}))
    legal = [
        replace(batch, micro_batch_size=size, gradient_accumulation=count)
        for size, count in pairs
        if count not in refused
    ]
    placements = _placements(config, target)
    # Whether to recompute is a choice for all stages together (PopART, autoRecomputation).
    works = [work]
    if work.recomputes and target.ipu is not None:
        works.append(work._replace(recomputes=False))
    ranked = _rank(works, cuts, placements, legal, model.constants)
    fitting = {size for size, _ in ranked}
    unfit = [own.micro_batch_size for own in legal if own.micro_batch_size not in fitting]
    best_first = merge(*(rows for _, rows in ranked), key=lambda row: row[:3])
    best = _best(config, best_first, target, model)
    return Found(
        best=best,
        tried=len(works) * len(cuts) * len(pairs) * len(placements),
        refused=refused,
        too_large=min(unfit, default=None),
        evaluations=_search_evaluation(config, best, target, model),
    )


def _rank(
    works: Sequence[Workload],
    cuts: np.ndarray,
    placements: Sequence[StatePlacement],
    batches: Sequence[BatchPlan],
    constants: Constants,
) -> List[Tuple[int, Iterator[_Ranked]]]:
    """Return the micro-batch size and the ranked cuts of each placement and batch that fits."""
    tables: Dict[Tuple[object, ...], _Table] = {}
    ranked = []
    for (preference, placement), work, batch in product(enumerate(placements), works, batches):
        placed = _placed(work._replace(batch=batch), placement)
        # Everything that a table depends on; the depths stop growing with the accumulation.
        key = (placed.formats, placed.recomputes, batch.micro_batch_size, placed.depths)
        if key not in tables:
            tables[key] = _Table(placed, cuts, constants)
        if np.isfinite(tables[key].memory).any():
            rows = tables[key].ranked(placed, placement, preference)
            ranked.append((batch.micro_batch_size, rows))
    return ranked


def _neutral(config: Config) -> Config:
    """Return the configuration with cuts, batches and placement that no rule refuses."""
    stages = len(config.pipeline.layers_per_stage)
    return config.changed(
        pipeline={
            "layers_per_stage": [1] * stages,
            "eval_layers_per_stage": [1] * len(eval_layers(config)),
            # The default of each kind of device, unless processes are to recompute.
            "recompute": None if config.pipeline.recompute in (None, "none") else "every_layer",
        },
        batch={
            "gradient_accumulation": num_pipeline_stages(stages),
            "global_batch_size": None,
            "eval_device_iterations": len(eval_layers(config)),
        },
        engine={"optimizer_state_on_chip": True, "replicated_tensor_sharding": False},
    )


def _refused(config: Config, work: Workload, counts: Sequence[int]) -> Dict[int, str]:
    """Return the accumulations that the pipeline refuses, each with the reason."""
    refused = {}
    for count in counts:
        tried = config.changed(batch={"gradient_accumulation": count})
        on_ipus = work.target.ipu is not None
        problems = ipu_problems(tried) if on_ipus else [schedule_problem(tried, len(work.costs))]
        if any(problems):
            refused[count] = str(problems[0])
    return refused


def _pairs(
    batch: BatchPlan, sizes: Optional[Sequence[int]], counts: Optional[Sequence[int]]
) -> List[Tuple[int, int]]:
    """Return the micro-batch sizes and accumulations to try together."""
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


def _placements(config: Config, target: Target) -> List[StatePlacement]:
    """Return the placements of the optimizer state to try, the configuration's own first."""
    if not target.ipu:
        return [StatePlacement(on_chip=True, sharded=False)]
    engine = config.engine
    own = StatePlacement(engine.optimizer_state_on_chip, engine.replicated_tensor_sharding)
    sharded = [False, True] if config.batch.replicas > 1 else [False]
    every = [StatePlacement(on_chip, shard) for on_chip in (True, False) for shard in sharded]
    return sorted(every, key=lambda placement: placement != own)


def _placed(work: Workload, placement: StatePlacement) -> Workload:
    """Return the work with this placement of the optimizer state, and its own accumulation."""
    formats = work.formats._replace(
        on_chip=placement.on_chip,
        shards=work.batch.replicas if placement.sharded else 1,
        accumulates=work.batch.gradient_accumulation > 1 or work.target.ipu is None,
    )
    return work._replace(formats=formats)


class _Table:
    """Time and memory of each cut, for works that differ in their accumulation only."""

    def __init__(self, work: Workload, cuts: np.ndarray, constants: Constants) -> None:
        self.cuts = cuts
        counts = range(work.shape.num_layers + 1)
        #: By stage and number of layers, the fastest first: all that the costs depend on.
        self.choices = [
            [_choices(work, constants, stage, layers, depth) for layers in counts]
            for stage, depth in enumerate(work.depths)
        ]
        most = [max((n for n in counts if choices[n]), default=-1) for choices in self.choices]
        if sum(most) < work.shape.num_layers:  # no cut fits
            self.memory = np.array([math.inf])
            return
        fastest = np.array(
            [[(choices or [_UNFIT])[0][:3] for choices in stage] for stage in self.choices]
        )
        #: float64 ``[cuts, stages, 3]``; infinite if it does not fit.
        values = fastest[np.arange(len(self.choices)), cuts]
        self.seconds = values[:, :, 0]
        #: Of the slowest stage, of the fullest, and of the longest weight update, ``[cuts]``.
        self.slowest_s, self.memory, self.update_s = values.max(axis=1).T

    def ranked(self, work: Workload, state: StatePlacement, preference: int) -> Iterator[_Ranked]:
        """Yield the cuts that fit, by the lower bound of an update's time."""
        least_s = self._least_s(work) + self.update_s
        candidates = np.arange(len(least_s))
        if work.schedule in ("lockstep", "in_order") and len(least_s) > _TOP:
            # The bound is the time itself: the first and all that tie with the last are enough.
            limit = np.partition(least_s, _TOP)[_TOP]
            candidates = np.flatnonzero(least_s <= limit * (1 + 1e-12))
        order = np.lexsort((self.memory[candidates], np.round(least_s[candidates], 12)))
        for row in candidates[order]:
            if not np.isfinite(least_s[row]):
                return
            layers = tuple(int(count) for count in self.cuts[row])
            chosen = self._chosen(work, layers, float(self.slowest_s[row]))
            per_image_s = round(float(least_s[row]) / work.batch.global_batch_size, 12)
            memory = max(choice.memory for choice in chosen)
            # Stages in order keep everything anyway.
            keeps_all = work.schedule != "in_order" and not work.recomputes
            kept = None if keeps_all else [own.kept for own in chosen]
            layout = Layout.of_stages(layers, kept, work.batch, state)
            yield _Ranked(per_image_s, preference, memory, layout)

    def _least_s(self, work: Workload) -> np.ndarray:
        """Return a lower bound of the time of each cut's micro-batches."""
        own, count = self.seconds, work.batch.gradient_accumulation
        if work.schedule == "lockstep":
            return np.asarray(num_cycles(own.shape[1], count) * self.slowest_s)
        if work.schedule == "in_order":
            return np.asarray(count * own.sum(axis=1))
        # The stages before a stage pass a micro-batch on before it starts, and take one back at the
        # end; in between it does its own work.
        before = np.cumsum(np.hstack([np.zeros((len(own), 1)), own[:, :-1]]), axis=1)
        return np.asarray((before + count * own).max(axis=1))

    def _chosen(self, work: Workload, layers: Tuple[int, ...], slowest_s: float) -> List[_Choice]:
        """Choose for each stage the least memory that does not slow the update."""
        chosen = []
        for stage, count in enumerate(layers):
            choices = self.choices[stage][count]
            limit_s = slowest_s if work.schedule == "lockstep" else choices[0].seconds
            quick = [choice for choice in choices if choice.seconds <= limit_s * (1 + 1e-9)]
            chosen.append(min(quick, key=lambda choice: choice.memory))
        return chosen


def _best(
    config: Config, ranked: Iterable[_Ranked], target: Target, model: SpeedModel
) -> List[Candidate]:
    """Plan the most promising combinations until no other can be among the best."""
    on_ipus = target.ipu is not None
    # What is refused of evaluation is searched later.
    evaluated = _neutral(config)
    best: List[Candidate] = []
    seen = set()
    for row in ranked:
        if len(best) >= _TOP and 1 / row.seconds_per_image < best[_TOP - 1].plan.samples_per_s:
            break
        layout = row.layout
        key = (tuple(layout.layers_per_stage), layout[1:3])
        if key in seen:  # no faster with the optimizer state elsewhere
            continue
        laid_out = layout.applied_to(evaluated, on_ipus=on_ipus)
        plan = make_plan(laid_out, target=target, model=model)
        if plan.fits and not (on_ipus and ipu_problems(laid_out)):
            seen.add(key)
            best.append(Candidate(layout, plan))
            best.sort(key=lambda candidate: -candidate.plan.samples_per_s)
    return best[:_TOP]


def _search_evaluation(
    config: Config, best: Sequence[Candidate], target: Target, model: SpeedModel
) -> List[EvaluationCandidate]:
    """Find the best layouts of evaluation on IPUs beside the best of training."""
    if not target.ipu or not best:
        return []
    laid_out = best[0].layout.applied_to(config, on_ipus=True)
    fastest: List[EvaluationCandidate] = []
    splits = split_images(config.data)
    for cut in _evaluation_cuts(laid_out):
        found = _evaluations(laid_out, cut, target, model, splits)
        # Another cut than that of training must be worth it.
        if not fastest or (found and _least_s_of(found) < (1 - AS_FAST) * _least_s_of(fastest)):
            fastest = found
    quick = [
        own for own in fastest if own.evaluation.splits_s <= _least_s_of(fastest) * (1 + AS_FAST)
    ]
    first = min(quick, key=lambda own: own.evaluation.images_per_call, default=None)
    others = sorted(fastest, key=lambda own: own.evaluation.splits_s)
    return ([first] if first else []) + [own for own in others if own is not first][
        : _TOP_EVALUATIONS - 1
    ]


def _evaluation_cuts(config: Config) -> List[Optional[List[int]]]:
    """Return the cuts of evaluation to try: that of training, as None, and the most even one."""
    training, stages = config.pipeline.layers_per_stage, len(eval_layers(config))
    shape = ModelShape.from_config(config)
    cuts = all_cuts(shape.num_layers, stages)
    flops = [
        [
            inference_cost(
                shape, num_layers=layers, is_first=stage == 0, is_last=stage == stages - 1
            ).forward_flops
            for layers in range(shape.num_layers + 1)
        ]
        for stage in range(stages)
    ]
    slowest = np.array(flops)[np.arange(stages), cuts].max(axis=1)
    even: List[int] = cuts[slowest.argmin()].tolist()
    if stages != len(training):
        return [even]
    is_sharded = config.pipeline.eval_execution == "sharded"  # any cut takes as long
    return [None] if is_sharded or even == training else [None, even]


def _evaluations(
    config: Config, cut: Optional[List[int]], target: Target, model: SpeedModel, splits: Splits
) -> List[EvaluationCandidate]:
    """Plan micro-batches and device iterations, powers of two, for a cut as above.

    Without one that keeps the limits of a host call the smallest is returned.
    """
    least = len(cut or config.pipeline.layers_per_stage)
    if config.pipeline.eval_execution == "sharded":
        least = 1
    found: List[EvaluationCandidate] = []
    for size in (1 << power for power in range(_MOST_POWERS)):
        before = len(found)
        for iterations in (1 << power for power in range(_MOST_POWERS)):
            if iterations < least:
                continue
            batch = {"eval_micro_batch_size": size, "eval_device_iterations": iterations}
            overlay: Dict[str, Dict[str, Any]] = {
                "pipeline": {"eval_layers_per_stage": cut},
                "batch": batch,
            }
            laid_out = config.changed(**overlay)
            evaluation = plan_evaluation(laid_out, target=target, model=model, splits=splits)
            if evaluation is None or not evaluation.plan.fits or ipu_problems(laid_out):
                break
            is_short = (
                evaluation.longest_call_s <= LONGEST_CALL_S
                and evaluation.calls(splits.validation) >= FEWEST_CALLS
            )
            if is_short or not found:
                found.append(EvaluationCandidate(overlay, evaluation))
            if not is_short:
                break
        if len(found) == before:
            break
    return found


def _least_s_of(found: Sequence[EvaluationCandidate]) -> float:
    """Return the shortest time to score both splits."""
    return min((own.evaluation.splits_s for own in found), default=math.inf)
