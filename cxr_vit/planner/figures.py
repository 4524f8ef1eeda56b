"""Figures of a plan: the pipeline over time, and the memory of each device.

Each has two sizes: `WIDE` for a page, `CARD` for TensorBoard, which shows an image in a card about
370 pixels wide and 220 high and leaves out pixels to scale it down.
"""

from __future__ import annotations

from typing import Any, List, NamedTuple, Tuple

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from cxr_vit.console import count
from cxr_vit.planner.costs import CATEGORIES
from cxr_vit.planner.estimate import Plan
from cxr_vit.planner.timeline import (
    Slot,
    Timeline,
    num_cycles,
    num_pipeline_stages,
    phases,
)

#: Okabe and Ito's palette, which the colour-blind can distinguish.
_WORK = {"forward": "#56B4E9", "recompute": "#F0E442", "backward": "#009E73", "update": "#CC79A7"}
_MEMORY = {
    "weights": "#0072B2",
    "accumulators": "#56B4E9",
    "optimizer": "#CC79A7",
    "stash": "#D55E00",
    "live": "#E69F00",
    "temporaries": "#F0E442",
    "io": "#8C564B",
    "code": "#009E73",
    "imbalance": "#BBBBBB",
}
#: Width of a block with room for a number, by its digits, inches.
_NUMBER_IN = {1: 0.12, 2: 0.18, 3: 0.25, 4: 0.32}
#: Least width of a weight update, as a share of the time shown, so that it is visible.
_LEAST_UPDATE = 0.012


class Size(NamedTuple):
    """The size of a figure, and of what it shows."""

    #: Inches; the height is `frame` and a `row` for each device.
    width: float
    frame: float
    row: float
    dpi: int
    #: Sizes of text, points.
    title: float
    text: float
    small: float
    #: Updates of more micro-batches are drawn without their middle, after the first few.
    whole: int
    first: int
    #: Entries of a row of the legend of the memory.
    columns: int
    #: Whether micro-batches have their numbers, and the phases of the pipeline their names.
    has_details: bool


WIDE = Size(12.0, 1.6, 0.45, 100, 11, 9, 8, 24, 3, 5, True)
CARD = Size(4.0, 2.4, 0.0, 200, 8, 7.5, 7.5, 8, 1, 3, False)
#: Most rows of a card with a name.
_NAMED_ROWS = 8


def timeline_figure(plan: Plan, size: Size = WIDE) -> Figure:
    """Draw which device works on what in one weight update.

    Rows are devices, and blocks carry the number of their micro-batch. The middle of a long update,
    which repeats itself, is left out. Without times the unit is one percent of the update.
    """
    timeline = plan.timeline
    unit_s = 1e-3 if plan.has_time else timeline.end_s / 100
    spans = _spans(timeline, size)
    rows = timeline.num_stages
    figure = _figure(size, rows)
    figure.suptitle(_title(plan) if size.has_details else _short_title(plan), fontsize=size.title)
    lengths = [end_s - start_s for start_s, end_s in spans]
    axes = figure.subplots(1, len(spans), sharey=True, squeeze=False, width_ratios=lengths)[0]
    for axis, span in zip(axes, spans):
        per_inch_s = sum(lengths) / (size.width - 1.5)
        _draw_span(axis, timeline, span, unit_s, size, per_inch_s=per_inch_s)
    named = _named_rows(rows, size)
    axes[0].set_yticks(named, [f"{plan.target.place} {row}" for row in named])
    axes[0].set_ylim(rows - 0.5, -0.95 if size.has_details and _phases(timeline) else -0.5)
    unit = "milliseconds" if plan.has_time else "% of the update"
    if size.has_details:
        figure.supxlabel(unit, fontsize=size.text)
    else:  # beside the legend there is no room
        axes[-1].set_xlabel(unit, fontsize=size.text, loc="right", labelpad=0)
    shown = {slot.kind for slot in timeline.slots if slot.end_s > slot.start_s}
    least_s = _LEAST_UPDATE * lengths[-1]
    widened = min(stage.time.update_s for stage in plan.stages) < least_s
    handles = [
        Patch(color=color, label="update (widened)" if kind == "update" and widened else kind)
        for kind, color in _WORK.items()
        if kind in shown
    ]
    _legend(figure, size, len(handles), loc="outside lower right", handles=handles)
    return figure


