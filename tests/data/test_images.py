"""Files -> uint8 gray: what is read, and what is refused and how."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Callable, Dict

import numpy as np
import pytest
from PIL import Image, ImageFile

from cxr_vit.data.images import find_images, read_gray
from cxr_vit.errors import DataError

SIDE = 24
LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    b"size 412345\n"
)


def pixels(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE), dtype=np.uint8)


def save(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def gray() -> Image.Image:
    return Image.fromarray(pixels())


def with_alpha(alpha: int, corner: int) -> Image.Image:
    """Gray in all three colours; alpha everywhere, but for one pixel."""
    opacity = np.full((SIDE, SIDE), alpha, dtype=np.uint8)
    opacity[-1, -1] = corner
    return Image.merge("RGBA", [gray(), gray(), gray(), Image.fromarray(opacity)])


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def sixteen_bit_png() -> bytes:
    rows = b"".join(b"\0" + b"\x12\x34" * SIDE for _ in range(SIDE))
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 16, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + png_chunk(b"IHDR", header)
        + png_chunk(b"IDAT", zlib.compress(rows))
        + png_chunk(b"IEND", b"")
    )


def assert_refused(path: Path, reason: str) -> None:
    with pytest.raises(DataError, match=reason) as caught:
        read_gray(path, SIDE)
    assert str(path) in str(caught.value)


# What is read


def test_a_gray_png_of_the_right_size_is_read_exactly(tmp_path: Path) -> None:
    path = save(gray(), tmp_path / "film.png")
    np.testing.assert_array_equal(read_gray(path, SIDE), pixels())


@pytest.mark.parametrize("size", [8, SIDE, 40])
def test_the_result_is_a_uint8_square_of_the_size_asked(tmp_path: Path, size: int) -> None:
    path = save(Image.fromarray(pixels()[:10]), tmp_path / "wide.png")
    read = read_gray(path, size)
    assert read.dtype == np.uint8 and read.shape == (size, size)


def test_the_result_may_be_written_to(tmp_path: Path) -> None:
    assert read_gray(save(gray(), tmp_path / "film.png"), SIDE).flags.writeable


def test_a_path_may_be_text(tmp_path: Path) -> None:
    path = save(gray(), tmp_path / "film.png")
    np.testing.assert_array_equal(read_gray(str(path), SIDE), pixels())


def test_rgb_of_equal_colours_is_its_red_channel(tmp_path: Path) -> None:
    path = save(gray().convert("RGB"), tmp_path / "film.png")
    np.testing.assert_array_equal(read_gray(path, SIDE), pixels())


def test_rgb_of_unequal_colours_is_its_luma(tmp_path: Path) -> None:
    path = save(Image.new("RGB", (SIDE, SIDE), (255, 0, 0)), tmp_path / "red.png")
    assert np.unique(read_gray(path, SIDE)).tolist() == [76]


def test_rgba_with_an_opaque_alpha_is_its_red_channel(tmp_path: Path) -> None:
    path = save(with_alpha(255, 255), tmp_path / "film.png")
    np.testing.assert_array_equal(read_gray(path, SIDE), pixels())


def test_gray_with_an_opaque_alpha_is_its_gray_channel(tmp_path: Path) -> None:
    path = save(gray().convert("LA"), tmp_path / "film.png")
    with Image.open(path) as stored:
        assert stored.mode == "LA"
    np.testing.assert_array_equal(read_gray(path, SIDE), pixels())


def test_a_palette_is_looked_up(tmp_path: Path) -> None:
    image = Image.fromarray((pixels() % 3).astype(np.uint8))
    image.putpalette([200, 200, 200, 10, 10, 10, 90, 90, 90])
    path = save(image, tmp_path / "film.png")
    with Image.open(path) as stored:
        assert stored.mode == "P"
    grays = np.array([200, 10, 90], dtype=np.uint8)
    np.testing.assert_array_equal(read_gray(path, SIDE), grays[pixels() % 3])


def test_one_bit_is_black_and_white(tmp_path: Path) -> None:
    path = save(Image.fromarray(pixels() > 99), tmp_path / "film.png")
    with Image.open(path) as stored:
        assert stored.mode == "1"
    np.testing.assert_array_equal(read_gray(path, SIDE), np.where(pixels() > 99, 255, 0))


@pytest.mark.parametrize("name", ["film.jpg", "film.jpeg", "film.png"])
@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_a_jpeg_is_read_whatever_its_suffix(tmp_path: Path, name: str, mode: str) -> None:
    ramp = np.tile(np.linspace(0, 255, SIDE).astype(np.uint8), (SIDE, 1))
    path = tmp_path / name
    path.write_bytes(encoded(Image.fromarray(ramp).convert(mode), "JPEG"))
    assert np.abs(read_gray(path, SIDE).astype(int) - ramp).max() < 16


def test_an_exif_rotation_is_undone(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    path = save(gray(), tmp_path / "film.png", exif=exif)
    np.testing.assert_array_equal(read_gray(path, SIDE), np.rot90(pixels(), -1))


def test_shrinking_is_antialiased(tmp_path: Path) -> None:
    board = (np.indices((256, 256)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = read_gray(save(Image.fromarray(board), tmp_path / "board.png"), 32)
    assert np.abs(small[1:-1, 1:-1].astype(int) - 127.5).max() <= 2
    assert np.abs(small.astype(int) - 127.5).max() <= 8


def test_shrinking_a_uniform_film_keeps_its_gray(tmp_path: Path) -> None:
    path = save(Image.new("L", (100, 60), 173), tmp_path / "film.png")
    assert np.unique(read_gray(path, 32)).tolist() == [173]


def test_a_palette_with_an_opaque_transparency_table_is_looked_up(tmp_path: Path) -> None:
    image = Image.fromarray((pixels() % 3).astype(np.uint8))
    image.putpalette([200, 200, 200, 10, 10, 10, 90, 90, 90])
    path = save(image, tmp_path / "film.png", transparency=b"\xff\xff\xff")
    grays = np.array([200, 10, 90], dtype=np.uint8)
    np.testing.assert_array_equal(read_gray(path, SIDE), grays[pixels() % 3])


# What is refused


@pytest.mark.parametrize(("alpha", "corner"), [(255, 254), (255, 0), (0, 0), (128, 255)])
def test_a_partly_transparent_colour_film_is_refused(
    tmp_path: Path, alpha: int, corner: int
) -> None:
    assert_refused(save(with_alpha(alpha, corner), tmp_path / "film.png"), "partly transparent")


def test_a_partly_transparent_gray_film_is_refused(tmp_path: Path) -> None:
    path = save(with_alpha(255, 7).convert("LA"), tmp_path / "film.png")
    assert_refused(path, "partly transparent")


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_a_transparent_colour_is_refused_as_a_transparent_channel_is(
    tmp_path: Path, mode: str
) -> None:
    image = gray().convert("RGB").quantize(8) if mode == "P" else gray().convert(mode)
    transparency = {"L": int(pixels()[0, 0]), "RGB": (int(pixels()[0, 0]),) * 3, "P": b"\0\x80"}
    path = save(image, tmp_path / "film.png", transparency=transparency[mode])
    assert_refused(path, "partly transparent")


def test_sixteen_bit_gray_is_refused_and_not_clipped(tmp_path: Path) -> None:
    path = tmp_path / "film.png"
    path.write_bytes(sixteen_bit_png())
    assert_refused(path, "more than 8 bits")


def test_sixteen_bit_gray_as_pillow_writes_it_is_refused(tmp_path: Path) -> None:
    path = save(Image.fromarray(pixels().astype(np.uint16) * 257), tmp_path / "film.png")
    assert_refused(path, "more than 8 bits")


def half(data: bytes) -> bytes:
    return data[: len(data) // 2]


REFUSED: Dict[str, Callable[[], bytes]] = {
    "truncated png": lambda: half(encoded(gray(), "PNG")),
    "truncated jpeg": lambda: half(encoded(gray(), "JPEG")),
    "png header alone": lambda: encoded(gray(), "PNG")[:20],
    "png signature alone": lambda: encoded(gray(), "PNG")[:8],
    "empty": lambda: b"",
    "html": lambda: b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "git-lfs pointer": lambda: LFS_POINTER,
    "gif": lambda: encoded(gray(), "GIF"),
    "bmp": lambda: encoded(gray(), "BMP"),
    "tiff": lambda: encoded(gray(), "TIFF"),
    "ppm": lambda: encoded(gray(), "PPM"),
}


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_what_is_not_a_whole_png_or_jpeg_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "film.png"
    path.write_bytes(REFUSED[kind]())
    assert_refused(path, "not a readable PNG or JPEG")


def test_a_damaged_byte_amid_the_pixels_is_refused(tmp_path: Path) -> None:
    data = bytearray(encoded(gray(), "PNG"))
    data[len(data) // 2] ^= 0x40
    path = tmp_path / "film.png"
    path.write_bytes(bytes(data))
    assert_refused(path, "not a readable PNG or JPEG")


def test_nobody_has_told_pillow_to_fill_truncated_films_with_gray() -> None:
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "absent.png", "the image is not there")


def test_a_folder_in_place_of_a_film_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "film.png"
    path.mkdir()
    assert_refused(path, "not a readable PNG or JPEG")


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(gray(), tmp_path / "film.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", SIDE * SIDE // 4)
    assert_refused(path, "not a readable PNG or JPEG")


# The index


def test_films_are_found_in_every_layout_people_have(tmp_path: Path) -> None:
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


def test_a_linked_folder_is_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "a.png").touch()
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "images").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert list(find_images(tmp_path / "root")) == ["a.png"]


def test_a_name_in_two_folders_is_refused_and_both_are_named(tmp_path: Path) -> None:
    for folder in ("images", "images_224"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").touch()
    with pytest.raises(DataError, match=r"1 images are under .* twice.*data\.images") as caught:
        find_images(tmp_path)
    assert str(tmp_path / "images" / "a.png") in str(caught.value)
    assert str(tmp_path / "images_224" / "a.png") in str(caught.value)


def test_links_that_lead_in_circles_or_to_the_same_folder_are_walked_once(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").touch()
    (tmp_path / "images" / "up").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "images")
    assert list(find_images(tmp_path)) == ["a.png"]


def test_a_folder_without_films_gives_an_empty_index(tmp_path: Path) -> None:
    assert find_images(tmp_path) == {}
