"""RandAugment of 8-bit images, with the operations and ranges of timm's ``rand-m6-mstd0.5-inc1``.

They are those of timm/data/auto_augment.py at commit aa4b585 of huggingface/pytorch-image-models,
which calls Pillow, as this module does. Three things differ: pixels from outside an image are
black, the border of an X-ray, and not the mean colour; posterize keeps at least one bit; and color,
which changes no gray image, is not among the operations.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Callable, Dict, Tuple

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from cxr_vit.config.data_sections import AugmentSection

#: Separates these random numbers from those of the other augmentation, which uses the same seed.
_STREAM = 0xA1
_MAX_MAGNITUDE, _MAGNITUDE_STD, _PROBABILITY = 10.0, 0.5, 0.5

#: From an image, the magnitude as a fraction of the largest, 1 or -1 (drawn), and a filter.
Operation = Callable[[Image.Image, float, int, Image.Resampling], Image.Image]


@lru_cache(maxsize=2)  # a batch needs its own epoch and rarely the next
def _epoch_numbers(
    num_samples: int, count: int, seed: int, epoch: int
) -> Tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng((seed, epoch, _STREAM))
    uniform = random.random((num_samples, count, 3), dtype=np.float32)
    return uniform, random.standard_normal((num_samples, count), dtype=np.float32)


def apply_to(
    images: np.ndarray, draws: np.ndarray, section: AugmentSection, *, num_samples: int, seed: int
) -> None:
    """Change images, uint8 ``[n, H, W]``, in place: a pure function of seed and draw."""
    resample = Image.Resampling[section.interpolation.upper()]
    for image, draw in zip(images, draws.tolist()):
        epoch, row = divmod(draw, num_samples)
        uniform, normal = _epoch_numbers(num_samples, section.rand_augment, seed, epoch)
        for (choice, applied, sign), deviation in zip(uniform[row], normal[row]):
            if applied >= _PROBABILITY:
                continue
            names = section.rand_operations
            operation = OPERATIONS[names[int(float(choice) * len(names))]]
            magnitude = section.rand_magnitude + _MAGNITUDE_STD * float(deviation)
            level = min(max(magnitude, 0.0), _MAX_MAGNITUDE) / _MAX_MAGNITUDE
            picture = operation(Image.fromarray(image), level, 1 if sign < 0.5 else -1, resample)
            image[...] = np.asarray(picture)


def _affine(matrix: Callable[[float, int], Tuple[float, ...]]) -> Operation:
    """Return an affine map; `matrix` gives it from the signed level and the image's side."""

    def move(image: Image.Image, level: float, sign: int, how: Image.Resampling) -> Image.Image:
        data = matrix(level * sign, image.width)
        return image.transform(image.size, Image.Transform.AFFINE, data, resample=how)

    return move


def _enhanced(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    """Return a blend with a plainer image: 0.1 to 1 towards it, 1 to 1.9 away from it."""
    return lambda image, level, sign, how: kind(image).enhance(max(0.1, 1 + 0.9 * level * sign))


def _solarize_add(
    image: Image.Image, level: float, sign: int, how: Image.Resampling
) -> Image.Image:
    added = int(level * 110)
    return image.point([min(255, gray + added) if gray < 128 else gray for gray in range(256)])


OPERATIONS: Dict[str, Operation] = {
    "auto_contrast": lambda image, level, sign, how: ImageOps.autocontrast(image),
    "equalize": lambda image, level, sign, how: ImageOps.equalize(image),
    "rotate": lambda image, level, sign, how: image.rotate(30 * level * sign, resample=how),
    "posterize": lambda image, level, sign, how: ImageOps.posterize(
        image, max(1, 4 - int(4 * level))
    ),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": _affine(lambda level, side: (1, 0.3 * level, 0, 0, 1, 0)),
    "shear_y": _affine(lambda level, side: (1, 0, 0, 0.3 * level, 1, 0)),
    "translate_x": _affine(lambda level, side: (1, 0, 0.45 * level * side, 0, 1, 0)),
    "translate_y": _affine(lambda level, side: (1, 0, 0, 0, 1, 0.45 * level * side)),
    "invert": lambda image, level, sign, how: ImageOps.invert(image),
    "solarize": lambda image, level, sign, how: ImageOps.solarize(image, 256 - int(256 * level)),
    "solarize_add": _solarize_add,
}
