"""Building a store: the same bytes however often the build is interrupted."""

from __future__ import annotations

import collections
import contextlib
import json
import logging
import os
import resource
import shutil
from pathlib import Path
from typing import Callable, Dict, Iterator, NamedTuple, Tuple

import numpy as np
import pytest
from PIL import Image

from cxr_vit.data import cache_build
from cxr_vit.data.cache import CacheIndex, CachePaths, CacheSettings, open_images, refusal
from cxr_vit.data.cache_build import Chunk, build_cache, locked
from cxr_vit.data.images import find_images, read_gray
from cxr_vit.errors import DataError

SIDE = 8
SETTINGS = CacheSettings(SIDE, 1)
IMAGES = 300  # more than one process decodes, in five chunks
BAD = "00000100_000.png"


def name_of(row: int) -> str:
    return f"{row:08d}_000.png"


def write_images(folder: Path) -> Dict[str, str]:
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for row in range(IMAGES):
        pixels = random.integers(0, 256, (12, 12), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name_of(row))
    (folder / BAD).write_bytes(b"")
    return find_images(folder)


class Reference(NamedTuple):
    paths: Dict[str, str]
    where: CachePaths
    pixels: bytes
    index: bytes


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """A store built without interruption by one process."""
    root = tmp_path_factory.mktemp("reference")
    where = CachePaths.of(root, SIDE)
    paths = write_images(root / "images")
    build_cache(where, SETTINGS, paths, workers=1)
    return Reference(paths, where, where.pixels.read_bytes(), where.index.read_bytes())


@pytest.fixture
def where(tmp_path: Path) -> CachePaths:
    return CachePaths.of(tmp_path, SIDE)


def assert_complete(where: CachePaths, reference: Reference) -> None:
    assert where.pixels.read_bytes() == reference.pixels
    assert where.index.read_bytes() == reference.index
    assert not where.partial.exists()
    assert not where.journal.exists()


def build(where: CachePaths, paths: Dict[str, str]) -> int:
    """Build a store or resume its build; return how many images were not decoded again."""
    found = []

    @contextlib.contextmanager
    def record(label: str, *, done: int, total: int) -> Iterator[Callable[[int], None]]:
        found.append(done)
        yield lambda count: None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_build, "progress", record)
        build_cache(where, SETTINGS, paths, workers=1)
    return found[0]


def interrupt(where: CachePaths, paths: Dict[str, str], *, after_chunks: int) -> None:
    """Interrupt a build when the journal has this many chunks."""

    @contextlib.contextmanager
    def interrupt_it(label: str, *, done: int, total: int) -> Iterator[Callable[[int], None]]:
        left = iter(range(after_chunks - 1))

        def advance(count: int) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        yield advance

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_build, "progress", interrupt_it)
        with pytest.raises(KeyboardInterrupt):
            build_cache(where, SETTINGS, paths, workers=1)


def interrupt_before_the_index(where: CachePaths, paths: Dict[str, str]) -> str:
    """Interrupt a build after the pixels are renamed; return the journal."""

    def interrupt_it(index: CacheIndex, path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CacheIndex, "save", interrupt_it)
        with pytest.raises(KeyboardInterrupt):
            build_cache(where, SETTINGS, paths, workers=1)
    return where.journal.read_text()


# Not interrupted


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_processes_builds_the_same_bytes(
    reference: Reference, where: CachePaths, workers: int
) -> None:
    build_cache(where, SETTINGS, reference.paths, workers=workers)
    assert_complete(where, reference)


def test_order_in_which_images_are_found_does_not_matter(
    reference: Reference, where: CachePaths
) -> None:
    build_cache(where, SETTINGS, dict(reversed(list(reference.paths.items()))), workers=1)
    assert_complete(where, reference)


# Interrupted


@pytest.mark.parametrize(("chunks", "images"), [(1, 64), (3, 192), (5, 300)])
def test_interrupted_build_resumes(
    reference: Reference, where: CachePaths, chunks: int, images: int
) -> None:
    interrupt(where, reference.paths, after_chunks=chunks)
    assert not where.pixels.exists() and not where.index.exists()
    assert build(where, reference.paths) == images
    assert_complete(where, reference)


