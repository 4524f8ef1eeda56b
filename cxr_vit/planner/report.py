"""Text of a plan, of a search and of the planner's sources."""

from __future__ import annotations

import math
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from cxr_vit.config import BatchPlan, Config, read_config
from cxr_vit.config.ipu_rules import ipu_problems
from cxr_vit.config.rules import schedule_problem
from cxr_vit.console import columns, count, percent, prose, signed_percent
from cxr_vit.errors import ConfigError
from cxr_vit.planner.costs import CATEGORIES
from cxr_vit.planner.estimate import FREEZE, Evaluation, Plan, StagePrediction, make_plan
from cxr_vit.planner.hardware import (
    ESTIMATES,
    IPUS_PER_MACHINE,
    MEMORY_UNCERTAINTY,
    PUBLISHED,
    TUTORIAL,
    Sourced,
    Target,
)
from cxr_vit.planner.search import (
    AS_FAST,
    FEWEST_CALLS,
    LONGEST_CALL_S,
    Candidate,
    EvaluationCandidate,
    Found,
)
from cxr_vit.planner.speed import FORWARD_PART, Workload, published_workload
from cxr_vit.planner.timeline import num_cycles, num_pipeline_stages, phases

#: Side of the images that the cache's speed was measured with.
_PIXELS_MEASURED = 224

_UNKNOWN_OVERHEAD = (
    "The fixed overhead of a micro-batch is unknown: small micro-batches look too fast."
    " --calibrate with runs of three micro-batch sizes or more determines it."
)
_UNKNOWN_MEMORY = "memory of the device is unknown: set planner.device_memory_gib"


def plan_lines(config: Config, plan: Plan, evaluation: Optional[Evaluation] = None) -> List[str]:
    """Describe the prediction for a configuration, and for its evaluation."""
    lines = [*_heading(config, plan, evaluation), "", *_memory(plan)]
    lines += [] if config.model.freeze == "none" else [FREEZE]
    lines += ["", *_times(plan), ""]
    lines += prose("update", _update(config, plan))
    if not plan.has_time:
        unknown = (
            "not predicted: no speed of this device is published for this model. --calibrate with"
            f" runs of {plan.target.describe()} predicts it; --hardware mk2 or bow predicts IPUs"
        )
        return lines + prose("speed", unknown)
    low, high = plan.speed_range
    speed = (
        f"{plan.samples_per_s:,.0f} samples/s ({low:,.0f} to {high:,.0f}), predicted; an epoch of"
        f" {plan.images:,} images ({plan.images_source}) takes {plan.epoch_minutes:,.1f} min"
    )
    lines += prose("speed", speed)
    lines += [*_host(config, plan), *_basis(plan), *_uncounted(plan), *_tutorial(plan)]
    return [*lines, *_evaluation(config, plan, evaluation)] if evaluation else lines


def _heading(config: Config, plan: Plan, evaluation: Optional[Evaluation]) -> List[str]:
    stages, batch, target = len(plan.stages), plan.work.batch, plan.target
    used = stages * batch.replicas
    devices = max(plan.devices, evaluation.plan.devices if evaluation else 0)
    reserved = "" if devices == used else f", {devices} reserved"
    if devices > plan.devices:
        reserved += " for evaluation"
    lines = [
        f"{target.of(used)}{reserved}: {count(batch.replicas, 'replica')} of"
        f" {count(stages, 'stage')}",
        f"{config.model.name} at {plan.work.shape.image_size} pixels,"
        f" {sum(stage.cost.parameters for stage in plan.stages):,} parameters",
    ]
    start = 0
    for stage in plan.stages:
        end = start + stage.cost.num_layers
        parts = ["embedding"] if stage.cost.is_first else []
        if end > start:
            parts.append(f"layers {start} to {end - 1}" if end > start + 1 else f"layer {start}")
        if stage.cost.is_last:
            parts.append("head")
        lines.append(f"  {target.place} {stage.stage}  {', '.join(parts)}")
        start = end
    lines.append(batch.describe()[0])
    problems = ipu_problems(config) if target.ipu else []
    if target.engine == "pipeline":
        problems = list(filter(None, [schedule_problem(config, stages)]))
    for problem in problems:
        lines += prose("refused", str(problem))
    return lines


