"""When the cache is built, used, refused or ignored, and what happens to unusable images."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Callable, Dict, List

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_vit.config.data_sections import DataSection
from cxr_vit.config.schema import Config
from cxr_vit.data.cache import CacheReader
from cxr_vit.data.datamodule import ChestXrayDataModule, prepare
from cxr_vit.data.image_source import ImageSource, cache_paths, open_image_source, verify
from cxr_vit.data.images import FileReader, find_images, read_gray
from cxr_vit.errors import DataError

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"
)
CSV = "Data_Entry_2017_v2020.csv"
IMAGES = 40
NAMES = [f"{row:08d}_000.png" for row in range(IMAGES)]


def write_image(path: Path, seed: int) -> None:
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Forty images of forty patients; the CSV is not sorted by name."""
    root = tmp_path / "nih"
    (root / "images").mkdir(parents=True)
    for row, name in enumerate(NAMES):
        write_image(root / "images" / name, row)
    rows = [f"{name},Mass,0,{int(name[:8])},50,F,AP" for name in reversed(NAMES)]
    (root / CSV).write_text("\n".join([HEADER, *rows]) + "\n", encoding="utf-8")
    return root


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, logger="cxr_vit")
    return caplog


def section(root: Path, **changes: object) -> DataSection:
    return DataSection(root=str(root), **{"image_size": 16, "val_fraction": 0.2, **changes})


def source_of(root: Path, *, renew: bool = False, **changes: object) -> ImageSource:
    return open_image_source(section(root, **changes), NAMES, renew=renew)


def images_of(source: ImageSource, names: List[str]) -> np.ndarray:
    out = np.empty((len(names), 16, 16), dtype=np.uint8)
    source.reader.select(names).read(np.arange(len(names)), out)
    return out


def assert_all_images(source: ImageSource, root: Path) -> None:
    paths = find_images(root)
    expected = np.stack([read_gray(paths[name], 16) for name in NAMES])
    np.testing.assert_array_equal(images_of(source, NAMES), expected)
    assert source.missing == []
    assert source.bad == {}


def spoil(root: Path, rows: range) -> None:
    for row in rows:
        (root / "images" / NAMES[row]).write_bytes(b"")


def grow(root: Path, row: int) -> None:
    """Change the size of a file, but not its image."""
    with (root / "images" / NAMES[row]).open("ab") as file:
        file.write(b"\0")


# data.cache: auto, require, off


def test_auto_builds_the_cache_on_first_use_only(root: Path, log: pytest.LogCaptureFixture) -> None:
    first = source_of(root)
    where = cache_paths(section(root))
    assert where.pixels == root / "cxr_vit_cache" / "films_16.u8"
    assert isinstance(first.reader, CacheReader)
    assert first.origin == str(where.pixels)
    assert log.text.count("cached 40 images in") == 1
    made = where.pixels.stat()
    second = source_of(root)
    assert log.text.count("cached 40 images in") == 1
    now = where.pixels.stat()
    assert (now.st_ino, now.st_mtime_ns) == (made.st_ino, made.st_mtime_ns)
    for source in (first, second):
        assert_all_images(source, root)


def test_each_image_size_has_its_own_store(root: Path) -> None:
    source_of(root)
    assert source_of(root, image_size=12).reader.image_size == 12
    assert_all_images(source_of(root, cache="require"), root)


def test_require_without_a_cache_says_how_to_build_it(root: Path) -> None:
    with pytest.raises(DataError, match=r"there is no finished cache .*films_16\.u8") as caught:
        source_of(root, cache="require")
    assert "python -m cxr_vit prepare" in str(caught.value)
    assert not (root / "cxr_vit_cache").exists()


def test_require_uses_an_existing_cache(root: Path) -> None:
    source_of(root)
    source = source_of(root, cache="require")
    assert isinstance(source.reader, CacheReader)
    assert_all_images(source, root)


