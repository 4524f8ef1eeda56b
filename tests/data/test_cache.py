"""The packed store: its index, and the reasons to refuse it."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import zlib
from importlib import metadata
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional

import numpy as np
import pytest
from PIL import Image

from cxr_vit.data import cache_build
from cxr_vit.data.cache import (
    CacheIndex,
    CachePaths,
    CacheSettings,
    open_images,
    plain_crc32,
    refusal,
)
from cxr_vit.data.cache_build import build_cache, check_cache, check_images
from cxr_vit.data.images import find_images, read_gray
from cxr_vit.errors import DataError
from cxr_vit.files import remove

SIDE = 16
#: In caches of all versions; another text would refuse them.
BILINEAR = "bilinear, antialiased (Pillow)"
SETTINGS = CacheSettings(SIDE, 5)
BAD = "00000003_000.png"


class Store(NamedTuple):
    images: Path
    paths: Dict[str, str]
    where: CachePaths
    index: CacheIndex

    def refusal(self, settings: CacheSettings = SETTINGS) -> Optional[str]:
        index = CacheIndex.load(self.where.index)
        return refusal(index, self.where.pixels, settings, find_images(self.images))


def write_image(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 30), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store of six images; the fourth is unusable."""
    images = tmp_path / "images"
    images.mkdir()
    for row in (4, 1, 5, 0, 2):  # not in order
        write_image(images / f"{row:08d}_000.png", row)
    (images / BAD).write_bytes(b"<html>")
    paths = find_images(images)
    where = CachePaths.of(tmp_path, SIDE)
    return Store(images, paths, where, build_cache(where, SETTINGS, paths, workers=1))


# The index


def test_files_are_named_by_the_image_size(tmp_path: Path) -> None:
    where = CachePaths.of(tmp_path, 224)
    assert where.pixels == tmp_path / "films_224.u8"
    assert where.index == tmp_path / "films_224.json"
    assert len(set(dataclasses.astuple(where))) == 5


def test_finished_store_leaves_no_partial_files(store: Store) -> None:
    there = {path.name for path in store.where.pixels.parent.iterdir()}
    assert there == {"images", "films_16.u8", "films_16.json"}


def test_images_are_sorted_by_name(store: Store) -> None:
    assert store.index.images == [f"{row:08d}_000.png" for row in range(6)]
    pixels = np.fromfile(store.where.pixels, dtype=np.uint8).reshape(6, SIDE, SIDE)
    for row, name in enumerate(store.index.images):
        if name != BAD:
            np.testing.assert_array_equal(pixels[row], read_gray(store.paths[name], SIDE))


def test_index_has_the_size_of_every_file(store: Store) -> None:
    sizes = [Path(store.paths[name]).stat().st_size for name in store.index.images]
    assert store.index.source_bytes == sizes


def test_index_has_the_checksum_of_every_image(store: Store) -> None:
    pixels = store.where.pixels.read_bytes()
    for row, name in enumerate(store.index.images):
        image = pixels[row * SIDE**2 : (row + 1) * SIDE**2]
        assert store.index.crc32[row] == (None if name == BAD else zlib.crc32(image))


def test_index_has_the_settings_and_versions(store: Store) -> None:
    values = json.loads(store.where.index.read_text())
    assert values["settings"] == {
        "image_size": SIDE,
        "max_megapixels": 5,
        "resize": BILINEAR,
        "format": 1,
    }
    assert values["versions"] == {
        "pillow": metadata.version("pillow"),
        "kornia-rs": metadata.version("kornia-rs"),
    }


def test_index_is_loaded_as_it_was_saved(store: Store) -> None:
    assert CacheIndex.load(store.where.index) == store.index
    assert store.index.cache_bytes == store.where.pixels.stat().st_size == 6 * SIDE**2


def test_unusable_image_has_a_reason_and_a_black_row_that_is_not_read(store: Store) -> None:
    assert list(store.index.unusable) == [BAD]
    assert "HTML" in store.index.unusable[BAD]
    images = open_images(store.index, store.where.pixels)
    assert len(images) == 5
    with pytest.raises(KeyError):
        images.select([BAD])
    assert store.where.pixels.read_bytes()[3 * SIDE**2 : 4 * SIDE**2] == bytes(SIDE**2)


# Refused


