"""What the planner prints of a plan. Imports no torch."""

from __future__ import annotations

from typing import Callable, List, Optional, Sequence

from cxr_vit.config import BatchPlan, Config, load_config
from cxr_vit.config.ipu_rules import ipu_problems
from cxr_vit.config.rules import schedule_problem
from cxr_vit.console import columns, count, percent, prose, signed_percent
from cxr_vit.errors import ConfigError
from cxr_vit.planner.costs import CATEGORIES
from cxr_vit.planner.estimate import (
    Plan,
    StagePrediction,
    choose_hardware,
    make_plan,
    processes_needed,
)
from cxr_vit.planner.hardware import (
    CACHED_PER_S,
    CODE_BYTES,
    DECODED_PER_S,
    DEFAULT_PROPORTION,
    HARDWARE,
    IMBALANCE,
    MEMORY_UNCERTAINTY,
    PUBLISHED,
    TUTORIAL,
    Hardware,
    Sourced,
)
from cxr_vit.planner.search import Candidate, Found
from cxr_vit.planner.speed import published_model, published_workload
from cxr_vit.planner.timeline import num_cycles, num_pipeline_stages, phases

__all__ = ["UNKNOWN_START", "plan_lines", "search_lines", "source_lines"]


_MEBIBYTE = 2**20

#: Side of the images that `CACHED_PER_S` was measured with.
_PIXELS_MEASURED = 224

#: Where `SpeedModel.start_cycles` is 0.
UNKNOWN_START = (
    "What a start takes is not known for this device: 0 is too little, and small micro-batches"
    " look too fast. --calibrate with two runs of unlike micro-batches tells it"
)


def plan_lines(config: Config, plan: Plan) -> List[str]:
    """Say what a configuration is predicted to take."""
    return [
        *_heading(config, plan),
        *_refused(config, plan),
        "",
        *_memory(plan),
        "",
        *_times(plan),
        "",
        *_speed(config, plan),
        *_host(config, plan),
        *_basis(config, plan),
        *_tutorial(plan),
    ]


def _heading(config: Config, plan: Plan) -> List[str]:
    stages, replicas = len(plan.stages), plan.work.replicas
    reserved = "" if plan.devices == stages * replicas else f", {plan.devices} reserved"
    return [
        f"{stages * replicas} x {plan.hardware.name}{reserved}: {count(replicas, 'replica')} of"
        f" {count(stages, 'stage')}",
        f"{config.model.name} at {plan.shape.image_size} pixels,"
        f" {sum(stage.cost.parameters for stage in plan.stages):,} parameters",
        *_allocation(plan),
        BatchPlan.from_section(config.batch).describe()[0],
    ]


def _refused(config: Config, plan: Plan) -> List[str]:
    """List what PopTorch, or torch's schedule, would refuse."""
    problems: List[Optional[str]] = []
    if plan.hardware.is_ipu:
        problems += ipu_problems(config)
    elif plan.work.schedule != "in_order":
        problems.append(schedule_problem(config, len(plan.stages)))
    return [line for problem in problems if problem for line in prose("refused", problem)]


def _allocation(plan: Plan) -> List[str]:
    """Write the device allocation, a line a device."""
    lines = []
    start = 0
    for stage in plan.stages:
        end = start + stage.cost.num_layers
        layers = f"layers {start} to {end - 1}" if end > start + 1 else f"layer {start}"
        parts = ["embedding"] * stage.cost.is_first + [layers] * (end > start)
        parts += ["head"] * stage.cost.is_last
        lines.append(f"  {plan.place} {stage.stage}  {', '.join(parts)}")
        start = end
    return lines


def _memory(plan: Plan) -> List[str]:
    limit = plan.hardware.memory_bytes
    head = f"memory, MB (a {plan.place} has {limit / 1e6:,.0f})"
    if plan.hardware.is_ipu:
        head = f"memory, MB (an IPU has {limit / 1e6:.1f}, or {limit / _MEBIBYTE:,.0f} MiB)"

    def row(name: str, text: Callable[[StagePrediction], str]) -> List[str]:
        return [name, *map(text, plan.stages)]

    def megabytes(category: str) -> Callable[[StagePrediction], str]:
        return lambda stage: f"{getattr(stage.memory, category) / 1e6:.1f}"

    rows = [
        row(head, lambda stage: f"{plan.place} {stage.stage}"),
        row("parameters, millions", lambda stage: f"{stage.cost.parameters / 1e6:.2f}"),
    ]
    for category, name in CATEGORIES.items():
        if any(getattr(stage.memory, category) for stage in plan.stages):
            label = _optimizer_label(plan) if category == "optimizer" else name
            rows.append(row(label, megabytes(category)))
    rows += [
        row("total", megabytes("total")),
        row("share", lambda stage: percent(stage.memory.share)),
        row("headroom", megabytes("headroom")),
        row(f"verdict (+- {100 * MEMORY_UNCERTAINTY:.0f} %)", lambda stage: stage.memory.verdict),
        row("micro-batches held at a time", lambda stage: str(stage.depth)),
    ]
    return columns(rows)