def _memory(plan: Plan) -> List[str]:
    target, limit = plan.target, plan.target.memory_bytes
    head = "memory, MB" if plan.work.is_training else "memory of evaluation, MB"
    if limit is not None:
        has = f"{limit / 1e6:.1f}, or {limit / 2**20:,.0f} MiB"
        head += f" ({'an' if target.ipu else 'a'} {target.place} has {has})"

    def row(name: str, text: Callable[[StagePrediction], str]) -> List[str]:
        return [name, *map(text, plan.stages)]

    def megabytes(name: str, category: str) -> List[str]:
        return row(name, lambda stage: f"{getattr(stage.memory, category) / 1e6:.1f}")

    rows = [
        row(head, lambda stage: f"{target.place} {stage.stage}"),
        row("parameters, millions", lambda stage: f"{stage.cost.parameters / 1e6:.2f}"),
    ]
    for category, name in _categories(plan).items():
        if any(getattr(stage.memory, category) for stage in plan.stages):
            rows.append(megabytes(name, category))
    rows.append(megabytes("total", "total"))
    if limit is not None:
        verdict = f"verdict (+- {100 * MEMORY_UNCERTAINTY:.0f} %)"
        rows += [
            row("share", lambda stage: percent(stage.memory.share)),
            megabytes("headroom", "headroom"),
            row(verdict, lambda stage: stage.memory.verdict),
        ]
    if plan.work.is_training:
        rows.append(row("micro-batches held at a time", lambda stage: str(stage.depth)))
    lines = columns(rows)
    if limit is None:
        lines.append(_UNKNOWN_MEMORY)
    elif not target.ipu:
        lines.append(f"memory of the device: {target.memory_source}")
    return lines


def _categories(plan: Plan) -> Dict[str, str]:
    """Name the categories of memory, as `CATEGORIES`."""
    names, formats = dict(CATEGORIES), plan.work.formats
    if not formats.is_training:
        names["live"] = "live in forward"
    elif plan.target.ipu:
        names["optimizer"] += ", on chip" if formats.on_chip else ", off chip"
        names["optimizer"] += f", 1/{formats.shards} per replica" if formats.shards > 1 else ""
    return names


def _times(plan: Plan) -> List[str]:
    """Tabulate the milliseconds, or without them the operations, of each stage."""
    place = plan.target.place
    title, scale = ("time, ms", 1e3) if plan.has_time else ("operations, G", 1e-9)
    rows = [[title, *(f"{place} {stage.stage}" for stage in plan.stages)]]
    for name, kind in (
        ("forward", "forward_s"),
        ("recompute", "recompute_s"),
        ("backward", "backward_s"),
        ("per micro-batch", "micro_batch_s"),
        ("per weight update", "update_s"),
    ):
        values = [scale * getattr(stage.time, kind) for stage in plan.stages]
        if any(values):
            rows.append([name, *(f"{value:.3f}" for value in values)])
    lines = columns(rows)
    slowest, *others = plan.by_speed()
    if others and plan.work.schedule != "in_order":
        second, overhead_s = others[0], plan.model.constants.overhead_s
        more = percent(slowest.time.micro_batch_s / second.time.micro_batch_s - 1)
        text = f"{place} {slowest.stage} is the slowest, {more} over {place} {second.stage}"
        if overhead_s:
            text += f"; {1e3 * overhead_s:.2f} ms of each micro-batch are fixed overhead"
        lines.append(text)
    return lines