def test_require_does_not_use_an_interrupted_cache(root: Path) -> None:
    source_of(root)
    where = cache_paths(section(root))
    where.index.unlink()
    with pytest.raises(DataError, match="there is no finished cache"):
        source_of(root, cache="require")


def test_off_reads_the_files_and_writes_nothing(root: Path) -> None:
    source = source_of(root, cache="off")
    assert isinstance(source.reader, FileReader)
    assert "decoded each time" in source.origin
    assert_all_images(source, root)
    assert {path.name for path in root.iterdir()} == {"images", CSV}


def test_cache_may_be_in_another_folder(root: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "fast" / "disk"
    source = source_of(root, cache_dir=str(elsewhere))
    assert source.origin == str(elsewhere / "films_16.u8")
    assert_all_images(source, root)
    assert not (root / "cxr_vit_cache").exists()


def test_cache_is_used_where_the_images_are_absent(root: Path) -> None:
    paths = {name: read_gray(path, 16) for name, path in find_images(root).items()}
    source_of(root)
    shutil.rmtree(str(root / "images"))
    for cache in ("auto", "require"):
        source = source_of(root, cache=cache)
        np.testing.assert_array_equal(
            images_of(source, NAMES), np.stack([paths[name] for name in NAMES])
        )
    assert len(ChestXrayDataModule(Config(data=section(root))).records) == IMAGES


# Refused and rebuilt


@pytest.mark.parametrize("cache", ["auto", "require"])
def test_stale_cache_is_refused_with_the_reason_and_what_to_do(root: Path, cache: str) -> None:
    source_of(root)
    before = cache_paths(section(root)).pixels.read_bytes()
    grow(root, 7)
    with pytest.raises(
        DataError, match=r"films_16\.u8 is refused: 1 images were changed"
    ) as caught:
        source_of(root, cache=cache)
    assert NAMES[7] in str(caught.value)
    assert "python -m cxr_vit prepare" in str(caught.value)
    assert "data.cache=off" in str(caught.value)
    assert cache_paths(section(root)).pixels.read_bytes() == before


def damage_index(root: Path) -> None:
    cache_paths(section(root)).index.write_text("{", encoding="utf-8")


def truncate_pixels(root: Path) -> None:
    os.truncate(cache_paths(section(root)).pixels, 100)


@pytest.mark.parametrize(
    "change", [damage_index, truncate_pixels, lambda root: grow(root, 7)], ids=["a", "b", "c"]
)
def test_cache_that_does_not_fit_is_rebuilt_on_request(
    root: Path, change: Callable[[Path], None], log: pytest.LogCaptureFixture
) -> None:
    source_of(root)
    change(root)
    with pytest.raises(DataError, match="is refused"):
        source_of(root)
    assert_all_images(source_of(root, renew=True), root)
    assert "does not fit" in log.text
    assert_all_images(source_of(root, cache="require"), root)


@pytest.mark.parametrize("cache", ["require", "off"])
def test_prepare_builds_the_cache_whatever_data_cache_is(root: Path, cache: str) -> None:
    assert prepare(section(root, cache=cache)) == (
        f"40 of 40 images of {root / CSV} are in {root / 'cxr_vit_cache' / 'films_16.u8'}"
    )
    assert_all_images(source_of(root, cache="require"), root)


def test_prepare_keeps_a_cache_that_fits(root: Path, log: pytest.LogCaptureFixture) -> None:
    assert prepare(section(root)) == prepare(section(root))
    assert log.text.count("cached 40 images in") == 1


def test_bad_image_that_is_fixed_at_the_same_size_is_usable(root: Path) -> None:
    """An image with a flipped bit that is fetched again has the same size."""
    path = root / "images" / NAMES[5]
    intact = path.read_bytes()
    flipped = bytearray(intact)
    flipped[len(intact) // 2] ^= 4
    path.write_bytes(bytes(flipped))
    with pytest.raises(DataError, match="1 of 40 images are unusable"):
        prepare(section(root))
    path.write_bytes(intact)
    assert prepare(section(root)).startswith("40 of 40 images")
    assert_all_images(source_of(root), root)


def test_folder_that_is_not_writable_is_refused(root: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be written to .*file \(") as caught:
        source_of(root, cache_dir=str(tmp_path / "file"))
    assert "data.cache_dir" in str(caught.value) and "data.cache=off" in str(caught.value)


def lock_out(root: Path) -> None:
    """Make the lock file unusable, also for root."""
    lock = cache_paths(section(root)).lock
    lock.unlink()
    lock.mkdir()


def test_cache_that_fits_is_read_from_a_folder_that_is_not_writable(root: Path) -> None:
    source_of(root)
    lock_out(root)
    assert_all_images(source_of(root), root)


@pytest.mark.parametrize("cache", ["auto", "require"])
def test_stale_cache_in_a_folder_that_is_not_writable_is_refused_with_the_reason(
    root: Path, cache: str
) -> None:
    source_of(root)
    lock_out(root)
    grow(root, 7)
    with pytest.raises(DataError, match="1 images were changed since"):
        source_of(root, cache=cache)


def test_verify_without_a_cache_or_with_a_damaged_index_is_refused(root: Path) -> None:
    with pytest.raises(DataError, match="there is no finished cache"):
        verify(section(root), NAMES)
    source_of(root)
    assert verify(section(root), NAMES) == ({}, 40, 0)
    damage_index(root)
    with pytest.raises(DataError, match="is damaged"):
        verify(section(root), NAMES)


def test_verify_of_a_cache_without_pixels_is_refused(root: Path) -> None:
    source_of(root)
    cache_paths(section(root)).pixels.unlink()
    with pytest.raises(DataError, match=r"films_16\.u8 has 0 bytes"):
        verify(section(root), NAMES)


# Unusable images


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_bad_images_are_counted_and_ten_are_named_before_training(root: Path, cache: str) -> None:
    spoil(root, range(5, 17))
    with pytest.raises(DataError, match=r"^12 of 40 images are unusable:\n") as caught:
        ChestXrayDataModule(Config(data=section(root, cache=cache))).setup()
    lines = str(caught.value).splitlines()
    assert len(lines) == 13
    assert all(line.endswith(".png: the file is empty. Fetch it again.") for line in lines[1:11])
    assert lines[11] == "  ... and 2 more"
    assert "data.on_bad_image=skip" in lines[12]


def test_missing_images_are_counted_and_ten_are_named_before_training(root: Path) -> None:
    for name in NAMES[5:17]:
        (root / "images" / name).unlink()
    with pytest.raises(DataError, match=r"^12 of 40 images are missing under ") as caught:
        ChestXrayDataModule(Config(data=section(root))).setup()
    assert str(caught.value).count(".png: missing") == 10
    assert "... and 2 more" in str(caught.value)
    assert "data.on_missing=skip" in str(caught.value)


SKIP: Dict[str, object] = {"on_missing": "skip", "on_bad_image": "skip"}


@pytest.mark.parametrize("cache", ["auto", "off"])
def test_unusable_images_are_skipped_on_request_and_listed(
    root: Path, cache: str, caplog: pytest.LogCaptureFixture
) -> None:
    spoil(root, range(5, 7))
    (root / "images" / NAMES[9]).unlink()
    module = ChestXrayDataModule(Config(data=section(root, cache=cache, **SKIP)))
    left = set(NAMES) - {NAMES[5], NAMES[6], NAMES[9]}
    assert set(module.records.table["image"]) == left
    assert dict(zip(module.skipped["image"], module.skipped["reason"])) == {
        NAMES[5]: "the file is empty. Fetch it again.",
        NAMES[6]: "the file is empty. Fetch it again.",
        NAMES[9]: "missing",
    }
    assert "1 of 40 images are missing" in caplog.text
    assert "2 of 40 images are unusable and left out" in caplog.text
    paths = find_images(root)
    for split in ("train", "val", "test"):
        dataset = module.dataset(split)
        images = dataset.read_images(range(len(dataset)))
        for image, name in zip(images, dataset.image_names):
            np.testing.assert_array_equal(image, read_gray(paths[name], 16))


@pytest.mark.parametrize("missing", [True, False])
def test_no_usable_image_is_an_error_even_with_skip(root: Path, missing: bool) -> None:
    if missing:
        shutil.rmtree(str(root / "images"))
    else:
        spoil(root, range(IMAGES))
    data = section(root, **SKIP)
    for act in (ChestXrayDataModule(Config(data=data)).setup, lambda: prepare(data)):
        with pytest.raises(DataError, match="40 of 40 images"):
            act()


def test_prepare_lists_skipped_images_beside_the_cache(root: Path) -> None:
    spoil(root, range(5, 6))
    assert prepare(section(root, **SKIP)).startswith("39 of 40 images")
    skipped = root / "cxr_vit_cache" / "skipped.csv"
    assert pd.read_csv(skipped)["image"].tolist() == [NAMES[5]]
    write_image(root / "images" / NAMES[5], 5)
    assert prepare(section(root, **SKIP)).startswith("40 of 40 images")
    assert not skipped.exists()


# A store of images whose files are gone


def move_away(root: Path, rows: range) -> None:
    for row in rows:
        (root / "images" / NAMES[row]).unlink()


@pytest.mark.parametrize("kept", [0, 10])
def test_store_is_never_replaced_by_one_with_fewer_images(root: Path, kept: int) -> None:
    source_of(root)
    where = cache_paths(section(root))
    before = where.pixels.read_bytes()
    move_away(root, range(IMAGES - kept))
    with pytest.raises(DataError, match=rf"would lose images .*\({IMAGES - kept}, first"):
        source_of(root, renew=True, max_megapixels=32)
    assert where.pixels.read_bytes() == before
    assert len(source_of(root).reader) == IMAGES  # it still fits its own settings


def test_store_with_a_damaged_index_is_kept_if_there_are_no_files(root: Path) -> None:
    source_of(root)
    where = cache_paths(section(root))
    before = where.pixels.read_bytes()
    damage_index(root)
    move_away(root, range(IMAGES))
    with pytest.raises(DataError, match="would lose images"):
        source_of(root, renew=True)
    assert where.pixels.read_bytes() == before


def test_verify_counts_images_without_a_file(root: Path) -> None:
    source_of(root)
    move_away(root, range(15))
    assert verify(section(root), NAMES) == ({}, 25, 15)


def test_missing_folder_of_images_is_refused(root: Path) -> None:
    source_of(root)
    with pytest.raises(DataError, match=r"data\.images=.*typo is not a folder"):
        source_of(root, images=str(root / "typo"))


def test_other_pictures_may_share_a_name(root: Path) -> None:
    for folder in ("docs", "paper"):
        (root / folder).mkdir()
        write_image(root / folder / "figure.png", 0)
    names = set(NAMES)
    assert len(source_of(root).reader) == len(find_images(root, names)) == IMAGES


def test_store_built_with_other_libraries_is_used_with_a_message(
    root: Path, log: pytest.LogCaptureFixture
) -> None:
    source_of(root)
    where = cache_paths(section(root))
    text = where.index.read_text(encoding="utf-8")
    where.index.write_text(text.replace('"kornia-rs": "', '"kornia-rs": "9'), encoding="utf-8")
    assert_all_images(source_of(root), root)
    assert "was made with pillow" in log.text and "--verify" in log.text


def test_store_of_another_csv_may_be_replaced(root: Path) -> None:
    source_of(root)
    data = section(root, max_megapixels=32)
    assert len(open_image_source(data, NAMES[:10], renew=True).reader) == 10
    with pytest.raises(DataError, match="30 of 40 images are not in it"):
        open_image_source(data, NAMES)
