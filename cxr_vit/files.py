"""Atomic writes, locks and file lookup."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
from pathlib import Path
from typing import IO, Callable, Iterator, Optional, Sequence

from cxr_vit.errors import CheckpointError, DataError

#: File that makes a folder a checkpoint.
STATE = "trainer_state.json"
#: Seconds between attempts to take a lock.
_POLL_S = 0.2


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path, then rename it to `path`.

    The temporary file is in the same folder. It is flushed to disk before the rename and removed
    after an error, so that `path` holds the old content or the new one, never a part.
    """
    temporary = path.with_name(f".{path.name}.writing")
    try:
        yield temporary
        with temporary.open("rb") as file:
            try:
                os.fsync(file.fileno())
            except OSError as error:  # a file system without fsync
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                    raise
        temporary.replace(path)
    except BaseException:
        remove(temporary)
        raise


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; a missing path is no error."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)


@contextlib.contextmanager
def lock(
    path: Path,
    *,
    timeout_s: Optional[float] = None,
    on_wait: Callable[[], None] = lambda: None,
    on_unsupported: Callable[[], None] = lambda: None,
) -> Iterator[IO[str]]:
    """Hold an exclusive lock on a file, which is created if missing.

    The operating system releases the lock when the process ends, however it ends. `on_wait` is
    called once if another process holds it, `on_unsupported` if the file system has no locks; the
    body then runs without one. Raises BlockingIOError if another process still holds the lock
    after `timeout_s` seconds (None: wait without limit), OSError if the file cannot be created.
    """
    with path.open("w") as file:
        started = time.monotonic()
        waits = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if timeout_s is not None and time.monotonic() - started > timeout_s:
                    raise
                if not waits:
                    on_wait()
                waits = True
                time.sleep(_POLL_S)
            except OSError:
                on_unsupported()
                break
        yield file


def find_file(
    root: Path, given: Optional[str], names: Sequence[str], *, key: str
) -> Optional[Path]:
    """Return the file given in the configuration under `key`, else the first of `names` in `root`.

    Returns None if no file is given and none found; raises DataError if the given one is missing.
    """
    if given is None:
        return next((root / name for name in names if (root / name).is_file()), None)
    if not Path(given).is_file():
        raise DataError(f"{key}={given}: no such file. Correct {key} or leave it out.")
    return Path(given)


def checkpoint_of(path: Path) -> Path:
    """Return a checkpoint's folder: the path itself, or `best` (else `last`) of a run's folder.

    Raises CheckpointError if it is neither.
    """
    if (path / STATE).is_file():
        return path
    for name in ("best", "last"):
        if (path / "checkpoints" / name / STATE).is_file():
            return path / "checkpoints" / name
    if path.is_file():
        problem = "it is a file, and a checkpoint is a folder"
        if (path.parent / STATE).is_file():
            raise CheckpointError(f"{path} is not a checkpoint: {problem}. Use {path.parent}.")
    elif (path / "config.yaml").is_file():
        problem = "this run has saved none yet"
    else:
        problem = f"it has no {STATE}" if path.is_dir() else "there is no such folder"
    raise CheckpointError(
        f"{path} is not a checkpoint: {problem}. Use a run's folder or a folder such as"
        " runs/<name>/checkpoints/best."
    )


def run_of_checkpoint(checkpoint: Path) -> Path:
    """Return the folder of the run that a checkpoint belongs to.

    Raises CheckpointError if no config.yaml is two folders above it.
    """
    # By the text of the path, so that messages show the path as given although `best` is a link.
    folder = Path(os.path.normpath(checkpoint / ".." / ".."))
    if not (folder / "config.yaml").is_file():
        folder = checkpoint.resolve().parent.parent  # a link from elsewhere
    if not (folder / "config.yaml").is_file():
        raise CheckpointError(
            f"{checkpoint} is not in a run's folder: no {folder / 'config.yaml'}. Use a folder such"
            " as runs/<name>/checkpoints/best."
        )
    return folder
