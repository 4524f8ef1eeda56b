"""Pictures of a plan: the pipeline over time, and the memory of each device. Drawn off screen."""

from __future__ import annotations

from typing import Any, Dict, List, Sequence, Tuple

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from cxr_vit.planner.costs import CATEGORIES
from cxr_vit.planner.estimate import Plan
from cxr_vit.planner.timeline import Slot, Timeline, num_cycles, phases

__all__ = ["memory_figure", "timeline_figure"]

#: Okabe and Ito's palette, told apart by the colour-blind too.
_WORK = {
    "forward": "#56B4E9",
    "recompute": "#F0E442",
    "backward": "#009E73",
    "update": "#CC79A7",
}
_MEMORY = {
    "weights": "#0072B2",
    "accumulators": "#56B4E9",
    "optimizer": "#CC79A7",
    "stash": "#D55E00",
    "live": "#E69F00",
    "transient": "#F0E442",
    "io": "#8C564B",
    "code": "#009E73",
    "uneven": "#BBBBBB",
}
#: More micro-batches than this are drawn without their middle.
_WHOLE = 24
#: Width of a figure, and of what a block needs for a number of so many digits, inches.
_WIDTH = 12.0
_NUMBER_IN = {1: 0.12, 2: 0.18, 3: 0.25, 4: 0.32}
#: A weight update is drawn at least this part of the time shown, so that it is seen.
_LEAST_UPDATE = 0.012


def timeline_figure(plan: Plan, note: str = "") -> Figure:
    """Draw who works on what in one weight update; `note` ends the heading.

    Rows are devices, blocks carry the number of their micro-batch; of a long update the middle,
    which repeats, is left out.
    """
    timeline = plan.timeline
    spans = _spans(timeline)
    rows = timeline.num_stages
    figure = Figure(figsize=(_WIDTH, 1.6 + 0.45 * rows), layout="constrained")
    figure.suptitle(_title(plan) + note, fontsize=11)
    lengths = [end_s - start_s for start_s, end_s in spans]
    axes = figure.subplots(1, len(spans), sharey=True, squeeze=False, width_ratios=lengths)[0]
    for axis, span in zip(axes, spans):
        _draw_span(axis, timeline, span, per_inch_s=sum(lengths) / (_WIDTH - 1.5))
    axes[0].set_yticks(range(rows), [f"{plan.place} {row}" for row in range(rows)])
    axes[0].set_ylim(rows - 0.5, -0.95 if _phases(timeline) else -0.5)
    figure.supxlabel("milliseconds", fontsize=9)
    shown = {slot.kind for slot in timeline.slots}
    least_s = _LEAST_UPDATE * lengths[-1]
    widened = min(stage.time.update_s for stage in plan.stages) < least_s
    handles = [
        Patch(color=color, label="update (widened)" if kind == "update" and widened else kind)
        for kind, color in _WORK.items()
        if kind in shown
    ]
    figure.legend(handles=handles, loc="outside lower right", ncols=len(handles), fontsize=9)
    return figure


def _title(plan: Plan) -> str:
    work, count = plan.work, len(plan.stages)
    batches = f"{work.micro_batches} x {work.micro_batch_size} images"
    if work.schedule == "in_order":
        return (
            f"one weight update on {count} x {plan.hardware.name}, predicted:"
            f" {1e3 * plan.seconds:,.1f} ms\n{batches}"
            f"{', one stage at a time' if count > 1 else ''}"
        )
    how = work.schedule
    if work.schedule == "lockstep":
        fill, _, drain = phases(count, work.micro_batches)
        cycles = num_cycles(count, work.micro_batches)
        how = f"{cycles} pipeline cycles, {fill} to fill and {drain} to drain"
    return (
        f"one weight update on {count} x {plan.hardware.name}, predicted:"
        f" {1e3 * plan.seconds:,.1f} ms\n{batches}, {how}; bubble {100 * plan.bubble:.1f} %"
    )


def _spans(timeline: Timeline) -> List[Tuple[float, float]]:
    """Return what is drawn, seconds: all, or the beginning and the end."""
    whole = [(0.0, timeline.end_s)]
    first, second = 3, timeline.micro_batches - 1 - 2 * timeline.num_stages
    if timeline.micro_batches <= _WHOLE or timeline.schedule == "gpipe" or second <= first:
        return whole
    backward = [slot for slot in timeline.slots if slot.kind == "backward" and slot.stage == 0]
    ends = {slot.micro_batch: slot.end_s for slot in backward}
    return [(0.0, ends[first]), (ends[second], timeline.end_s)]


def _phases(timeline: Timeline) -> List[Tuple[str, float, float]]:
    """Return the phases of IPUs in lockstep, each with its begin and end, seconds."""
    fill, steady, _ = phases(timeline.num_stages, timeline.micro_batches)
    if timeline.schedule != "lockstep" or not fill or not steady:
        return []
    fill_s, drain_s = fill * timeline.cycle_s, timeline.micro_batches * timeline.cycle_s
    return [
        ("fill", 0.0, fill_s),
        (f"steady, {steady} cycle{'s' * (steady > 1)}", fill_s, drain_s),
        ("drain", drain_s, timeline.work_s),
    ]