def test_store_that_fits_is_not_refused(store: Store) -> None:
    assert store.refusal() is None


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"image_size": 24}, "it was built with image_size=16, and 24 is needed"),
        ({"max_megapixels": 64}, "it was built with max_megapixels=5, and 64 is needed"),
        ({"resize": "nearest"}, f"it was built with resize={BILINEAR}, and nearest is needed"),
        ({"format": 2}, "it was built with format=1, and 2 is needed"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_store_with_other_settings_is_refused(
    store: Store, changed: Dict[str, object], reason: str
) -> None:
    assert store.refusal(dataclasses.replace(SETTINGS, **changed)) == reason


@pytest.mark.parametrize(
    ("damage", "held"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), 6 * SIDE**2 - 1),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), 6 * SIDE**2 + 1),
        (lambda path: path.write_bytes(b""), 0),
        (lambda path: path.unlink(), 0),
    ],
    ids=["a byte short", "a byte long", "empty", "absent"],
)
def test_store_of_another_size_is_refused(
    store: Store, damage: Callable[[Path], None], held: int
) -> None:
    damage(store.where.pixels)
    expected = f"{store.where.pixels} has {held} bytes and should have {6 * SIDE**2}"
    assert store.refusal() == expected


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace("crc32", "crc33"),
        lambda text: text.replace('"format"', '"of_tomorrow"'),
        lambda text: text.replace('"00000001_000.png", ', ""),
        lambda text: text.replace('"images": [', '"images": 5, "more": ['),
        lambda text: "\0" * len(text),
    ],
    ids=["empty", "cut", "list", "bare", "field", "setting", "row lost", "type", "zeros"],
)
def test_damaged_index_is_refused(store: Store, damage: Callable[[str], str]) -> None:
    text = store.where.index.read_text()
    store.where.index.write_text(damage(text))
    assert store.where.index.read_text() != text
    with pytest.raises(ValueError, match=rf"its index {store.where.index} is damaged"):
        CacheIndex.load(store.where.index)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("images", ["00000000_000.png", 1, None, [], {}, 2.0]),
        ("images", ["00000000_000.png"] * 6),
        ("images", ["../secret.png", "b", "c", "d", "e", "f"]),
        ("images", ["\x1b[2Jclear", "b", "c", "d", "e", "f"]),
        ("images", "abcdef"),
        ("source_bytes", [1, 2, 3, 4, 5, "6"]),
        ("source_bytes", [1, 2, 3, 4, 5, 6.0]),
        ("source_bytes", [1, 2, 3, 4, 5, -2]),
        ("crc32", [1, 2, 3, None, 5, 2**32]),
        ("crc32", [1, 2, 3, None, 5, -1]),
        ("crc32", [1, 2, 3, None, 5, True]),
        ("crc32", [1, 2, 3, None, 5, float("nan")]),
        ("crc32", [1, 2, 3, 4, 5, 6]),
        ("crc32", [None] * 6),
        ("unusable", {}),
        ("unusable", {"another.png": "a reason"}),
        ("unusable", {BAD: "x" * 10**4}),
        ("unusable", [BAD]),
        ("versions", {"pillow": 5}),
        ("versions", []),
        ("settings", {}),
        ("settings", {"image_size": 0, "max_megapixels": 5, "resize": "a", "format": 1}),
        ("settings", {"image_size": 10**9, "max_megapixels": 5, "resize": "a", "format": 1}),
        ("settings", {"image_size": "16", "max_megapixels": 5, "resize": "a", "format": 1}),
        ("settings", {"image_size": 16, "max_megapixels": 5, "resize": [], "format": 1}),
    ],
    ids=lambda value: repr(value)[:40],
)
def test_index_with_a_wrong_value_is_refused(store: Store, field: str, value: object) -> None:
    values = {**json.loads(store.where.index.read_text()), field: value}
    store.where.index.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"^its index {store.where.index} is damaged or of"):
        CacheIndex.load(store.where.index)


@pytest.mark.parametrize(
    "text",
    ["[" * 10**5, '{"a":' * 10**5, '{"images": ["\\ud800"]}', "9" * 10**5, "NaN"],
    ids=["nested lists", "nested objects", "surrogate", "long number", "not a number"],
)
def test_hostile_index_is_refused(store: Store, text: str) -> None:
    store.where.index.write_text(text)
    with pytest.raises(ValueError, match="is damaged"):
        CacheIndex.load(store.where.index)


def test_index_that_is_very_large_or_no_file_is_refused_without_reading_it(store: Store) -> None:
    path = store.where.index
    os.truncate(path, 2**40)  # sparse
    with pytest.raises(ValueError, match="is damaged"):
        CacheIndex.load(path)
    for make in (os.mkdir, os.mkfifo):
        remove(path)
        make(path)
        with pytest.raises(ValueError, match="is damaged"):
            CacheIndex.load(path)


def test_any_changed_bytes_of_an_index_are_refused_or_read(store: Store) -> None:
    """Damage is either noticed in one line or gives values of the right types."""
    text = store.where.index.read_bytes()
    random = np.random.default_rng(0)
    messages: List[str] = []
    for _ in range(150):
        changed = bytearray(text)
        for place in random.integers(0, len(text), random.integers(1, 4)):
            changed[place] = random.choice(list(b'[]{}",:.-0129aeN\\\x00\xff'))
        store.where.index.write_bytes(bytes(changed))
        try:
            index = CacheIndex.load(store.where.index)
            reason = refusal(index, store.where.pixels, SETTINGS, store.paths)
            if reason is None:
                open_images(index, store.where.pixels)
        except (ValueError, DataError) as error:
            messages.append(str(error))
    assert len(messages) > 75
    assert not any("\n" in message for message in messages)


def test_index_that_is_not_text_is_refused(store: Store) -> None:
    store.where.index.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ValueError, match="is damaged"):
        CacheIndex.load(store.where.index)