def _optimizer_label(plan: Plan) -> str:
    """Say where the optimizer's state lies."""
    formats, name = plan.formats, CATEGORIES["optimizer"]
    if not plan.hardware.is_ipu:
        return name
    place = "on chip" if formats.on_chip else "off chip"
    shared = f", 1/{formats.shards} a replica" if formats.shards > 1 else ""
    return f"{name}, {place}{shared}"


def _times(plan: Plan) -> List[str]:
    start_ms = 1e3 * plan.model.start_s(plan.hardware)
    rows = [["time, ms", *(f"{plan.place} {stage.stage}" for stage in plan.stages)]]
    for name, kind in (
        ("forward", "forward_s"),
        ("recompute", "recompute_s"),
        ("backward", "backward_s"),
        ("a micro-batch", "micro_batch_s"),
        ("an update of the weights", "update_s"),
    ):
        values = [1e3 * getattr(stage.time, kind) for stage in plan.stages]
        if any(values):
            rows.append([name, *(f"{value:.3f}" for value in values)])
    lines = columns(rows)
    slowest, *others = plan.by_speed()
    if others and plan.work.schedule != "in_order":
        next_one = others[0]
        more = slowest.time.micro_batch_s / next_one.time.micro_batch_s - 1
        lines.append(
            f"{plan.place} {slowest.stage} is the slowest, {percent(more)} over"
            f" {plan.place} {next_one.stage}; {start_ms:.2f} ms of each micro-batch are its start"
        )
    return lines


def _speed(config: Config, plan: Plan) -> List[str]:
    low, high = plan.speed_range
    spread = f" ({low:,.0f} to {high:,.0f})" if high > 1.001 * low else ""
    return [
        *prose("update", f"{1e3 * plan.seconds:,.1f} ms: {_rounds(config, plan)}"),
        *prose(
            "speed",
            f"{plan.samples_per_s:,.0f} samples/s{spread}, predicted; an epoch of {plan.images:,}"
            f" images ({plan.images_source}) takes {plan.epoch_minutes:,.1f} min",
        ),
    ]


def _rounds(config: Config, plan: Plan) -> str:
    """Say how the micro-batches of an update go through the stages."""
    work, stages, bubble = plan.work, len(plan.stages), percent(plan.bubble)
    micro_batches = f"{work.micro_batches} micro-batch{'es' * (work.micro_batches > 1)}"
    if work.schedule == "in_order":
        idle = f", one stage at a time: each idles {percent(1 - 1 / stages)}" if stages > 1 else ""
        return f"{micro_batches}{idle}"
    if work.schedule != "lockstep":
        planned = ""
        if config.pipeline.schedule == "interleaved_1f1b":
            planned = " (interleaved_1f1b is planned as that, with a stage a device)"
        return f"{work.schedule}{planned} with {micro_batches}; bubble {bubble}"
    cycles = num_cycles(stages, work.micro_batches)
    fill, steady, drain = phases(stages, work.micro_batches)
    of_them = f" ({fill} fill, {steady} steady, {drain} drain)" if steady and fill else ""
    return (
        f"{cycles} pipeline cycles = {work.micro_batches} micro-batches +"
        f" {num_pipeline_stages(stages)} pipeline stages - 1{of_them}; used"
        f" {work.micro_batches}/{cycles}, bubble {bubble}"
    )


def _host(config: Config, plan: Plan) -> List[str]:
    needed, workers = plan.samples_per_s, config.data.num_workers
    text = (
        f"must read {needed:,.0f} images/s and send {plan.host_bytes_per_s / 1e6:,.1f} MB/s"
        f" ({percent(plan.host_bytes_per_s / plan.host_bandwidth)} of what its links carry). "
    )
    if config.data.cache == "off":
        each, what = DECODED_PER_S, "data.cache=off decodes some"
        remedy = "Bound by the host, not by the devices: use the cache"
    else:
        pixels = (_PIXELS_MEASURED / plan.shape.image_size) ** 2
        each, what = (
            CACHED_PER_S._replace(value=CACHED_PER_S.value * pixels),
            "The cache serves some",
        )
        remedy = "Bound by the host, not by the devices: raise data.num_workers"
    processes = processes_needed(needed, each)
    text += (
        f"{what} {each.value:,.0f} images/s a process: {processes} for this speed, and"
        f" data.num_workers is {workers}"
    )
    if processes > max(1, workers):
        text += f". {remedy}"
    return prose("host", text)


