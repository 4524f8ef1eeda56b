"""Kill `prepare` at random moments, resume it, and compare the store with an uninterrupted one.

    python -m benchmarks.kill_prepare [--kills N] [--seed N] [--images DIR]

SIGKILL comes at a random moment of the build or of its resumption; the command is run again until
it ends, and its files are compared byte for byte. Then kills at chosen moments after the last image
follow, triggered by changes of the files. No process may be left after a kill. The exit status is 1
if anything is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Callable, Dict, List, Optional, Sequence, Tuple

from benchmarks.linked_images import NIH, original_images, write_linked_set
from cxr_vit.data.cache import CachePaths

REPOSITORY = Path(__file__).resolve().parents[1]
IMAGE_SIZE = 224
#: Set in the environment of every process of a command, to find those left over.
MARK = "CXR_VIT_KILL_PREPARE"
#: Seconds after which a killed command's processes must be gone.
PATIENCE_S = 2.0
RESUMING = re.compile(r"resuming an interrupted cache: (\d+) of")

Condition = Callable[[], bool]


class Trial:
    """Runs of `prepare` on one data set and one cache folder.

    Parameters
    ----------
    root
        Folder of the data set.
    folder
        Folder of the cache.
    workers
        Number of decoding processes.
    """

    def __init__(self, root: Path, folder: Path, workers: int) -> None:
        self.folder = folder
        self.paths = CachePaths.of(folder, IMAGE_SIZE)
        self.faults: List[str] = []
        self.slowest_end_s = 0.0
        self._done = 0
        self._log = folder.with_name(f"{folder.name}.log")
        self._command = [
            *(sys.executable, "-m", "cxr_vit", "prepare"),
            *(f"data.root={root}", f"data.cache_dir={folder}", f"data.cache_workers={workers}"),
            f"data.image_size={IMAGE_SIZE}",
        ]

    def run(self, condition: Condition) -> Optional[float]:
        """Run `prepare`; kill it once the condition holds.

        Returns
        -------
        float or None
            Seconds from its start to the kill; None if it ended before.
        """
        mark = uuid.uuid4().hex
        start = time.monotonic()
        with self._log.open("w") as log:
            process = subprocess.Popen(
                self._command,
                cwd=str(REPOSITORY),
                env={**os.environ, MARK: mark},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            while process.poll() is None and not condition():
                pass
            process.send_signal(signal.SIGKILL)  # no effect on one that has ended
            status = process.wait()
        seconds = time.monotonic() - start
        self._check_progress(ended=status == 0)
        self._check_left_over(mark)
        if status == -signal.SIGKILL:
            return seconds
        if status != 0:
            self.faults.append(f"prepare exited with {status}: {self._log.read_text()}")
        return None

    def images_done(self) -> int:
        """Return the number of finished images in the journal."""
        if not self.paths.journal.is_file():
            return 0
        lines = self.paths.journal.read_text(encoding="utf-8").splitlines(keepends=True)
        return sum(len(json.loads(line)[1]) for line in lines[1:] if line.endswith("\n"))

    def present(self) -> str:
        """Return the names of the store's existing files."""
        return " ".join(sorted(path.name for path in self.folder.glob("*films_*"))) or "nothing yet"

    def _check_progress(self, *, ended: bool) -> None:
        """Check that a resumed run reuses every image in the journal."""
        resumed = RESUMING.search(self._log.read_text(encoding="utf-8"))
        reused = int(resumed.group(1)) if resumed else 0
        if (resumed or ended) and reused != self._done:
            self.faults.append(f"{self._done} images were in the journal, {reused} were reused")
        self._done = self.images_done()

    def _check_left_over(self, mark: str) -> None:
        start = time.monotonic()
        left = processes_marked(mark)
        while left and time.monotonic() - start < PATIENCE_S:
            time.sleep(0.01)
            left = processes_marked(mark)
        self.slowest_end_s = max(self.slowest_end_s, time.monotonic() - start)
        if left:
            self.faults.append(f"still running {PATIENCE_S} s after the kill: {left}")


def processes_marked(mark: str) -> Dict[int, str]:
    """Return process id -> command line of the processes whose environment has the mark."""
    found: Dict[int, str] = {}
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                command = (folder / "cmdline").read_bytes().replace(b"\0", b" ")
                found[int(folder.name)] = command.decode(errors="replace")
        except OSError:  # it has ended, or belongs to another user
            continue
    return found


def never() -> bool:
    """Return False, after a short sleep."""
    time.sleep(0.01)
    return False


def after(seconds: float) -> Condition:
    """Make a condition that holds from this many seconds after now."""
    end = time.monotonic() + seconds

    def holds() -> bool:
        time.sleep(0.001)
        return time.monotonic() >= end

    return holds


def appears(path: Path) -> Condition:
    """Make a condition that holds once a file is created or replaced."""

    def stamp() -> Optional[Tuple[int, int]]:
        try:
            status = path.stat()
        except FileNotFoundError:
            return None
        return status.st_ino, status.st_mtime_ns

    before = stamp()
    return lambda: stamp() not in (before, None)


