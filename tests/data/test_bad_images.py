"""Files that are refused, with the path and a readable reason."""

from __future__ import annotations

import io
import os
import re
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Tuple, Union

import kornia_rs
import numpy as np
import pytest
from image_files import (
    COLOUR,
    GRAY,
    PALETTE,
    PNG_END,
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
    smooth,
    write,
)
from PIL import Image, ImageFile

from cxr_vit.data import codestreams
from cxr_vit.data.images import gray_or_reason, read_gray
from cxr_vit.errors import DataError


@pytest.fixture(autouse=True)
def _truncated_images_are_not_filled_with_gray() -> Iterator[None]:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False
    yield
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def outcome(path: Path, **options: int) -> Union[np.ndarray, str]:
    """Pixels or the reason, the same from both functions and without a warning."""
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        found = gray_or_reason(path, SIDE, **options)
        if isinstance(found, str):
            with pytest.raises(DataError) as caught:
                read_gray(path, SIDE, **options)
            assert str(caught.value) == f"{path}: {found}"
    assert [str(warning.message) for warning in leaked] == []
    return found


def assert_refused(path: Path, *reasons: str, **options: int) -> None:
    found = outcome(path, **options)
    assert isinstance(found, str), "it was read"
    assert all(reason in found for reason in reasons), found
    assert len(found) < 160 and found.isprintable() and "<_io" not in found and "0x" not in found


def assert_refused_or_equal(expected: np.ndarray, data: bytes, folder: Path) -> None:
    found = outcome(write(folder, data))
    if not isinstance(found, str):
        np.testing.assert_array_equal(found, expected)


# Not an image


def test_missing_file_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "absent.png", "not there")


def test_broken_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image.png").symlink_to(tmp_path / "absent.png")
    assert_refused(tmp_path / "image.png", "not there")


def test_link_to_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image.png").symlink_to(tmp_path / "image.png")
    assert_refused(tmp_path / "image.png", "cannot be read", "symbolic links")


def test_folder_in_place_of_an_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "image.png").mkdir()
    assert_refused(tmp_path / "image.png", "cannot be read", "Is a directory")


def test_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, png_of(pixels()))
    assert_refused(path / "image.png", "cannot be read", "Not a directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_file_without_permission_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, png_of(pixels()))
    path.chmod(0)
    assert_refused(path, "cannot be read", "Permission denied")


@pytest.mark.parametrize("linked", [False, True])
def test_named_pipe_does_not_block(tmp_path: Path, linked: bool) -> None:
    path = tmp_path / "image.png"
    os.mkfifo(tmp_path / "pipe" if linked else path)
    if linked:
        path.symlink_to(tmp_path / "pipe")
    assert_refused(path, "a named pipe, not a regular file", "Replace it")


def test_link_to_a_device_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "image.png").symlink_to("/dev/zero")
    assert_refused(tmp_path / "image.png", "a device, not a regular file", "Replace it")


def test_file_of_more_bytes_than_its_pixels_need_is_not_read(tmp_path: Path) -> None:
    path = write(tmp_path, png_of(pixels()))
    os.truncate(path, 10**12)
    assert_refused(path, "1,000,000,000,000 bytes", "data.max_megapixels")
    os.truncate(path, 8_000_001)
    assert_refused(path, "more than the limit of 8,000,000", max_megapixels=1)
    os.truncate(path, 8_000_000)
    assert not isinstance(outcome(path, max_megapixels=1), str)


