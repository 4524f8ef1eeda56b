"""The pictures: 1200 pixels wide, and no text over another."""

from itertools import combinations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from cxr_vit.config import load_config
from cxr_vit.planner.estimate import make_plan
from cxr_vit.planner.figures import memory_figure, timeline_figure

from .shapes import ROOT, pod4

LARGE = (
    "model.name=vit-large",
    "pipeline.layers_per_stage=[3,3,3,3,3,3,3,3]",
    "pipeline.recompute=every_layer",
)
PLANS = {
    "pod4": lambda: make_plan(pod4()),
    "few micro-batches": lambda: make_plan(pod4("batch.gradient_accumulation=7")),
    "too large": lambda: make_plan(pod4("batch.micro_batch_size=34")),
    "nearly full": lambda: make_plan(pod4("batch.micro_batch_size=8")),
    "eight": lambda: make_plan(pod4(*LARGE)),
    "twelve": lambda: make_plan(
        pod4(*LARGE, f"pipeline.layers_per_stage={[2] * 12}", "batch.gradient_accumulation=26")
    ),
    "twenty-four": lambda: make_plan(
        pod4(*LARGE, f"pipeline.layers_per_stage={[1] * 24}", "batch.gradient_accumulation=47")
    ),
    "thousands": lambda: make_plan(pod4("batch.gradient_accumulation=2048")),
    "gpipe": lambda: make_plan(
        load_config([ROOT / "configs/vit_gpu4.yaml"], ["pipeline.schedule=gpipe"])
    ),
    "sharded": lambda: make_plan(pod4("pipeline.execution=sharded")),
    "alone": lambda: make_plan(load_config([ROOT / "configs/vit_demo.yaml"])),
}


def texts(figure):
    """All visible text with its place, pixels."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    beyond = [label for axes in figure.axes for label in labels_beyond(axes)]
    artists = figure.findobj(lambda artist: isinstance(artist, Text) and artist not in beyond)
    found = [
        (artist.get_text(), artist.get_window_extent(renderer))
        for artist in artists
        if artist.get_visible() and artist.get_text().strip()
    ]
    return found, renderer.width, renderer.height


def labels_beyond(axes):
    """The labels of ticks that are not drawn: they lie outside of what is shown."""
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if not low <= tick.get_loc() <= high:
                yield from (tick.label1, tick.label2)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("draw", [timeline_figure, memory_figure])
def test_no_text_lies_over_another_or_beyond_the_edge(draw, name):
    found, width, height = texts(draw(PLANS[name]()))
    assert width == 1200
    assert len(found) > 5
    for text, box in found:
        assert box.x0 >= -1 and box.y0 >= -1, text
        assert box.x1 <= width + 1 and box.y1 <= height + 1, text
    for (one, box), (other, place) in combinations(found, 2):
        across = min(box.x1, place.x1) - max(box.x0, place.x0)
        down = min(box.y1, place.y1) - max(box.y0, place.y0)
        assert across <= 1 or down <= 1, f"{one!r} lies over {other!r}"


def test_the_timeline_says_what_was_planned():
    found, _, _ = texts(timeline_figure(PLANS["pod4"]()))
    words = " ".join(text for text, _ in found)
    for expected in ("134 pipeline cycles", "bubble 4.5 %", "fill", "steady", "drain", "IPU 3"):
        assert expected in words
    assert {"forward", "recompute", "backward", "update (widened)"} <= {text for text, _ in found}


@pytest.mark.parametrize("name", PLANS)
def test_nothing_is_drawn_twice(name):
    views = [axis.get_xlim() for axis in timeline_figure(PLANS[name]()).axes]
    for (_, end), (begin, _) in zip(views, views[1:]):
        assert end <= begin + 1e-9


def test_every_micro_batch_of_a_short_update_is_drawn():
    figure = timeline_figure(PLANS["few micro-batches"]())
    (axis,) = figure.axes
    blocks = {}
    for collection in axis.collections:
        color = tuple(collection.get_facecolor()[0]) if len(collection.get_facecolor()) else None
        blocks[color] = blocks.get(color, 0) + len(collection.get_paths())
    # forward, recompute and backward of 7 micro-batches on 4 IPUs, and 4 updates
    assert sorted(count for count in blocks.values() if count) == [4, 28, 28, 28]


def test_the_bars_reach_what_the_plan_says():
    plan = PLANS["too large"]()
    (axis,) = memory_figure(plan).axes
    for row, stage in enumerate(plan.stages):
        ends = [
            patch.get_x() + patch.get_width()
            for patch in axis.patches
            if round(patch.get_y() + patch.get_height() / 2) == row
        ]
        assert max(ends) == pytest.approx(stage.memory.total / 1e6)
    limits = [line.get_xdata()[0] for line in axis.lines]
    assert limits == [pytest.approx(plan.hardware.memory_bytes / 1e6)]


def test_an_update_that_takes_long_is_not_widened():
    slow = make_plan(pod4("batch.gradient_accumulation=7", "engine.optimizer_state_on_chip=false"))
    words = {text for text, _ in texts(timeline_figure(slow))[0]}
    assert "update" in words and "update (widened)" not in words