def vanishes(path: Path) -> Condition:
    """Make a condition that holds once a file has existed and is gone."""
    seen = [False]

    def holds() -> bool:
        exists = path.exists()
        seen[0] = seen[0] or exists
        return seen[0] and not exists

    return holds


def all_done(trial: Trial, num_images: int) -> Condition:
    """Make a condition that holds once the journal has the last image."""

    def holds() -> bool:
        time.sleep(0.01)
        return trial.images_done() == num_images

    return holds


def differences(folder: Path, reference: Path) -> List[str]:
    """Compare the files of two caches, byte for byte."""
    names = {path.name for path in (*folder.iterdir(), *reference.iterdir())}
    different = []
    for name in sorted(names):
        here, there = folder / name, reference / name
        if not (here.exists() and there.exists()):
            different.append(f"{name} is only in {folder if here.exists() else reference}")
        elif here.read_bytes() != there.read_bytes():
            different.append(f"{name} differs from the uninterrupted one")
    return different


def finish(trial: Trial, reference: Path) -> None:
    """Run `prepare` to its end and compare."""
    if trial.run(never) is None:
        compare(trial, reference)


def compare(trial: Trial, reference: Path) -> None:
    """Compare a finished cache with the reference, then remove it."""
    found = differences(trial.folder, reference)
    print("    ended;", "; ".join(found) if found else "identical to the uninterrupted one")
    trial.faults += found
    shutil.rmtree(trial.folder)


def kill_at_random(
    trial: Trial, reference: Path, *, kills: int, longest_s: float, source: random.Random
) -> None:
    """Kill this many times and resume each time; when a build ends, compare and start again."""
    done = 0
    while done < kills:
        seconds = trial.run(after(source.uniform(0, longest_s)))
        if seconds is None:
            compare(trial, reference)
            continue
        if trial.paths.index.exists():  # it was about to end: not counted
            print(f"   (a kill after {seconds:.2f} s found the store complete)")
            continue
        done += 1
        print(
            f"kill {done:2} after {seconds:5.2f} s: {trial.images_done():5} images done;"
            f" {trial.present()}"
        )
    finish(trial, reference)


def kill_at_the_end(trial: Trial, reference: Path, *, rounds: int, num_images: int) -> None:
    """Kill after the last image: before, between and after the final renames."""
    paths = trial.paths
    temporary = paths.index.with_name(f".{paths.index.name}.writing")  # files.replacing
    moments: Dict[str, Callable[[], Condition]] = {
        "the journal has the last image": lambda: all_done(trial, num_images),
        "the pixels are renamed": lambda: vanishes(paths.partial),
        "the index is being written": lambda: appears(temporary),
        "the index is renamed": lambda: appears(paths.index),
    }
    for _ in range(rounds):
        for moment, condition in moments.items():
            seconds = trial.run(condition())
            if seconds is None:
                print(f"when {moment}: it ended before the kill")
                compare(trial, reference)
                continue
            print(f"when {moment} ({seconds:.2f} s): {trial.present()}")
        finish(trial, reference)


def make_data(root: Path, images: Path, num_images: int) -> None:
    """Link the real images; without any, write synthetic ones of 512 pixels."""
    if images == NIH / "images" and not images.is_dir():
        print(f"no real images in {images}: synthetic ones of 512 pixels")
        command = [sys.executable, "-m", "cxr_vit", "sample", "--out", str(root)]
        command += ["--images", str(num_images), "--size", "512"]
        subprocess.run(command, cwd=str(REPOSITORY), check=True)
    else:
        write_linked_set(root, original_images(images), num_images)


def main(argv: Sequence[str]) -> int:
    """Kill, resume, compare; return 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, default=NIH / "images", metavar="DIR")
    parser.add_argument("--num-images", type=int, default=1500, metavar="N")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="at random moments")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of kills at the end")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="data.cache_workers")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    arguments = parser.parse_args(argv)
    sys.stdout.reconfigure(line_buffering=True)
    with tempfile.TemporaryDirectory(prefix="kill_prepare-") as folder:
        data, reference = Path(folder) / "data", Path(folder) / "reference"
        make_data(data, arguments.images, arguments.num_images)
        uninterrupted = Trial(data, reference, arguments.workers)
        start = time.monotonic()
        uninterrupted.run(never)
        longest_s = time.monotonic() - start
        print(
            f"{arguments.num_images} images without interruption: {longest_s:.1f} s,"
            f" {uninterrupted.present()}"
        )
        trial = Trial(data, Path(folder) / "killed", arguments.workers)
        if not uninterrupted.faults:
            source = random.Random(arguments.seed)
            kill_at_random(
                trial, reference, kills=arguments.kills, longest_s=longest_s, source=source
            )
            kill_at_the_end(
                trial, reference, rounds=arguments.rounds, num_images=arguments.num_images
            )
    faults = [*uninterrupted.faults, *trial.faults]
    print(f"all processes ended within {trial.slowest_end_s:.2f} s of a kill")
    print("\n".join(["FAULTS:", *faults]) if faults else "all stores are identical; no fault")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