def _update(config: Config, plan: Plan) -> str:
    """Describe the time of an update, and how its micro-batches go through the stages.

    Of evaluation it is that of a host call.
    """
    work, stages, bubble = plan.work, len(plan.stages), percent(plan.bubble)
    accumulation = work.batch.gradient_accumulation
    micro_batches = f"{accumulation} micro-batch{'es' if accumulation > 1 else ''}"
    time = f"{1e3 * plan.seconds:,.1f} ms: " if plan.has_time else ""
    if work.schedule == "in_order":
        idle = f", one stage at a time: each idles {percent(1 - 1 / stages)}" if stages > 1 else ""
        return f"{time}{micro_batches}{idle}"
    if work.schedule != "lockstep":
        planned = ""
        if config.pipeline.schedule == "interleaved_1f1b":
            planned = " (interleaved_1f1b is planned as 1f1b, with one stage per device)"
        source = "" if plan.has_time else ", from the stages' operations alone"
        return f"{time}{work.schedule}{planned} with {micro_batches}; bubble {bubble}{source}"
    cycles = num_cycles(stages, accumulation, work.is_training)
    ends = num_pipeline_stages(stages, work.is_training)
    fill, steady, drain = phases(ends, accumulation)
    parts = f" ({fill} fill, {steady} steady, {drain} drain)" if steady and fill else ""
    return (
        f"{time}{cycles} pipeline cycles = {micro_batches} +"
        f" {ends} pipeline stages - 1{parts}; used"
        f" {accumulation}/{cycles}, bubble {bubble}"
    )


def _host(config: Config, plan: Plan) -> List[str]:
    needed, workers = plan.samples_per_s, config.data.num_workers
    text = f"must read {needed:,.0f} images/s and send {plan.host_bytes_per_s / 1e6:,.1f} MB/s"
    if plan.target.ipu:
        machines = math.ceil(plan.devices / IPUS_PER_MACHINE)
        links = machines * plan.target.ipu.host_bandwidth.value
        text += f" ({percent(plan.host_bytes_per_s / links)} of what its links carry)"
    if config.data.cache == "off":
        what, remedy = "data.cache=off decodes about", "use the cache"
        each = ESTIMATES["decoded_per_s"].value
    else:
        what, remedy = "The cache serves about", "raise data.num_workers"
        scale = (_PIXELS_MEASURED / plan.work.shape.image_size) ** 2
        each = ESTIMATES["cached_per_s"].value * scale
    processes = math.ceil(needed / each)
    text += (
        f". {what} {each:,.0f} images/s per process: {processes} for this speed, and"
        f" data.num_workers is {workers}"
    )
    if processes > max(1, workers):
        text += f". The host limits the speed, not the devices: {remedy}"
    return prose("host", text)


def _basis(plan: Plan) -> List[str]:
    constants, ipu = plan.model.constants, plan.target.ipu
    text = f"{constants.flops_per_s / 1e12:,.4g} TFLOPS"
    if ipu:
        share = constants.flops_per_s / ipu.peak_flops(plan.target.precision)
        text += f" ({percent(share)} of the peak)"
    if constants.overhead_s:
        text = f"an overhead of {1e3 * constants.overhead_s:.2f} ms per micro-batch and {text}"
    error = percent(plan.model.error)
    text += f", {plan.model.basis}; the range assumes errors of up to {error} in these speeds"
    if constants.overhead_s == 0:
        text += f". {_UNKNOWN_OVERHEAD} The range covers no overhead and nothing but overhead"
    return prose("basis", text)


def _uncounted(plan: Plan) -> List[str]:
    """Say what the plan leaves out, or has from PopART's sources alone, and how much it is."""
    work = plan.work
    if plan.target.ipu is None:
        return []
    lines = []
    if work.formats.activation < work.formats.weight:
        slowest = plan.by_speed()[0]
        passes = ["forward", *(["recomputation"] if slowest.cost.recompute_flops else [])]
        casts_s = work.casts_s(slowest.cost)
        lines += prose(
            "casts",
            f"not in these times: engine.weights=fp32 casts the weights of every product and lays"
            f" them out again, in {', '.join([*passes, 'backward'])}, for each micro-batch. By the"
            f" bandwidth of tiles and exchange it takes {1e3 * casts_s:.3f} ms of"
            f" {plan.target.place} {slowest.stage} or more,"
            f" {percent(casts_s / slowest.time.micro_batch_s)} of a micro-batch. The published runs"
            " had fp16 weights (engine.weights=fp16)",
        )
    weights = [stage.depth * stage.cost.kept_weights for stage in plan.stages]
    if any(weights):
        most = max(plan.stages, key=lambda stage: weights[stage.stage])
        size = weights[most.stage] * work.formats.activation
        lines += prose(
            "stash",
            f"{size / 1e6:,.1f} MB of that of {plan.target.place} {most.stage} are weights: without"
            " recomputation PopART keeps every tensor that forward makes and backward reads, and so"
            " the cast or transposed weights of each product, for each micro-batch held (read in"
            " its pipeline.cpp, not measured)",
        )
    return lines


