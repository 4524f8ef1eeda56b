"""Decoders of compressed DICOM files: the same pixels to the bit, and a reason for damage."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from dicom_files import encoded, image, pydicom, reason, transcoded
from image_files import SIDE, smooth, write

from cxr_vit.data import dicom_pixels
from cxr_vit.data.dicom import parse
from cxr_vit.data.dicom_pixels import stored_cells
from cxr_vit.data.images import gray_or_reason

uid = pydicom.uid

LOSSLESS = {
    "RLE": uid.RLELossless,
    "JPEG process 14": "1.2.840.10008.1.2.4.57",
    "JPEG": "1.2.840.10008.1.2.4.70",
    "JPEG-LS": uid.JPEGLSLossless,
    "JPEG 2000": uid.JPEG2000Lossless,
    "implicit": uid.ImplicitVRLittleEndian,
    "big endian": uid.ExplicitVRBigEndian,
}
COMPRESSED = [name for name in LOSSLESS if name.startswith("JPEG")]


def noise(bits: int, *, is_signed: bool) -> np.ndarray:
    """All bits in use, in each value another."""
    values = np.random.default_rng(bits).integers(0, 2**bits, (SIDE, SIDE))
    values[0, :2] = 0, 2**bits - 1
    if is_signed:
        return (values - 2 ** (bits - 1)).astype(np.int8 if bits == 8 else np.int16)
    return values.astype(np.uint8 if bits == 8 else np.uint16)


def xray(values: np.ndarray, bits: int) -> bytes:
    allocated = 8 * values.dtype.itemsize
    return encoded(image(values, bits=bits, BitsAllocated=allocated, PixelData=values.tobytes()))


@pytest.mark.parametrize("name", LOSSLESS)
def test_lossless_syntaxes_agree_to_the_bit(tmp_path: Path, name: str) -> None:
    for bits, is_signed in ((8, False), (12, False), (12, True), (16, False), (16, True)):
        values = noise(bits, is_signed=is_signed)
        data = transcoded(xray(values, bits), LOSSLESS[name], tmp_path)
        dataset = parse(data)
        assert dataset.file_meta.TransferSyntaxUID == LOSSLESS[name]
        cells = stored_cells(dataset)
        mask = 2**bits - 1  # the sign of fewer bits is extended as the values are displayed
        np.testing.assert_array_equal(cells.astype(int) & mask, values.astype(int) & mask)
        plain = gray_or_reason(write(tmp_path, xray(values, bits), "plain.dcm"), SIDE)
        np.testing.assert_array_equal(gray_or_reason(tmp_path / "other.dcm", SIDE), plain)


def test_12_bits_of_lossy_jpeg_are_decoded(tmp_path: Path) -> None:
    values = smooth().astype(np.uint16) * 16
    data = transcoded(xray(values, 12), uid.JPEGExtended12Bit, tmp_path)
    difference = np.abs(stored_cells(parse(data)).astype(int) - values)
    assert difference.max() < 40  # of 4095


@pytest.mark.parametrize("name", COMPRESSED)
def test_damage_is_a_reason(tmp_path: Path, name: str) -> None:
    data = transcoded(xray(smooth().astype(np.uint16), 12), LOSSLESS[name], tmp_path)
    start, chance = data.rindex(b"\xe0\x7f\x10\0OB"), random.Random(3)
    for _ in range(3):
        damaged = bytearray(data)
        for _ in range(4):
            damaged[chance.randrange(start + 20, start + 110)] = chance.randrange(256)
        found = gray_or_reason(write(tmp_path, bytes(damaged)), SIDE)
        assert not isinstance(found, str) or "a damaged DICOM" in found or "decoded" in found


@pytest.mark.parametrize(
    ("usual", "other"), [(b"\xff\xc4", b"\xff\x01"), (b"\xff\xc3\0\x0b", b"\xff\xc3\0\x0b\x36")]
)
def test_picture_that_ends_its_decoder_is_a_reason(
    tmp_path: Path, usual: bytes, other: bytes
) -> None:
    """GDCM 3.2 ends with SIGABRT without a Huffman table, with SIGSEGV for values of 54 bits."""
    data = transcoded(xray(smooth().astype(np.uint16), 12), LOSSLESS["JPEG"], tmp_path)
    start = data.index(usual, data.rindex(b"\xe0\x7f\x10\0OB"))
    damaged = data[:start] + other + data[start + len(other) :]
    assert "cannot be decoded (JPEG Lossless" in reason(damaged, tmp_path)


def test_decoder_that_aborts_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = transcoded(xray(noise(12, is_signed=False), 12), LOSSLESS["JPEG"], tmp_path)
    for program in ("import os; os.abort()", "print('x' * 7)", "while True: pass"):
        limits = "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (1, 1))\n"
        path = write(tmp_path, (limits + program).encode(), "program.py")
        monkeypatch.setattr(dicom_pixels.dicom_gdcm, "__file__", str(path))
        assert "cannot be decoded (JPEG Lossless" in reason(data, tmp_path)


def test_modules_of_the_current_folder_are_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = transcoded(xray(noise(12, is_signed=False), 12), LOSSLESS["JPEG"], tmp_path)
    for name in ("gdcm.py", "resource.py"):
        write(tmp_path, b"raise SystemExit('run')", name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    assert not isinstance(gray_or_reason(write(tmp_path, data), SIDE), str)


def test_missing_decoder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = transcoded(xray(noise(12, is_signed=False), 12), LOSSLESS["JPEG"], tmp_path)
    monkeypatch.setattr(dicom_pixels, "find_spec", lambda name: None)
    assert 'needs python-gdcm. Run: pip install "cxr-vit[dicom]"' in reason(data, tmp_path)


def test_high_bit_of_a_compressed_picture_is_that_of_the_bits_stored(tmp_path: Path) -> None:
    data = transcoded(xray(noise(12, is_signed=False), 12), LOSSLESS["JPEG"], tmp_path)
    usual, other = (b"\x28\0\x02\x01US\x02\0" + bytes([high, 0]) for high in (11, 15))
    assert data.count(usual) == 1
    assert "high bit" in reason(data.replace(usual, other), tmp_path)
