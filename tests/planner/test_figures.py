"""The figures: as wide as a page or a card, and no text overlaps another."""

from itertools import combinations

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from cxr_vit.config import read_config
from cxr_vit.planner.estimate import make_plan
from cxr_vit.planner.figures import CARD, WIDE, memory_figure, timeline_figure

from .shapes import DEMO, gpu4, pod4

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
    "gpipe": lambda: make_plan(gpu4("pipeline.schedule=gpipe", "planner.device_memory_gib=24")),
    "unknown memory": lambda: make_plan(gpu4()),
    "sharded": lambda: make_plan(pod4("pipeline.execution=sharded")),
    "alone": lambda: make_plan(read_config([DEMO])),
}


def texts(figure):
    """Return all visible text with its box, pixels."""
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
    """Yield the labels of ticks outside the limits, which are not drawn."""
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        for tick in axis.get_major_ticks():
            if not low <= tick.get_loc() <= high:
                yield from (tick.label1, tick.label2)


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("draw", [timeline_figure, memory_figure])
@pytest.mark.parametrize(("size", "pixels"), [(WIDE, 1200), (CARD, 800)])
def test_no_text_overlaps_another_or_the_edge(size, pixels, draw, name):
    found, width, height = texts(draw(PLANS[name](), size))
    assert width == pixels
    assert len(found) > 5
    for text, box in found:
        assert box.x0 >= -1 and box.y0 >= -1, text
        assert box.x1 <= width + 1 and box.y1 <= height + 1, text
    for (one, box), (other, place) in combinations(found, 2):
        across = min(box.x1, place.x1) - max(box.x0, place.x0)
        down = min(box.y1, place.y1) - max(box.y0, place.y0)
        assert across <= 1 or down <= 1, f"{one!r} overlaps {other!r}"


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("draw", [timeline_figure, memory_figure])
def test_text_of_a_card_is_legible_in_tensorboard(draw, name):
    figure = draw(PLANS[name](), CARD)
    assert (figure.get_figwidth(), figure.get_figheight()) == (4.0, 2.4)
    shown = [text for text in figure.findobj(Text) if text.get_text().strip()]
    # A card of 370 pixels shows 7.5 points of a figure 4 inches wide as 9.6 pixels.
    assert min(text.get_fontsize() for text in shown) >= 7.5


def test_timeline_shows_the_plan():
    found, _, _ = texts(timeline_figure(PLANS["pod4"]()))
    words = " ".join(text for text, _ in found)
    for expected in ("134 pipeline cycles", "bubble 4.5 %", "fill", "steady", "drain", "IPU 3"):
        assert expected in words
    assert {"forward", "recompute", "backward", "update (widened)"} <= {text for text, _ in found}


@pytest.mark.parametrize("name", PLANS)
def test_spans_do_not_overlap(name):
    views = [axis.get_xlim() for axis in timeline_figure(PLANS[name]()).axes]
    for (_, end), (begin, _) in zip(views, views[1:]):
        assert end <= begin + 1e-9


def test_all_micro_batches_of_a_short_update_are_drawn():
    figure = timeline_figure(PLANS["few micro-batches"]())
    (axis,) = figure.axes
    blocks = {}
    for collection in axis.collections:
        color = tuple(collection.get_facecolor()[0]) if len(collection.get_facecolor()) else None
        blocks[color] = blocks.get(color, 0) + len(collection.get_paths())
    # forward, recompute and backward of 7 micro-batches on 4 IPUs, and 4 updates
    assert sorted(count for count in blocks.values() if count) == [4, 28, 28, 28]


def test_bars_are_as_long_as_the_predicted_memory():
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
    assert limits == [pytest.approx(plan.target.memory_bytes / 1e6)]


def test_long_update_is_not_widened():
    slow = make_plan(pod4("batch.gradient_accumulation=7", "engine.optimizer_state_on_chip=false"))
    words = {text for text, _ in texts(timeline_figure(slow))[0]}
    assert "update" in words and "update (widened)" not in words


def test_without_times_the_unit_is_a_percent_of_the_update():
    plan = PLANS["unknown memory"]()
    words = {text for text, _ in texts(timeline_figure(plan))[0]}
    assert "% of the update" in words and "milliseconds" not in words
    assert not any("predicted" in text or " ms" in text for text in words)
    assert {"forward", "backward"} <= words and "update" not in words
    (axis,) = timeline_figure(plan).axes
    assert axis.get_xlim() == pytest.approx((0, 100))


def test_without_a_limit_the_bars_show_bytes():
    plan = PLANS["unknown memory"]()
    figure = memory_figure(plan)
    words = {text for text, _ in texts(figure)[0]}
    assert {f"{stage.memory.total / 1e6:,.0f} MB" for stage in plan.stages} <= words
    assert not figure.axes[0].lines
    assert not any("limit" in text or "fit" in text for text in words)
