"""`python -m cxr_vit prepare` as a command, interrupted and killed, and its processes."""

from __future__ import annotations

import csv
import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Callable, Dict, List

import numpy as np
import pytest
from PIL import Image

from conftest import SMALL
from cxr_vit.cli import main
from cxr_vit.data.cache import CachePaths, CacheSettings
from cxr_vit.data.cache_build import Chunk, build_cache, in_parallel
from cxr_vit.data.images import find_images
from cxr_vit.errors import DataError

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"
)
IMAGES = 768
SIDE = 64
#: Not a divisor of a chunk's length, so that no two chunks have the same images.
KINDS = 41


def write_set(root: Path, *, images: int, kinds: int, side: int) -> None:
    (root / "images").mkdir(parents=True)
    made = np.random.default_rng(0).integers(0, 256, (kinds, side, side), dtype=np.uint8)
    names = [f"{row:08d}_000.png" for row in range(images)]
    for row, name in enumerate(names):
        path = root / "images" / name
        if row < kinds:
            Image.fromarray(made[row]).save(path, compress_level=1)
        else:
            os.link(str(root / "images" / names[row % kinds]), str(path))
    rows = [f"{name},Mass,0,{int(name[:8])},50,F,AP" for name in names]
    (root / "Data_Entry_2017_v2020.csv").write_text("\n".join([HEADER, *rows]) + "\n")


def wait_until(true: Callable[[], object], *, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.001)


class Prepare:
    """A `prepare` in its own process group."""

    def __init__(self, root: Path, cache: Path, *more: str, size: int = SIDE) -> None:
        self.where = CachePaths.of(cache, size)
        self.log = cache.parent / f"{cache.name}.{random.getrandbits(32)}.log"
        arguments = [
            f"data.root={root}", f"data.cache_dir={cache}", f"data.image_size={size}",
            "data.cache_workers=2", *more,
        ]  # fmt: skip
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cxr_vit", "prepare", *arguments],
                cwd=str(Path(__file__).resolve().parents[2]),
                stdout=log,
                stderr=log,
                start_new_session=True,
                # The tests may run with SIGINT ignored, e.g. in the background of a shell.
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.default_int_handler),
            )

    def text(self) -> str:
        return self.log.read_text()

    def end(self) -> int:
        return self.process.wait(timeout=60)

    def chunks_done(self) -> int:
        journal = self.where.journal
        return len(journal.read_text().splitlines()) - 1 if journal.exists() else 0

    def workers(self) -> List[int]:
        """Return its running processes that decode images."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                stat = (folder / "stat").read_text().rpartition(")")[2].split()
                started = (folder / "cmdline").read_bytes()
            except (OSError, IndexError):
                continue
            if int(stat[2]) == self.process.pid and stat[0] != "Z" and b"spawn_main" in started:
                found.append(int(folder.name))
        return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("prepare") / "nih"
    write_set(root, images=IMAGES, kinds=KINDS, side=512)
    return root


@pytest.fixture(scope="module")
def uninterrupted(root: Path) -> Dict[str, bytes]:
    where = CachePaths.of(root.parent, SIDE)
    build_cache(where, CacheSettings(SIDE, 64), find_images(root), workers=1)
    return {path.name: path.read_bytes() for path in (where.pixels, where.index)}


def assert_complete(where: CachePaths, uninterrupted: Dict[str, bytes]) -> None:
    there = {path.name: path for path in where.pixels.parent.iterdir() if path != where.lock}
    assert set(there) == set(uninterrupted)
    for name, path in there.items():
        assert path.read_bytes() == uninterrupted[name], name


# Interrupted and killed


@pytest.mark.slow
def test_interrupted_and_killed_builds_resume_to_the_same_bytes(
    root: Path, uninterrupted: Dict[str, bytes], tmp_path: Path
) -> None:
    seeded = random.Random(4)
    # Chunks in the journal at each signal; at 0, the processes are just starting.
    first, second = sorted(seeded.sample(range(3, 8), 2))
    signals = [(0, signal.SIGKILL), (2, signal.SIGINT), (first, signal.SIGKILL)]
    for chunks, number in [*signals, (second, signal.SIGKILL)]:
        run = Prepare(root, tmp_path / "cache")
        wait_until(run.workers)
        wait_until(lambda: run.chunks_done() >= chunks)  # noqa: B023
        if number == signal.SIGINT:  # Ctrl-C in a terminal signals all processes
            os.killpg(run.process.pid, signal.SIGINT)
            assert run.end() == 130, run.text()
            lines = run.text().splitlines()
            assert [line for line in lines if "resuming an interrupted cache" not in line] == []
        else:
            time.sleep(seeded.uniform(0, 0.02))
            run.process.kill()
            assert run.end() == -signal.SIGKILL
        wait_until(lambda: not run.workers(), seconds=2)  # noqa: B023
        assert run.where.journal.exists() and not run.where.index.exists()
    last = Prepare(root, tmp_path / "cache")
    assert last.end() == 0, last.text()
    assert "resuming an interrupted cache" in last.text()
    assert_complete(last.where, uninterrupted)


def test_ctrl_c_while_the_processes_start_prints_no_traceback(root: Path, tmp_path: Path) -> None:
    run = Prepare(root, tmp_path / "cache")
    wait_until(run.workers)
    status = Path(f"/proc/{run.workers()[0]}/status").read_text()
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.end() == 130, run.text()
    wait_until(lambda: not run.workers(), seconds=2)
    assert run.text().strip() == ""
    # A process ignores the signal from its start.
    masks = dict(line.split(":\t") for line in status.splitlines() if line.startswith("Sig"))
    ignored = int(masks["SigIgn"], 16) | int(masks["SigBlk"], 16)
    assert ignored & 1 << (signal.SIGINT - 1)


@pytest.mark.slow
def test_second_process_waits_for_the_first_to_build(
    tmp_path: Path,
) -> None:
    write_set(tmp_path / "nih", images=40, kinds=40, side=24)
    cache = tmp_path / "cache"
    cache.mkdir()
    where = CachePaths.of(cache, 16)
    with where.lock.open("w") as lock:  # makes both wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        runs = [Prepare(tmp_path / "nih", cache, size=16) for _ in range(2)]
        wait_until(lambda: all("another process builds the cache" in run.text() for run in runs))
        assert not where.partial.exists()
    assert [run.end() for run in runs] == [0, 0]
    assert sorted(run.text().count("cached 40 images in") for run in runs) == [0, 1]
    assert all("40 of 40 images" in run.text() for run in runs)


# Output


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Forty images; the first three are empty files."""
    root = tmp_path / "nih"
    write_set(root, images=40, kinds=40, side=24)
    for path in sorted((root / "images").iterdir())[:3]:
        path.write_bytes(b"")
    return root