def _draw_span(
    axis: Any, timeline: Timeline, span: Tuple[float, float], *, per_inch_s: float
) -> None:
    start_s, end_s = span
    shown = [slot for slot in timeline.slots if slot.end_s > start_s and slot.start_s < end_s]
    for kind, color in _WORK.items():
        for row in range(timeline.num_stages):
            blocks = [
                _block(slot, span) for slot in shown if (slot.kind, slot.stage) == (kind, row)
            ]
            axis.broken_barh(
                blocks, (row - 0.4, 0.8), facecolors=color, edgecolor="white", linewidth=0.5
            )
    for slot in shown:
        left_ms, length_ms = _block(slot, span)
        number = str(slot.micro_batch)
        has_room = length_ms / 1e3 > _NUMBER_IN.get(len(number), 0.4) * per_inch_s
        is_whole = slot.start_s >= start_s and slot.end_s <= end_s
        if slot.kind in ("forward", "backward") and has_room and is_whole:
            axis.text(
                left_ms + length_ms / 2, slot.stage, number, ha="center", va="center", fontsize=7
            )
    _draw_phases(axis, timeline, span)
    if timeline.cycle_s:
        for cycle in range(round(start_s / timeline.cycle_s), round(end_s / timeline.cycle_s) + 1):
            axis.axvline(1e3 * cycle * timeline.cycle_s, color="0.85", linewidth=0.6, zorder=0)
    extra_ms = max((left + length for left, length in _updates(shown, span)), default=0.0)
    axis.set_xlim(1e3 * start_s, max(1e3 * end_s, extra_ms))
    axis.tick_params(axis="both", labelsize=8, length=2)
    axis.locator_params(axis="x", nbins=6)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _draw_phases(axis: Any, timeline: Timeline, span: Tuple[float, float]) -> None:
    """Write the phases over the rows, those of which enough is shown."""
    for name, begin_s, finish_s in _phases(timeline):
        left_s, right_s = max(begin_s, span[0]), min(finish_s, span[1])
        if right_s - left_s < 0.5 * timeline.cycle_s:
            continue
        axis.plot([1e3 * left_s, 1e3 * right_s], [-0.55, -0.55], color="0.4", linewidth=1.2)
        words = name if right_s - left_s > 4 * timeline.cycle_s else name.split(",")[0]
        axis.text(1e3 * (left_s + right_s) / 2, -0.6, words, ha="center", va="bottom", fontsize=8)


def _block(slot: Slot, span: Tuple[float, float]) -> Tuple[float, float]:
    """Return where a block begins and how long it is, milliseconds."""
    length_s = slot.end_s - slot.start_s
    if slot.kind == "update":
        length_s = max(length_s, _LEAST_UPDATE * (span[1] - span[0]))
    return 1e3 * slot.start_s, 1e3 * length_s


def _updates(slots: Sequence[Slot], span: Tuple[float, float]) -> List[Tuple[float, float]]:
    return [_block(slot, span) for slot in slots if slot.kind == "update"]


def memory_figure(plan: Plan) -> Figure:
    """Draw what each device's memory has to hold, by category, against what it has."""
    stages = plan.stages
    limit_mb = plan.hardware.memory_bytes / 1e6
    figure = Figure(figsize=(_WIDTH, 1.8 + 0.5 * len(stages)), layout="constrained")
    figure.suptitle(
        f"memory of {len(stages)} x {plan.hardware.name}, predicted: micro-batch"
        f" {plan.work.micro_batch_size}",
        fontsize=11,
    )
    axis = figure.subplots()
    left: Dict[int, float] = {stage.stage: 0.0 for stage in stages}
    for category, name in CATEGORIES.items():
        sizes = [getattr(stage.memory, category) / 1e6 for stage in stages]
        if not any(sizes):
            continue
        hatch = "///" if category == "uneven" else None
        axis.barh(
            [stage.stage for stage in stages],
            sizes,
            left=list(left.values()),
            color=_MEMORY[category],
            edgecolor="white",
            linewidth=0.5,
            hatch=hatch,
            label=name,
        )
        for stage, size in zip(stages, sizes):
            left[stage.stage] += size
    widest = max([limit_mb, *left.values()])
    for stage in stages:
        axis.text(
            left[stage.stage] + 0.008 * widest,
            stage.stage,
            f"{100 * stage.memory.share:.0f} %, {stage.memory.verdict}",
            va="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.8},
        )
    axis.axvline(limit_mb, color="black", linewidth=2, label=f"limit, {limit_mb:,.0f} MB")
    axis.set_xlim(0, 1.18 * widest)
    axis.set_yticks([stage.stage for stage in stages], [f"{plan.place} {s.stage}" for s in stages])
    axis.invert_yaxis()
    axis.set_xlabel("MB (10^6 bytes)", fontsize=9)
    axis.tick_params(labelsize=9)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=5, fontsize=9)
    return figure
