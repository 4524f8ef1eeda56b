"""Finding image files, and decoding them to uint8 gray.

`test_bad_images.py` tests the files that are refused.
"""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path
from typing import Callable, Dict, List

import kornia_rs
import numpy as np
import pytest
from image_files import (
    COLOUR,
    GRAY,
    PALETTE,
    PNG_SIGNATURE,
    SIDE,
    as_rows,
    encoded,
    exif,
    exif_chunk,
    in_colour,
    interlaced_png,
    pixels,
    png,
    png_chunk,
    png_of,
    raw_profile_chunk,
    smooth,
    turned,
    write,
    xmp_chunk,
)
from PIL import Image

from cxr_vit.data.images import find_images, gray_or_reason, read_gray
from cxr_vit.errors import DataError


def assert_read_as(expected: np.ndarray, data: bytes, folder: Path) -> None:
    """Assert that a file is read as these pixels, resized if they are no square of 24."""
    path = write(folder, data)
    read = read_gray(path, SIDE)
    assert read.dtype == np.uint8 and read.shape == (SIDE, SIDE)
    if expected.shape != (SIDE, SIDE):
        resized = Image.fromarray(np.ascontiguousarray(expected))
        expected = np.asarray(resized.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(read, expected)


def ramp(bits: int) -> np.ndarray:
    """All values of this many bits from black to white, in a 16-bit image."""
    return np.linspace(0, 2**bits - 1, SIDE * SIDE).astype(np.uint16).reshape(SIDE, SIDE)


def scaled(values: np.ndarray, bits: int) -> np.ndarray:
    return np.round(values * 255.0 / (2**bits - 1)).astype(np.uint8)


# Gray PNG


def test_gray_png_of_the_right_size_is_read_exactly(tmp_path: Path) -> None:
    assert_read_as(pixels(), png_of(pixels()), tmp_path)


def test_gray_or_reason_returns_the_same_pixels(tmp_path: Path) -> None:
    path = write(tmp_path, png_of(pixels()))
    np.testing.assert_array_equal(gray_or_reason(path, SIDE), read_gray(path, SIDE))


@pytest.mark.parametrize("size", [8, SIDE, 40])
def test_result_is_a_uint8_square_of_the_given_size(tmp_path: Path, size: int) -> None:
    read = read_gray(write(tmp_path, png_of(pixels((10, SIDE)))), size)
    assert read.dtype == np.uint8 and read.shape == (size, size)


@pytest.mark.parametrize("size", [8, SIDE])
def test_result_is_writable_and_contiguous(tmp_path: Path, size: int) -> None:
    read = read_gray(write(tmp_path, png_of(pixels())), size)
    assert read.flags.writeable and read.flags.c_contiguous


def test_path_may_be_a_string(tmp_path: Path) -> None:
    path = write(tmp_path, png_of(pixels()))
    np.testing.assert_array_equal(read_gray(str(path), SIDE), pixels())


@pytest.mark.parametrize("shape", [(1, 1), (1, 30), (30, 1), (17, 40), (40, 17)])
@pytest.mark.parametrize("make", [png_of, interlaced_png])
def test_images_of_any_shape_are_resized_to_the_square(
    tmp_path: Path, make: Callable[[np.ndarray], bytes], shape: tuple
) -> None:
    assert_read_as(pixels(shape), make(pixels(shape)), tmp_path)


def test_shrinking_is_antialiased(tmp_path: Path) -> None:
    board = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = read_gray(write(tmp_path, png_of(board)), 32)
    assert np.abs(small[1:-1, 1:-1].astype(int) - 127.5).max() <= 2
    assert np.abs(small.astype(int) - 127.5).max() <= 8


def test_shrinking_a_uniform_image_keeps_its_gray(tmp_path: Path) -> None:
    path = write(tmp_path, png_of(np.full((60, 100), 173, np.uint8)))
    assert np.unique(read_gray(path, 32)).tolist() == [173]


# The two decoders of PNG


def refuse(*_: object) -> None:
    raise ValueError("not this time")


@pytest.mark.parametrize("size", [1, 7, SIDE, 100])
@pytest.mark.parametrize("shape", [(SIDE, SIDE), (100, 100), (1, 9), (61, 33)])
@pytest.mark.parametrize("make", [png_of, interlaced_png])
def test_pillow_alone_decodes_the_same_pixels(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[np.ndarray], bytes],
    shape: tuple,
    size: int,
) -> None:
    path = write(tmp_path, make(pixels(shape)))
    fast = read_gray(path, size)
    monkeypatch.setattr(kornia_rs.io, "decode_image_png_u8", refuse)
    np.testing.assert_array_equal(fast, read_gray(path, size))


