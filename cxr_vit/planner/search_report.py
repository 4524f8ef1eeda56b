"""What the planner prints of a search. Imports no torch."""

from __future__ import annotations

from typing import List, Sequence

from cxr_vit.config import Config
from cxr_vit.config.ipu_rules import ipu_problems
from cxr_vit.errors import ConfigError
from cxr_vit.planner.estimate import Plan, choose_hardware, make_plan
from cxr_vit.planner.hardware import MEMORY_UNCERTAINTY
from cxr_vit.planner.report import UNKNOWN_START
from cxr_vit.planner.search import Candidate, Found
from cxr_vit.planner.text import columns, percent, prose

__all__ = ["search_lines"]


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
    smaller = "fewer films a micro-batch"
    if hardware.is_ipu:
        smaller += ", engine.weights=fp16, optim.accumulator=fp16"
    more = f"fits: try more stages (pipeline.layers_per_stage) or {smaller}."
    return [*lines, *prose("nothing", more)]


def _table(best: Sequence[Candidate]) -> List[str]:
    on_ipus = best[0].plan.hardware.is_ipu
    rows = [["", "layers", "micro-batch", "accum.", "films"]]
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
    start_s, films = plan.model.start_s(plan.hardware), plan.work.micro_batch_size
    update_s = max(plan.work.update_s)
    update = f", {1e3 * update_s:.1f} ms an update" if update_s > 0.01 * plan.seconds else ""
    if plan.work.schedule == "in_order":
        all_s = sum(stage.time.micro_batch_s for stage in plan.stages)
        return f"{1e3 * all_s / films:.2f} ms a film through all stages{update}"
    slowest = plan.by_speed()[0]
    start = start_s / slowest.time.micro_batch_s
    return (
        f"{1e3 * slowest.time.micro_batch_s / films:.2f} ms a film on the slowest stage"
        f" ({plan.place} {slowest.stage}; {percent(start)} of it the start){update} and a bubble of"
        f" {percent(plan.bubble)}"
    )
