"""Read DICOM files with pydicom, which is optional."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from typing import Any, Iterator, Optional

import numpy as np

from cxr_vit.data.codestreams import MAX_SIDE, Unusable, overloaded
from cxr_vit.data.dicom_display import COLOURS, GRAYS, choose_view, displayed
from cxr_vit.data.dicom_pixels import stored_cells

INSTALL = 'Run: pip install "cxr-vit[dicom]"'

#: UID of the transfer syntax that compresses the whole file: a few kB can hold gigabytes.
_DEFLATED = "1.2.840.10008.1.2.1.99"
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
_TOO_MUCH = "a DICOM file with too much beside the image"


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


def decode_dicom(data: bytes, *, max_megapixels: int, window: Optional[str] = None) -> np.ndarray:
    """Return the image of a DICOM file as it is displayed, uint8 ``[H, W]``.

    The values are those of the lookup table or window of the name `window`, or of the file's first
    one. Without any, the values of 8 bits are the gray levels, and of others the smallest value of
    the image is black and the largest is white. Padding is black. Colours become their luminance.

    Raises Unusable if there is no image of one frame, no such window, or pydicom is not installed.
    """
    try:
        import pydicom  # noqa: F401
    except ImportError as error:
        raise Unusable(f"a DICOM file, which needs pydicom. {INSTALL}") from error
    try:
        with quiet():
            dataset = parse(data)
            _check_header(dataset, max_megapixels)
            choose_view(dataset, window)
            return displayed(dataset, stored_cells(dataset))
    except (MemoryError, Unusable):
        raise
    except Exception as error:  # errors of many types, as bytes are damaged in many places
        what = str(error).strip().split("\n")[0][:100] or type(error).__name__
        raise Unusable(f"a damaged DICOM file ({what}). Fetch the file again.") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence pydicom, which quotes values that break the standard, also those of a patient."""
    log = logging.getLogger("pydicom")
    was_disabled, log.disabled = log.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.disabled = was_disabled


def parse(data: bytes, **options: Any) -> Any:
    """Return pydicom's Dataset of a file; `options` are those of `pydicom.dcmread`.

    Raises Unusable if the file is deflated or holds far more than an image needs, and errors of
    many types if it is damaged.
    """
    import pydicom

    if _transfer_syntax(data) == _DEFLATED:
        raise Unusable("a deflated DICOM file. Export it uncompressed.")
    dataset = pydicom.dcmread(_LimitedFile(data), **options)
    _check_elements(dataset)
    return dataset


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
    samples = dataset.get("SamplesPerPixel", 1)
    channels = COLOURS.get(kind) if dataset.get("BitsAllocated") == 8 else None
    if samples != (1 if kind in GRAYS else channels):
        raise Unusable(f"a colour image in a DICOM file ({kind}). Export it as gray.")
