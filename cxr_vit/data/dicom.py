"""Decode DICOM files with pydicom, which is optional."""

from __future__ import annotations

import io
import re
import struct
import sys
import warnings
from typing import Any, List, Optional, Tuple

import numpy as np

from cxr_vit.data.codestreams import (
    JPEG_SIGNATURE,
    MAX_SIDE,
    Unusable,
    check_jpeg,
    overloaded,
)

#: UID of the transfer syntax that compresses the whole file: a few kB can hold gigabytes.
_DEFLATED = "1.2.840.10008.1.2.1.99"
_RUN_LENGTH = "1.2.840.10008.1.2.5"
#: The first byte after the preamble and the four letters DICM.
_FILE_META = 132

#: Reads per file: each element takes two or more, and microseconds. Compressed pixels of 64
#: megapixels take 60,000.
_MAX_READS = 200_000
#: Bytes of an element that describes the image, and their groups: some lookup tables fit in.
_MAX_ELEMENT = 2**20
_DESCRIBING = (0x0002, 0x0008, 0x0028)
#: Items of undefined length within such an element: they may be nested, a few frames of the stack
#: for each.
_MAX_OPEN_ITEMS = 50
_OPEN_ITEM, _OPEN_ITEM_BIG_ENDIAN = (
    b"\xfe\xff\x00\xe0" + b"\xff" * 4,
    b"\xff\xfe\xe0\x00" + b"\xff" * 4,
)
_MAX_FRAGMENTS = 100_000
_TOO_MUCH = "a DICOM file with too much beside the image"

#: Pixels that are converted at a time, in double precision.
_BAND_PIXELS = 2**18

_JP2_SIGNATURE = b"\0\0\0\x0cjP  "
#: Begins a JPEG 2000 picture; its size follows.
_JPEG_2000 = b"\xff\x4f\xff\x51"


def is_dicom(data: bytes) -> bool:
    """Whether these are the bytes of a DICOM file."""
    return data[128:132] == b"DICM"


class _LimitedFile(io.BytesIO):
    """A file in memory that can be read a limited number of times, and not in deep recursion."""

    reads = 0

    def read(self, size: Optional[int] = -1) -> bytes:
        self.reads += 1
        if self.reads > _MAX_READS or _is_deep():
            raise overloaded(_TOO_MUCH)
        return super().read(size)


