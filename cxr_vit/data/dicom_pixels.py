"""Decompress the pixels of a DICOM file, within limits of memory and time."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from importlib.util import find_spec
from typing import Any, List, Tuple

import numpy as np

from cxr_vit.data import dicom_gdcm
from cxr_vit.data.codestreams import JPEG_SIGNATURE, Unusable, check_jpeg, overloaded

_RUN_LENGTH = "1.2.840.10008.1.2.5"
_MAX_FRAGMENTS = 100_000

_JP2_SIGNATURE = b"\0\0\0\x0cjP  "
#: Begins a JPEG 2000 picture; its size follows.
_JPEG_2000 = b"\xff\x4f\xff\x51"


def stored_cells(dataset: Any) -> np.ndarray:
    """Return the pixel cells of an image as they are stored, ``[H, W]`` or ``[H, W, channels]``.

    Their type is that of the bits allocated; bits beyond those stored are not removed yet.

    Raises Unusable if a decoder is missing or fails, and errors of many types if the file is
    damaged.
    """
    syntax = dataset.file_meta.TransferSyntaxUID
    size = (dataset.Columns, dataset.Rows, dataset.get("SamplesPerPixel", 1))
    if syntax.is_compressed:
        fragments = _fragments(dataset.PixelData)
        fits = all(_fits(picture, size) for picture in (b"".join(fragments), *fragments))
        if syntax == _RUN_LENGTH:
            fits = len(fragments) == 1 and not _overflows(fragments[0], size[0] * size[1])
        if not fits:
            raise ValueError("the compressed picture has another size than the header says")
        if syntax != _RUN_LENGTH:
            return _decompressed(dataset, b"".join(fragments))
    stored = dataset.BitsStored
    dataset.BitsStored = dataset.BitsAllocated  # pydicom 3 clears bits, but not by the HighBit
    if hasattr(dataset, "pixel_array_options"):
        dataset.pixel_array_options(raw=True)  # pydicom 3 converts some kinds of colours
    cells: np.ndarray = dataset.pixel_array
    dataset.BitsStored = stored
    if cells.shape[:2] != (size[1], size[0]) or cells.ndim != (3 if size[2] > 1 else 2):
        raise ValueError("its pixels are not rows of gray values or of colours")
    return cells.astype(cells.dtype.newbyteorder("="), copy=False)


def _decompressed(dataset: Any, picture: bytes) -> np.ndarray:
    """Decode a picture of JPEG, JPEG-LS or JPEG 2000 with GDCM.

    GDCM runs in a process of its own: damaged pictures end it with SIGABRT or SIGSEGV, or take
    minutes. One decoder gives the same pixels with every version of pydicom.
    """
    name = dataset.file_meta.TransferSyntaxUID.name[:60]
    if find_spec("gdcm") is None:
        raise Unusable(
            f"a compressed DICOM file ({name}), which needs python-gdcm."
            ' Run: pip install "cxr-vit[dicom]"'
        )
    if dataset.get("HighBit", dataset.BitsStored - 1) != dataset.BitsStored - 1:
        raise ValueError("the high bit of a compressed picture is not the last that is stored")
    shape = (dataset.Rows, dataset.Columns, dataset.get("SamplesPerPixel", 1))
    facts = [
        str.__str__(dataset.file_meta.TransferSyntaxUID),
        dataset.PhotometricInterpretation,
        *shape,
        *(dataset.BitsAllocated, dataset.BitsStored, dataset.PixelRepresentation),
    ]
    program = [sys.executable, str(dicom_gdcm.__file__), *map(str, facts)]
    done = subprocess.run(
        program,
        input=picture,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # GDCM prints what is wrong with a picture
        check=False,
    )
    item_bytes, rest = divmod(len(done.stdout), shape[0] * shape[1] * shape[2])
    if done.returncode != 0 or rest or item_bytes not in (1, 2, 4):
        raise Unusable(
            f"a DICOM file that cannot be decoded ({name}): it is damaged, or of a kind that GDCM"
            " does not decode. Export it uncompressed."
        )
    kind = "i" if dataset.PixelRepresentation else "u"
    cells = np.frombuffer(done.stdout, f"<{kind}{item_bytes}").reshape(shape)
    return cells if shape[2] > 1 else cells[..., 0]


def _fragments(items: bytes) -> List[bytes]:
    """Return the pieces of a compressed picture; the first item is a table of offsets."""
    found: List[bytes] = []
    offset = 0
    while items.startswith(b"\xfe\xff\x00\xe0", offset):
        length = int.from_bytes(items[offset + 4 : offset + 8], "little")
        found.append(items[offset + 8 : offset + 8 + length])
        offset += 8 + length
        if len(found) > _MAX_FRAGMENTS:
            raise overloaded("a DICOM file with too much beside the image")
    return found[1:]


def _fits(picture: bytes, size: Tuple[int, int, int]) -> bool:
    """Whether a JPEG or JPEG 2000 picture has this width, height and number of channels.

    Other bytes fit: they are the middle of a picture, or fail to decode.
    """
    if picture.startswith(JPEG_SIGNATURE):
        return all(found == size for found in check_jpeg(picture))
    starts = [0] if picture.startswith(_JPEG_2000) else []
    if picture.startswith(_JP2_SIGNATURE):  # boxes, one of which holds the picture
        starts = [match.start() for match in re.finditer(re.escape(_JPEG_2000), picture)]
    for start in starts:
        right, bottom, left, top = struct.unpack_from(">4I", picture, start + 8)
        (channels,) = struct.unpack_from(">H", picture, start + 40)
        if (right - left, bottom - top, channels) != size:
            return False
    return True


def _overflows(picture: bytes, pixels: int) -> bool:
    """Whether a run-length encoded part of a picture has far more bytes than there are pixels."""
    (count,) = struct.unpack_from("<I", picture)
    starts = struct.unpack_from("<15I", picture, 4)[: min(count, 15)]
    for position, end in zip(starts, (*starts[1:], len(picture))):
        unpacked = 0
        while position < min(end, len(picture)) and unpacked <= 2 * pixels + 256:
            code = picture[position]
            unpacked += 257 - code if code > 128 else (code + 1) % 129
            position += 2 if code > 128 else (code + 1) % 129 + 1
        if unpacked > 2 * pixels + 256:
            return True
    return False