def _basis(config: Config, plan: Plan) -> List[str]:
    model, hardware = plan.model, plan.hardware
    rate = model.flops_per_s(hardware, plan.work.precision)
    text = (
        f"a start of {1e3 * model.start_s(hardware):.2f} ms a micro-batch and"
        f" {rate / 1e12:,.4g} TFLOPS ({percent(model.efficiency)} of the peak), {model.basis}"
    )
    if model is published_model(hardware):
        text += "; nothing here was measured on your machine"
    if model.start_cycles == 0:
        text += f". {UNKNOWN_START}"
    return [*prose("basis", text), *_other_devices(config, plan)]


def _other_devices(config: Config, plan: Plan) -> List[str]:
    """Say what else could be planned where a GPU is."""
    if plan.hardware.is_ipu:
        return []
    ways = ["--hardware mk2 plans for IPUs"]
    if config.engine.name != "pipeline":
        ways.insert(0, "engine.name=pipeline plans a GPU for each stage")
    return prose("device", f"GPUs as engine.name={config.engine.name} takes; {', '.join(ways)}")


def _tutorial(plan: Plan) -> List[str]:
    """Hold Graphcore's tutorial against the plan, where that is of the same batch and split."""
    theirs = published_workload(TUTORIAL)
    same_size = [cost.parameters for cost in plan.work.costs] == [
        cost.parameters for cost in theirs.costs
    ]
    same_batch = (plan.work.micro_batch_size, plan.work.micro_batches, plan.work.replicas) == (
        theirs.micro_batch_size,
        theirs.micro_batches,
        theirs.replicas,
    )
    same = same_size and same_batch and plan.work.schedule == theirs.schedule
    if plan.hardware is not HARDWARE[TUTORIAL.hardware] or not same:
        return []
    if plan.work.precision != theirs.precision or plan.samples_per_s < TUTORIAL.samples_per_s:
        return []
    below = 1 - TUTORIAL.samples_per_s / plan.samples_per_s
    own = theirs.samples / theirs.seconds(plan.model)
    return prose(
        "note",
        f"Graphcore's tutorial printed {TUTORIAL.samples_per_s:.1f} samples/s for this batch and"
        f" split: {percent(below)} below the {plan.samples_per_s:,.0f} predicted here,"
        f" {percent(1 - TUTORIAL.samples_per_s / own)} below the {own:,.0f} predicted for its own"
        f" settings. It was {TUTORIAL.note}.",
    )


def search_lines(config: Config, found: Found) -> List[str]:
    """List what a search found, and say why the first wins.

    Parameters
    ----------
    config
        The configuration that was searched around.
    found
        What was found.
    """
    hardware, stages = choose_hardware(config), len(config.pipeline.layers_per_stage)
    lines = [
        f"{stages * config.batch.replicas} x {hardware.name}: {found.tried:,} cuts x batches x"
        " placements tried"
    ]
    if found.refused:
        counts = ", ".join(map(str, found.refused))
        lines += prose("refused", f"accumulation {counts}: {list(found.refused.values())[-1]}")
    if found.too_large is not None:
        lines += prose("memory", f"micro-batch {found.too_large} and larger: fit in no cut")
    if found.best:
        return [*lines, *_table(found.best), *_why(config, found.best)]
    if found.too_large is None:
        more = "is left: give other --accumulations, or smaller --micro-batches."
        return [*lines, *prose("nothing", more)]
    smaller = "fewer images a micro-batch"
    if hardware.is_ipu:
        smaller += ", engine.weights=fp16, optim.accumulator=fp16"
    more = f"fits: try more stages (pipeline.layers_per_stage) or {smaller}."
    return [*lines, *prose("nothing", more)]


def _table(best: Sequence[Candidate]) -> List[str]:
    on_ipus = best[0].plan.hardware.is_ipu
    rows = [["", "layers", "micro-batch", "accum.", "images"]]
    rows[0] += [*(["keeps", "moments"] if on_ipus else []), "samples/s", "fullest"]
    for rank, (layout, plan) in enumerate(best, 1):
        kept = _kept_text(layout.recompute) if plan.work.recomputes else "all"
        place = ("on chip" if layout.on_chip else "off chip") + ", sharded" * layout.sharded
        rows.append(
            [
                str(rank),
                _list(layout.layers_per_stage),
                str(layout.micro_batch_size),
                str(layout.gradient_accumulation),
                str(plan.work.samples),
                *([kept, place] if on_ipus else []),
                f"{plan.samples_per_s:,.0f}",
                f"{plan.place} {plan.fullest.stage} {percent(plan.fullest.memory.share)}",
            ]
        )
    return columns(rows)


