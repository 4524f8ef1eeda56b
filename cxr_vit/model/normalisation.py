"""Mean and standard deviation of the images, and the module that applies them on the device."""

from __future__ import annotations

import logging
from typing import List, NamedTuple, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from cxr_vit.config import Config
from cxr_vit.config.architectures import SIZES
from cxr_vit.errors import ModelError
from cxr_vit.model.source import Preprocessor, read_preprocessor, source_folder
from cxr_vit.model.vit import loading

logger = logging.getLogger(__name__)

#: A number for all channels, or one per channel.
PerChannel = Union[float, Sequence[float]]

#: `data.resample` -> Pillow's number of the filter, in preprocessor_config.json.
RESAMPLE = {"lanczos": 1, "bilinear": 2, "bicubic": 3}
_DEFAULT = 0.5


def per_channel(value: PerChannel, num_channels: int) -> List[float]:
    """Return one number per channel; ModelError if `value` has another number of them."""
    values = [value] * num_channels if isinstance(value, (int, float)) else list(value)
    values = values * num_channels if len(values) == 1 else values
    if len(values) != num_channels:
        raise ModelError(
            f"model.image_mean and model.image_std have {len(values)} numbers; the model takes"
            f" images of {num_channels} channel{'s' * (num_channels != 1)}. Give one number, or one"
            " per channel."
        )
    return values


class Normalisation(NamedTuple):
    """Mean and standard deviation of gray levels, which are scaled to 0..1."""

    mean: PerChannel
    std: PerChannel

    def of_channels(self, num_channels: int) -> Tuple[List[float], List[float]]:
        """Return both as one number per channel; ModelError if there is another number of them."""
        return per_channel(self.mean, num_channels), per_channel(self.std, num_channels)

    @classmethod
    def from_config(cls, config: Config) -> Normalisation:
        """Return those of the configuration, else those that the weights were trained with.

        The latter are in their preprocessor_config.json; without one they are 0.5. Logs where the
        file and the configuration differ, and what was read of the file. Raises ModelError if it
        cannot be read.
        """
        model = config.model
        saved = None
        if model.name not in SIZES:
            with loading(model.name):
                saved = read_preprocessor(source_folder(model, config_only=True))
        found = cls(_DEFAULT, _DEFAULT)
        if saved is not None:
            _log_differences(config, saved)
            found = cls(saved.mean, saved.std)
        return cls(
            found.mean if model.image_mean is None else model.image_mean,
            found.std if model.image_std is None else model.image_std,
        )


def _log_differences(config: Config, saved: Preprocessor) -> None:
    model, data = config.model, config.data
    file = f"the preprocessor_config.json of {model.name}"
    counting, read = [], []
    for key, given, found in (
        ("mean", model.image_mean, saved.mean),
        ("std", model.image_std, saved.std),
    ):
        count = max(len(found), len(given) if isinstance(given, (list, tuple)) else 1)
        if given is not None and per_channel(given, count) != per_channel(found, count):
            counting.append(f"model.image_{key}={_words(given)} and not {_words(found)}")
        elif given is None and set(found) != {_DEFAULT}:
            read.append(f"{key} {_words(found)}")
    if counting:
        logger.warning("images are normalised with %s, as in %s", ", ".join(counting), file)
    if read:
        logger.info("images are normalised with %s, from %s", ", ".join(read), file)
    others = []
    if saved.size not in (None, data.image_size):
        others.append(f"{saved.size} pixels, and data.image_size={data.image_size}")
    names = {number: name for name, number in RESAMPLE.items()}
    if saved.resample not in (None, RESAMPLE[data.resample]):
        name = names.get(saved.resample or 0, f"filter {saved.resample}")
        others.append(f"resample={name}, and data.resample={data.resample}")
    if others:
        logger.info("%s has %s; the configuration counts", file, "; ".join(others))


def _words(value: PerChannel) -> str:
    values = [value] if isinstance(value, (int, float)) else list(value)
    return str(values[0]) if len(set(values)) == 1 else str(values)


class Normalise(nn.Module):
    """Convert gray uint8 images to the model's input.

    This runs on the device, so that a third of the values, of a quarter of the size, are
    transferred. `mean` and `std` are those of a `Normalisation`.
    """

    def __init__(self, *, mean: PerChannel, std: PerChannel, num_channels: int) -> None:
        super().__init__()
        means, stds = Normalisation(mean, std).of_channels(num_channels)
        # (x / 255 - mean) / std as one multiplication and one addition. Not buffers: those would
        # be rounded in an fp16 model.
        self.factors = [(1.0 / (255.0 * s), -m / s) for m, s in zip(means, stds)]

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 ``[B, 1, H, W]`` to float32 ``[B, num_channels, H, W]``."""
        gray = images.float()
        if len(set(self.factors)) == 1:
            scale, offset = self.factors[0]
            return (gray * scale + offset).expand(-1, len(self.factors), -1, -1)
        return torch.cat([gray * scale + offset for scale, offset in self.factors], dim=1)
