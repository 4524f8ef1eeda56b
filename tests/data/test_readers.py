"""Readers of files and of the store: the same pixels, bounded memory, and changes noticed."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import subprocess
import sys
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Callable, Dict, List

import numpy as np
import pytest
from PIL import Image

from cxr_vit.data.cache import (
    _CHECK_EVERY,
    CacheFile,
    CachePaths,
    CacheReader,
    CacheSettings,
    open_images,
)
from cxr_vit.data.cache_build import build_cache
from cxr_vit.data.images import FileReader, ImageReader, find_images, read_gray
from cxr_vit.errors import DataError

SIDE = 20
SETTINGS = CacheSettings(SIDE, 1)
EVERY_KIND = 9


def noise(seed: int, height: int = 37, width: int = 31, channels: int = 0) -> np.ndarray:
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_every_kind(folder: Path) -> Dict[str, str]:
    """Write an image of every supported kind, and a damaged one."""
    folder.mkdir()
    twelve_bits = noise(4).astype(np.uint16) * 16
    opaque = Image.fromarray(noise(5, channels=3)).convert("RGBA")
    for name, image in {
        "00000001_000.png": Image.fromarray(noise(1)),
        "00000002_000.png": Image.fromarray(noise(2, SIDE, SIDE)),  # needs no resizing
        "00000003_000.png": Image.fromarray(noise(3, channels=3)),
        "00000005_000.png": Image.fromarray(twelve_bits),
        "00000006_000.png": opaque,
        "00000007_000.png": Image.fromarray(noise(6)).convert("P"),
        "00000008_000.png": Image.fromarray(noise(7, 9, 300)),
        "00000009_000.png": Image.fromarray(noise(8)).convert("1"),
        "00000010_000.jpg": Image.fromarray(noise(9)),
    }.items():
        image.save(folder / name)
    (folder / "00000004_000.png").write_bytes(b"no image")
    return find_images(folder)


def build(folder: Path, paths: Dict[str, str], settings: CacheSettings = SETTINGS) -> CacheReader:
    folder.mkdir(exist_ok=True)
    where = CachePaths.of(folder, settings.image_size)
    return open_images(build_cache(where, settings, paths, workers=1), where.pixels)


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Dict[str, str]:
    return write_every_kind(tmp_path_factory.mktemp("images") / "images")


@pytest.fixture(scope="module")
def cached(paths: Dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> CacheReader:
    return build(tmp_path_factory.mktemp("store"), paths)


@pytest.fixture
def names(paths: Dict[str, str]) -> List[str]:
    return sorted(set(paths) - {"00000004_000.png"})


def files_of(paths: Dict[str, str], names: List[str]) -> FileReader:
    return FileReader(paths, names, image_size=SIDE, max_megapixels=1)


def read(images: ImageReader, rows: List[int]) -> np.ndarray:
    out = np.full((len(rows), images.image_size, images.image_size), 255, dtype=np.uint8)
    images.read(np.array(rows, dtype=np.int64), out)
    return out


def test_store_and_files_have_the_same_pixels(
    paths: Dict[str, str], names: List[str], cached: CacheReader
) -> None:
    assert len(cached) == len(names) == EVERY_KIND
    direct = read(files_of(paths, names), list(range(EVERY_KIND)))
    np.testing.assert_array_equal(read(cached, list(range(EVERY_KIND))), direct)
    for row, name in enumerate(names):
        np.testing.assert_array_equal(direct[row], read_gray(paths[name], SIDE))
    assert len({image.tobytes() for image in direct}) == EVERY_KIND  # no two images are equal


@pytest.mark.parametrize(
    "rows", [[8, 0, 5], [3, 3, 3], [2, 7, 2, 0, 7], [4], []], ids=lambda rows: str(rows)
)
def test_rows_are_read_in_any_order_and_any_number_of_times(
    paths: Dict[str, str], names: List[str], cached: CacheReader, rows: List[int]
) -> None:
    np.testing.assert_array_equal(read(cached, rows), read(files_of(paths, names), rows))


def test_random_batches_match_the_files(
    paths: Dict[str, str], names: List[str], cached: CacheReader
) -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        rows = random.integers(0, EVERY_KIND, random.integers(1, 30)).tolist()
        np.testing.assert_array_equal(read(cached, rows), read(files_of(paths, names), rows))


def test_images_are_selected_by_name_in_the_given_order(
    paths: Dict[str, str], names: List[str], cached: CacheReader
) -> None:
    wanted = [names[6], names[1], names[8], names[1]]
    expected = np.stack([read_gray(paths[name], SIDE) for name in wanted])
    for images in (cached, files_of(paths, names)):
        selected = images.select(wanted)
        assert len(selected) == 4
        assert selected.image_size == SIDE
        np.testing.assert_array_equal(read(selected, [0, 1, 2, 3]), expected)
        again = selected.select(wanted[::-1])  # of all images, not only of those selected
        np.testing.assert_array_equal(read(again, [3, 2, 1, 0]), expected)


def test_unusable_image_cannot_be_selected(cached: CacheReader) -> None:
    with pytest.raises(KeyError, match=r"00000004_000\.png"):
        cached.select(["00000004_000.png"])


def test_only_the_given_part_of_the_buffer_is_written(cached: CacheReader) -> None:
    buffer = np.full((4, SIDE, SIDE), 7, dtype=np.uint8)
    cached.read(np.array([1, 2]), buffer[1:3])
    assert (buffer[[0, 3]] == 7).all()
    np.testing.assert_array_equal(buffer[1:3], read(cached, [1, 2]))


def test_read_returns_a_copy(cached: CacheReader) -> None:
    before = cached._cache.path.read_bytes()
    images = read(cached, [0, 1])
    images += 1
    assert cached._cache.path.read_bytes() == before
    assert not np.array_equal(read(cached, [0, 1]), images)


def test_file_that_became_unreadable_is_reported(tmp_path: Path) -> None:
    paths = write_every_kind(tmp_path / "images")
    images = files_of(paths, ["00000001_000.png"])
    Path(paths["00000001_000.png"]).unlink()
    with pytest.raises(DataError, match=r"00000001_000\.png.*not there"):
        read(images, [0])


# Processes


def read_all(images: ImageReader) -> np.ndarray:
    return read(images, list(range(len(images))))


def test_other_process_reads_the_same_images(
    paths: Dict[str, str], names: List[str], cached: CacheReader
) -> None:
    expected = read_all(cached)
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn) as pool:
        some = cached.select(names[::-2])
        np.testing.assert_array_equal(pool.submit(read_all, cached).result(), expected)
        np.testing.assert_array_equal(pool.submit(read_all, some).result(), expected[::-2])
        files = files_of(paths, names)
        np.testing.assert_array_equal(pool.submit(read_all, files).result(), expected)


def test_neither_pixels_nor_names_of_other_images_are_pickled(tmp_path: Path) -> None:
    store = tmp_path / "images.u8"
    store.write_bytes(b"\1" * (1000 * SIDE**2))
    by_name = {f"{row:08d}_000.png": row for row in range(1000)}
    crc32 = np.full(1000, zlib.crc32(b"\1" * SIDE**2), dtype=np.uint32)
    images = CacheReader(CacheFile(store, (1000, SIDE, SIDE)), by_name, crc32, list(by_name))
    ten = images.select(list(by_name)[:10])
    assert read_all(images).sum() == 1000 * SIDE**2
    assert read_all(ten).sum() == 10 * SIDE**2
    assert len(pickle.dumps(images)) < 1000 * (8 + 4) + 1500
    assert len(pickle.dumps(ten)) < 1600
    few = FileReader(by_name, list(by_name)[:10], image_size=SIDE, max_megapixels=1)
    assert len(pickle.dumps(few)) < 1100


READS_A_LARGE_STORE = """
import resource
import sys
import zlib
from pathlib import Path
import numpy as np
from cxr_vit.data.cache import CacheFile, CacheReader