PAGE = b"<html><body>404 Not Found</body></html>"
GIT_LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 412345\n"
)
OTHER_CONTENT: Dict[str, Tuple[bytes, str]] = {
    "empty": (b"", "empty"),
    "git lfs": (GIT_LFS, "git lfs pull"),
    "page": (PAGE, "HTML"),
    "page with a type": (b"<!DOCTYPE html>" + PAGE, "HTML"),
    "page in upper case": (PAGE.upper(), "HTML"),
    "page after lines": (b"\r\n\t \n" + PAGE, "HTML"),
    "page after many lines": (b"\n" * 200 + PAGE, "HTML"),
    "page after a byte order mark": (b"\xef\xbb\xbf" + PAGE, "HTML"),
    "page after a mark and lines": (b"\xef\xbb\xbf\r\n" + b"<!doctype HTML>" + PAGE, "HTML"),
    "page after a comment": (b"<!-- saved -->" + PAGE, "HTML"),
    "an object store's denial": (b'<?xml version="1.0"?><Error>AccessDenied</Error>', "ML"),
    "text": (b"the image is in the other folder\n", "no PNG, JPEG or DICOM file"),
    "csv": (b"Image Index,Finding Labels\n00000001_000.png,Hernia\n", "no PNG, JPEG or DICOM file"),
    "zeros": (b"\0" * 5000, "no PNG, JPEG or DICOM file"),
    "one byte": (b"\x89", "no PNG, JPEG or DICOM file"),
    "webp": (b"RIFF\x24\0\0\0WEBPVP8 \x18\0\0\0" + b"\0" * 24, "no PNG, JPEG or DICOM file"),
    **{
        kind: (encoded(Image.fromarray(pixels()), kind), "no PNG, JPEG or DICOM file")
        for kind in ("GIF", "BMP", "TIFF", "PPM", "TGA")
    },
}


@pytest.mark.parametrize("name", ["image.png", "image.jpg"])
@pytest.mark.parametrize("content", sorted(OTHER_CONTENT))
def test_other_content_under_the_name_of_an_image_is_refused(
    tmp_path: Path, content: str, name: str
) -> None:
    data, reason = OTHER_CONTENT[content]
    assert_refused(write(tmp_path, data, name), reason)


# Damaged in transfer

FORMS: Dict[str, Callable[[], bytes]] = {
    "gray": lambda: png_of(smooth()),
    "gray in pieces": lambda: encoded(Image.fromarray(np.tile(pixels(), (60, 60))), "PNG"),
    "interlaced": lambda: interlaced_png(smooth()),
    "colour": lambda: png_of(in_colour(smooth())),
    "opaque": lambda: png_of(in_colour(smooth(), alpha=255)),
    "16-bit gray": lambda: png_of(smooth().astype(np.uint16) * 257),
    "16-bit colour": lambda: png_of(in_colour(smooth().astype(np.uint16) * 257)),
    "black and white": lambda: encoded(Image.fromarray(smooth() > 120), "PNG"),
    "palette": lambda: encoded(Image.fromarray(in_colour(smooth())).quantize(200), "PNG"),
    "turned": lambda: png_of(smooth(), before=exif_chunk(6)),
    "turned, at the end": lambda: png_of(in_colour(smooth()), after=exif_chunk(6)),
    "turned, gray, at the end": lambda: png_of(smooth(), after=exif_chunk(6)),
}


@pytest.fixture(params=sorted(FORMS))
def undamaged(request: pytest.FixtureRequest, tmp_path: Path) -> Tuple[bytes, np.ndarray]:
    """The bytes and pixels of an undamaged image."""
    data = FORMS[request.param]()
    return data, read_gray(write(tmp_path, data), SIDE)


def flipped(data: bytes, position: int, bit: int) -> bytes:
    return data[:position] + bytes([data[position] ^ 1 << bit]) + data[position + 1 :]


def test_flipped_bit_never_changes_a_png(
    tmp_path: Path, undamaged: Tuple[bytes, np.ndarray]
) -> None:
    data, expected = undamaged
    generator = np.random.default_rng(3)
    anywhere = generator.integers(0, len(data), 60)
    near_the_end = generator.integers(len(data) - 100, len(data), 60)
    for position in [*anywhere, *near_the_end]:
        assert_refused_or_equal(expected, flipped(data, position, generator.integers(8)), tmp_path)