def _evaluation(config: Config, training: Plan, evaluation: Evaluation) -> List[str]:
    """Describe the inference graph, which holds the IPUs while the training graph does not."""
    plan = evaluation.plan
    lines = ["", *_memory(plan), ""]
    stages = [stage.cost.num_layers for stage in plan.stages]
    if stages != [stage.cost.num_layers for stage in training.stages]:
        lines += prose("layers", f"{_list(stages)} in evaluation")
    what = BatchPlan.from_section(config.batch).describe()[2].split(maxsplit=1)[1]
    lines += prose("calls", f"{what}{_calls(evaluation)}")
    lines += prose("call", _update(config, plan))
    low, high = plan.speed_range
    lines += prose(
        "speed",
        f"{plan.samples_per_s:,.0f} samples/s ({low:,.0f} to {high:,.0f}) in evaluation, predicted:"
        f" a forward pass is assumed to have {percent(FORWARD_PART)} of the overhead of a training"
        " micro-batch, and all of it at the lower end; no published speed of evaluation shows it."
        " The time of the host between two calls is not counted",
    )
    return lines + _host(config, plan)


def _calls(evaluation: Evaluation) -> str:
    """Count the host calls of each split."""
    plan, parts = evaluation.plan, []
    for name, images in (("validation", plan.images), ("test", evaluation.test_images)):
        calls = evaluation.calls(images)
        parts.append(f"{calls:,}, {calls * plan.seconds:,.1f} s, for the {images:,} {name} images")
    return f". Calls: {' and '.join(parts)} ({plan.images_source})"


def _tutorial(plan: Plan) -> List[str]:
    """Compare the plan with Graphcore's tutorial, if batch, split and device are the same."""
    theirs, ours = published_workload(TUTORIAL), plan.work

    def compared(work: Workload) -> Tuple[object, ...]:
        sizes = work.batch.micro_batch_size, work.batch.global_batch_size, work.batch.replicas
        return work.target, work.schedule, sizes, [cost.parameters for cost in work.costs]

    if compared(theirs) != compared(ours) or plan.samples_per_s < TUTORIAL.samples_per_s:
        return []
    below = 1 - TUTORIAL.samples_per_s / plan.samples_per_s
    own = theirs.batch.global_batch_size / theirs.seconds(plan.model.constants)
    return prose(
        "note",
        f"Graphcore's tutorial printed {TUTORIAL.samples_per_s:.1f} samples/s for this batch and"
        f" split: {percent(below)} below the {plan.samples_per_s:,.0f} predicted here,"
        f" {percent(1 - TUTORIAL.samples_per_s / own)} below the {own:,.0f} predicted for its own"
        f" settings. It was {TUTORIAL.note}.",
    )


def search_lines(config: Config, found: Found, target: Target) -> List[str]:
    """List the results of a search around a configuration, and why the first is the fastest."""
    stages = len(config.pipeline.layers_per_stage)
    devices = target.of(stages * config.batch.replicas)
    tried = "cuts x batches x placements" + (" x recomputation" if target.ipu else "")
    lines = [f"{devices}: {found.tried:,} {tried} tried"]
    if found.refused:
        counts = ", ".join(map(str, found.refused))
        lines += prose("refused", f"accumulation {counts}: {list(found.refused.values())[-1]}")
    if target.memory_bytes is None:
        lines += prose("memory", f"{_UNKNOWN_MEMORY}; nothing is left out for it")
    if found.too_large is not None:
        lines += prose("memory", f"micro-batch {found.too_large} and larger: fit in no cut")
    if found.best:
        lines += [*_table(found.best), *prose("why", _why(config, found.best))]
        return lines + _evaluation_table(found.evaluations) if target.ipu else lines
    advice = "is left: give other --accumulations, or smaller --micro-batches."
    if found.too_large is not None:
        formats = ", engine.weights=fp16, optim.accumulator=fp16" if target.ipu else ""
        advice = (
            "fits: try more stages (pipeline.layers_per_stage) or fewer images per micro-batch"
            f"{formats}."
        )
    return [*lines, *prose("nothing", advice)]