def test_interrupted_build_may_be_resumed_by_more_processes(
    reference: Reference, where: CachePaths, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="cxr_vit")
    interrupt(where, reference.paths, after_chunks=1)
    # Few images are left, for which no processes would be started.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache_build, "_FEW_IMAGES", 0)
        build_cache(where, SETTINGS, reference.paths, workers=2)
    assert_complete(where, reference)
    assert "resuming an interrupted cache: 64 of 300 images are in it" in caplog.text
    assert "cached 299 images in" in caplog.text


@pytest.mark.parametrize("kept", [0, 1, 100, -1], ids=lambda kept: f"up to {kept}")
def test_truncated_line_of_the_journal_is_ignored(
    reference: Reference, where: CachePaths, kept: int
) -> None:
    interrupt(where, reference.paths, after_chunks=3)
    lines = where.journal.read_text().splitlines(keepends=True)
    where.journal.write_text("".join(lines[:-1]) + lines[-1][:kept])
    assert build(where, reference.paths) == 128
    assert_complete(where, reference)


def test_journal_without_its_first_line_restarts_the_build(
    reference: Reference, where: CachePaths
) -> None:
    interrupt(where, reference.paths, after_chunks=3)
    plan = where.journal.read_text().splitlines()[0]
    for text in ("", plan[:20], plan):
        where.journal.write_text(text)
        assert build(where, reference.paths) == 0
        assert_complete(where, reference)


def test_build_of_the_first_release_is_resumed(reference: Reference, where: CachePaths) -> None:
    interrupt(where, reference.paths, after_chunks=3)
    plan, *lines = where.journal.read_text().splitlines(keepends=True)
    assert plan.count('"images"') == 1
    where.journal.write_text("".join([plan.replace('"images"', '"pictures"'), *lines]))
    assert build(where, reference.paths) == 192
    assert_complete(where, reference)


@pytest.mark.parametrize(
    "line",
    [
        "\0" * 40,
        "[192, [1, 2",
        "{}",
        "[5]",
        "[" * 10**5,
        '["64", [], []]',
        "[64, 5, 5]",
        "[64, [], []]",
        "[-64, [1], [null]]",
        "[65, [1], [null]]",
        "[6400000000000000000000, [1], [null]]",
        json.dumps([64, ["1"] * 64, [None] * 64]),
        json.dumps([64, [None] * 64, [None] * 64]),
        json.dumps([64, [None] * 64, ["claimed to be damaged"] * 64]),
    ],
    ids=lambda line: line[:24],
)
def test_damaged_line_of_the_journal_is_ignored(
    reference: Reference, where: CachePaths, line: str
) -> None:
    """A power loss damages lines; a kill does not."""
    interrupt(where, reference.paths, after_chunks=3)
    lines = where.journal.read_text().splitlines(keepends=True)
    where.journal.write_text("".join([*lines[:2], line + "\n", *lines[3:]]))
    assert build(where, reference.paths) == 128
    assert_complete(where, reference)


@pytest.mark.parametrize("plan", ["[" * 10**5, "[]", "5", "null", "\xff"])
def test_journal_of_another_first_line_restarts_the_build(
    reference: Reference, where: CachePaths, plan: str
) -> None:
    interrupt(where, reference.paths, after_chunks=3)
    _, *lines = where.journal.read_text().splitlines(keepends=True)
    where.journal.write_text("".join([plan + "\n", *lines]), encoding="latin-1")
    assert build(where, reference.paths) == 0
    assert_complete(where, reference)


def test_lost_pixels_are_decoded_again(reference: Reference, where: CachePaths) -> None:
    interrupt(where, reference.paths, after_chunks=3)
    with where.partial.open("r+b") as file:
        file.seek(70 * SIDE**2)
        file.write(bytes(SIDE**2))
    assert build(where, reference.paths) == 128
    assert_complete(where, reference)


