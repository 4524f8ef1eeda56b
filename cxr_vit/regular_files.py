"""Open files in folders that others wrote: regular files only, to read of a limited size."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import stat
from pathlib import Path
from typing import Any, Dict, Optional, Union

#: By file type; everything else is a regular file or a folder.
_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFLNK: "a symbolic link",
}

#: Bytes of a metrics.json, which has some kilobytes for each label.
MOST_METRICS = 50_000_000


def read_bytes(path: Union[str, Path], *, limit: int, length: Optional[int] = None) -> bytes:
    """Return the content of a regular file of at most `limit` bytes, or its first `length` ones.

    Raises OSError otherwise, with a readable reason in `strerror`. A named pipe does not block, and
    a device is not opened, whether it has the path itself or a link leads to it.
    """
    try:
        _check_regular(Path(path).stat())
        # The path may lead elsewhere by now: do not wait for a pipe's other end.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    except ValueError as error:  # a zero byte or a lone surrogate in the name
        raise OSError(errno.EINVAL, "no path has such a name") from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        _check_regular(status)
        _check_size(status.st_size, limit)
        if length is not None:
            return file.read(length)
        data = file.read(status.st_size + 1)
        if len(data) > status.st_size:  # it grows, or is one of /proc, whose size is 0
            data += file.read(limit + 1 - len(data))
    _check_size(len(data), limit)
    return data


def no_link(path: Union[str, Path], flags: int) -> int:
    """Open a regular file at the path itself: the `opener` of files that are written.

    Raises OSError with a readable reason in `strerror` for anything else. A link is not followed:
    it may lead out of the folder.
    """
    name = str(path)  # an error shows a Path as PosixPath(...)
    with contextlib.suppress(FileNotFoundError):
        _check_regular(os.lstat(path), name)
    # The path may lead elsewhere by now: do not follow, and do not wait for a pipe's other end.
    safe = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
    descriptor = os.open(path, flags | safe, 0o666)
    try:
        _check_regular(os.fstat(descriptor), name)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def truncate(path: Path, size: int) -> None:
    """Give a file a size, as `os.truncate` does, but follow no link."""
    with open(path, "r+b", opener=no_link) as file:
        file.truncate(size)


def read_json(path: Union[str, Path], *, limit: int) -> Dict[str, Any]:
    """Return the object in a JSON file of at most `limit` bytes.

    Raises OSError as `read_bytes` does, and ValueError with a readable reason if the file is no
    strict JSON (NaN, infinite numbers and lone surrogates are refused) or no object.
    """
    text = read_bytes(path, limit=limit).decode("utf-8")
    try:
        value = json.loads(text, parse_float=_finite, parse_constant=_finite)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # fails on a lone surrogate
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("it holds no JSON object")
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is no finite number")
    return number


def _check_regular(status: os.stat_result, name: Optional[str] = None) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), name)
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a special file")
        raise OSError(errno.EINVAL, f"{kind}, not a regular file", name)


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise OSError(errno.EFBIG, f"{size:,} bytes, more than the limit of {limit:,}")