def _table(best: Sequence[Candidate]) -> List[str]:
    first = best[0].plan
    place, on_ipus = first.target.place, first.target.ipu is not None
    heads = ["", "layers", "micro-batch", "accum.", "images"]
    heads += ["keeps", "moments"] if on_ipus else []
    rows = [[*heads, "samples/s" if first.has_time else "relative speed", "fullest"]]
    for rank, (layout, plan) in enumerate(best, 1):
        row = [
            str(rank),
            _list(layout.layers_per_stage),
            str(layout.micro_batch_size),
            str(layout.gradient_accumulation),
            str(plan.work.batch.global_batch_size),
        ]
        if on_ipus:
            moments = "on chip" if layout.placement.on_chip else "off chip"
            row.append(_kept_text(layout.recompute) if plan.work.recomputes else "everything")
            row.append(f"{moments}, sharded" if layout.placement.sharded else moments)
        relative = percent(plan.samples_per_s / first.samples_per_s)
        row.append(f"{plan.samples_per_s:,.0f}" if plan.has_time else relative)
        memory, is_known = plan.fullest.memory, plan.target.memory_bytes is not None
        full = percent(memory.share) if is_known else f"{memory.total / 1e6:,.0f} MB"
        rows.append([*row, f"{place} {plan.fullest.stage} {full}"])
    return columns(rows)


def _evaluation_table(found: Sequence[EvaluationCandidate]) -> List[str]:
    if not found:
        text = "no layout of evaluation fits, or each is refused: plan the best one to see why"
        return ["", *prose("nothing", text)]
    heads = ["", "evaluation", "micro-batch", "iterations", "images", "ms per call", "bubble"]
    rows = [[*heads, "samples/s", "both splits, s", "fullest"]]
    for rank, (_, evaluation) in enumerate(found, 1):
        plan, batch = evaluation.plan, evaluation.plan.work.batch
        row = [
            str(rank),
            _list([stage.cost.num_layers for stage in plan.stages]),
            str(batch.micro_batch_size),
            str(batch.gradient_accumulation),
            str(evaluation.images_per_call),
            f"{1e3 * plan.seconds:,.1f}",
            percent(plan.bubble),
            f"{plan.samples_per_s:,.0f}",
            f"{evaluation.splits_s:,.2f}",
            f"{plan.target.place} {plan.fullest.stage} {percent(plan.fullest.memory.share)}",
        ]
        rows.append(row)
    first = found[0].evaluation
    rule = (
        f"the smallest host call that scores the {first.plan.images:,} validation and"
        f" {first.test_images:,} test images within {percent(AS_FAST)} of the fastest time, among"
        f" calls of {LONGEST_CALL_S:.0f} s at most, also at the lower end of the speed, of which a"
        f" validation needs {FEWEST_CALLS} or more, so that filling up the last costs little"
    )
    return ["", *columns(rows), *prose("why", f"1 is {rule}.")]


def _list(values: Sequence[object]) -> str:
    return str(list(values)).replace(" ", "")


def _kept_text(recompute: Sequence[Any]) -> str:
    """Shorten `pipeline.recompute` to what each stage keeps besides its input."""
    short = {"stage_inputs": "-", "every_layer": "all", "attention_mlp": "halves"}
    return " ".join(short[own] if isinstance(own, str) else _list(own) for own in recompute)


def _why(config: Config, best: Sequence[Candidate]) -> str:
    """Explain why the first is faster than the configuration and than the second."""
    first = best[0].plan
    text = f"1 is the fastest, with {_character(first)}.{_against_own(config, first)}"
    if len(best) > 1:
        second = best[1].plan
        slower = percent(1 - second.samples_per_s / first.samples_per_s)
        text += f" 2 is {slower} slower: {_character(second)}."
    if first.fullest.memory.verdict == "fits, closely":
        verdicts = [row.plan.fullest.memory.verdict for row in best]
        roomy = (
            f"{verdicts.index('fits') + 1} is the first with" if "fits" in verdicts else "none has"
        )
        error = f"{100 * MEMORY_UNCERTAINTY:.0f} %"
        text += f" 1 fits closely, and the prediction may be off by {error}: {roomy} room for that."
    return text if first.model.constants.overhead_s else f"{text} {_UNKNOWN_OVERHEAD}"


