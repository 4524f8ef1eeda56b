"""Augmentation: pure functions of (seed, epoch, row), each within its range."""

from __future__ import annotations

import os
from typing import Any, Dict

import cv2
import numpy as np
import pytest
import torch

from cxr_vit.config.data_sections import AugmentSection
from cxr_vit.data.augment import Augmentation

SIDE = 32
IMAGES = 50
EVERYTHING: Dict[str, Any] = {
    "rotation": 10,
    "shift": 0.05,
    "scale": 0.1,
    "crop": 0.7,
    "brightness": 0.2,
    "contrast": 0.2,
    "gamma": 0.2,
    "horizontal_flip": 0.5,
}
DRAWS = np.arange(IMAGES)


def images(count: int = IMAGES) -> np.ndarray:
    """Return smooth images: in noise, any small warp changes every pixel."""
    coarse = np.random.default_rng(0).integers(30, 220, (count, 4, 4), dtype=np.uint8)
    return np.stack([cv2.resize(image, (SIDE, SIDE)) for image in coarse])


def make(seed: int = 0, **switches: Any) -> Augmentation:
    section = AugmentSection(**switches)
    return Augmentation(section, num_samples=IMAGES, image_size=SIDE, seed=seed)


def augmented(augmentation: Augmentation, draws: np.ndarray) -> np.ndarray:
    return augmentation(images()[draws % IMAGES], draws)


def numbers_of(augmentation: Augmentation, draws: np.ndarray = DRAWS) -> np.ndarray:
    return augmentation._numbers(draws)


def test_augmentation_is_off_by_default() -> None:
    assert not AugmentSection().is_on
    assert not AugmentSection(crop_ratio=1.3).is_on  # which only applies to a crop
    np.testing.assert_array_equal(augmented(make(), DRAWS), images())


@pytest.mark.parametrize("switch", sorted(EVERYTHING))
def test_each_switch_alone_changes_images(switch: str) -> None:
    augmentation = make(**{switch: EVERYTHING[switch]})
    assert augmentation.section.is_on
    assert augmentation.section.moves != augmentation.section.recolours
    changed = (augmented(augmentation, DRAWS) != images()).any(axis=(1, 2))
    assert changed.mean() > 0.4


def test_an_image_does_not_depend_on_the_rest_of_its_batch() -> None:
    whole = augmented(make(**EVERYTHING), DRAWS)
    order = np.random.default_rng(1).permutation(IMAGES)
    np.testing.assert_array_equal(augmented(make(**EVERYTHING), order), whole[order])
    for draw in (0, 7, 49):
        np.testing.assert_array_equal(
            augmented(make(**EVERYTHING), np.array([draw]))[0], whole[draw]
        )


def test_a_batch_may_span_epochs() -> None:
    draws = np.arange(IMAGES - 5, IMAGES + 5)
    together = augmented(make(**EVERYTHING), draws)
    apart = [augmented(make(**EVERYTHING), part) for part in (draws[:5], draws[5:])]
    np.testing.assert_array_equal(together, np.concatenate(apart))


def test_returning_to_an_epoch_gives_the_same_images() -> None:
    augmentation = make(**EVERYTHING)
    first = augmented(augmentation, DRAWS)
    for epoch in (1, 2, 3):
        augmented(augmentation, DRAWS + epoch * IMAGES)
    np.testing.assert_array_equal(augmented(augmentation, DRAWS), first)


def test_images_depend_on_epoch_and_seed() -> None:
    first = augmented(make(**EVERYTHING), DRAWS)
    assert (first != augmented(make(**EVERYTHING), DRAWS + IMAGES)).any(axis=(1, 2)).all()
    assert (first != augmented(make(seed=1, **EVERYTHING), DRAWS)).any(axis=(1, 2)).all()


def test_numpys_global_generator_is_not_used() -> None:
    np.random.seed(0)  # noqa: NPY002
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    augmented(make(**EVERYTHING), DRAWS)
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002


def test_flip_probability_one_mirrors_every_image() -> None:
    np.testing.assert_array_equal(augmented(make(horizontal_flip=1), DRAWS), images()[:, :, ::-1])


def test_flip_probability_half_mirrors_about_half_of_the_images() -> None:
    draws = np.arange(IMAGES * 20)
    numbers = numbers_of(make(horizontal_flip=0.5), draws)
    mirrored = make(horizontal_flip=0.5).matrices(numbers)[:, 0, 0] < 0
    assert 0.45 < mirrored.mean() < 0.55


@pytest.mark.parametrize("degrees", [1, 10, 45])
def test_rotations_fill_their_range_in_both_directions(degrees: float) -> None:
    augmentation = make(rotation=degrees)
    matrices = augmentation.matrices(numbers_of(augmentation, np.arange(IMAGES * 20)))
    angles = np.rad2deg(np.arctan2(matrices[:, 0, 1], matrices[:, 0, 0]))
    assert abs(angles).max() <= degrees + 1e-4
    assert angles.min() < -0.95 * degrees and angles.max() > 0.95 * degrees