def _figure(size: Size, rows: int) -> Figure:
    height = size.frame + size.row * rows
    return Figure(figsize=(size.width, height), dpi=size.dpi, layout="constrained")


def _legend(figure: Figure, size: Size, columns: int, **options: Any) -> None:
    if not size.has_details:
        options.update(handlelength=1.0, columnspacing=1.0, handletextpad=0.4, frameon=False)
        options.update(borderpad=0.0, labelspacing=0.2, borderaxespad=0.2)
    figure.legend(ncols=columns, fontsize=size.text, **options)


def _named_rows(rows: int, size: Size) -> List[int]:
    """Return the rows whose names have room."""
    step = 1 if size.row else -(-rows // _NAMED_ROWS)
    return list(range(0, rows, step))


def _short_title(plan: Plan) -> str:
    batch = plan.work.batch
    time = f", predicted: {1e3 * plan.seconds:,.1f} ms" if plan.has_time else ""
    bubble = f"; bubble {100 * plan.bubble:.1f} %" if len(plan.stages) > 1 else ""
    images = f"{batch.gradient_accumulation} x {batch.micro_batch_size} images"
    return f"one weight update{time}\n{images}{bubble}"


def _title(plan: Plan) -> str:
    work, stages = plan.work, len(plan.stages)
    accumulation = work.batch.gradient_accumulation
    time = f", predicted: {1e3 * plan.seconds:,.1f} ms" if plan.has_time else ""
    head = (
        f"one weight update on {plan.target.of(stages)}{time}\n{accumulation} x"
        f" {work.batch.micro_batch_size} images"
    )
    if work.schedule == "in_order":
        return f"{head}, one stage at a time" if stages > 1 else head
    how = work.schedule
    if work.schedule == "lockstep":
        fill, _, drain = phases(num_pipeline_stages(stages), accumulation)
        cycles = num_cycles(stages, accumulation)
        how = f"{cycles} pipeline cycles, {fill} to fill and {drain} to drain"
    return f"{head}, {how}; bubble {100 * plan.bubble:.1f} %"


def _spans(timeline: Timeline, size: Size) -> List[Tuple[float, float]]:
    """Return the spans to draw, seconds: everything, or the beginning and the end."""
    first, second = size.first, timeline.micro_batches - 1 - 2 * timeline.num_stages
    if timeline.micro_batches <= size.whole or timeline.schedule == "gpipe" or second <= first:
        return [(0.0, timeline.end_s)]
    backward = [slot for slot in timeline.slots if slot.kind == "backward" and slot.stage == 0]
    ends = {slot.micro_batch: slot.end_s for slot in backward}
    return [(0.0, ends[first]), (ends[second], timeline.end_s)]


def _phases(timeline: Timeline) -> List[Tuple[str, float, float]]:
    """Return the phases of IPUs in lockstep, each with its begin and end, seconds."""
    fill, steady, _ = phases(num_pipeline_stages(timeline.num_stages), timeline.micro_batches)
    if timeline.schedule != "lockstep" or not fill or not steady:
        return []
    fill_s, drain_s = fill * timeline.cycle_s, timeline.micro_batches * timeline.cycle_s
    return [
        ("fill", 0.0, fill_s),
        (f"steady, {count(steady, 'cycle')}", fill_s, drain_s),
        ("drain", drain_s, timeline.work_s),
    ]


def _draw_span(
    axis: Any,
    timeline: Timeline,
    span: Tuple[float, float],
    unit_s: float,
    size: Size,
    *,
    per_inch_s: float,
) -> None:
    start_s, end_s = span
    shown = [slot for slot in timeline.slots if slot.end_s > start_s and slot.start_s < end_s]
    for kind, color in _WORK.items():
        for row in range(timeline.num_stages):
            blocks = [
                (slot.start_s / unit_s, _length_s(slot, span) / unit_s)
                for slot in shown
                if (slot.kind, slot.stage) == (kind, row)
            ]
            axis.broken_barh(
                blocks, (row - 0.4, 0.8), facecolors=color, edgecolor="white", linewidth=0.5
            )
    for slot in shown if size.has_details else []:
        number, length_s = str(slot.micro_batch), slot.end_s - slot.start_s
        has_room = length_s > _NUMBER_IN.get(len(number), 0.4) * per_inch_s
        is_whole = slot.start_s >= start_s and slot.end_s <= end_s
        if slot.kind in ("forward", "backward") and has_room and is_whole:
            middle = (slot.start_s + length_s / 2) / unit_s
            axis.text(middle, slot.stage, number, ha="center", va="center", fontsize=7)
    if size.has_details:
        _draw_phases(axis, timeline, span, unit_s)
    if timeline.cycle_s:
        for cycle in range(round(start_s / timeline.cycle_s), round(end_s / timeline.cycle_s) + 1):
            axis.axvline(cycle * timeline.cycle_s / unit_s, color="0.85", linewidth=0.6, zorder=0)
    ends_s = [slot.start_s + _length_s(slot, span) for slot in shown if slot.kind == "update"]
    axis.set_xlim(start_s / unit_s, max([end_s, *ends_s]) / unit_s)
    axis.tick_params(axis="both", labelsize=size.small, length=2)
    share = (span[1] - span[0]) / (per_inch_s * (size.width - 1.5))
    axis.locator_params(axis="x", nbins=6 if size.has_details else max(1, round(5 * share)))
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _draw_phases(axis: Any, timeline: Timeline, span: Tuple[float, float], unit_s: float) -> None:
    """Write the phases over the rows, if enough of them is shown."""
    for name, begin_s, finish_s in _phases(timeline):
        left_s, right_s = max(begin_s, span[0]), min(finish_s, span[1])
        if right_s - left_s < 0.5 * timeline.cycle_s:
            continue
        line = [left_s / unit_s, right_s / unit_s]
        axis.plot(line, [-0.55, -0.55], color="0.4", linewidth=1.2)
        words = name if right_s - left_s > 4 * timeline.cycle_s else name.split(",")[0]
        axis.text(sum(line) / 2, -0.6, words, ha="center", va="bottom", fontsize=8)


def _length_s(slot: Slot, span: Tuple[float, float]) -> float:
    """Return the length of a block, seconds; a short weight update is widened."""
    length_s = slot.end_s - slot.start_s
    if slot.kind == "update" and length_s:
        return max(length_s, _LEAST_UPDATE * (span[1] - span[0]))
    return length_s


def memory_figure(plan: Plan, size: Size = WIDE) -> Figure:
    """Draw the memory of each device by category, against its limit if that is known."""
    stages, target = plan.stages, plan.target
    rows = [stage.stage for stage in stages]
    figure = _figure(size, len(stages))
    figure.suptitle(
        f"memory of {target.of(len(stages))}, predicted:"
        f"{' ' if size.has_details else chr(10)}"
        f"micro-batch {plan.work.batch.micro_batch_size}",
        fontsize=size.title,
    )
    axis = figure.subplots()
    left: List[float] = [0.0] * len(stages)
    for category, name in CATEGORIES.items():
        sizes = [getattr(stage.memory, category) / 1e6 for stage in stages]
        if not any(sizes):
            continue
        axis.barh(
            rows,
            sizes,
            left=left,
            color=_MEMORY[category],
            edgecolor="white",
            linewidth=0.5,
            hatch="///" if category == "imbalance" else None,
            label=name,
        )
        left = [end + size for end, size in zip(left, sizes)]
    widest = max(left)
    if target.memory_bytes is not None:
        limit = target.memory_bytes / 1e6
        widest = max(widest, limit)
        axis.axvline(limit, color="black", linewidth=2, label=f"limit, {limit:,.0f} MB")
    named = _named_rows(len(stages), size)
    for stage, end in zip(stages, left):
        if stage.stage not in named:
            continue
        text = f"{100 * stage.memory.share:.0f} %, {stage.memory.verdict}"
        axis.text(
            end + 0.008 * widest,
            stage.stage,
            f"{end:,.0f} MB" if target.memory_bytes is None else text,
            va="center",
            fontsize=size.text,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.8},
        )
    axis.set_xlim(0, (1.18 if size.has_details else 1.35) * widest)
    axis.set_yticks(named, [f"{target.place} {row}" for row in named])
    axis.invert_yaxis()
    axis.set_xlabel("MB (10^6 bytes)", fontsize=size.text, labelpad=1)
    axis.tick_params(labelsize=size.text)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    _legend(figure, size, size.columns, loc="outside lower center")
    return figure