def test_overwritten_bytes_never_change_a_png(
    tmp_path: Path, undamaged: Tuple[bytes, np.ndarray]
) -> None:
    data, expected = undamaged
    generator = np.random.default_rng(4)
    for position in generator.integers(0, len(data) - 8, 40):
        damaged = data[:position] + generator.bytes(8) + data[position + 8 :]
        assert_refused_or_equal(expected, damaged, tmp_path)


def test_lost_bytes_never_change_a_png(tmp_path: Path, undamaged: Tuple[bytes, np.ndarray]) -> None:
    data, expected = undamaged
    for position in np.random.default_rng(5).integers(0, len(data) - 8, 40):
        assert_refused_or_equal(expected, data[:position] + data[position + 3 :], tmp_path)


def test_truncated_png_is_refused(tmp_path: Path, undamaged: Tuple[bytes, np.ndarray]) -> None:
    data, _ = undamaged
    lengths = {*np.linspace(9, len(data) - 1, 50).astype(int), 8, 20, 33, len(data) - 13}
    for length in lengths:
        assert_refused(write(tmp_path, data[:length]), "damaged image")


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_jpeg_is_refused(tmp_path: Path, mode: str, progressive: bool) -> None:
    image = Image.fromarray(smooth(200)).convert(mode)
    data = encoded(image, "JPEG", progressive=progressive)
    lengths = {*np.linspace(4, len(data) - 3, 60).astype(int), 3, 11, 20}
    for length in lengths:
        assert_refused(write(tmp_path, data[:length]), "damaged image")


def test_lost_end_marker_of_a_jpeg_changes_no_pixels(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(smooth()), "JPEG")
    expected = read_gray(write(tmp_path, data), SIDE)
    for length in (len(data) - 2, len(data) - 1):
        assert_refused_or_equal(expected, data[:length], tmp_path)


def test_damaged_jpeg_is_read_or_refused(tmp_path: Path) -> None:
    """A JPEG has no checksums: damage may change pixels, but raises no other error."""
    data = encoded(Image.fromarray(smooth(64)), "JPEG", exif=Image.Exif())
    generator = np.random.default_rng(6)
    for position in generator.integers(0, len(data), 300):
        found = outcome(write(tmp_path, flipped(data, position, generator.integers(8))))
        assert isinstance(found, str) or found.shape == (SIDE, SIDE)


@pytest.mark.parametrize("position", range(8, 33))
def test_damaged_header_is_reported_as_damage(tmp_path: Path, position: int) -> None:
    assert_refused(write(tmp_path, flipped(png_of(smooth()), position, 0)), "damaged image")


# Malformed, with correct checksums


def image(values: np.ndarray, stream: bytes) -> bytes:
    colour = COLOUR if values.ndim == 3 else GRAY
    return png((SIDE, SIDE), 8 * values.dtype.itemsize, colour, b"", packed=stream)


KINDS: Dict[str, np.ndarray] = {
    "gray": pixels(),
    "colour": in_colour(pixels()),
    "16-bit gray": pixels().astype(np.uint16) * 257,
    "16-bit colour": in_colour(pixels().astype(np.uint16) * 257),
}