def _list(values: Sequence[object]) -> str:
    return str(list(values)).replace(" ", "")


def _kept_text(recompute: Sequence[object]) -> str:
    """Shorten `pipeline.recompute`: what each stage keeps besides its input."""
    short = {"stage_inputs": "-", "every_layer": "all"}
    return " ".join(
        short[choice] if isinstance(choice, str) else str(choice).replace(" ", "")
        for choice in recompute
    )


def _why(config: Config, best: Sequence[Candidate]) -> List[str]:
    """Say what makes the first faster than the configuration, and than the second."""
    first = best[0].plan
    text = f"1 wins with {_character(first)}.{_against_own(config, first)}"
    if len(best) > 1:
        second = best[1].plan
        text += (
            f" 2 is {percent(1 - second.samples_per_s / first.samples_per_s)} slower:"
            f" {_character(second)}."
        )
    if first.fullest.memory.verdict != "fits":
        roomy = next(
            (rank for rank, row in enumerate(best, 1) if row.plan.fullest.memory.verdict == "fits"),
            None,
        )
        where = f"{roomy} is the first with room for that" if roomy else "none has room for that"
        text += (
            f" 1 fits closely, and the prediction may be off by {100 * MEMORY_UNCERTAINTY:.0f} %:"
            f" {where}."
        )
    if first.model.start_cycles == 0:
        text += f" {UNKNOWN_START}."
    return prose("why", text)


def _against_own(config: Config, first: Plan) -> str:
    """Hold the first against the configuration's own layout."""
    try:
        own = make_plan(config, model=first.model)
    except ConfigError:
        return " The configuration's own cut is refused."
    layout = (
        f"{_list(config.pipeline.layers_per_stage)}, {own.work.micro_batch_size} x"
        f" {own.work.micro_batches}"
    )
    if own.hardware.is_ipu and ipu_problems(config):
        return f" The configuration's own, {layout}, is refused."
    if not own.fits:
        full = percent(own.fullest.memory.share)
        return (
            f" The configuration's own, {layout}, does not fit: {full} of {own.place}"
            f" {own.fullest.stage}."
        )
    return (
        f" The configuration's own, {layout}: {own.samples_per_s:,.0f} samples/s with"
        f" {_character(own)}; 1 is {first.samples_per_s / own.samples_per_s:.2f} times as fast."
    )


def _character(plan: Plan) -> str:
    start_s, images = plan.model.start_s(plan.hardware), plan.work.micro_batch_size
    update_s = max(plan.work.update_s)
    update = f", {1e3 * update_s:.1f} ms an update" if update_s > 0.01 * plan.seconds else ""
    if plan.work.schedule == "in_order":
        all_s = sum(stage.time.micro_batch_s for stage in plan.stages)
        return f"{1e3 * all_s / images:.2f} ms an image through all stages{update}"
    slowest = plan.by_speed()[0]
    start = start_s / slowest.time.micro_batch_s
    return (
        f"{1e3 * slowest.time.micro_batch_s / images:.2f} ms an image on the slowest stage"
        f" ({plan.place} {slowest.stage}; {percent(start)} of it the start){update} and a bubble of"
        f" {percent(plan.bubble)}"
    )


def source_lines(hardware: Hardware) -> List[str]:
    """List a device's numbers and the published runs, each with its source."""
    lines = [hardware.name]
    for field, value in zip(hardware._fields, hardware):
        if isinstance(value, Sourced):
            lines += prose("", f"{field} {value.value:,.15g}: {value.source}")
    constants = {
        "code_bytes": CODE_BYTES,
        "imbalance": IMBALANCE,
        "default_proportion": DEFAULT_PROPORTION,
        "decoded_per_s": DECODED_PER_S,
        "cached_per_s": CACHED_PER_S,
    }
    for name, value in constants.items():
        lines += prose("", f"{name} {value.value:,.15g}: {value.source}")
    lines.append("published runs, samples/s, and how full their fullest device is predicted")
    rows = [["", "published", "predicted", "measured over it", "", "fullest"]]
    for run in PUBLISHED:
        config = load_config([], [*run.settings, f"planner.hardware={run.hardware}"])
        plan = make_plan(config, image_bytes=run.image_bytes)
        rows.append(
            [
                f"  {run.what}",
                f"{run.samples_per_s:,.0f}",
                f"{plan.samples_per_s:,.0f}",
                signed_percent(run.samples_per_s / plan.samples_per_s - 1),
                "fitted" if run.is_fitted else "",
                percent(plan.fullest.memory.share),
            ]
        )
    lines += columns(rows)
    for run in PUBLISHED:
        note = f" It was {run.note}." if run.note else ""
        lines += prose("", f"{run.what}: {run.source}.{note}")
    return lines
