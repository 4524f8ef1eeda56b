"""DICOM files, written by pydicom, and their 8-bit gray."""

from __future__ import annotations

import io
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dicom_files import assert_equal_gray, encoded, image, ramp, read, reason, stretched
from image_files import SIDE, write
from PIL import Image

from cxr_vit.config.data_sections import DataSection
from cxr_vit.data import dicom
from cxr_vit.data.image_source import open_image_source
from cxr_vit.data.images import FileReader, gray_or_reason, read_gray
from cxr_vit.errors import DataError

pydicom = pytest.importorskip("pydicom", reason="reading DICOM needs pydicom (extra: dicom)")
from pydicom import uid  # noqa: E402
from pydicom.dataset import Dataset  # noqa: E402
from pydicom.encaps import encapsulate  # noqa: E402

FAKE = Path(__file__).resolve().parents[3] / "shared" / "data" / "nih" / "Fake_MONOHR1.dcm"

# What is shown


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.ImplicitVRLittleEndian])
@pytest.mark.parametrize("bits", [10, 12, 16])
def test_without_a_window_the_extremes_are_black_and_white(
    tmp_path: Path, bits: int, syntax: str
) -> None:
    values = ramp(bits) // 2 + 100
    found = read(image(values, bits=bits), tmp_path, syntax)
    assert_equal_gray(found, stretched(values, values.min(), values.max()))
    assert found[0, 0] == 0 and found[-1, -1] == 255


def test_8_bits_per_value_are_read(tmp_path: Path) -> None:
    values = ramp(8)
    dataset = image(values, bits=8, BitsAllocated=8, PixelData=values.astype(np.uint8).tobytes())
    np.testing.assert_array_equal(read(dataset, tmp_path), values)


def test_monochrome1_is_inverted(tmp_path: Path) -> None:
    bones_dark = image(ramp(), PhotometricInterpretation="MONOCHROME1")
    assert_equal_gray(read(bones_dark, tmp_path), 255 - stretched(ramp(), 0, 4095))


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_window_is_applied(tmp_path: Path, photometric: str) -> None:
    dataset = image(
        ramp(), WindowCenter=2000, WindowWidth=1001, PhotometricInterpretation=photometric
    )
    # The standard's LINEAR: centre - 0.5 is the middle of width - 1 values.
    expected = stretched(ramp(), 1999.5 - 500, 1999.5 + 500)
    expected = 255 - expected if photometric == "MONOCHROME1" else expected
    assert_equal_gray(read(dataset, tmp_path), expected)


def test_image_inside_of_its_window_is_not_stretched(tmp_path: Path) -> None:
    values = ramp() // 4 + 1000
    found = read(image(values, WindowCenter=2048, WindowWidth=4096), tmp_path)
    assert_equal_gray(found, stretched(values, 0, 4095))
    assert found.max() < 140


def test_first_of_several_windows_is_applied(tmp_path: Path) -> None:
    dataset = image(ramp(), WindowCenter=[1000.5, 3000], WindowWidth=[2001, 10])
    assert_equal_gray(read(dataset, tmp_path), stretched(ramp(), 0, 2000))


def test_exact_window_is_applied(tmp_path: Path) -> None:
    fields = {"WindowCenter": 1000, "WindowWidth": 500, "VOILUTFunction": "LINEAR_EXACT"}
    assert_equal_gray(read(image(ramp(), **fields), tmp_path), stretched(ramp(), 750, 1250))


def test_sigmoid_window_is_applied(tmp_path: Path) -> None:
    fields = {"WindowCenter": 2000, "WindowWidth": 900, "VOILUTFunction": "SIGMOID"}
    expected = 255 / (1 + np.exp(-4 * (ramp().astype(np.float64) - 2000) / 900))
    assert_equal_gray(read(image(ramp(), **fields), tmp_path), np.round(expected).astype(np.uint8))


@pytest.mark.parametrize("slope", [0.5, 2, -2])
def test_window_is_in_rescaled_values(tmp_path: Path, slope: float) -> None:
    fields = {"RescaleSlope": slope, "RescaleIntercept": -100, "RescaleType": "US"}
    rescaled = ramp() * float(slope) - 100
    assert_equal_gray(
        read(image(ramp(), WindowCenter=500.5, WindowWidth=401, **fields), tmp_path),
        stretched(rescaled, 300, 700),
    )
    assert_equal_gray(
        read(image(ramp(), **fields), tmp_path),
        stretched(rescaled, rescaled.min(), rescaled.max()),
    )


