"""DICOM files for the tests, written by pydicom; compressed ones by GDCM."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from image_files import SIDE, write

from cxr_vit.data.images import gray_or_reason, read_gray

pydicom = pytest.importorskip("pydicom", reason="reading DICOM needs pydicom (extra: dicom)")
gdcm = pytest.importorskip("gdcm", reason="decoding DICOM needs python-gdcm (extra: dicom)")
from pydicom import uid  # noqa: E402
from pydicom.dataset import Dataset, FileMetaDataset  # noqa: E402

IS_PYDICOM_2 = pydicom.__version__.startswith("2.")


def ramp(bits: int = 12) -> np.ndarray:
    """All levels of gray, the first pixel at 0."""
    return np.linspace(0, 2**bits - 1, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)


def image(values: np.ndarray, *, bits: int = 12, **fields: Any) -> Dataset:
    """An X-ray of these values; `fields` are added or replaced."""
    dataset = Dataset()
    dataset.SOPClassUID = uid.DigitalXRayImageStorageForPresentation
    dataset.SOPInstanceUID = uid.generate_uid()
    dataset.Rows, dataset.Columns = values.shape
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, bits, bits - 1
    dataset.PixelRepresentation = int(values.dtype.kind == "i")
    dataset.PixelData = values.astype(values.dtype.newbyteorder("<")).tobytes()
    for name, value in fields.items():
        setattr(dataset, name, value)
    return dataset


def encoded(dataset: Dataset, syntax: str = uid.ExplicitVRLittleEndian) -> bytes:
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = syntax
    buffer = io.BytesIO()
    if IS_PYDICOM_2:
        dataset.is_little_endian = True
        dataset.is_implicit_VR = syntax == uid.ImplicitVRLittleEndian
        dataset.save_as(buffer, write_like_original=False)
    else:
        dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def read(dataset: Dataset, folder: Path, syntax: str = uid.ExplicitVRLittleEndian) -> np.ndarray:
    return read_gray(write(folder, encoded(dataset, syntax), "image.dcm"), SIDE)


def transcoded(data: bytes, syntax: str, folder: Path) -> bytes:
    """The file in another transfer syntax, by GDCM."""
    reader, change, writer = (
        gdcm.ImageReader(),
        gdcm.ImageChangeTransferSyntax(),
        gdcm.ImageWriter(),
    )
    reader.SetFileName(str(write(folder, data, "plain.dcm")))
    assert reader.Read()
    change.SetTransferSyntax(gdcm.TransferSyntax(gdcm.TransferSyntax.GetTSType(str(syntax))))
    change.SetInput(reader.GetImage())
    assert change.Change()
    writer.SetFile(reader.GetFile())
    writer.SetImage(change.GetOutput())
    writer.SetFileName(str(folder / "other.dcm"))
    assert writer.Write()
    return (folder / "other.dcm").read_bytes()


def reason(data: bytes, folder: Path, **limits: int) -> str:
    found = gray_or_reason(write(folder, data, "image.dcm"), SIDE, **limits)
    assert isinstance(found, str)
    return found


def stretched(values: np.ndarray, black: float, white: float) -> np.ndarray:
    shown = np.clip((values.astype(np.float64) - black) / (white - black), 0, 1)
    return np.round(255 * shown).astype(np.uint8)


def assert_equal_gray(found: np.ndarray, expected: np.ndarray) -> None:
    """Allow one level where float32 rounds the other way."""
    assert found.dtype == np.uint8
    difference = np.abs(found.astype(int) - expected.astype(int))
    assert difference.max() <= 1 and np.count_nonzero(difference) <= 2
