"""RandAugment: timm's operations and ranges, as pure functions of (seed, epoch, row)."""

from __future__ import annotations

from typing import Any, Dict, get_args

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from cxr_vit.config.data_sections import AugmentSection
from cxr_vit.config.fields import RandAugmentOperation
from cxr_vit.data import rand_augment
from cxr_vit.data.augment import Augmentation
from cxr_vit.data.rand_augment import OPERATIONS

SIDE, IMAGES = 20, 60
BICUBIC = Image.Resampling.BICUBIC
RAMP = np.tile(np.arange(0, 240, 12, dtype=np.uint8), (SIDE, 1))


def augmented(draws: np.ndarray, seed: int = 0, **switches: Any) -> np.ndarray:
    """Augment the same image for each draw."""
    section = AugmentSection(**{"rand_augment": 2, **switches})
    augmentation = Augmentation(section, num_samples=IMAGES, image_size=SIDE, seed=seed)
    return augmentation(np.tile(RAMP, (len(draws), 1, 1)), draws)


def after(name: str, level: float, sign: int = 1, image: np.ndarray = RAMP) -> np.ndarray:
    return np.asarray(OPERATIONS[name](Image.fromarray(image), level, sign, BICUBIC))


def test_images_are_functions_of_seed_epoch_and_row() -> None:
    draws = np.arange(IMAGES + 20)
    whole = augmented(draws)
    order = np.random.default_rng(0).permutation(len(draws))
    np.testing.assert_array_equal(augmented(order), whole[order])
    rand_augment._epoch_numbers.cache_clear()  # as in another process
    np.testing.assert_array_equal(augmented(np.array([65, 7])), whole[[65, 7]])
    assert (whole[IMAGES:] != whole[:20]).any() and (whole != augmented(draws, seed=1)).any()


def test_the_other_augmentation_stays_as_it_is() -> None:
    switches: Dict[str, Any] = {"rotation": 10, "crop": 0.5, "gamma": 0.2}
    draws = np.arange(IMAGES)
    plain = augmented(draws, rand_augment=0, **switches)
    both = augmented(draws, **switches)
    same = (plain == both).all(axis=(1, 2))
    assert 0.1 < same.mean() < 0.5, "no operation is applied to a quarter of the images"


def test_each_operation_is_applied_with_probability_one_half() -> None:
    draws = np.arange(IMAGES * 10)
    once = augmented(draws, rand_augment=1, rand_operations=["invert"])
    assert 0.4 < (once != RAMP).any(axis=(1, 2)).mean() < 0.6
    two = augmented(draws, rand_operations=["invert", "translate_x"])
    # None is applied to a quarter, and invert twice to a sixteenth.
    assert 0.25 < (two == RAMP).all(axis=(1, 2)).mean() < 0.38


def test_magnitudes_vary_about_their_mean() -> None:
    draws = np.arange(IMAGES * 10)
    switches = {"rand_augment": 1, "rand_operations": ["brightness"], "rand_magnitude": 4.0}
    factors = augmented(draws, **switches)[:, 0, 10] / RAMP[0, 10]
    applied = abs(factors[(factors < 0.95) | (factors > 1.05)] - 1) / 0.9 * 10
    assert abs(applied.mean() - 4) < 0.15 and 0.3 < applied.std() < 0.7
    assert 0.3 < (factors < 0.95).sum() / len(applied) < 0.7


@pytest.mark.parametrize("name", get_args(RandAugmentOperation))
def test_every_operation_changes_images_and_keeps_their_kind(name: str) -> None:
    image = RAMP // 2 + 60
    image[4:12, 8:10] = 255
    strong = after(name, 1.0, image=image)
    assert strong.shape == RAMP.shape and strong.dtype == np.uint8
    assert (strong != image).any() or name in ("auto_contrast",)
    if name not in ("auto_contrast", "equalize", "invert", "posterize"):
        np.testing.assert_array_equal(after(name, 0.0, image=image), image)


def test_ranges_are_timms() -> None:
    np.testing.assert_array_equal(after("translate_x", 1.0, -1)[:, 9:], RAMP[:, : SIDE - 9])
    assert (after("translate_x", 1.0, -1)[:, :9] == 0).all(), "black beyond the border"
    assert (after("translate_y", 1.0)[SIDE - 9 :] == 0).all()
    assert len(np.unique(after("posterize", 0.6))) == 4, "2 bits"
    assert len(np.unique(after("posterize", 1.0))) == 2, "at least 1 bit"
    np.testing.assert_array_equal(after("solarize", 0.5), np.where(RAMP < 128, RAMP, 255 - RAMP))
    np.testing.assert_array_equal(
        after("solarize_add", 1.0),
        np.where(RAMP < 128, np.minimum(RAMP.astype(int) + 110, 255), RAMP),
    )
    dark = ImageEnhance.Brightness(Image.fromarray(RAMP)).enhance(0.46)
    np.testing.assert_array_equal(after("brightness", 0.6, -1), np.asarray(dark))
    turned = Image.fromarray(RAMP).rotate(-18, resample=BICUBIC)
    np.testing.assert_array_equal(after("rotate", 0.6, -1), np.asarray(turned))


def test_bone_is_not_turned_into_air_by_default() -> None:
    assert not {"invert", "solarize", "solarize_add"} & set(AugmentSection().rand_operations)
    assert set(OPERATIONS) == set(get_args(RandAugmentOperation))
    assert AugmentSection(rand_augment=1).is_on and not AugmentSection(rand_augment=1).moves
