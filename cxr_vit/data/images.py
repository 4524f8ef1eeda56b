"""What Pillow leaves unchecked in a PNG: most checksums, and whether all rows are there.

Imports no torch.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Container, Dict, List, NamedTuple, Optional, Set, Tuple, Union

import kornia_rs
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from cxr_vit.errors import DataError

__all__ = [
    "MAX_MEGAPIXELS",
    "RESIZE_FILTER",
    "SIGNATURE",
    "PngChunks",
    "find_images",
    "gray_or_reason",
    "has_all_rows",
    "read_chunks",
    "read_gray",
]


SIGNATURE = b"\x89PNG\r\n\x1a\n"

_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}

# Adam7: first column and row, and the steps between columns and rows.
_PASSES = (
    (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4),
    (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2),
)  # fmt: skip


class PngChunks(NamedTuple):
    """The kinds of chunks in a PNG, and what its pixels are packed in."""

    kinds: Set[bytes]
    header: bytes
    packed: List[memoryview]


def read_chunks(data: bytes) -> PngChunks:
    """Walk a PNG to its end and check every checksum.

    Raises
    ------
    ValueError
        What is wrong, in words.
    """
    view, at = memoryview(data), len(SIGNATURE)
    chunks = PngChunks(set(), data[16:29], [])
    while b"IEND" not in chunks.kinds:
        if at + 12 > len(data):
            raise ValueError("it ends too early")
        length, kind = struct.unpack_from(">I4s", data, at)
        body = view[at + 4 : at + 8 + length]
        if at + 12 + length > len(data):
            raise ValueError("it ends too early")
        if zlib.crc32(body) != struct.unpack_from(">I", data, at + 8 + length)[0]:
            raise ValueError("a checksum is wrong")
        chunks.kinds.add(kind)
        if kind == b"IDAT":
            chunks.packed.append(body[4:])
        at += 12 + length
    if data[12:16] != b"IHDR" or len(chunks.header) != 13:
        raise ValueError("it does not begin with a header")
    return chunks


def has_all_rows(chunks: PngChunks) -> bool:
    """Whether as many bytes are packed as the header promises: Pillow leaves other rows black."""
    width, height, bits, colour, _, _, is_interlaced = struct.unpack(">IIBBBBB", chunks.header)
    promised = 0
    for left, top, right, down in _PASSES if is_interlaced else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // right), -(-(height - top) // down)
        if columns > 0 and rows > 0:
            promised += rows * (1 + -(-columns * bits * _CHANNELS[colour] // 8))
    return len(zlib.decompressobj().decompress(b"".join(chunks.packed), promised)) == promised


#: Only these decoders are ever tried, whatever the file's name or content.
FORMATS = ("PNG", "JPEG")

#: How images get their size; a cache holds it beside the pixels.
RESIZE_FILTER = "bilinear, antialiased (Pillow)"

MAX_MEGAPIXELS = 64

_SUFFIXES = (".png", ".jpg", ".jpeg")

#: What lies in place of an image after a download that went wrong, by how it begins.
_LOOK_ALIKES = (
    (b"version https://git-lfs", "a Git LFS pointer, not the image. Run: git lfs pull"),
    (b"<", "a page of HTML or XML, not the image (a login or error page?). Fetch it again."),
)

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

#: Chunks that change nothing about how pixels are shown here: no orientation, no transparency.
_PLAIN_CHUNKS = frozenset(
    b"IHDR IDAT IEND tIME pHYs gAMA sRGB cHRM iCCP sBIT bKGD hIST sPLT".split()
)

# Of PNG's header: bit depth and colour type lie at these bytes.
_PNG_FORMAT = slice(24, 26)

_GRAY_8, _RGB_16 = b"\x08\x00", b"\x10\x02"


class _Unusable(Exception):
    """Why an image cannot be used."""


def find_images(root: Path, wanted: Optional[Container[str]] = None) -> Dict[str, str]:
    """Walk a folder once and return each image's file name -> path.

    NIH's archives unpack to `images/`, Kaggle's copy to `images_001/images/` and so on, resized
    copies to one folder: the names are unique, so any nesting serves.

    Parameters
    ----------
    root
        The folder.
    wanted
        File names to look for; None: all.

    Raises
    ------
    DataError
        If such a name is in two folders, as where a resized copy lies beside the originals.
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
            if name.lower().endswith(_SUFFIXES) and (wanted is None or name in wanted):
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


def read_gray(
    path: Union[str, Path], size: int, *, max_megapixels: int = MAX_MEGAPIXELS
) -> np.ndarray:
    """Read one image as 8-bit gray, resized to a square with an antialiased bilinear filter.

    Parameters
    ----------
    path
        A PNG or JPEG, gray or colour, of 8 or 16 bits. An alpha channel must be opaque (some of
        NIH's images are RGBA with equal colours); 16-bit values are scaled by the depth they use.
        A JPEG has no checksums: damage inside it may go unnoticed.
    size
        Side of the square, pixels.
    max_megapixels
        Larger images are refused before they are decoded.

    Returns
    -------
    numpy.ndarray
        uint8 ``[size, size]``.

    Raises
    ------
    DataError
        If the file is missing, damaged, of another format, too large, animated or partly
        transparent.
    """
    pixels = gray_or_reason(path, size, max_megapixels=max_megapixels)
    if isinstance(pixels, str):
        raise DataError(f"{path}: {pixels}")
    return pixels


