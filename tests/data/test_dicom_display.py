"""From stored values to gray levels: views by name, unused bits, padding, tables, colours."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
from dicom_files import Dataset, assert_equal_gray, encoded, image, ramp, read, stretched
from image_files import SIDE, pixels, write
from PIL import Image

from cxr_vit.data.images import gray_or_reason, read_gray

NAMED = {"WindowCenter": [2000.5, 3000.5, 500.5], "WindowWidth": [4001, 101, 201]}
NAMES = {"WindowCenterWidthExplanation": ["NORMAL", "Bone ", "SOFT"]}


def shown(dataset: Dataset, folder: Path, window: Optional[str]) -> Any:
    path = write(folder, encoded(dataset), "image.dcm")
    return gray_or_reason(path, SIDE, dicom_window=window)


def table(values: np.ndarray, bits: int, name: str = "") -> Dataset:
    item = Dataset()
    item.add_new("LUTDescriptor", "US", [len(values), 0, bits])
    item.add_new("LUTData", "OW", values.astype("<u2").tobytes())
    if name:
        item.LUTExplanation = name
    return item


# Views by name


@pytest.mark.parametrize(
    ("name", "limits"),
    [(None, (0, 4000)), ("normal", (0, 4000)), ("BONE", (2950, 3050)), (" soft", (400, 600))],
)
def test_window_is_found_by_its_name(tmp_path: Path, name: Optional[str], limits: Any) -> None:
    found = shown(image(ramp(), **NAMED, **NAMES), tmp_path, name)
    assert_equal_gray(found, stretched(ramp(), *limits))


def test_lookup_table_and_window_are_found_by_name_in_the_same_file(tmp_path: Path) -> None:
    dataset = image(ramp(), **NAMED, **NAMES)
    curves = [np.arange(4096), np.arange(4096)[::-1]]
    dataset.VOILUTSequence = [table(curves[0], 12, "FIRST"), table(curves[1], 12, "Inverse")]
    assert_equal_gray(shown(dataset, tmp_path, None), stretched(ramp(), 0, 4095))
    assert_equal_gray(shown(dataset, tmp_path, "INVERSE"), stretched(4095 - ramp(), 0, 4095))
    assert_equal_gray(shown(dataset, tmp_path, "bone"), stretched(ramp(), 2950, 3050))


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({**NAMED, **NAMES}, "it has NORMAL, Bone, SOFT."),
        (NAMED, "it names none."),
        ({}, "it names none."),
        ({"WindowCenter": 1000, "WindowWidth": 9, **NAMES}, "it has NORMAL."),
        ({"WindowCenterWidthExplanation": "LUNG"}, "it names none."),
        ({**NAMED, "WindowCenterWidthExplanation": ["", ""]}, "it names none."),
    ],
    ids=["others", "no names", "no window", "fewer windows", "only a name", "empty names"],
)
def test_window_that_the_file_does_not_have_is_refused(
    tmp_path: Path, fields: Any, reason: str
) -> None:
    found = shown(image(ramp(), **fields), tmp_path, "LUNG")
    assert found == f"a DICOM file without a window 'LUNG': {reason} Set data.dicom_window."


def test_single_window_with_a_name_is_found(tmp_path: Path) -> None:
    one = image(ramp(), WindowCenter=1000.5, WindowWidth=201, WindowCenterWidthExplanation="LUNG")
    assert_equal_gray(shown(one, tmp_path, "lung"), stretched(ramp(), 900, 1100))


# Bits that are no part of the value


@pytest.mark.parametrize("window", [{}, {"WindowCenter": 2048, "WindowWidth": 4096}])
@pytest.mark.parametrize("lowest", [0, 4], ids=["above", "above and below"])
def test_bits_beside_those_stored_are_ignored(tmp_path: Path, lowest: int, window: Any) -> None:
    junk = np.random.default_rng(0).integers(0, 16, ramp().shape).astype(np.uint16)
    cells = ramp() << 4 | junk if lowest else ramp() | junk << 12
    found = read(image(cells, bits=12, HighBit=11 + lowest, **window), tmp_path)
    np.testing.assert_array_equal(found, read(image(ramp(), **window), tmp_path))


@pytest.mark.parametrize("lowest", [0, 4])
def test_sign_is_the_highest_bit_stored(tmp_path: Path, lowest: int) -> None:
    values = ramp().astype(np.int16) - 2048
    cells = (values.view(np.uint16) & 0xFFF) << lowest  # the bits above are not those of the sign
    window = {"WindowCenter": 0, "WindowWidth": 4096}
    dataset = image(cells, HighBit=11 + lowest, PixelRepresentation=1, **window)
    np.testing.assert_array_equal(read(dataset, tmp_path), read(image(values, **window), tmp_path))


def test_high_bit_that_cannot_be_is_taken_for_the_usual_one(tmp_path: Path) -> None:
    np.testing.assert_array_equal(
        read(image(ramp(), HighBit=3), tmp_path), read(image(ramp()), tmp_path)
    )


# Padding


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("limit", [{}, {"PixelPaddingRangeLimit": 4090}], ids=["value", "range"])
def test_padding_is_black_and_no_extreme(tmp_path: Path, photometric: str, limit: Any) -> None:
    values = ramp() // 4 + 1000
    values[:5] = 4095
    values[5, :3] = 4092  # between the limits of the range
    padding = {"PixelPaddingValue": 4095, **limit}
    found = read(image(values, PhotometricInterpretation=photometric, **padding), tmp_path)
    is_padding = values >= 4090 if limit else values == 4095
    inside = values[~is_padding]
    expected = stretched(values, inside.min(), inside.max())
    expected = 255 - expected if photometric == "MONOCHROME1" else expected
    assert_equal_gray(found, np.where(is_padding, 0, expected).astype(np.uint8))


@pytest.mark.parametrize(
    ("cell", "given"),
    [(-2000, -2000), (63536, 63536), (0xF000 | 7, 7)],
    ids=["signed", "of more bits than stored", "with unused bits"],
)
def test_padding_is_compared_as_stored(tmp_path: Path, cell: int, given: int) -> None:
    values = (ramp() // 4 + 1000).astype(np.int32)
    values[:5] = cell
    signed = cell < 0
    dataset = image(values.astype(np.int16 if signed else np.uint16), PixelPaddingValue=given)
    found = read(dataset, tmp_path)
    assert (found[:5] == 0).all()
    assert_equal_gray(found[5:], stretched(values[5:], values[5:].min(), values[5:].max()))


@pytest.mark.parametrize("given", [16, 3780, -2000])
def test_padding_of_bits_that_are_stored_higher_is_a_value(tmp_path: Path, given: int) -> None:
    values = (ramp() // 4 + 1000).astype(np.int16)  # below 2048
    values[:5] = given
    kind = np.int16 if given < 0 else np.uint16
    usual = image(values.astype(kind), PixelPaddingValue=given)
    higher = image((values << 4).astype(kind), PixelPaddingValue=given, HighBit=15)
    found = read(higher, tmp_path)
    assert (found[:5] == 0).all()
    np.testing.assert_array_equal(found, read(usual, tmp_path))


def test_image_of_nothing_but_padding_is_black(tmp_path: Path) -> None:
    values = np.full((SIDE, SIDE), 9, np.uint16)
    for more in ({}, {"WindowCenter": 4, "WindowWidth": 5}):
        assert read(image(values, PixelPaddingValue=9, **more), tmp_path).max() == 0


# Tables of the modality, and gray levels


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_table_of_the_modality_comes_before_the_window(tmp_path: Path, bits: int) -> None:
    curve = np.round((np.arange(4096) / 4095) ** 2 * (2**bits - 1)).astype(np.uint16)
    dataset = image(ramp(), WindowCenter=2.0 ** (bits - 2) + 0.5, WindowWidth=2 ** (bits - 1) + 1)
    dataset.ModalityLUTSequence = [table(curve, bits)]
    assert_equal_gray(read(dataset, tmp_path), stretched(curve[ramp()], 0, 2 ** (bits - 1)))


@pytest.mark.parametrize("fields", [{}, {"WindowCenter": 128, "WindowWidth": 256}])
def test_8_bits_are_the_gray_levels_of_a_png(tmp_path: Path, fields: Any) -> None:
    values = pixels() // 2 + 40
    data = encoded(image(values, bits=8, BitsAllocated=8, PixelData=values.tobytes(), **fields))
    Image.fromarray(values).save(tmp_path / "a.png")
    for size in (SIDE, 16):
        found = read_gray(write(tmp_path, data, "a.dcm"), size)
        np.testing.assert_array_equal(found, read_gray(tmp_path / "a.png", size))


# Colours


def colour(values: np.ndarray, kind: str, **fields: Any) -> Dataset:
    given = {"PhotometricInterpretation": kind, "SamplesPerPixel": 3, "PlanarConfiguration": 0}
    given.update(BitsAllocated=8, PixelData=values.tobytes(), **fields)
    return image(values[..., 0], bits=8, **given)


def test_colours_are_converted_as_those_of_a_png(tmp_path: Path) -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    picture = Image.fromarray(rgb)
    picture.save(tmp_path / "a.png")
    expected = read_gray(tmp_path / "a.png", SIDE)
    np.testing.assert_array_equal(read(colour(rgb, "RGB"), tmp_path), expected)
    planes = np.ascontiguousarray(rgb.transpose(2, 0, 1))
    by_plane = colour(rgb, "RGB", PlanarConfiguration=1)
    by_plane.PixelData = planes.tobytes()
    np.testing.assert_array_equal(read(by_plane, tmp_path), expected)
    ybr = np.asarray(picture.convert("YCbCr"))
    found = read(colour(ybr, "YBR_FULL"), tmp_path)
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("bits", [8, 16])
def test_palette_is_applied(tmp_path: Path, bits: int) -> None:
    values = pixels(seed=1)
    entries = np.random.default_rng(0).integers(0, 256, (256, 3), dtype=np.uint8)
    dataset = image(values, bits=8, BitsAllocated=8, PixelData=values.tobytes())
    dataset.PhotometricInterpretation = "PALETTE COLOR"
    for channel, name in enumerate(("Red", "Green", "Blue")):
        levels = entries[:, channel].astype(f"<u{bits // 8}") << (bits - 8)
        dataset.add_new(f"{name}PaletteColorLookupTableDescriptor", "US", [256, 0, bits])
        dataset.add_new(f"{name}PaletteColorLookupTableData", "OW", levels.tobytes())
    Image.fromarray(entries[values]).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read(dataset, tmp_path), read_gray(tmp_path / "a.png", SIDE))
    assert "without a window" in shown(dataset, tmp_path, "LUNG")