@pytest.mark.parametrize("kept_rows", [0, 1, 12, 23, 0.5, 11.3, 23.9])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_missing_rows_are_never_black(tmp_path: Path, kind: str, kept_rows: float) -> None:
    rows = as_rows(KINDS[kind])
    short = zlib.compress(rows[: int(len(rows) // SIDE * kept_rows)])
    assert_refused(write(tmp_path, image(KINDS[kind], short)), "damaged image")


@pytest.mark.parametrize("keep", [0.0, 0.01, 0.5, 0.9])
@pytest.mark.parametrize("kind", sorted(KINDS))
def test_truncated_pixel_data_is_refused(tmp_path: Path, kind: str, keep: float) -> None:
    stream = zlib.compress(as_rows(KINDS[kind]))
    cut = image(KINDS[kind], stream[: int(len(stream) * keep)])
    assert_refused(write(tmp_path, cut), "damaged image")


@pytest.mark.parametrize("make", [png_of, interlaced_png])
def test_missing_rows_are_detected_without_the_fast_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[np.ndarray], bytes]
) -> None:
    monkeypatch.delattr(kornia_rs.io, "decode_image_png_u8")
    data = make(pixels())
    stream = zlib.decompress(data[41:-16])
    cut = data[:33] + png_chunk(b"IDAT", zlib.compress(stream[: 12 * (SIDE + 1)])) + PNG_END
    assert_refused(write(tmp_path, cut), "damaged image")


def header(**changes: int) -> bytes:
    fields = {"width": SIDE, "height": SIDE, "bits": 8, "colour": 0, "packing": 0, "filter": 0}
    fields = {**fields, "interlace": 0, **changes}
    return png_chunk(b"IHDR", struct.pack(">IIBBBBB", *fields.values()))


def with_header(**changes: int) -> bytes:
    return PNG_SIGNATURE + header(**changes) + png_of(pixels())[33:]


IMPOSSIBLE: Dict[str, Callable[[], bytes]] = {
    "no width": lambda: with_header(width=0),
    "no height": lambda: with_header(height=0),
    "more rows than the file has": lambda: with_header(height=SIDE + 1),
    "seven bits": lambda: with_header(bits=7),
    "a fifth kind of colour": lambda: with_header(colour=5),
    "interlaced in the header only": lambda: with_header(interlace=1),
    "interlaced in another way": lambda: with_header(interlace=2),
    "a palette that is missing": lambda: with_header(colour=PALETTE),
    "a palette too short": lambda: png(
        (SIDE, SIDE), 8, PALETTE, as_rows(pixels()), before=png_chunk(b"PLTE", b"\7" * 30)
    ),
    "no pixels": lambda: PNG_SIGNATURE + header() + PNG_END,
    "no header": lambda: PNG_SIGNATURE + png_of(pixels())[33:],
    "an end only": lambda: PNG_SIGNATURE + PNG_END,
    "an unknown row filter": lambda: image(pixels(), zlib.compress(b"\x09" * SIDE * (SIDE + 1))),
    "10 MB of text in 10 kB": lambda: png_of(
        pixels(), before=png_chunk(b"zTXt", b"a\0\0" + zlib.compress(b"a" * 10_000_000))
    ),
}


@pytest.mark.parametrize("what", sorted(IMPOSSIBLE))
def test_malformed_png_is_refused(tmp_path: Path, what: str) -> None:
    assert_refused(write(tmp_path, IMPOSSIBLE[what]()), "damaged image")


@pytest.mark.parametrize("make", [np.array, in_colour])
@pytest.mark.parametrize("tags", [b"", b"junk", b"MM\0*\0\0\0\x08\0\x01\x01\x12"])
def test_broken_exif_warns_of_nothing_and_changes_no_pixels(
    tmp_path: Path, make: Callable[[np.ndarray], np.ndarray], tags: bytes
) -> None:
    data = png_of(make(pixels()), before=png_chunk(b"eXIf", tags))
    assert_refused_or_equal(pixels(), data, tmp_path)


# Undamaged but unusable


def bomb(side: int) -> bytes:
    compressor = zlib.compressobj(9)
    row = bytes(side // 8 + 1)
    rows = b"".join(compressor.compress(row) for _ in range(side)) + compressor.flush()
    return png((side, side), 1, GRAY, b"", packed=rows)


@pytest.mark.parametrize("side", [10_000, 14_000])
def test_decompression_bomb_is_refused_before_it_is_decoded(tmp_path: Path, side: int) -> None:
    path = write(tmp_path, bomb(side))
    assert path.stat().st_size < 25_000
    assert_refused(path, "pixels", "data.max_megapixels=64")


@pytest.mark.parametrize(("width", "height"), [(1, 2**31 - 1), (2**31 - 1, 2**31 - 1)])
def test_png_header_with_too_many_pixels_is_refused(
    tmp_path: Path, width: int, height: int
) -> None:
    data = with_header(width=width, height=height)
    assert_refused(write(tmp_path, data), "data.max_megapixels=64")


@pytest.mark.parametrize("side", [9_000, 30_000])
def test_jpeg_header_with_too_many_pixels_is_refused(tmp_path: Path, side: int) -> None:
    sizes = struct.pack(">HH", SIDE, SIDE), struct.pack(">HH", side, side)
    data = encoded(Image.fromarray(smooth()), "JPEG").replace(*sizes)
    assert_refused(write(tmp_path, data), "data.max_megapixels=64")


@pytest.mark.parametrize("sides", [(1, 32_769), (32_769, 1)])
def test_long_side_is_refused_however_short_the_other_is(
    tmp_path: Path, sides: Tuple[int, int]
) -> None:
    jpeg = encoded(Image.fromarray(smooth()), "JPEG")
    size = struct.pack(">HH", SIDE, SIDE), struct.pack(">HH", *sides)
    for data in (png_of(np.full(sides, 7, np.uint8)), jpeg.replace(*size)):
        assert_refused(write(tmp_path, data), "a side exceeds 32768", "Scale it down")


def test_longest_side_is_read(tmp_path: Path) -> None:
    for data in (png_of(np.full((1, 32_768), 7, np.uint8)), png_of(np.full((32_768, 1), 7, "u2"))):
        assert not isinstance(outcome(write(tmp_path, data)), str)


def segments(data: bytes) -> List[bytes]:
    """The parts of a JPEG, each beginning with a marker."""
    starts = [match.start() for match in re.finditer(rb"\xff[\xc0-\xcf\xd8-\xfe]", data)]
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)])]