def gray_or_reason(
    path: Union[str, Path], size: int, *, max_megapixels: int = MAX_MEGAPIXELS
) -> Union[np.ndarray, str]:
    """Read one image as `read_gray` does, or return the reason why it cannot be used."""
    try:
        gray = _decode(path, max_megapixels)
    except _Unusable as reason:
        return str(reason)
    if gray.size != (size, size):
        gray = gray.resize((size, size), Image.Resampling.BILINEAR)
    return np.array(gray, dtype=np.uint8)


def _decode(path: Union[str, Path], max_megapixels: int) -> Image.Image:
    """Return the image as an image of mode L."""
    data = _read_bytes(path)
    try:
        chunks = read_chunks(data) if data.startswith(SIGNATURE) else None
        with warnings.catch_warnings():  # about pixels (the limit is ours) and metadata
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            _check_header(image, max_megapixels)
            return _to_gray(image, data, chunks)
    except (_Unusable, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise _Unusable(
            f"far more pixels than data.max_megapixels={max_megapixels}. Scale the image down."
        ) from error
    except UnidentifiedImageError as error:
        if data.startswith((SIGNATURE, b"\xff\xd8\xff")):
            raise _Unusable("a damaged image (in its header). Fetch the file again.") from error
        raise _Unusable("neither a PNG nor a JPEG by its content. Fetch the file again.") from error
    # Whatever a decoder stumbles on in bytes from anywhere, it means the same to the user.
    except Exception as error:
        raise _Unusable(f"a damaged image ({error}). Fetch the file again.") from error


def _read_bytes(path: Union[str, Path]) -> bytes:
    try:
        data = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise _Unusable("the image is not there.") from error
    except OSError as error:
        raise _Unusable(f"the image cannot be read ({error.strerror}).") from error
    if not data:
        raise _Unusable("the file is empty. Fetch it again.")
    start = data[:512].replace(_BYTE_ORDER_MARK, b"", 1).lstrip().lower()
    for beginning, what in _LOOK_ALIKES:
        if start.startswith(beginning):
            raise _Unusable(what)
    return data


def _check_header(image: Image.Image, max_megapixels: int) -> None:
    width, height = image.size
    if width * height > max_megapixels * 1_000_000:
        raise _Unusable(
            f"{width} x {height} pixels are more than data.max_megapixels={max_megapixels}."
        )
    if getattr(image, "is_animated", False):
        raise _Unusable("several pictures in one file; an image is one. Export it as a plain PNG.")


def _to_gray(image: Image.Image, data: bytes, chunks: Optional[PngChunks]) -> Image.Image:
    form = data[_PNG_FORMAT] if chunks else b""
    if chunks and form == _GRAY_8 and chunks.kinds <= _PLAIN_CHUNKS:
        with contextlib.suppress(Exception):  # then Pillow decides, and says what is wrong
            pixels = kornia_rs.io.decode_image_png_u8(data, image.size[::-1], "mono")
            return Image.fromarray(np.asarray(pixels)[..., 0])
    if chunks and not has_all_rows(chunks):
        raise _Unusable("a damaged image (rows are missing). Fetch the file again.")
    if chunks and b"PLTE" not in chunks.kinds and form[1:] == b"\x03":
        raise _Unusable("a damaged image (its palette is missing). Fetch the file again.")
    image.load()  # and with it what follows the pixels
    if image.mode == "P" and int(np.asarray(image).max()) >= len(image.getpalette() or ()) // 3:
        raise _Unusable("a damaged image (its palette is too short). Fetch the file again.")
    if form == _RGB_16 and "transparency" not in image.info:  # Pillow would drop the low bytes
        pixels = kornia_rs.io.decode_image_png_u16(data, image.size[::-1], "rgb")
        gray = _to_8_bits(np.asarray(pixels))
    else:
        gray = _loaded_to_gray(image, png_bits=form[0] if form else 8)
    gray.info.update(image.info)  # where exif_transpose looks for the orientation
    return ImageOps.exif_transpose(gray).convert("L")


def _loaded_to_gray(image: Image.Image, *, png_bits: int) -> Image.Image:
    if "transparency" in image.info:  # a PNG may name transparent colours without a channel for it
        if png_bits != 8 and image.mode != "P":  # Pillow looks for them at the wrong depth
            raise _Unusable("partly transparent. Export the image without a transparent colour.")
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA") and png_bits == 16:
        raise _Unusable("16-bit with an alpha channel. Export the image as 16-bit gray.")
    if image.mode in ("RGBA", "LA") and image.getchannel("A").getextrema()[0] != 255:
        raise _Unusable("partly transparent. Export the image without an alpha channel.")
    if image.mode.startswith("I"):
        return _to_8_bits(np.asarray(image))
    if image.mode in ("CMYK", "YCCK"):
        raise _Unusable(f"an image for print ({image.mode}). Export the image as gray.")
    return image.convert("L")


def _to_8_bits(values: np.ndarray) -> Image.Image:
    """Scale 16-bit gray or colour by the depth in use: detectors give 10, 12 or 14 bits, unscaled.

    To clip, as Pillow's own conversion does, would turn a 12-bit image white.
    """
    used = int(values.max()).bit_length()
    depth = max(8, used + used % 2)
    scaled = values.astype(np.float32) * (255.0 / (2**depth - 1))
    return Image.fromarray(np.round(scaled).astype(np.uint8))
