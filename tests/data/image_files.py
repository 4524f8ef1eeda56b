"""Image files for the tests of reading, made by Pillow or byte by byte."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Optional, Tuple

import numpy as np
from PIL import Image

SIDE = 24
GRAY, COLOUR, PALETTE, GRAY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2))


def pixels(shape: Tuple[int, int] = (SIDE, SIDE), *, seed: int = 0) -> np.ndarray:
    """Noise without black, so that a missing row is seen."""
    return np.random.default_rng(seed).integers(1, 256, shape, dtype=np.uint8)


def smooth(side: int = SIDE) -> np.ndarray:
    """A smooth pattern, which compresses as images do."""
    rows, columns = np.indices((side, side))
    return (120 + 60 * np.sin(columns / 5) + 50 * np.cos(rows / 7)).astype(np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def write(folder: Path, data: bytes, name: str = "image.png") -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    size: Tuple[int, int],
    bits: int,
    colour: int,
    rows: bytes,
    *,
    before: bytes = b"",
    after: bytes = b"",
    packed: Optional[bytes] = None,
    interlaced: bool = False,
) -> bytes:
    """A PNG of (width, height), with other chunks before and after the pixels."""
    header = struct.pack(">IIBBBBB", *size, bits, colour, 0, 0, interlaced)
    packed = zlib.compress(rows) if packed is None else packed
    chunks = png_chunk(b"IHDR", header) + before + png_chunk(b"IDAT", packed) + after
    return PNG_SIGNATURE + chunks + PNG_END


def as_rows(values: np.ndarray) -> bytes:
    """Unfiltered rows of 8- or 16-bit values [height, width(, channels)]."""
    values = values.astype(">u2") if values.dtype == np.uint16 else values
    return b"".join(b"\0" + row.tobytes() for row in values)


def png_of(values: np.ndarray, **options: bytes) -> bytes:
    """A PNG of 8- or 16-bit values [height, width(, channels)]."""
    channels = values.shape[2] if values.ndim == 3 else 1
    colour = {1: GRAY, 2: GRAY_ALPHA, 3: COLOUR, 4: COLOUR_ALPHA}[channels]
    size = (values.shape[1], values.shape[0])
    return png(size, 8 * values.dtype.itemsize, colour, as_rows(values), **options)


def interlaced_png(values: np.ndarray) -> bytes:
    """The same in Adam7's seven passes; passes without pixels have no rows."""
    passes = [values[top::down, left::right] for left, top, right, down in _ADAM7]
    passes.append(values[1::2])
    rows = b"".join(as_rows(part) for part in passes if part.size)
    colour = COLOUR if values.ndim == 3 else GRAY
    size = (values.shape[1], values.shape[0])
    return png(size, 8 * values.dtype.itemsize, colour, rows, interlaced=True)


def in_colour(gray: np.ndarray, alpha: Optional[int] = None) -> np.ndarray:
    """Gray in three channels, and optionally a uniform alpha in a fourth."""
    colours = [gray, gray, gray]
    return np.dstack(colours if alpha is None else [*colours, np.full_like(gray, alpha)])


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def exif_chunk(orientation: int) -> bytes:
    return png_chunk(b"eXIf", exif(orientation).tobytes()[len(b"Exif\0\0") :])


def raw_profile_chunk(orientation: int) -> bytes:
    """EXIF as ImageMagick writes it."""
    tags = exif(orientation).tobytes()
    text = f"\nexif\n{len(tags):8d}\n{tags.hex()}\n".encode()
    return png_chunk(b"tEXt", b"Raw profile type exif\0" + text)


def xmp_chunk(orientation: int) -> bytes:
    text = f'<rdf:Description tiff:Orientation="{orientation}"/>'.encode()
    return png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + text)


def turned(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The stored image as shown with one of EXIF's eight orientations."""
    return {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: np.rot90(upright, -1),
        7: upright[::-1, ::-1].T,
        8: np.rot90(upright),
    }[orientation]