def _is_deep() -> bool:
    """Whether recursion nears its limit: pydicom survives no RecursionError on Python 3.8."""
    try:
        return bool(sys._getframe(sys.getrecursionlimit() // 2))
    except ValueError:
        return False


def decode_dicom(data: bytes, *, max_megapixels: int) -> np.ndarray:
    """Return the image of a DICOM file as it is displayed, uint8 ``[H, W]``.

    The values are those of the file's first lookup table or window. Without either, the smallest
    value of the image is black and the largest is white. Only gray images of one frame are read.

    Raises Unusable if there is no such image, or pydicom is not installed.
    """
    try:
        import pydicom
    except ImportError as error:
        text = 'a DICOM file, which needs pydicom. Run: pip install "cxr-vit[dicom]"'
        raise Unusable(text) from error
    try:
        with warnings.catch_warnings():  # pydicom warns of values that break the standard
            warnings.simplefilter("ignore")
            if _transfer_syntax(data) == _DEFLATED:
                raise Unusable("a deflated DICOM file. Export it uncompressed.")
            dataset = pydicom.dcmread(_LimitedFile(data))
            _check_elements(dataset)
            _check_header(dataset, max_megapixels)
            return _displayed(dataset, _pixels(dataset))
    except (MemoryError, Unusable):
        raise
    except Exception as error:  # errors of many types, as bytes are damaged in many places
        what = str(error).strip().split("\n")[0][:100] or type(error).__name__
        raise Unusable(f"a damaged DICOM file ({what}). Fetch the file again.") from error


def _transfer_syntax(data: bytes) -> str:
    """Return the transfer syntax of the file meta (group 2), without decoding what follows."""
    from pydicom.filereader import read_dataset

    file = _LimitedFile(data)
    file.seek(_FILE_META)
    meta = read_dataset(
        file,
        is_implicit_VR=False,
        is_little_endian=True,
        stop_when=lambda tag, representation, length: tag.group != 2,
    )
    _check_elements(meta)
    return str(meta.get("TransferSyntaxUID", ""))


def _check_elements(dataset: Any) -> None:
    """Raise Unusable if an element is far larger than its kind needs, before it is parsed."""
    for tag in list(dataset.keys()):
        value = dataset.get_item(tag).value
        if isinstance(value, bytes) and tag.group in _DESCRIBING:
            items = value.count(_OPEN_ITEM) + value.count(_OPEN_ITEM_BIG_ENDIAN)
            if len(value) > _MAX_ELEMENT or items > _MAX_OPEN_ITEMS:
                raise overloaded(_TOO_MUCH)


def _check_header(dataset: Any, max_megapixels: int) -> None:
    """Raise Unusable if the header describes an image that cannot be used."""
    width, height = dataset.get("Columns"), dataset.get("Rows")
    if "PixelData" not in dataset or not width or not height:
        raise Unusable("a DICOM file without an image.")
    if width * height > max_megapixels * 1_000_000:
        limit = f"data.max_megapixels={max_megapixels}"
        raise Unusable(f"{width} x {height} pixels are more than {limit}. Scale the image down.")
    if max(width, height) > MAX_SIDE:
        raise Unusable(f"{width} x {height} pixels: a side exceeds {MAX_SIDE}. Scale it down.")
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        raise Unusable("several pictures in one DICOM file. Export one of them.")
    kind = str(dataset.get("PhotometricInterpretation"))[:30]
    if kind not in ("MONOCHROME1", "MONOCHROME2") or dataset.get("SamplesPerPixel", 1) != 1:
        raise Unusable(f"a colour image in a DICOM file ({kind}). Export it as gray.")


def _pixels(dataset: Any) -> np.ndarray:
    """Return the stored values, decompressed."""
    syntax = dataset.file_meta.TransferSyntaxUID
    if syntax.is_compressed:
        fragments = _fragments(dataset.PixelData)
        size = (dataset.Columns, dataset.Rows, 1)
        fits = all(_fits(picture, size) for picture in (b"".join(fragments), *fragments))
        if syntax == _RUN_LENGTH:
            fits = len(fragments) == 1 and not _overflows(fragments[0], size[0] * size[1])
        if not fits:
            raise ValueError("the compressed picture has another size than the header says")
    try:
        pixels = dataset.pixel_array
    except MemoryError:
        raise
    except Exception as error:
        if not syntax.is_compressed:
            raise
        raise Unusable(
            f"a DICOM file that cannot be decoded ({syntax.name[:60]}): it is damaged, or pydicom"
            " needs a decoder. Export it uncompressed, or install python-gdcm."
        ) from error
    if pixels.ndim != 2:
        raise ValueError("its pixels are not rows of gray values")
    return pixels


def _fragments(items: bytes) -> List[bytes]:
    """Return the pieces of a compressed picture; the first item is a table of offsets."""
    found: List[bytes] = []
    offset = 0
    while items.startswith(b"\xfe\xff\x00\xe0", offset):
        length = int.from_bytes(items[offset + 4 : offset + 8], "little")
        found.append(items[offset + 8 : offset + 8 + length])
        offset += 8 + length
        if len(found) > _MAX_FRAGMENTS:
            raise overloaded(_TOO_MUCH)
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


def _displayed(dataset: Any, pixels: np.ndarray) -> np.ndarray:
    """Return 8-bit gray; black is 0, also where the file means the opposite."""
    rows = max(1, _BAND_PIXELS // pixels.shape[1])
    bands = [pixels[top : top + rows] for top in range(0, len(pixels), rows)]
    limits = _limits(dataset)
    if limits is None:
        extremes = [(values.min(), values.max()) for values in (_values(dataset, b) for b in bands)]
        limits = float(min(low for low, _ in extremes)), float(max(high for _, high in extremes))
    black, white = limits
    gray = np.zeros(pixels.shape, np.uint8)
    if white == black:
        return gray
    for index, band in enumerate(bands):
        values = _values(dataset, band).astype(np.float32)
        shown = np.clip((values - black) * (255.0 / (white - black)), 0, 255)
        gray[index * rows : index * rows + len(band)] = np.round(shown)
    return 255 - gray if dataset.PhotometricInterpretation == "MONOCHROME1" else gray


def _apply_lookup(values: np.ndarray, dataset: Any) -> np.ndarray:
    """Apply the file's first lookup table or window."""
    try:
        from pydicom.pixels.processing import apply_voi_lut
    except ImportError:  # pydicom 2
        from pydicom.pixel_data_handlers import (  # type: ignore[no-redef,unused-ignore]
            apply_voi_lut,
        )
    with np.errstate(over="ignore"):
        return np.asarray(apply_voi_lut(values, dataset))


def _limits(dataset: Any) -> Optional[Tuple[float, float]]:
    """Return black and white of what `_values` returns; None for the extremes of the image."""
    tables = dataset.get("VOILUTSequence")
    if tables:
        bits = tables[0].LUTDescriptor[2]
        tables[0].LUTDescriptor[2] = 16  # with 8, pydicom looks up the index modulo 256
        return 0, 2**bits - 1
    if dataset.get("WindowCenter") is None or dataset.get("WindowWidth") is None:
        return None
    # The output of a window has the range of the input, which depends on several fields. Values
    # far outside of the window give it.
    black, white = _apply_lookup(np.array([-1e12, 1e12]), dataset)
    return float(black), float(white)


def _values(dataset: Any, pixels: np.ndarray) -> np.ndarray:
    """Return values after lookup table or window."""
    try:
        from pydicom.pixels.processing import apply_modality_lut
    except ImportError:  # pydicom 2
        from pydicom.pixel_data_handlers import (  # type: ignore[no-redef,unused-ignore]
            apply_modality_lut,
        )
    values = np.asarray(apply_modality_lut(pixels, dataset))
    if dataset.get("VOILUTSequence"):
        return _apply_lookup(np.round(values).astype(np.int32), dataset)
    return _apply_lookup(values, dataset)
