"""Mean and standard deviation of the images, and the module that applies them on the device."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn

from cxr_vit.config import Config
from cxr_vit.config.architectures import SIZES
from cxr_vit.config.data_sections import DataSection
from cxr_vit.errors import ModelError
from cxr_vit.model.source import (
    PREPROCESSOR,
    Preprocessor,
    SourceError,
    read_config,
    read_preprocessor,
    source_folder,
)
from cxr_vit.model.vit import loading

logger = logging.getLogger(__name__)

#: A number for all channels, or one per channel.
PerChannel = Union[float, Sequence[float]]

#: `data.resample` -> Pillow's number of the filter, in preprocessor_config.json.
RESAMPLE = {"lanczos": 1, "bilinear": 2, "bicubic": 3}
_DEFAULT = 0.5


def per_channel(value: PerChannel, num_channels: int, name: str) -> List[float]:
    """Return one number per channel; ModelError if `value`, the `name`, has another number."""
    values = [value] * num_channels if isinstance(value, (int, float)) else list(value)
    values = values * num_channels if len(values) == 1 else values
    if len(values) != num_channels:
        raise ModelError(
            f"{name} has {len(values)} numbers; the model takes images of {num_channels}"
            f" channel{'s' * (num_channels != 1)}. Give one number, or one per channel."
        )
    return values


class Normalisation(NamedTuple):
    """Mean and standard deviation of gray levels, which are scaled to 0..1."""

    mean: PerChannel
    std: PerChannel

    def of_channels(self, num_channels: int) -> Tuple[List[float], List[float]]:
        """Return both as one number per channel; ModelError if there is another number of them."""
        mean = per_channel(self.mean, num_channels, "the mean")
        return mean, per_channel(self.std, num_channels, "the standard deviation")

    @classmethod
    def from_config(cls, config: Config) -> Normalisation:
        """Return those of the configuration, else those that the weights were trained with.

        The latter are in their preprocessor_config.json; without one they are 0.5. Logs where the
        file and the configuration differ, and what was read of the file. Raises ModelError if it
        cannot be read, or has other channels than the model.
        """
        model, saved, channels = config.model, None, SIZES["vit-base"].num_channels
        if model.name not in SIZES:
            with loading(model.name):
                place = source_folder(model, config_only=True)
                channels = read_config(place).num_channels
                saved = _saved(config, place)
        found = []
        for key, given in (("mean", model.image_mean), ("std", model.image_std)):
            if given is None and saved is not None and getattr(saved, key) is not None:
                found.append(getattr(saved, key))
                name = f"the {key} in the {saved.file} of {model.name}"
            else:
                found.append(_DEFAULT if given is None else given)
                name = f"model.image_{key}"
            per_channel(found[-1], channels, name)
        if model.name not in SIZES:
            _log_default(config, saved)
        if saved is not None:
            _log_differences(config, saved, channels)
        return cls(*found)


def _saved(config: Config, place: Path) -> Optional[Preprocessor]:
    """Read how images are prepared for the weights; needless if the configuration says it."""
    model = config.model
    try:
        return read_preprocessor(place)
    except ValueError as error:
        if model.image_mean is None or model.image_std is None:
            raise SourceError(
                f"{error} Correct it, or set model.image_mean and model.image_std."
            ) from error
        logger.warning("%s It is ignored: model.image_mean and model.image_std are set.", error)
        return None


def _log_default(config: Config, saved: Optional[Preprocessor]) -> None:
    """Say which numbers neither the configuration nor a file has."""
    model = config.model
    given = (("mean", model.image_mean), ("std", model.image_std))
    absent = [key for key, value in given if value is None and getattr(saved, key, None) is None]
    if not absent:
        return
    what = f"no {PREPROCESSOR} beside {model.name}"
    if saved is not None:
        what = f"the {saved.file} of {model.name} has no {' and no '.join(absent)}"
    logger.info(
        "%s: images are normalised with %s; set %s",
        what,
        ", ".join(f"{key} {_DEFAULT}" for key in absent),
        " and ".join(f"model.image_{key}" for key in absent),
    )


def _log_differences(config: Config, saved: Preprocessor, channels: int) -> None:
    model = config.model
    file = f"the {saved.file} of {model.name}"
    counting, there, read = [], [], []
    for key, given, found in (
        ("mean", model.image_mean, saved.mean),
        ("std", model.image_std, saved.std),
    ):
        if found is None:
            continue
        if given is not None and _differ(given, found, channels):
            counting.append(f"model.image_{key}={_words(given)}")
            there.append(f"{key} {_words(found)}")
        elif given is None and set(found) != {_DEFAULT}:
            read.append(f"{key} {_words(found)}")
    if counting:
        used, others = ", ".join(counting), ", ".join(there)
        logger.warning("images are normalised with %s; %s has %s", used, file, others)
    if read:
        logger.info("images are normalised with %s, from %s", ", ".join(read), file)
    differing = _differing_images(config.data, saved)
    if differing:
        logger.info("%s has %s; the configuration counts", file, "; ".join(differing))


def _differing_images(data: DataSection, saved: Preprocessor) -> List[str]:
    """Return in what size, part and filter of the images differ."""
    differing = []
    if saved.size not in (None, data.image_size):
        differing.append(f"{saved.size} pixels, and data.image_size={data.image_size}")
    if saved.read_size not in (None, saved.size if data.resize is None else data.resize):
        given = "null" if data.resize is None else data.resize
        differing.append(f"images cut out of {saved.read_size} pixels, and data.resize={given}")
    names = {number: name for name, number in RESAMPLE.items()}
    if saved.resample not in (None, RESAMPLE[data.resample]):
        name = names.get(saved.resample or 0, f"filter {saved.resample}")
        differing.append(f"resample={name}, and data.resample={data.resample}")
    return differing


def _differ(given: PerChannel, found: Sequence[float], channels: int) -> bool:
    both = [[v] if isinstance(v, (int, float)) else list(v) for v in (given, found)]
    own, its = (values * channels if len(values) == 1 else values for values in both)
    return own != its


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