def test_added_images_are_counted_and_the_first_is_named(store: Store) -> None:
    for row in (8, 7):
        write_image(store.images / f"{row:08d}_000.png", row)
    reason = store.refusal()
    assert reason is not None
    assert reason.startswith("2 of 8 images are not in it, first: 0000000")


def test_changed_images_are_counted_and_the_first_is_named(store: Store) -> None:
    for row in (2, 5):
        path = store.images / f"{row:08d}_000.png"
        path.write_bytes(path.read_bytes() + b"\0")
    assert store.refusal() == "2 images were changed since, first: 00000002_000.png"


def test_bad_image_that_was_fixed_counts_as_changed(store: Store) -> None:
    write_image(store.images / BAD, 3)
    assert store.refusal() == f"1 images were changed since, first: {BAD}"


# Not refused


def test_store_is_usable_on_a_machine_without_the_images(store: Store) -> None:
    expected = [read_gray(store.paths[name], SIDE) for name in store.index.images if name != BAD]
    for path in store.images.iterdir():
        path.unlink()
    assert store.refusal() is None
    out = np.empty((5, SIDE, SIDE), dtype=np.uint8)
    open_images(store.index, store.where.pixels).read(np.arange(5), out)
    np.testing.assert_array_equal(out, np.stack(expected))


def test_store_with_more_images_than_needed_fits(store: Store) -> None:
    for row in (0, 4):
        (store.images / f"{row:08d}_000.png").unlink()
    assert store.refusal() is None


def test_order_of_the_images_does_not_matter(store: Store) -> None:
    backwards = dict(sorted(store.paths.items(), reverse=True))
    assert refusal(store.index, store.where.pixels, SETTINGS, backwards) is None


def test_images_may_be_moved_to_another_folder(store: Store) -> None:
    moved = store.images.with_name("images_001")
    store.images.rename(moved)
    assert refusal(store.index, store.where.pixels, SETTINGS, find_images(moved)) is None


# Verified


DAMAGED = "its pixels in the cache are damaged"
CHANGED = "the cache does not hold what its file holds now"


def verified(store: Store, *, workers: int = 1) -> Dict[str, str]:
    paths = find_images(store.images)
    return check_cache(store.index, store.where, paths, workers=workers)


@pytest.mark.parametrize("workers", [1, 2])
def test_undamaged_store_has_nothing_wrong(
    store: Store, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_build, "_FEW_IMAGES", 0)
    assert verified(store, workers=workers) == {}


def flip(path: Path, *places: int) -> None:
    data = bytearray(path.read_bytes())
    for place in places:
        data[place] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("has_files", [True, False], ids=["with the images", "without the images"])
def test_every_image_with_a_flipped_bit_is_named(store: Store, has_files: bool) -> None:
    flip(store.where.pixels, 0, 2 * SIDE**2 - 1, 4 * SIDE**2)
    if not has_files:
        shutil.rmtree(store.images)
    assert verified(store) == {f"{row:08d}_000.png": DAMAGED for row in (0, 1, 4)}


def test_images_after_the_end_of_a_truncated_store_are_named(store: Store) -> None:
    os.truncate(store.where.pixels, 4 * SIDE**2 + 1)
    assert verified(store) == dict.fromkeys(("00000004_000.png", "00000005_000.png"), DAMAGED)


def test_image_that_changed_but_kept_its_size_is_named(store: Store) -> None:
    path = store.images / "00000002_000.png"
    size = path.stat().st_size
    for seed in range(100, 200):
        write_image(path, seed)
        path.write_bytes(path.read_bytes().ljust(size, b"\0"))
        if path.stat().st_size == size:
            break
    assert store.refusal() is None  # only file sizes are compared
    assert verified(store) == {"00000002_000.png": CHANGED}


def test_image_that_became_bad_and_one_that_was_fixed_are_named(store: Store) -> None:
    (store.images / "00000001_000.png").write_bytes(b"no image")
    write_image(store.images / BAD, 3)
    assert verified(store) == {"00000001_000.png": CHANGED, BAD: CHANGED}


def test_images_without_a_file_are_only_checked_for_damage(store: Store) -> None:
    shutil.rmtree(store.images)
    assert verified(store) == {}


def test_images_are_checked_without_a_store(store: Store, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    assert check_images(store.paths, SETTINGS, workers=1) == (store.index.unusable, [])
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("size", [1, 16, 37])
def test_the_checksums_of_images_of_one_value_are_those_of_their_pixels(size: int) -> None:
    expected = {zlib.crc32(bytes([value]) * size**2) for value in range(256)}
    assert plain_crc32(size) == expected and len(expected) == 256


def test_store_of_other_pixels_is_refused_at_the_start(store: Store) -> None:
    pixels = store.where.pixels
    pixels.write_bytes(bytes(len(pixels.read_bytes())))  # the right size, and black
    with pytest.raises(DataError, match=r"is damaged: .* is not what its index says.*prepare"):
        open_images(CacheIndex.load(store.where.index), pixels)