PLAIN_CHUNKS = {
    "none": b"",
    "as NIH's": png_chunk(b"tIME", struct.pack(">HBBBBB", 2017, 1, 16, 12, 0, 0)),
    "gamma": png_chunk(b"gAMA", struct.pack(">I", 22_000)),
    "colour profile": png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(b"of nothing" * 20)),
    "broken colour profile": png_chunk(b"iCCP", b"profile\0\0zzzz"),
    "resolution": png_chunk(b"pHYs", struct.pack(">IIB", 100, 300, 1)),
    "unknown": png_chunk(b"abCd", b"whatever"),
    "text": png_chunk(b"tEXt", b"Comment\0a image"),
    "5 MB of text": png_chunk(b"tEXt", b"Comment\0" + b"a" * 5_000_000),
    "broken text": png_chunk(b"zTXt", b"Comment\0\0zzzz"),
    "animation without frames": png_chunk(b"acTL", struct.pack(">II", 0, 0)),
}


@pytest.mark.parametrize("name", sorted(PLAIN_CHUNKS))
@pytest.mark.parametrize("place", ["before", "after"])
def test_other_chunks_do_not_change_the_pixels(tmp_path: Path, place: str, name: str) -> None:
    assert_read_as(pixels(), png_of(pixels(), **{place: PLAIN_CHUNKS[name]}), tmp_path)


def test_images_of_nih_use_the_fast_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: List[object] = []
    decode = kornia_rs.io.decode_image_png_u8
    monkeypatch.setattr(
        kornia_rs.io, "decode_image_png_u8", lambda *given: (calls.append(1), decode(*given))[1]
    )
    read_gray(write(tmp_path, png_of(pixels(), before=PLAIN_CHUNKS["as NIH's"])), SIDE)
    assert len(calls) == 1


@pytest.mark.parametrize("pieces", [2, 7, 50])
def test_pixels_may_be_in_several_chunks(tmp_path: Path, pieces: int) -> None:
    packed = zlib.compress(as_rows(pixels()))
    cuts = np.linspace(0, len(packed), pieces + 1).astype(int)
    parts = [png_chunk(b"IDAT", packed[start:end]) for start, end in zip(cuts, cuts[1:])]
    whole = png_chunk(b"IDAT", packed)
    data = png_of(pixels()).replace(whole, b"".join([*parts, png_chunk(b"IDAT", b"")]))
    assert_read_as(pixels(), data, tmp_path)


def test_bytes_after_the_end_are_ignored(tmp_path: Path) -> None:
    assert_read_as(pixels(), png_of(pixels()) + b"\0" * 100, tmp_path)


# Colour, palettes, transparency, few bits


@pytest.mark.parametrize("make", [png_of, interlaced_png])
def test_rgb_of_equal_colours_is_its_red_channel(
    tmp_path: Path, make: Callable[[np.ndarray], bytes]
) -> None:
    assert_read_as(pixels(), make(in_colour(pixels())), tmp_path)


def test_rgb_of_unequal_colours_is_its_luma(tmp_path: Path) -> None:
    red = np.zeros((SIDE, SIDE, 3), np.uint8)
    red[..., 0] = 255
    assert_read_as(np.full((SIDE, SIDE), 76, np.uint8), png_of(red), tmp_path)


def test_rgba_with_an_opaque_alpha_is_its_red_channel(tmp_path: Path) -> None:
    assert_read_as(pixels(), png_of(in_colour(pixels(), alpha=255)), tmp_path)


def test_gray_with_an_opaque_alpha_is_its_gray_channel(tmp_path: Path) -> None:
    opaque = np.dstack([pixels(), np.full_like(pixels(), 255)])
    assert_read_as(pixels(), png_of(opaque), tmp_path)