def test_a_rotation_keeps_the_center() -> None:
    augmentation = make(rotation=45)
    middle = np.array([(SIDE - 1) / 2, (SIDE - 1) / 2, 1])
    there = augmentation.matrices(numbers_of(augmentation)) @ middle
    np.testing.assert_allclose(there, np.tile(middle[:2], (IMAGES, 1)), atol=1e-9)


def test_scales_fill_their_range() -> None:
    augmentation = make(scale=0.2)
    matrices = augmentation.matrices(numbers_of(augmentation, np.arange(IMAGES * 20)))
    zooms = 1 / np.sqrt(np.linalg.det(matrices[:, :, :2]))
    assert 0.8 - 1e-6 <= zooms.min() < 0.82 and 1.18 < zooms.max() <= 1.2 + 1e-6


def test_shifts_are_fractions_of_the_side() -> None:
    augmentation = make(shift=0.1)
    offsets = augmentation.matrices(numbers_of(augmentation, np.arange(IMAGES * 20)))[:, :, 2]
    assert abs(offsets).max() <= 0.1 * SIDE + 1e-4
    assert (abs(offsets).max(axis=0) > 0.095 * SIDE).all()


@pytest.mark.parametrize(("crop", "ratio"), [(0.5, 1.5), (0.7, 1.1), (0.9, 1.0), (0.5, 1.0)])
def test_a_crop_stays_inside_the_image_and_keeps_its_least_area(crop: float, ratio: float) -> None:
    augmentation = make(crop=crop, crop_ratio=ratio)
    matrices = augmentation.matrices(numbers_of(augmentation, np.arange(IMAGES * 20)))
    area = np.linalg.det(matrices[:, :, :2])
    assert area.min() >= crop - 1e-6 and area.max() <= 1 + 1e-6
    assert area.min() < crop + 0.01 and area.max() > 0.98
    shape = matrices[:, 0, 0] / matrices[:, 1, 1]
    assert shape.max() <= ratio + 1e-6 and shape.min() >= 1 / ratio - 1e-6
    edges = np.array([[-0.5, -0.5, 1], [SIDE - 0.5, SIDE - 0.5, 1]])
    corners = matrices @ edges.T
    assert corners.min() >= -0.5 - 1e-4 and corners.max() <= SIDE - 0.5 + 1e-4


def test_a_crop_of_a_twentieth_is_the_smallest() -> None:
    with pytest.raises(ValueError, match=r"greater than or equal to 0\.05"):
        AugmentSection(crop=0.04)