def test_signed_values_are_read(tmp_path: Path) -> None:
    values = ramp().astype(np.int16) - 2048
    found = read(image(values, WindowCenter=0.5, WindowWidth=1001), tmp_path)
    assert_equal_gray(found, stretched(values, -500, 500))


@pytest.mark.parametrize("bits", [8, 12])
def test_lookup_table_is_applied_before_a_window(tmp_path: Path, bits: int) -> None:
    curve = np.round((np.arange(2000) / 1999) ** 2 * (2**bits - 1)).astype(np.uint16)
    table = Dataset()
    table.add_new("LUTDescriptor", "US", [2000, 1000, bits])
    table.add_new("LUTData", "OW", curve.astype("<u2").tobytes())
    dataset = image(ramp(), WindowCenter=10, WindowWidth=10)
    dataset.VOILUTSequence = [table]
    looked_up = curve[np.clip(ramp().astype(int) - 1000, 0, 1999)]
    assert_equal_gray(read(dataset, tmp_path), stretched(looked_up, 0, 2**bits - 1))


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_uniform_image_is_black(tmp_path: Path, photometric: str) -> None:
    dataset = image(np.full((SIDE, SIDE), 700, np.uint16), PhotometricInterpretation=photometric)
    assert read(dataset, tmp_path).max() == 0