def test_palette_of_shuffled_grays_is_applied(tmp_path: Path) -> None:
    grays = np.random.default_rng(1).permutation(256).astype(np.uint8)
    table = png_chunk(b"PLTE", in_colour(grays[None]).tobytes())
    data = png((SIDE, SIDE), 8, PALETTE, as_rows(pixels()), before=table)
    assert_read_as(grays[pixels()], data, tmp_path)


def test_palette_with_an_opaque_transparency_table_is_applied(tmp_path: Path) -> None:
    table = png_chunk(b"PLTE", bytes([200] * 3 + [10] * 3 + [90] * 3))
    table += png_chunk(b"tRNS", b"\xff\xff\xff")
    data = png((SIDE, SIDE), 8, PALETTE, as_rows(pixels() % 3), before=table)
    assert_read_as(np.array([200, 10, 90], np.uint8)[pixels() % 3], data, tmp_path)


def test_transparent_gray_that_no_pixel_has_is_ignored(tmp_path: Path) -> None:
    data = png_of(pixels(), before=png_chunk(b"tRNS", b"\0\0"))
    assert_read_as(pixels(), data, tmp_path)


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("colour", [GRAY, PALETTE])
def test_fewer_than_8_bits_are_scaled_from_black_to_white(
    tmp_path: Path, bits: int, colour: int
) -> None:
    levels = 2**bits
    grays = (np.arange(levels) * 255 // (levels - 1)).astype(np.uint8)
    values = pixels() % levels
    as_bits = np.unpackbits(values[..., None], axis=2)[..., -bits:]
    rows = as_rows(np.packbits(as_bits.reshape(SIDE, -1), axis=1))
    table = png_chunk(b"PLTE", in_colour(grays[None]).tobytes()) if colour == PALETTE else b""
    assert_read_as(grays[values], png((SIDE, SIDE), bits, colour, rows, before=table), tmp_path)


# 16 bits


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("make", [png_of, interlaced_png])
def test_sixteen_bit_gray_is_scaled_by_the_depth_in_use(
    tmp_path: Path, make: Callable[[np.ndarray], bytes], bits: int
) -> None:
    assert_read_as(scaled(ramp(bits), bits), make(ramp(bits)), tmp_path)
    read = read_gray(tmp_path / "image.png", SIDE).ravel().astype(int)
    assert read[0] == 0 and read[-1] == 255  # neither clipped nor dark
    assert (np.diff(read) >= 0).all() and len(np.unique(read)) == 256


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("make", [png_of, interlaced_png])
def test_sixteen_bit_colour_keeps_its_low_bytes(
    tmp_path: Path, make: Callable[[np.ndarray], bytes], bits: int
) -> None:
    assert_read_as(scaled(ramp(bits), bits), make(in_colour(ramp(bits))), tmp_path)


def test_sixteen_bit_gray_as_pillow_writes_it_is_scaled(tmp_path: Path) -> None:
    image = Image.fromarray(smooth().astype(np.uint16) * 257)
    assert_read_as(smooth(), encoded(image, "PNG"), tmp_path)


@pytest.mark.parametrize("make", [np.array, in_colour])
def test_black_sixteen_bit_image_stays_black(
    tmp_path: Path, make: Callable[[np.ndarray], np.ndarray]
) -> None:
    black = np.zeros((SIDE, SIDE), np.uint8)
    assert_read_as(black, png_of(make(black.astype(np.uint16))), tmp_path)


# Orientation

ORIENTED = {"exif": exif_chunk, "raw profile": raw_profile_chunk, "xmp": xmp_chunk}
VALUES: Dict[str, Callable[[], np.ndarray]] = {
    "gray": pixels,
    "colour": lambda: in_colour(pixels()),
    "opaque": lambda: in_colour(pixels(), alpha=255),
    "16-bit gray": lambda: pixels().astype(np.uint16) * 257,
    "16-bit colour": lambda: in_colour(pixels().astype(np.uint16) * 257),
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("written", sorted(ORIENTED))
@pytest.mark.parametrize("kind", sorted(VALUES))
def test_orientation_in_a_png_is_applied(
    tmp_path: Path, kind: str, written: str, place: str
) -> None:
    data = png_of(VALUES[kind](), **{place: ORIENTED[written](6)})
    assert_read_as(turned(pixels(), 6), data, tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("shape", [(SIDE, SIDE), (10, 31)])
def test_all_eight_orientations_are_applied(tmp_path: Path, shape: tuple, orientation: int) -> None:
    data = png_of(pixels(shape), before=exif_chunk(orientation))
    assert_read_as(turned(pixels(shape), orientation), data, tmp_path)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_in_a_jpeg_is_applied(tmp_path: Path, orientation: int) -> None:
    image = Image.fromarray(smooth())
    upright = read_gray(write(tmp_path, encoded(image, "JPEG")), SIDE)
    data = encoded(image, "JPEG", exif=exif(orientation))
    assert_read_as(turned(upright, orientation), data, tmp_path)


@pytest.mark.parametrize("orientation", [0, 9, 77])
def test_undefined_orientation_is_ignored(tmp_path: Path, orientation: int) -> None:
    assert_read_as(pixels(), png_of(pixels(), before=exif_chunk(orientation)), tmp_path)


# JPEG


@pytest.mark.parametrize("name", ["image.jpg", "image.jpeg", "image.png"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_is_read_whatever_its_suffix(
    tmp_path: Path, name: str, mode: str, progressive: bool
) -> None:
    image = Image.fromarray(smooth()).convert(mode)
    path = write(tmp_path, encoded(image, "JPEG", progressive=progressive), name)
    assert np.abs(read_gray(path, SIDE).astype(int) - smooth()).max() < 16


def test_png_is_read_under_a_jpeg_name(tmp_path: Path) -> None:
    path = write(tmp_path, png_of(pixels()), "image.jpg")
    np.testing.assert_array_equal(read_gray(path, SIDE), pixels())


def test_helpers_write_what_pillow_reads(tmp_path: Path) -> None:
    for values in (pixels(), in_colour(pixels()), in_colour(pixels(), alpha=7)):
        with Image.open(write(tmp_path, png_of(values))) as image:
            np.testing.assert_array_equal(np.asarray(image), values)
    assert png_of(pixels()).startswith(PNG_SIGNATURE) and in_colour(pixels()).shape[2] == COLOUR + 1


# find_images


def test_images_are_found_in_every_known_layout(tmp_path: Path) -> None:
    places = {
        "a.png": "images",
        "b.png": "images_001/images",
        "c.png": "images_012/images",
        "d.png": "images-224/images-224",
        "e.png": "deep/er/and/deeper",
        "f.png": ".",
    }
    for name, folder in places.items():
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / name).touch()
    found = find_images(tmp_path)
    assert {name: Path(path).resolve() for name, path in found.items()} == {
        name: (tmp_path / folder / name).resolve() for name, folder in places.items()
    }


def test_only_png_and_jpeg_names_are_found(tmp_path: Path) -> None:
    for name in ("a.png", "b.PNG", "c.jpg", "d.jpeg", "e.gif", "labels.csv", "list.txt", "png"):
        (tmp_path / name).touch()
    assert sorted(find_images(tmp_path)) == ["a.png", "b.PNG", "c.jpg", "d.jpeg"]


def test_linked_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").touch()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "images").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert list(find_images(tmp_path / "root")) == ["a.png"]


def test_name_in_two_folders_is_refused_and_both_are_named(tmp_path: Path) -> None:
    for folder in ("images", "images_224"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").touch()
    with pytest.raises(DataError, match=r"1 images are under .* twice.*data\.images") as caught:
        find_images(tmp_path)
    assert str(tmp_path / "images" / "a.png") in str(caught.value)
    assert str(tmp_path / "images_224" / "a.png") in str(caught.value)


def test_circular_links_and_links_to_the_same_folder_are_walked_once(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").touch()
    (tmp_path / "images" / "up").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "images")
    assert list(find_images(tmp_path)) == ["a.png"]


def test_folder_without_images_is_empty(tmp_path: Path) -> None:
    assert find_images(tmp_path) == {}


# DICOM (more in test_dicom.py)


def test_dicom_without_pydicom_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pydicom", None)
    path = write(tmp_path, b"\0" * 128 + b"DICM" + b"\0" * 500, "image.dcm")
    with pytest.raises(DataError, match=r'needs pydicom.*pip install "cxr-vit\[dicom\]"'):
        read_gray(path, SIDE)