def test_jpeg_of_many_scans_is_refused(tmp_path: Path) -> None:
    """Each scan takes as long as the image."""
    data = encoded(Image.fromarray(smooth()), "JPEG", progressive=True)
    parts = segments(data)
    scans = [index for index, part in enumerate(parts) if part[1] == 0xDA]
    assert 3 < len(scans) < 20 and not isinstance(outcome(write(tmp_path, data)), str)
    last = scans[-1]
    for copies in (50 - len(scans), 51 - len(scans)):
        more = b"".join(parts[: last + 1] + [parts[last]] * copies + parts[last + 1 :])
        found = outcome(write(tmp_path, more))
        refused = "a JPEG of more than 50 scans. Export the image as a plain PNG."
        assert found == refused if copies + len(scans) > 50 else not isinstance(found, str)


def jpeg_segment(marker: int, data: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data


OVERLOADED: Dict[str, Callable[[], bytes]] = {
    "empty comments": lambda: jpeg_segment(0xFE, b"") * 20_000,
    "large segments": lambda: jpeg_segment(0xE5, b"\0" * 65_000) * 260,
    "EXIF in pieces": lambda: jpeg_segment(0xE1, b"Exif\0\0" + b"\0" * 60_000) * 2,
    "padding": lambda: b"\xff" * 20_000,
    "restart markers": lambda: b"\xff\xd0" * 20_000,
}


@pytest.mark.parametrize("what", sorted(OVERLOADED))
def test_jpeg_with_too_much_beside_the_image_is_refused(tmp_path: Path, what: str) -> None:
    data = encoded(Image.fromarray(smooth()), "JPEG")
    path = write(tmp_path, data[:2] + OVERLOADED[what]() + data[2:])
    assert_refused(path, "a JPEG with too much beside the image", "Export")


def test_jpeg_with_a_preview_and_a_profile_is_read(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(smooth()), "JPEG")
    expected = outcome(write(tmp_path, data))
    preview = jpeg_segment(0xE1, exif(1).tobytes() + data)
    profile = jpeg_segment(0xE2, b"ICC_PROFILE\0\1\1" + b"\xff\xda" * 30_000)
    found = outcome(write(tmp_path, data[:2] + preview + profile + data[2:] + data * 60))
    np.testing.assert_array_equal(found, expected)


#: A directory of EXIF whose entries all hold the rest of the file.
OVERLAPPING = b"MM\0*\0\0\0\x08" + struct.pack(">H", 5000) + 5000 * struct.pack(
    ">HHII", 0x9286, 7, 60_000, 10
)  # fmt: skip

OVERLOADED_PNG: Dict[str, Callable[[], bytes]] = {
    "empty chunks": lambda: png_chunk(b"prVt", b"") * 2_001,
    "a large private chunk": lambda: png_chunk(b"prVt", b"\0" * 16_000_001),
    "EXIF": lambda: png_chunk(b"eXIf", OVERLAPPING + b"\0" * 6_000),
    "EXIF as text": lambda: png_chunk(
        b"tEXt",
        b"Raw profile type exif\0\nexif\n1\n" + (OVERLAPPING + b"\0" * 6_000).hex().encode(),
    ),
}


@pytest.mark.parametrize("what", sorted(OVERLOADED_PNG))
def test_png_with_too_much_beside_the_image_is_refused(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codestreams, "_MAX_CHUNKS", 2_000)
    data = png_of(in_colour(pixels()), before=OVERLOADED_PNG[what]())
    assert_refused(write(tmp_path, data), "too much", "Export the image as a plain PNG")


def test_rows_are_counted_across_pieces_of_any_length(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(1, 256, (500, 700, 3), dtype=np.uint8)
    packed = zlib.compress(as_rows(values), 1)
    for length in (1, 2**16 - 1, 2**16, 2**20):
        pieces = [packed[start : start + length] for start in range(0, 100 * length, length)]
        rest = packed[100 * length :]
        idats = b"".join(png_chunk(b"IDAT", piece) for piece in [*pieces, b"", rest])
        size = struct.pack(">IIBBBBB", 700, 500, 8, COLOUR, 0, 0, 0)
        data = PNG_SIGNATURE + png_chunk(b"IHDR", size) + idats + PNG_END
        assert not isinstance(outcome(write(tmp_path, data)), str)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="no /proc")
def test_conversion_takes_little_more_memory_than_the_decoded_image(tmp_path: Path) -> None:
    side = 2000
    deep = np.tile(np.arange(side, dtype=np.uint16), (side, 1))
    colour_16 = write(tmp_path, png_of(in_colour(deep)), "colour.png")
    gray_16 = write(tmp_path, png_of(deep), "gray.png")
    small = write(tmp_path, png_of(in_colour(pixels().astype(np.uint16))), "small.png")
    code = """
import re, sys
from pathlib import Path
from cxr_vit.data.images import read_gray
for path in sys.argv[1:]:
    read_gray(path, 8)
    print(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
"""
    command = [sys.executable, "-c", code, str(small), str(gray_16), str(colour_16)]
    before, *peaks_kb = map(int, subprocess.check_output(command, encoding="utf-8").split())
    bytes_per_pixel = [1024 * (peak - before) / side**2 for peak in peaks_kb]
    # Pillow's copies have 2 (older ones 4) and 4 bytes; the low bytes of colour have 3 more.
    assert bytes_per_pixel[0] < 9
    assert bytes_per_pixel[1] < 16


def test_limit_on_pixels_is_configurable(tmp_path: Path) -> None:
    at_limit = write(tmp_path, png_of(np.full((1000, 1000), 90, np.uint8)), "at.png")
    above = write(tmp_path, png_of(np.full((1000, 1001), 90, np.uint8)), "above.png")
    assert not isinstance(outcome(at_limit, max_megapixels=1), str)
    assert_refused(above, "1001 x 1000 pixels", "data.max_megapixels=1", max_megapixels=1)
    assert not isinstance(outcome(above, max_megapixels=2), str)


def transparent(alpha: int, corner: int) -> np.ndarray:
    """Gray in three channels with a uniform alpha, except in one pixel."""
    values = in_colour(pixels(), alpha=alpha)
    values[-1, -1, 3] = corner
    return values


@pytest.mark.parametrize(("alpha", "corner"), [(255, 254), (255, 0), (0, 0), (128, 255)])
def test_partly_transparent_image_is_refused(tmp_path: Path, alpha: int, corner: int) -> None:
    values = transparent(alpha, corner)
    for data in (png_of(values), png_of(np.ascontiguousarray(values[..., 2:]))):
        assert_refused(write(tmp_path, data), "transparent", "Export")


def indexed(table: bytes) -> bytes:
    colours = png_chunk(b"PLTE", bytes(range(9))) + png_chunk(b"tRNS", table)
    return png((SIDE, SIDE), 8, PALETTE, as_rows(pixels() % 3), before=colours)


def few_bits(bits: int, level: int) -> bytes:
    """All levels in each row, one of which is transparent."""
    rows = as_rows(np.tile(np.array([0x1B, 0xF0] * (bits * SIDE // 16), np.uint8), (SIDE, 1)))
    colour = png_chunk(b"tRNS", struct.pack(">H", level))
    return png((SIDE, SIDE), bits, GRAY, rows, before=colour)


def level_of(values: np.ndarray, place: str = "before") -> bytes:
    """A PNG in which the first pixel's colour is transparent."""
    first = np.atleast_1d(values[0, 0]).astype(">u2").tobytes()
    return png_of(values, **{place: png_chunk(b"tRNS", first)})


TRANSPARENT: Dict[str, Callable[[], bytes]] = {
    "gray": lambda: level_of(pixels()),
    "colour": lambda: level_of(in_colour(pixels())),
    "16-bit gray": lambda: level_of(pixels().astype(np.uint16) * 255),
    "16-bit colour": lambda: level_of(in_colour(pixels().astype(np.uint16) * 255)),
    "palette": lambda: indexed(b"\xff\x80"),
    "palette's last": lambda: indexed(b"\xff\xff\x00"),
    "2 bits, black": lambda: few_bits(2, 0),
    "2 bits, white": lambda: few_bits(2, 3),
    "4 bits, black": lambda: few_bits(4, 0),
    "4 bits, white": lambda: few_bits(4, 15),
}


@pytest.mark.parametrize("kind", sorted(TRANSPARENT))
def test_transparent_level_is_refused(tmp_path: Path, kind: str) -> None:
    assert_refused(write(tmp_path, TRANSPARENT[kind]()), "transparent", "Export")


@pytest.mark.parametrize("channels", [slice(2, 4), slice(0, 4)])
@pytest.mark.parametrize("alpha", [0, 40_000, 65_535])
def test_sixteen_bit_image_with_an_alpha_channel_is_refused(
    tmp_path: Path, channels: slice, alpha: int
) -> None:
    values = in_colour(pixels().astype(np.uint16) * 257, alpha=alpha)[..., channels]
    path = write(tmp_path, png_of(np.ascontiguousarray(values)))
    assert_refused(path, "Export")


def test_animated_png_is_refused(tmp_path: Path) -> None:
    frames = [Image.fromarray(pixels(seed=seed)) for seed in (0, 1, 2)]
    data = encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])
    assert_refused(write(tmp_path, data), "several pictures", "Export")


def test_jpeg_of_several_pictures_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    frames = [Image.fromarray(pixels(seed=seed)) for seed in (0, 1)]
    frames[0].save(buffer, "MPO", save_all=True, append_images=frames[1:])
    assert_refused(write(tmp_path, buffer.getvalue(), "image.jpg"), "several pictures", "Export")


def test_jpeg_for_print_is_refused(tmp_path: Path) -> None:
    data = encoded(Image.fromarray(in_colour(smooth())).convert("CMYK"), "JPEG")
    assert_refused(write(tmp_path, data), "for print", "CMYK", "Export")
