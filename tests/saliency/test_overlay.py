"""Maps over images: where they lie, how strong they are, what stays as it is."""

import numpy as np
import pytest
from PIL import Image

from cxr_vit.data.images import read_gray, read_original
from cxr_vit.data.views import CENTER
from cxr_vit.errors import DataError
from cxr_vit.saliency.overlay import LARGEST_SIDE, beside, overlay

WHOLE = (0.0, 0.0, 1.0, 1.0)


def colour_of(picture):
    """Return how much each pixel of a picture is coloured, ``[H, W]``."""
    pixels = np.asarray(picture).astype(int)
    return pixels.max(axis=2) - pixels.min(axis=2)


def one_hot(rows, columns, place):
    values = np.zeros((rows, columns), np.float32)
    values[place] = 0.02  # only the ratio to the largest value counts
    return values


def test_a_part_is_where_it_is_cut_out():
    """Also where the margins cannot be equal."""
    rows = np.arange(45, dtype=np.uint8)
    images = np.stack([np.tile(rows, (45, 1)), np.tile(rows[:, None], (1, 45))])
    for size in (45, 32, 30):
        left, top, right, bottom = (edge * 45 for edge in CENTER.box(45, size))
        across, down = CENTER.of(images, size)
        assert (across[0, 0], across[0, -1] + 1) == pytest.approx((left, right))
        assert (down[0, 0], down[-1, 0] + 1) == pytest.approx((top, bottom))


def test_map_covers_what_the_model_saw_at_the_images_aspect():
    image = Image.new("L", (400, 200), 100)
    box = CENTER.box(40, 32)  # a tenth of each side is cut off
    coloured = colour_of(overlay(image, np.ones((4, 4)), box))
    assert coloured.shape == (200, 400)
    inside = np.zeros((200, 400), bool)
    inside[20:180, 40:360] = True
    assert coloured[inside].min() == coloured[inside].max() > 50
    assert coloured[~inside].max() == 0


def test_largest_value_is_in_the_middle_of_its_patch():
    coloured = colour_of(overlay(Image.new("L", (400, 200)), one_hot(4, 8, (1, 6)), WHOLE))
    places = np.argwhere(coloured == coloured.max()) + 0.5
    assert places.mean(axis=0) == pytest.approx((75, 325), abs=1)
    y, x = np.nonzero(coloured)
    assert x.min() >= 275 and x.max() < 375 and y.min() >= 25 and y.max() < 125


def test_opacity_grows_with_the_value():
    """What is left of an edge in the image is less where the value is higher."""
    pixels = np.repeat(np.array([[50], [150]], np.uint8), 50, axis=0).repeat(100, axis=1)
    values = np.repeat([[0.0, 0.2, 0.5, 1.0]], 4, axis=0)
    shown = np.asarray(overlay(Image.fromarray(pixels), values, WHOLE)).astype(int)
    middles = shown[:, [12, 37, 62, 87]]
    left = (middles[50] - middles[49]).mean(axis=1)
    assert left == pytest.approx([100, 87, 67.5, 35], abs=1.5)
    assert (np.diff(middles[0].sum(axis=1)) > 0).all(), "also without colours"


def test_map_without_a_positive_value_leaves_the_image_gray():
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    found = np.asarray(overlay(image, np.zeros((2, 2), np.float32), WHOLE))
    assert (found == np.asarray(image)[..., None]).all()


def test_large_images_are_shrunk_and_stay_themselves():
    image = Image.new("L", (3000, 1500), 7)
    picture = overlay(image, np.ones((2, 2)), WHOLE)
    assert picture.size == (LARGEST_SIDE, 512) and image.size == (3000, 1500)
    both = beside(image, picture)
    assert both.size == (2 * 1024 + 16, 512) and both.mode == "RGB" and both.info == {}
    pixels = np.asarray(both)
    assert (pixels[:, :1024] == 7).all() and (pixels[:, 1024:1040] == 255).all()
    assert (pixels[:, 1040:] == np.asarray(picture)).all()


def test_originals_are_read_at_their_own_size(tmp_path):
    pixels = np.arange(64 * 64, dtype=np.uint8).reshape(64, 64)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (np.asarray(read_original(tmp_path / "a.png")) == pixels).all()
    assert (read_gray(tmp_path / "a.png", 64) == pixels).all()
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes()[:90])
    with pytest.raises(DataError, match=r"b\.png: "):
        read_original(tmp_path / "b.png")