@pytest.mark.parametrize("held", [None, 0, 100 * SIDE**2, 301 * SIDE**2])
def test_partial_file_that_is_lost_or_has_another_size_is_rebuilt(
    reference: Reference, where: CachePaths, held: int
) -> None:
    interrupt(where, reference.paths, after_chunks=3)
    if held is None:
        where.partial.unlink()
    else:
        os.truncate(where.partial, held)
    build(where, reference.paths)
    assert_complete(where, reference)


def test_kill_before_the_index_is_written_loses_nothing(
    reference: Reference, where: CachePaths
) -> None:
    interrupt_before_the_index(where, reference.paths)
    assert where.pixels.exists() and not where.index.exists() and not where.partial.exists()
    assert build(where, reference.paths) == IMAGES
    assert_complete(where, reference)


def test_kill_before_the_journal_is_removed_leaves_a_complete_store(
    reference: Reference, where: CachePaths
) -> None:
    journal = interrupt_before_the_index(where, reference.paths)
    build(where, reference.paths)
    where.journal.write_text(journal)
    index = CacheIndex.load(where.index)
    assert refusal(index, where.pixels, SETTINGS, reference.paths) is None
    os.truncate(where.pixels, 5)  # the old journal must not be used for the next store
    build(where, reference.paths)
    assert_complete(where, reference)


def test_kill_while_an_old_store_is_replaced_loses_nothing(
    reference: Reference, where: CachePaths
) -> None:
    interrupt(where, reference.paths, after_chunks=5)
    where.pixels.write_bytes(b"of an old store whose index is gone")
    assert build(where, reference.paths) == IMAGES
    assert_complete(where, reference)


def test_pixels_without_an_index_and_a_journal_are_not_used(
    reference: Reference, where: CachePaths
) -> None:
    where.pixels.write_bytes(bytes(len(reference.pixels)))
    assert build(where, reference.paths) == 0
    assert_complete(where, reference)


@pytest.fixture
def changed(reference: Reference, tmp_path: Path) -> Tuple[Dict[str, str], str]:
    """The images with another one in place of the first, and its path."""
    path = tmp_path / name_of(0)
    Image.fromarray(np.full((40, 50), 77, dtype=np.uint8)).save(path)
    return {**reference.paths, name_of(0): str(path)}, str(path)


def test_changed_images_restart_the_build(
    reference: Reference, where: CachePaths, changed: Tuple[Dict[str, str], str]
) -> None:
    interrupt(where, reference.paths, after_chunks=3)
    paths, _ = changed
    assert build(where, paths) == 0
    pixels = where.pixels.read_bytes()
    assert pixels[: SIDE**2] == bytes([77]) * SIDE**2
    assert pixels[SIDE**2 :] == reference.pixels[SIDE**2 :]


def test_other_settings_restart_the_build(reference: Reference, where: CachePaths) -> None:
    interrupt(where, reference.paths, after_chunks=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"{__name__}.SETTINGS", CacheSettings(SIDE, 2))
        assert build(where, reference.paths) == 0
    assert CacheIndex.load(where.index).settings.max_megapixels == 2


def test_old_store_stays_readable_until_the_new_one_is_complete(
    reference: Reference, where: CachePaths, changed: Tuple[Dict[str, str], str]
) -> None:
    build(where, reference.paths)
    interrupt(where, changed[0], after_chunks=5)
    index = CacheIndex.load(where.index)
    assert refusal(index, where.pixels, SETTINGS, reference.paths) is None
    out = np.empty((1, SIDE, SIDE), dtype=np.uint8)
    open_images(index, where.pixels).read(np.array([0]), out)
    np.testing.assert_array_equal(out[0], read_gray(reference.paths[name_of(0)], SIDE))
    assert build(where, changed[0]) == IMAGES
    assert where.pixels.read_bytes()[: SIDE**2] == bytes([77]) * SIDE**2


# Space and permissions