def test_bad_images_are_an_error_and_the_store_is_complete(small: Path, tmp_path: Path) -> None:
    run = Prepare(small, tmp_path / "cache", size=16)
    assert run.end() == 2
    lines = run.text().splitlines()
    assert "DataError: 3 of 40 images are unusable:" in lines
    assert "DataError:   00000002_000.png: the file is empty. Fetch it again." in lines
    assert "Traceback" not in run.text()
    assert run.where.index.exists() and not run.where.journal.exists()
    with (tmp_path / "cache" / "skipped.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [f"{row:08d}_000.png" for row in range(3)]
    assert {row["reason"] for row in rows} == {"the file is empty. Fetch it again."}


def prepare(root: Path, *more: str) -> int:
    return main(
        ["prepare", f"data.root={root}", "data.image_size=16", "data.on_bad_image=skip", *more]
    )


def test_journal_beside_a_complete_store_is_removed(small: Path) -> None:
    assert prepare(small) == 0
    journal = small / "cxr_vit_cache" / "films_16.journal"
    journal.write_text("left by a kill between the last two steps\n")
    assert prepare(small) == 0
    assert not journal.exists()


def test_verify_reports_success_or_what_is_wrong(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(small) == 0
    assert "37 of 40 images" in capsys.readouterr().out
    assert prepare(small, "--verify") == 0
    out = capsys.readouterr().out
    assert "all checksums match; 40 images equal their files\n" in out
    pixels = small / "cxr_vit_cache" / "films_16.u8"
    data = bytearray(pixels.read_bytes())
    data[8 * 256] ^= 1
    pixels.write_bytes(bytes(data))
    with pytest.raises(DataError, match=r"1 images of the cache .* are wrong") as caught:
        prepare(small, "--verify")
    assert "00000008_000.png: its pixels in the cache are damaged\n" in str(caught.value)


def test_damaged_store_can_be_rebuilt_as_verify_says(small: Path) -> None:
    prepare(small)
    pixels = small / "cxr_vit_cache" / "films_16.u8"
    pixels.write_bytes(bytes(len(pixels.read_bytes())))
    with pytest.raises(DataError, match=r"Remove .*films_16\.json and run"):
        prepare(small, "--verify")
    (small / "cxr_vit_cache" / "films_16.json").unlink()
    assert prepare(small) == 0
    assert prepare(small, "--verify") == 0


@pytest.mark.slow
def test_training_lists_skipped_images_in_its_run_folder(
    small: Path, tmp_path: Path, repository: Path
) -> None:
    run = tmp_path / "run"
    arguments = [f"data.root={small}", f"run.dir={run}", "train.steps=1", "data.on_bad_image=skip"]
    result = subprocess.run(
        [sys.executable, "train.py", *SMALL, *arguments],
        cwd=str(repository),
        stderr=subprocess.PIPE,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "3 of 40 images are unusable and left out" in result.stderr
    with (run / "skipped.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == [f"{row:08d}_000.png" for row in range(3)]


# in_parallel


def rows_of(chunk: Chunk) -> List[int]:
    return [chunk.first_row + place for place in range(len(chunk.paths))]


def fail_at_100(chunk: Chunk) -> List[int]:
    if chunk.first_row == 100:
        raise DataError("row 100 is wrong")
    return rows_of(chunk)


def exit_at_once(chunk: Chunk) -> List[int]:
    os._exit(9)


CHUNKS = [Chunk(start, [""] * 50) for start in range(0, 500, 50)]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_chunk_has_one_result(workers: int) -> None:
    results = list(in_parallel("", rows_of, CHUNKS, workers=workers))
    assert sorted(row for rows in results for row in rows) == list(range(500))


def test_no_chunks_have_no_results() -> None:
    assert list(in_parallel("", rows_of, [], workers=2)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_error_in_a_process_is_raised(workers: int) -> None:
    with pytest.raises(DataError, match="row 100 is wrong"):
        list(in_parallel("", fail_at_100, CHUNKS, workers=workers))


def test_process_that_ends_early_is_reported() -> None:
    with pytest.raises(DataError, match=r"ended before its work.*data\.cache_workers=1"):
        list(in_parallel("", exit_at_once, CHUNKS, workers=2))