names = {str(row): row for row in range(640)}
crc32 = np.full(640, zlib.crc32(bytes(1024**2)), dtype=np.uint32)
images = CacheReader(CacheFile(Path(sys.argv[1]), (640, 1024, 1024)), names, crc32, list(names))
out = np.empty((8, 1024, 1024), dtype=np.uint8)
images.read(np.arange(8), out)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for start in range(0, 640, 8):
    images.read(np.arange(start, start + 8), out)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_while_a_process_reads_a_whole_store(
    tmp_path: Path, repository: Path
) -> None:
    store = tmp_path / "images.u8"
    with store.open("wb") as file:
        file.truncate(640 * 1024**2)  # sparse: takes no disk space
    result = subprocess.run(
        [sys.executable, "-c", READS_A_LARGE_STORE, str(store)],
        cwd=str(repository),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 2048  # KiB


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_file_is_closed_with_its_last_reader(paths: Dict[str, str], tmp_path: Path) -> None:
    before = open_files()
    images: ImageReader = build(tmp_path / "store", paths)
    some = images.select(sorted(paths)[:2])
    copied = pickle.loads(pickle.dumps(some))
    assert open_files() == before + 2  # one per process that opens it, and this is another
    del images
    read_all(some)
    del some, copied
    assert open_files() == before


# A store that is changed during a run


@pytest.fixture
def opened(paths: Dict[str, str], tmp_path: Path) -> CacheReader:
    return build(tmp_path / "store", paths)


def overwrite(path: Path) -> None:
    """Write other pixels into the same file, as `cp` does."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(bytes(size))


def in_place(opened: CacheReader, change: Callable[[Path], None], *, later_ns: int) -> Path:
    """Change the store; its time of modification is `later_ns` after the old one."""
    path = opened._cache.path
    before = path.stat()
    change(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + later_ns))
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (overwrite, "was changed while it was read"),
        (lambda path: os.truncate(path, SIDE**2), "was cut from 4000 to 400 bytes while"),
        (lambda path: os.truncate(path, 2**20), "was changed while it was read"),
        (Path.touch, "was changed while it was read"),
    ],
    ids=["other pixels", "truncated", "extended", "only the time"],
)
def test_store_that_is_changed_in_place_is_refused_at_the_next_batch(
    opened: CacheReader, change: Callable[[Path], None], words: str
) -> None:
    read_all(opened)
    path = in_place(opened, change, later_ns=10**7)
    with pytest.raises(DataError, match=rf"the cache {path} {words}.*prepare.*--resume") as raised:
        read_all(opened)
    assert "\n" not in str(raised.value)


def test_store_that_ends_within_a_batch_is_reported(opened: CacheReader) -> None:
    """Truncated after the check of its size: a memory map would end the process with SIGBUS."""
    cache = opened._cache
    in_place(opened, lambda path: os.truncate(path, SIDE**2), later_ns=0)
    opened._cache._opened = (*cache._opened[:2], SIDE**2, cache.path.stat().st_mtime_ns)
    with pytest.raises(DataError, match="ends before its last image"):
        read_all(opened)


def read_often(images: ImageReader) -> None:
    for _ in range(2 * _CHECK_EVERY // len(images)):
        read_all(images)


def test_checksums_find_other_pixels_with_the_old_size_and_time(
    opened: CacheReader, names: List[str]
) -> None:
    state = pickle.dumps(opened)
    read_all(opened)
    in_place(opened, overwrite, later_ns=0)
    with pytest.raises(DataError, match=r"is damaged: 0000.* is not what its index") as raised:
        read_often(opened)
    assert re.search("|".join(names), str(raised.value))
    with pytest.raises(DataError, match=r"is damaged: image \d+ of its index"):
        read_all(pickle.loads(state))  # the first batch of a process is always checked


def test_unreadable_store_is_reported(opened: CacheReader, tmp_path: Path) -> None:
    folder = os.open(tmp_path, os.O_RDONLY)
    os.dup2(folder, opened._cache._file)  # reading a folder is an OSError
    os.close(folder)
    status = os.fstat(opened._cache._file)
    opened._cache._opened = (0, 0, status.st_size, status.st_mtime_ns)
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
        read_all(opened)


def test_store_that_is_removed_is_read_on_and_cannot_be_opened_again(opened: CacheReader) -> None:
    expected, state = read_all(opened), pickle.dumps(opened)
    opened._cache.path.unlink()
    np.testing.assert_array_equal(read_all(opened), expected)
    with pytest.raises(DataError, match=r"cannot be opened \(No such file or directory\)"):
        pickle.loads(state)


@pytest.mark.parametrize("travels", [False, True], ids=["in this process", "in another process"])
def test_rows_of_a_rebuilt_store_are_never_mixed_up(tmp_path: Path, travels: bool) -> None:
    """Validation images and new loader processes open the store long after it was built."""
    images = tmp_path / "images"
    images.mkdir()
    for row in range(1, 5):
        Image.fromarray(noise(row)).save(images / f"{row:08d}_000.png")
    paths = find_images(images)
    opened = build(tmp_path / "store", paths)
    expected = np.stack([read_gray(paths[name], SIDE) for name in sorted(paths)])
    (images / "00000004_000.png").unlink()  # rows move up, the size stays
    Image.fromarray(noise(0)).save(images / "00000000_000.png")
    state = pickle.dumps(opened)
    build(tmp_path / "store", find_images(images))
    if travels:
        with pytest.raises(DataError, match="was rebuilt during the run"):
            pickle.loads(state)
        return
    got = read_all(opened)
    np.testing.assert_array_equal(got, expected)