@pytest.mark.parametrize("read_size", [SIDE, 2 * SIDE])
def test_crops_are_distributed_as_torchvisions(read_size: int) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    section = AugmentSection(crop=0.2, crop_ratio=4 / 3)
    ours = Augmentation(section, 2000, SIDE, seed=0, read_size=read_size)
    matrices = ours.matrices(numbers_of(ours, np.arange(2000)))
    sides = matrices[:, [0, 1], [0, 1]] * SIDE / read_size
    # Of the pixel edges, in fractions of the image; torchvision's are whole pixels of a large one.
    places = (matrices @ [-0.5, -0.5, 1] + 0.5) / read_size
    torch.manual_seed(0)
    large = torch.empty(1, 1000, 1000)
    draw = transforms.RandomResizedCrop.get_params
    drawn = [draw(large, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(2000)]
    theirs = np.array(drawn)[:, [1, 0, 3, 2]] / 1000
    quantiles = []
    for x, y, width, height in (np.concatenate([places, sides], axis=1).T, theirs.T):
        # Of a larger area torchvision draws another crop if it does not fit; ours is made to fit.
        fits = width * height < 0.75
        assert 0.6 < fits.mean() < 0.85
        x, y, width, height = (each[fits] for each in (x, y, width, height))
        numbers = x / (1 - width), y / (1 - height), width * height, np.log(width / height)
        quantiles.append([np.quantile(each, np.linspace(0.05, 0.95, 10)) for each in numbers])
    assert abs(np.subtract(*quantiles)).max() < 0.05


def test_parts_of_larger_images_are_unscaled_and_uniform() -> None:
    size = SIDE - 2
    large = np.random.default_rng(0).integers(0, 256, (IMAGES, size + 6, size + 6), dtype=np.uint8)
    augmentation = Augmentation(AugmentSection(), IMAGES, size, seed=0, read_size=size + 6)
    draws = np.arange(IMAGES * 40)
    matrices = augmentation.matrices(numbers_of(augmentation, draws))
    places = matrices[:, :, 2]
    np.testing.assert_allclose(places, places.round(), atol=1e-9)
    counts = [np.bincount(column, minlength=7) for column in places.round().astype(int).T]
    assert np.shape(counts) == (2, 7) and np.min(counts) > 200  # of 286
    parts = augmentation(large.copy(), DRAWS)
    for image, part, (left, top) in zip(large, parts, places[:IMAGES].round().astype(int)):
        np.testing.assert_array_equal(part, image[top : top + size, left : left + size])


def test_a_part_of_a_larger_image_is_rotated_about_the_center_of_the_image() -> None:
    section = AugmentSection(rotation=45, horizontal_flip=0.5)
    augmentation = Augmentation(section, IMAGES, SIDE, seed=0, read_size=2 * SIDE)
    matrices = augmentation.matrices(numbers_of(augmentation))
    numbers_of_part = numbers_of(augmentation)
    numbers_of_part[:, 0] = 0.5  # not rotated
    flat = augmentation.matrices(numbers_of_part)
    middle, center = np.array([(SIDE - 1) / 2] * 2 + [1]), SIDE - 0.5
    radii = [np.linalg.norm(maps @ middle - center, axis=1) for maps in (matrices, flat)]
    np.testing.assert_allclose(*radii, atol=1e-9)
    np.testing.assert_allclose(abs(np.linalg.det(matrices[:, :, :2])), 1)


def test_bicubic_is_opencvs() -> None:
    cubic = make(rotation=20, interpolation="bicubic")
    matrices = cubic.matrices(numbers_of(cubic))
    flags = cv2.INTER_CUBIC | cv2.WARP_INVERSE_MAP
    expected = cv2.warpAffine(images()[3], matrices[3], (SIDE, SIDE), flags=flags)
    np.testing.assert_array_equal(augmented(cubic, DRAWS)[3], expected)
    assert (augmented(make(rotation=20), DRAWS) != augmented(cubic, DRAWS)).mean() > 0.2


def test_gray_levels_keep_their_order() -> None:
    augmentation = make(brightness=0.5, contrast=0.5, gamma=0.5)
    tables = augmentation.tables(numbers_of(augmentation), images()).astype(int)
    assert (np.diff(tables, axis=1) >= 0).all()
    assert len(np.unique(tables, axis=0)) == IMAGES


def test_gamma_keeps_black_and_white() -> None:
    augmentation = make(gamma=0.3)
    tables = augmentation.tables(numbers_of(augmentation), images())
    assert (tables[:, 0] == 0).all() and (tables[:, 255] == 255).all()
    middle = tables[:, 128] / 255
    assert (128 / 255) ** 1.3 - 0.01 <= middle.min() < middle.max() <= (128 / 255) ** 0.7 + 0.01


def test_brightness_multiplies_gray_levels() -> None:
    augmentation = make(brightness=0.2)
    tables = augmentation.tables(numbers_of(augmentation), images())
    assert (tables[:, 0] == 0).all()
    assert 80 - 1 <= tables[:, 100].min() < tables[:, 100].max() <= 120 + 1


def test_contrast_keeps_the_mean_of_an_image() -> None:
    augmentation = make(contrast=0.3)
    batch = images()
    tables = augmentation.tables(numbers_of(augmentation), batch)
    means = batch.mean(axis=(1, 2)).round().astype(int)
    assert abs(tables[np.arange(IMAGES), means].astype(int) - means).max() <= 1
    assert (tables[:, 255].astype(int) < 255).any()


def test_pixels_from_outside_the_image_are_black() -> None:
    white = np.full((IMAGES, SIDE, SIDE), 255, dtype=np.uint8)
    white = make(shift=0.5, gamma=0.5)(white, DRAWS)
    beyond = (white == 0).reshape(IMAGES, -1).mean(axis=1)
    assert beyond.max() > 0.5 and beyond.mean() > 0.2


def test_pixels_from_outside_get_the_contrast_of_the_image() -> None:
    half = np.zeros((IMAGES, SIDE, SIDE), dtype=np.uint8)
    half[:, :, SIDE // 2 :] = 200
    half = make(shift=0.2, contrast=0.5)(half, DRAWS)
    assert max(len(np.unique(image[: SIDE // 4, : SIDE // 8])) for image in half) == 1
    assert half.min(axis=(1, 2)).max() > 0  # lower contrast raises black


def test_a_crop_brings_no_border_into_view() -> None:
    white = np.full((IMAGES, SIDE, SIDE), 255, dtype=np.uint8)
    white = make(crop=0.5, crop_ratio=1.5, horizontal_flip=0.5)(white, DRAWS)
    assert (white == 255).all()


def test_the_random_numbers_differ_from_those_of_the_sample_order() -> None:
    order = np.random.default_rng((0, 0)).random((IMAGES, 12), dtype=np.float32)
    assert not np.array_equal(numbers_of(make()), order)


def test_opencv_uses_no_threads_and_works_in_a_forked_process() -> None:
    augmented(make(**EVERYTHING), DRAWS)
    assert cv2.getNumThreads() == 1
    expected = augmented(make(**EVERYTHING), DRAWS)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, b"%d" % np.array_equal(augmented(make(**EVERYTHING), DRAWS), expected))
        finally:
            os._exit(0)
    assert os.read(reader, 8) == b"1"
    os.waitpid(child, 0)
    os.close(reader)
    os.close(writer)
