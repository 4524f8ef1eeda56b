"""Atomic writes, locks and file lookup."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import stat
import tempfile
import time
from pathlib import Path
from typing import IO, Any, Callable, Dict, Iterator, Optional, Sequence

from cxr_vit.errors import DataError
from cxr_vit.regular_files import read_bytes

logger = logging.getLogger(__name__)

#: Seconds between attempts to take a lock.
_POLL_S = 0.2
#: Size of the longest owner that a lock file may name, bytes.
_LONGEST_OWNER = 4096


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file atomically: yield a temporary path, then rename it to `path`.

    The temporary file is in the same folder. It is flushed to disk before the rename and removed
    after an error, so that `path` holds the old content or the new one, never a part.
    """
    temporary = path.with_name(f".{path.name}.writing")
    remove(temporary)  # of a killed process, or a link that leads elsewhere
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except BaseException:
        remove(temporary)
        raise


@contextlib.contextmanager
def writing_to(folder: Path, what: str = "the report") -> Iterator[None]:
    """Raise DataError for an error of the disk: the report, or `what`, cannot be written."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{what} cannot be written to {folder} ({error.strerror or error}). Correct this,"
            " or give another folder with --out."
        ) from error


def make_folder(
    given: Optional[Path], default: Path, *, levels: int = 1, what: str = "the report"
) -> Path:
    """Make the folder of a report, or of `what`, and write to it once.

    Without a given one it is the default, in the run.

    Raises DataError if that is not possible, or if the run has a link there: it may lead anywhere.
    The last `levels` folders of the default are in the run.
    """
    folder = given or default
    inside = [folder, *folder.parents][:levels]
    links = [path for path in inside if path.is_symlink()]
    if given is None and links:
        raise DataError(
            f"{what} cannot be written to {links[0]} (a symbolic link). Remove it, or give the"
            " folder with --out."
        )
    with writing_to(folder, what):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    return folder


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # a file system without fsync
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder; a missing path is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()


class Locked(Exception):
    """Another process holds a lock; the message names it."""


@contextlib.contextmanager
def lock(
    path: Path,
    *,
    timeout_s: Optional[float] = None,
    removes: Optional[Callable[[], bool]] = None,
    on_wait: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Hold an exclusive lock on a file, which is created if missing and names its owner.

    The operating system releases the lock when the process ends, however it ends. On a file system
    without locks the owner in the file counts, unless it is a process of this host that has ended.
    At the end the file names no owner; `removes` may say to remove it, or to leave it as it is.
    `on_wait` is called once if another process holds the lock. Raises Locked if it still does after
    `timeout_s` seconds (None: wait without limit), OSError if the file cannot be created or is no
    regular file.
    """
    started = time.monotonic()
    waits = False
    while True:
        with _open_lock(path) as file:
            if _take(file, path):
                _write_owner(file)
                try:
                    yield
                finally:
                    _release(file, path, removes)
                return
            other = _describe_owner(path)
        if timeout_s is not None and time.monotonic() - started > timeout_s:
            raise Locked(other)
        if not waits:
            on_wait()
        waits = True
        time.sleep(_POLL_S)


def _open_lock(path: Path) -> IO[bytes]:
    """Open a lock file; a link that leads elsewhere is not followed."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    file = os.fdopen(os.open(path, flags, 0o666), "r+b", buffering=0)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def _release(file: IO[bytes], path: Path, removes: Optional[Callable[[], bool]]) -> None:
    """Leave the file, or name no owner any more and remove it unless it is another one by now."""
    with contextlib.suppress(OSError):
        is_removed = removes is not None and removes()
        if removes is None or is_removed:
            file.truncate(0)
        if is_removed and _is_at(file, path):
            path.unlink()


def _take(file: IO[bytes], path: Path) -> bool:
    """Whether the lock of an open file was free and is now taken."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return _take_by_owner(file, path)
    # Its last owner may have removed the file: a lock on that one would exclude nobody.
    return _is_at(file, path)


def _take_by_owner(file: IO[bytes], path: Path) -> bool:
    """Take the lock by writing the owner into the file, for file systems without locks."""
    owner = _read_owner(path)
    if owner and _may_be_alive(owner):
        return False
    if owner:
        logger.warning("%s: taking over from %s, which has ended", path, _words(owner))
    _write_owner(file)
    time.sleep(_POLL_S)  # another process may have done the same at this moment; one is the last
    return _is_at(file, path) and _read_owner(path) == _this_process()


def _is_at(file: IO[bytes], path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _this_process() -> Dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "pid": pid, "started": _start_of(pid)}


def _start_of(pid: int) -> str:
    """Return when a process started, in ticks since boot; "" if there is no such process.

    Numbers of processes are used again; with its start a process is known for certain.
    """
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return "" if Path("/proc/self").exists() or not _exists(pid) else "unknown"
    return status.rpartition(")")[2].split()[19]


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _write_owner(file: IO[bytes]) -> None:
    owner = {**_this_process(), "time": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):  # on a full disk the lock holds without it
        file.truncate(0)
        os.pwrite(file.fileno(), json.dumps(owner).encode(), 0)


def _read_owner(path: Path) -> Dict[str, Any]:
    """Return host, pid and start of the process that a lock file names; empty if it names none."""
    try:
        owner = json.loads(read_bytes(path, limit=_LONGEST_OWNER))
        return {key: owner[key] for key in ("host", "pid", "started")}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return {}


def _may_be_alive(owner: Dict[str, Any]) -> bool:
    """Whether a process may be running: one of another host always may."""
    if owner["host"] != socket.gethostname():
        return True
    return isinstance(owner["pid"], int) and _start_of(owner["pid"]) == owner["started"]


def _words(owner: Dict[str, Any]) -> str:
    return f"process {owner['pid']} on {owner['host']}"


def _describe_owner(path: Path) -> str:
    """Describe the process that holds a lock, as far as its file tells."""
    owner = _read_owner(path)
    return _words(owner) if owner else "another process"


def is_lock_file(path: Path) -> bool:
    """Whether a file is one that `lock` made."""
    return bool(_read_owner(path))


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