def test_too_little_space_is_reported_before_decoding(
    reference: Reference, where: CachePaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**6, 0, IMAGES * SIDE**2 - 1))
    with pytest.raises(DataError, match=r"the cache needs .* GB in .* GB are free") as caught:
        build_cache(where, SETTINGS, reference.paths, workers=1)
    assert "data.cache_dir" in str(caught.value) and "data.cache=off" in str(caught.value)
    assert not where.partial.exists() and not where.pixels.exists()


def test_full_disk_is_reported_with_what_to_do(reference: Reference, where: CachePaths) -> None:
    chunk = Chunk(0, [reference.paths[name_of(0)]])
    where.partial.touch()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3, limits[1]))
    try:
        with pytest.raises(DataError, match=r"File too large.*the build resumes"):
            cache_build.decode_chunk(chunk, settings=SETTINGS, pixels=where.partial)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    lock = CachePaths.of(tmp_path / "file", SIDE).lock
    with pytest.raises(DataError, match=r"cannot be written to .*data\.cache_dir"), locked(lock):
        raise AssertionError("the lock was taken")


# Links in a folder of others


@pytest.fixture
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file of the user's outside the folder of the cache, which keeps its content."""
    path = tmp_path_factory.mktemp("elsewhere") / "precious"
    path.write_text("precious\n" * 1000)
    yield path
    assert path.read_text() == "precious\n" * 1000
    assert os.listdir(path.parent) == [path.name]


def swap_for_link(path: Path, target: Path) -> None:
    path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize("name", ["journal", "partial"])
@pytest.mark.parametrize("dangling", [False, True])
def test_build_never_writes_through_a_link(
    reference: Reference, where: CachePaths, elsewhere: Path, name: str, dangling: bool
) -> None:
    interrupt(where, reference.paths, after_chunks=2)
    swap_for_link(getattr(where, name), elsewhere.parent / "new" if dangling else elsewhere)
    assert build(where, reference.paths) == 0
    assert_complete(where, reference)


def test_link_to_a_journal_is_not_cut(
    reference: Reference, where: CachePaths, tmp_path: Path
) -> None:
    interrupt(where, reference.paths, after_chunks=2)
    other = tmp_path / "journal of another"
    other.write_text(where.journal.read_text() + "cut short")
    before = other.read_bytes()
    swap_for_link(where.journal, other)
    assert build(where, reference.paths) == 0
    assert_complete(where, reference)
    assert other.read_bytes() == before


def test_pixels_that_are_a_link_are_replaced(
    reference: Reference, where: CachePaths, elsewhere: Path
) -> None:
    interrupt_before_the_index(where, reference.paths)
    swap_for_link(where.pixels, elsewhere)
    assert build(where, reference.paths) == 0
    assert_complete(where, reference)


def test_partial_file_that_becomes_a_link_is_refused(
    reference: Reference, where: CachePaths, elsewhere: Path
) -> None:
    where.partial.symlink_to(elsewhere)
    chunk = Chunk(0, [reference.paths[name_of(0)]])
    with pytest.raises(DataError, match=r"\.u8\.partial: a symbolic link, not a regular file"):
        cache_build.decode_chunk(chunk, settings=SETTINGS, pixels=where.partial)


@pytest.mark.parametrize("dangling", [False, True])
def test_lock_that_is_a_link_is_refused(where: CachePaths, elsewhere: Path, dangling: bool) -> None:
    where.lock.symlink_to(elsewhere.parent / "new" if dangling else elsewhere)
    before = elsewhere.stat()
    words = rf"{where.lock.name}: a symbolic link, not a regular file\)\. Set data\.cache_dir"
    with pytest.raises(DataError, match=words), locked(where.lock):
        raise AssertionError("the lock was taken")
    assert elsewhere.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.parametrize("name", ["journal", "partial"])
def test_folder_in_place_of_a_file_is_refused(
    reference: Reference, where: CachePaths, name: str
) -> None:
    path: Path = getattr(where, name)
    path.mkdir()
    with pytest.raises(
        DataError, match=rf"cannot be written to .* \({path.name}: Is a dir"
    ) as caught:
        build(where, reference.paths)
    assert "\n" not in str(caught.value)
    assert path.is_dir()
