"""A file -> uint8 gray pixels, safely. Imports no torch.

Resizing happens on the gray image, before the copy to three channels (which the model makes on the
device): half the work, and one channel to move. Pillow's resize is antialiased.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Dict, List, Set, Tuple, Union

import numpy as np
from PIL import Image, ImageOps

from cxr_vit.errors import DataError

__all__ = ["find_images", "read_gray"]

#: Only these decoders are ever tried, whatever the file's name or content.
FORMATS = ("PNG", "JPEG")
_SUFFIXES = (".png", ".jpg", ".jpeg")


def find_images(root: Path) -> Dict[str, str]:
    """Walk a folder once and return each image's file name -> path.

    NIH's archives unpack to `images/`, Kaggle's copy to `images_001/images/` and so on, resized
    copies to one folder: the names are unique, so any nesting serves.

    Raises
    ------
    DataError
        If a name is in two folders, as where a resized copy lies beside the originals.
    """
    found: Dict[str, str] = {}
    twice: List[Tuple[str, str]] = []
    seen: Set[Tuple[int, int]] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        status = Path(folder).stat()
        if (status.st_dev, status.st_ino) in seen:  # links may lead in circles
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        for name in names:
            if name.lower().endswith(_SUFFIXES):
                path = os.path.join(folder, name)
                if found.setdefault(name, path) != path:
                    twice.append((found[name], path))
    if twice:
        first, second = twice[0]
        raise DataError(
            f"{len(twice)} images are under {root} twice, e.g. {first} and {second}. Set"
            " data.images to the folder that should be read."
        )
    return found


def read_gray(path: Union[str, Path], size: int) -> np.ndarray:
    """Read one film as 8-bit gray, resized to a square with an antialiased bilinear filter.

    Parameters
    ----------
    path
        A PNG or JPEG, gray or colour; an alpha channel must be opaque (some of NIH's films are
        RGBA with equal colours).
    size
        Side of the square, pixels.

    Returns
    -------
    numpy.ndarray
        uint8 ``[size, size]``.

    Raises
    ------
    DataError
        If the file is missing, damaged, of another format or depth, or partly transparent.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            image.load()
            gray = _to_gray(ImageOps.exif_transpose(image), path)
    except FileNotFoundError as error:
        raise DataError(f"{path}: the image is not there.") from error
    # Pillow reports damage as one of these, depending on the place of the damage.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(
            f"{path}: not a readable PNG or JPEG ({error}). Fetch the file again."
        ) from error
    if gray.size != (size, size):
        gray = gray.resize((size, size), Image.Resampling.BILINEAR)
    return np.array(gray, dtype=np.uint8)


def _to_gray(image: Image.Image, path: Union[str, Path]) -> Image.Image:
    if "transparency" in image.info:  # a PNG may name transparent colours without a channel for it
        image = image.convert("RGBA")
    if image.mode.startswith(("I", "F")):
        raise DataError(
            f"{path}: pixels of mode {image.mode!r} (more than 8 bits); clipping them would ruin"
            " the film. Convert it to 8-bit gray first."
        )
    if image.mode in ("RGBA", "LA") and image.getchannel("A").getextrema()[0] != 255:
        raise DataError(
            f"{path}: the film is partly transparent. Export it without an alpha channel."
        )
    return image if image.mode == "L" else image.convert("L")
