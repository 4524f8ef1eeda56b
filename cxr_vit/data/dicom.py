"""Decode DICOM files with pydicom, which is optional."""

from __future__ import annotations

import io
import warnings
from typing import Any, Tuple, Union

import numpy as np

#: UID of the transfer syntax that compresses the whole file: a few kB can hold gigabytes.
_DEFLATED = "1.2.840.10008.1.2.1.99"
#: The first byte after the preamble and the four letters DICM.
_FILE_META = 132


def is_dicom(data: bytes) -> bool:
    """Whether these are the bytes of a DICOM file."""
    return data[128:132] == b"DICM"


def decode_dicom(data: bytes, *, max_megapixels: int) -> Union[np.ndarray, str]:
    """Return the image of a DICOM file as it is displayed, uint8 ``[H, W]``, or why it is unusable.

    The values are those of the file's first lookup table or window. Without either, the smallest
    value of the image is black and the largest is white. Only gray images of one frame are read.
    """
    try:
        import pydicom
    except ImportError:
        return 'a DICOM file, which needs pydicom. Run: pip install "cxr-vit[dicom]"'
    try:
        with warnings.catch_warnings():  # pydicom warns of values that break the standard
            warnings.simplefilter("ignore")
            if _transfer_syntax(data) == _DEFLATED:
                return "a deflated DICOM file. Export it uncompressed."
            dataset = pydicom.dcmread(io.BytesIO(data))
            reason = _unusable(dataset, max_megapixels)
            pixels = reason or _pixels(dataset)
            return pixels if isinstance(pixels, str) else _displayed(dataset, pixels)
    except MemoryError:
        raise
    except Exception as error:  # errors of many types, as bytes are damaged in many places
        what = str(error).strip().split("\n")[0] or type(error).__name__
        return f"a damaged DICOM file ({what}). Fetch the file again."


def _transfer_syntax(data: bytes) -> str:
    """Return the transfer syntax of the file meta (group 2), without decoding what follows."""
    from pydicom.filereader import read_dataset

    file = io.BytesIO(data)
    file.seek(_FILE_META)
    meta = read_dataset(
        file,
        is_implicit_VR=False,
        is_little_endian=True,
        stop_when=lambda tag, representation, length: tag.group != 2,
    )
    return str(meta.get("TransferSyntaxUID", ""))


def _unusable(dataset: Any, max_megapixels: int) -> str:
    """Return why the image is unusable by its header, or ""."""
    width, height = dataset.get("Columns"), dataset.get("Rows")
    if "PixelData" not in dataset or not width or not height:
        return "a DICOM file without an image."
    if width * height > max_megapixels * 1_000_000:
        return f"{width} x {height} pixels are more than data.max_megapixels={max_megapixels}."
    if int(dataset.get("NumberOfFrames") or 1) > 1:
        return "several pictures in one DICOM file. Export one of them."
    kind = dataset.get("PhotometricInterpretation")
    if kind not in ("MONOCHROME1", "MONOCHROME2") or dataset.get("SamplesPerPixel", 1) != 1:
        return f"a colour image in a DICOM file ({kind}). Export it as gray."
    return ""


def _pixels(dataset: Any) -> Union[np.ndarray, str]:
    """Return the stored values, or the reason why compressed ones cannot be decoded."""
    syntax = dataset.file_meta.TransferSyntaxUID
    try:
        return dataset.pixel_array
    except MemoryError:
        raise
    except Exception:
        if not syntax.is_compressed:
            raise
        return (
            f"a DICOM file that cannot be decoded ({syntax.name}): it is damaged, or pydicom needs"
            " a decoder. Export it uncompressed, or install python-gdcm."
        )


def _displayed(dataset: Any, pixels: np.ndarray) -> np.ndarray:
    """Return 8-bit gray; black is 0, also where the file means the opposite."""
    values, black, white = _values(dataset, pixels)
    if white == black:
        return np.zeros(values.shape, np.uint8)
    shown = np.clip((values.astype(np.float32) - black) * (255.0 / (white - black)), 0, 255)
    gray = np.round(shown).astype(np.uint8)
    return 255 - gray if dataset.PhotometricInterpretation == "MONOCHROME1" else gray


def _values(dataset: Any, pixels: np.ndarray) -> Tuple[np.ndarray, float, float]:
    """Return the values after lookup table or window, with those of black and white."""
    try:
        from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut
    except ImportError:  # pydicom 2
        from pydicom.pixel_data_handlers import (  # type: ignore[no-redef,unused-ignore]
            apply_modality_lut,
            apply_voi_lut,
        )
    values = apply_modality_lut(pixels, dataset)
    tables = dataset.get("VOILUTSequence")
    if tables:
        bits = tables[0].LUTDescriptor[2]
        tables[0].LUTDescriptor[2] = 16  # with 8, pydicom looks up the index modulo 256
        return apply_voi_lut(np.round(values).astype(np.int32), dataset), 0, 2**bits - 1
    if dataset.get("WindowCenter") is None or dataset.get("WindowWidth") is None:
        return values, float(values.min()), float(values.max())
    # The output of a window has the range of the input, which depends on several fields. Values
    # far outside of the window give it.
    with np.errstate(over="ignore"):
        black, white = apply_voi_lut(np.array([-1e12, 1e12]), dataset)
        return apply_voi_lut(values, dataset), float(black), float(white)