def test_run_length_encoded_image_is_decoded(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(io.BytesIO(encoded(image(ramp()))))
    dataset.compress(uid.RLELossless)
    path = tmp_path / "image.dcm"
    dataset.save_as(path)
    assert_equal_gray(read_gray(path, SIDE), stretched(ramp(), 0, 4095))


# Among other images


@pytest.mark.parametrize("name", ["image.dcm", "image", "00000001_000.png"])
def test_content_decides_whatever_the_name(tmp_path: Path, name: str) -> None:
    path = write(tmp_path, encoded(image(ramp())), name)
    reader = FileReader({name: str(path)}, [name], image_size=SIDE, max_megapixels=1)
    out = np.zeros((1, SIDE, SIDE), np.uint8)
    reader.read(np.array([0]), out)
    assert_equal_gray(out[0], stretched(ramp(), 0, 4095))


@pytest.mark.parametrize("size", [8, 40])
def test_image_is_resized(tmp_path: Path, size: int) -> None:
    values = np.repeat(np.array([[0, 4095]], np.uint16), 30, axis=1).repeat(50, axis=0)
    found = read_gray(write(tmp_path, encoded(image(values))), size)
    assert found.shape == (size, size)
    assert (found[:, 0] == 0).all() and (found[:, -1] == 255).all()


def table_of(root: Path, count: int = 6) -> DataSection:
    """A table of DICOM files with two windows, a patient each."""
    for index in range(count):
        views = {"WindowCenter": [1000 + index, 3000], "WindowWidth": [2001, 500]}
        views["WindowCenterWidthExplanation"] = ["NORMAL", "BONE"]
        write(root, encoded(image(ramp(), **views)), f"{index}.dcm")
    rows = [f"{index}.dcm,{index},{index % 2}" for index in range(count)]
    (root / "t.csv").write_text("\n".join(["file,who,Mass", *rows, ""]), encoding="utf-8")
    columns: Any = {"image": "file", "patient": "who"}
    return DataSection(
        **{"root": str(root), "format": "table", "csv": "t.csv", "columns": columns},
        **{"labels": ["Mass"], "image_size": SIDE, "cache_workers": 1},
    )


def test_cache_and_training_read_what_the_reader_reads(tmp_path: Path) -> None:
    data, names = table_of(tmp_path), [f"{index}.dcm" for index in range(6)]
    bone = data.model_copy(update={"dicom_window": "Bone"})
    for section in (data, bone):
        path = tmp_path / "5.dcm"
        expected = read_gray(path, SIDE, dicom_window=section.dicom_window)
        for cache in ("off", "auto", "require"):
            folder = str(tmp_path / str(section.dicom_window))
            asked = section.model_copy(update={"cache": cache, "cache_dir": folder})
            source = open_image_source(asked, names)
            out = np.empty((1, SIDE, SIDE), np.uint8)
            source.reader.select(names).read(np.array([5]), out)
            np.testing.assert_array_equal(out[0], expected)
    index = (tmp_path / "None").glob("*.json")
    assert "dicom_window" not in next(index).read_text(), "earlier releases would refuse it"
    other = bone.model_copy(update={"cache_dir": str(tmp_path / "None")})
    with pytest.raises(DataError, match="built with dicom_window=None, and Bone is needed"):
        open_image_source(other, names)


def test_window_that_a_file_does_not_have_is_its_reason(tmp_path: Path) -> None:
    data = table_of(tmp_path, count=2).model_copy(update={"dicom_window": "LUNG", "cache": "off"})
    write(tmp_path, jpeg(SIDE, SIDE, 1), "1.dcm")  # has no windows, and needs none
    source = open_image_source(data, ["0.dcm", "1.dcm"])
    assert list(source.bad) == ["0.dcm"]
    assert "without a window 'LUNG': it has NORMAL, BONE" in source.bad["0.dcm"]


# Files of others


def test_files_of_pydicom_are_read_or_refused() -> None:
    folder = Path(pydicom.__file__).parent / "data" / "test_files"
    found = {path.name: gray_or_reason(path, SIDE) for path in sorted(folder.glob("*.dcm"))}
    for name, gray in found.items():
        if isinstance(gray, str):
            assert gray.isprintable() and len(gray) < 200, name
        else:
            assert gray.shape == (SIDE, SIDE), name
    plain = found["MR_small.dcm"]
    for other in ("RLE", "bigendian", "expb", "implicit", "jp2klossless", "jpeg_ls_lossless"):
        np.testing.assert_array_equal(found[f"MR_small_{other}.dcm"], plain, err_msg=other)
    for colour in ("rle", "gdcm_KY", "jpeg_dcmtk", "dcmtk_+eb+cr", "dcmtk_+eb+cy+np"):
        assert not isinstance(found[f"SC_rgb_{colour}.dcm"], str), colour
    assert "several pictures" in str(found["SC_rgb_rle_2frame.dcm"])
    assert "without an image" in str(found["rtplan.dcm"])


@pytest.mark.skipif(not FAKE.exists(), reason=f"needs {FAKE}")
def test_monochrome1_file_of_others_is_the_negative_of_its_jpeg(tmp_path: Path) -> None:
    picture = pydicom.dcmread(FAKE).PixelData
    found = read_gray(FAKE, 64)
    stored = read_gray(write(tmp_path, picture[picture.index(b"\xff\xd8\xff") :]), 64)
    difference = np.abs(255 - stored.astype(int) - found)
    assert difference.max() <= 2  # of two decoders


# What is refused


def test_several_frames_are_refused(tmp_path: Path) -> None:
    two = image(ramp(), NumberOfFrames=2, PixelData=ramp().tobytes() * 2)
    assert "several pictures" in reason(encoded(two), tmp_path)


@pytest.mark.parametrize(
    "fields",
    [{"BitsAllocated": 16}, {"SamplesPerPixel": 1}, {"PhotometricInterpretation": "HSV"}],
    ids=["16 bits", "one channel", "another kind"],
)
def test_colour_of_other_than_8_bits_is_refused(tmp_path: Path, fields: Any) -> None:
    given = {"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3, "BitsAllocated": 8, **fields}
    found = reason(encoded(image(ramp(), **given)), tmp_path)
    assert f"a colour image in a DICOM file ({given['PhotometricInterpretation']})" in found


def test_report_is_refused(tmp_path: Path) -> None:
    report = image(ramp())
    del report.PixelData
    assert reason(encoded(report), tmp_path) == "a DICOM file without an image."


def test_large_image_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    data = encoded(image(ramp(), Rows=5000, Columns=5000))
    assert reason(data, tmp_path, max_megapixels=24) == (
        "5000 x 5000 pixels are more than data.max_megapixels=24. Scale the image down."
    )
    assert "damaged" in reason(data, tmp_path, max_megapixels=25)


def test_deflated_file_is_refused_before_it_is_inflated(tmp_path: Path) -> None:
    data = encoded(image(ramp()), uid.DeflatedExplicitVRLittleEndian)
    assert "deflated" in reason(data, tmp_path)


def test_file_that_names_the_deflated_syntax_elsewhere_is_read(tmp_path: Path) -> None:
    note = str(uid.DeflatedExplicitVRLittleEndian)
    dataset = image(ramp(), ImageComments=f"converted from {note}")
    assert note.encode() in encoded(dataset)
    assert_equal_gray(read(dataset, tmp_path), stretched(ramp(), 0, 4095))


@pytest.mark.parametrize("syntax", [uid.JPEGLSLossless, uid.JPEG2000Lossless, uid.JPEGBaseline8Bit])
def test_undecodable_compression_is_named(tmp_path: Path, syntax: str) -> None:
    dataset = image(ramp(8), bits=8, BitsAllocated=8)
    dataset.PixelData = encapsulate([b"\xff\xd8" + b"\0" * 98])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    found = reason(encoded(dataset, syntax), tmp_path)
    assert f"cannot be decoded ({uid.UID(syntax).name})" in found
    assert "Export it uncompressed" in found


def compressed(picture: bytes, syntax: str, *more: bytes) -> bytes:
    """A file whose 24 x 24 pixels are given compressed."""
    dataset = image(ramp())
    dataset.PixelData = encapsulate([picture, *more])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    return encoded(dataset, syntax)


def jpeg_2000(width: int, height: int, channels: int) -> bytes:
    """The beginning of a JPEG 2000 picture."""
    sizes = struct.pack(">HHIIIIIIIIH", 41, 0, width, height, 0, 0, width, height, 0, 0, channels)
    return b"\xff\x4f\xff\x51" + sizes + b"\x0b\1\1" * channels


def jpeg(width: int, height: int, channels: int) -> bytes:
    picture = Image.new("L" if channels == 1 else "RGB", (width, height))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG")
    return buffer.getvalue()


BOXED = b"\0\0\0\x0cjP  \r\n\x87\n" + jpeg_2000(SIDE, SIDE, 1)


@pytest.mark.parametrize(
    ("picture", "syntax"),
    [
        (jpeg_2000(30_000, 30_000, 1), uid.JPEG2000Lossless),
        (jpeg_2000(SIDE, SIDE, 16_000), uid.JPEG2000Lossless),
        (BOXED + jpeg_2000(30_000, 30_000, 1), uid.JPEG2000Lossless),
        (jpeg(SIDE, SIDE + 1, 1), uid.JPEGBaseline8Bit),
        (jpeg(SIDE, SIDE, 3), uid.JPEGBaseline8Bit),
        (jpeg(SIDE, SIDE, 1).replace(b"\xff\xc0", b"\xff\xf7"), uid.JPEGLSLossless),
    ],
    ids=["large", "channels", "second box", "rows", "colour", "JPEG-LS"],
)
def test_compressed_picture_of_another_size_is_not_decoded(
    tmp_path: Path, picture: bytes, syntax: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if syntax == uid.JPEGLSLossless:  # the same header under another marker
        picture = picture.replace(bytes([0, SIDE, 0, SIDE]), bytes([9, SIDE, 0, SIDE]))
    monkeypatch.setattr(Dataset, "pixel_array", property(lambda dataset: pytest.fail("decoded")))
    for data in (compressed(picture, syntax), compressed(b"\0" * 10, syntax, picture)):
        assert "another size than the header says" in reason(data, tmp_path)


def test_compressed_picture_of_the_size_of_the_header_is_decoded(tmp_path: Path) -> None:
    data = compressed(jpeg(SIDE, SIDE, 1), uid.JPEGBaseline8Bit)
    assert "another size" not in str(gray_or_reason(write(tmp_path, data), SIDE))


def run_length(*parts: bytes) -> bytes:
    starts = [64 + sum(map(len, parts[:index])) for index in range(len(parts))]
    return struct.pack("<16I", len(parts), *starts, *[0] * (15 - len(parts))) + b"".join(parts)


def test_run_length_encoded_picture_that_unpacks_to_too_much_is_refused(tmp_path: Path) -> None:
    row = b"\x81\7"  # 128 times 7
    whole = row * (SIDE * SIDE // 128) + b"\xc1\7"  # and 64 times
    path = write(tmp_path, compressed(run_length(whole, whole), uid.RLELossless))
    assert not isinstance(gray_or_reason(path, SIDE), str)
    bomb = run_length(whole, row * 1_000)
    for data in (compressed(bomb, uid.RLELossless), compressed(whole, uid.RLELossless, bomb)):
        assert "another size than the header says" in reason(data, tmp_path)


def element(group: int, number: int, kind: bytes, value: bytes) -> bytes:
    if kind in (b"OB", b"SQ", b"UT"):
        return struct.pack("<HH2sHI", group, number, kind, 0, len(value)) + value
    return struct.pack("<HH2sH", group, number, kind, len(value)) + value


#: An item of a sequence within an item, both of undefined length.
NESTED = struct.pack("<HH2sHIHHI", 0x08, 0x1140, b"SQ", 0, 2**32 - 1, 0xFFFE, 0xE000, 2**32 - 1)


@pytest.mark.parametrize(
    "extra",
    [
        b"".join(element(0x0009, 0x1001 + i % 9, b"LO", b"") for i in range(2_500)),
        NESTED * 10_000,
        NESTED * 100_000,
        element(0x0028, 0x3010, b"SQ", NESTED[12:] + NESTED * 10_000),
        element(0x0028, 0x3010, b"SQ", b"\0" * (2**20 + 2)),
        element(0x0028, 0x1056, b"UT", b"1\\" * 2**20),
    ],
    ids=["elements", "deep", "deeper", "a deep table", "a long table", "a long text"],
)
def test_file_with_too_much_beside_the_image_is_refused(
    tmp_path: Path, extra: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dicom, "_MAX_READS", 2_000)
    data = encoded(image(ramp()))
    place = data.index(struct.pack("<HH", 0x7FE0, 0x0010))
    found = reason(data[:place] + extra + data[place:], tmp_path)
    assert "too much beside the image" in found or "damaged DICOM file" in found
    assert len(found) < 200


@pytest.mark.parametrize(
    "frames", [b"x ", b"-1", b"1e9 ", b"9" * 5000, b"1\\1 ", b"\xff\0"], ids=range(6)
)
def test_number_of_frames_that_is_no_number_is_read_or_refused(
    tmp_path: Path, frames: bytes
) -> None:
    data = encoded(image(ramp(), NumberOfFrames=1))
    start = data.index(struct.pack("<HH2s", 0x28, 8, b"IS"))
    changed = data[:start] + element(0x28, 8, b"IS", frames) + data[start + 10 :]
    found = gray_or_reason(write(tmp_path, changed), SIDE)
    assert not isinstance(found, str) or len(found) < 200


@pytest.mark.parametrize("kind", [b"M\x05\x1b[31m ", b"M" * 9000], ids=["control", "long"])
def test_text_of_the_file_is_quoted_briefly_and_without_control_characters(
    tmp_path: Path, kind: bytes
) -> None:
    usual = element(0x28, 4, b"CS", b"MONOCHROME2 ")
    data = encoded(image(ramp()))
    assert usual in data
    found = reason(data.replace(usual, element(0x28, 4, b"CS", kind)), tmp_path)
    assert found.isprintable() and len(found) < 100


def test_long_side_is_refused(tmp_path: Path) -> None:
    data = encoded(image(ramp(), Rows=1, Columns=33_000))
    assert "a side exceeds 32768" in reason(data, tmp_path)


def test_image_of_several_bands_is_that_of_its_parts(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 4096, (700, 900)).astype(np.uint16)
    values[650, 7] = 9000  # the white of all bands
    path = write(tmp_path, encoded(image(values[:, :700], bits=16)))
    assert_equal_gray(read_gray(path, 700), stretched(values[:, :700], 0, 9000))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9, 0.99])
def test_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    data = encoded(image(ramp()))
    kept = 132 + int((len(data) - 132) * share)
    path = write(tmp_path, data[:kept], "image.dcm")
    with pytest.raises(DataError, match=r"image\.dcm: a (damaged )?DICOM file"):
        read_gray(path, SIDE)


def test_damaged_file_is_read_or_refused(tmp_path: Path) -> None:
    chance = random.Random(0)
    data = encoded(image(ramp(), WindowCenter=2000, WindowWidth=1001))
    header = len(data) - 2 * SIDE * SIDE
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(chance.choice([1, 4, 16])):
            damaged[chance.randrange(132, header)] = chance.randrange(256)
        found = gray_or_reason(write(tmp_path, bytes(damaged), "image.dcm"), SIDE)
        assert isinstance(found, str) or found.shape == (SIDE, SIDE)
        refused += isinstance(found, str)
    assert 50 < refused < 300