def _against_own(config: Config, first: Plan) -> str:
    """Compare the first with the configuration's own layout."""
    try:
        own = make_plan(config, target=first.target, model=first.model)
    except ConfigError:
        return " The configuration's own cut is refused."
    batch = own.work.batch
    layers = _list(config.pipeline.layers_per_stage)
    layout = f"{layers}, {batch.micro_batch_size} x {batch.gradient_accumulation}"
    if own.target.ipu and ipu_problems(config):
        return f" The configuration's own, {layout}, is refused."
    if not own.fits:
        full = percent(own.fullest.memory.share)
        place = f"{own.target.place} {own.fullest.stage}"
        return f" The configuration's own, {layout}, does not fit: {full} of {place}."
    speed = f"{own.samples_per_s:,.0f} samples/s with " if own.has_time else ""
    return (
        f" The configuration's own, {layout}: {speed}{_character(own)}; 1 is"
        f" {first.samples_per_s / own.samples_per_s:.2f} times as fast."
    )


def _character(plan: Plan) -> str:
    images, overhead_s = plan.work.batch.micro_batch_size, plan.model.constants.overhead_s
    scale, unit = (1e3, "ms") if plan.has_time else (1e-9, "G operations")
    update_s = plan.work.update_s
    update = f", {1e3 * update_s:.1f} ms per update" if update_s > 0.01 * plan.seconds else ""
    if plan.work.schedule == "in_order":
        all_s = sum(stage.time.micro_batch_s for stage in plan.stages)
        return f"{scale * all_s / images:.2f} {unit} per image through all stages{update}"
    slowest = plan.by_speed()[0]
    stage = f"{plan.target.place} {slowest.stage}"
    if overhead_s:
        stage += f"; {percent(overhead_s / slowest.time.micro_batch_s)} of it overhead"
    return (
        f"{scale * slowest.time.micro_batch_s / images:.2f} {unit} per image on the slowest stage"
        f" ({stage}){update} and a bubble of {percent(plan.bubble)}"
    )


def describe_result(plan: Plan) -> str:
    """Describe in a line what a search found, for the head of the file that it writes."""
    speed = f": predicted {plan.samples_per_s:,.0f} samples/s" if plan.has_time else ""
    is_known, share = plan.target.memory_bytes is not None, plan.fullest.memory.share
    full = f", the fullest {100 * share:.0f} % full" if is_known else ""
    return f"for {plan.target.of(plan.devices)}{speed}{full}"


def source_lines(target: Target) -> List[str]:
    """List a device's numbers and the published runs, each with its source."""
    lines = [target.name]
    numbers = {**target.ipu._asdict(), **ESTIMATES} if target.ipu else ESTIMATES
    if not target.ipu:
        memory = f"memory {target.memory_bytes or 0:,.0f} bytes: {target.memory_source}"
        lines += prose("", _UNKNOWN_MEMORY if target.memory_bytes is None else memory)
    for name, number in numbers.items():
        if isinstance(number, Sourced):
            lines += prose("", f"{name} {number.value:,.15g}: {number.source}")
    lines.append("published runs, samples/s, and how full their fullest device is predicted")
    rows = [["", "published", "predicted", "measured over it", "", "fullest"]]
    for run in PUBLISHED:
        config = read_config([], [*run.settings, f"planner.hardware={run.hardware}"])
        plan = make_plan(config, image_bytes=run.image_bytes)
        row = [f"  {run.what}", f"{run.samples_per_s:,.0f}", f"{plan.samples_per_s:,.0f}"]
        row.append(signed_percent(run.samples_per_s / plan.samples_per_s - 1))
        row.append("fitted" if run.is_fitted else "")
        rows.append([*row, percent(plan.fullest.memory.share)])
    lines += columns(rows)
    for run in PUBLISHED:
        note = f" It was {run.note}." if run.note else ""
        lines += prose("", f"{run.what}: {run.source}.{note}")
    return lines
