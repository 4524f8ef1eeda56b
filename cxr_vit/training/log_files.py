"""The files of loggers: they outlive a full disk, a killed process and a clock that is set back."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import socket
import time
from collections import deque
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Callable, Deque, Iterator, Optional, Union

from cxr_vit.files import replacing
from cxr_vit.regular_files import no_link, truncate

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

logger = logging.getLogger(__name__)

#: Bytes of one file that may wait for room on the disk.
_MOST_WAITING = 16 * 2**20
#: Bytes of the longest line that is read as one; no event of ours has more.
_LONGEST_LINE = 2**20
#: The second in the name of an event file.
_STAMP = re.compile(r"events\.out\.tfevents\.([0-9]{10})\.")
#: Version of the format of event files.
_VERSION = "brain.Event:2"


class LogFile:
    """A file to which records are appended in their order, each whole or not at all.

    An error of the disk does not end the run: it is warned of once, and what is not yet written
    waits in memory for the next record. At most 16 MiB wait; later records are dropped.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        #: Records and changes of the file, in the order in which they take effect.
        self._waiting: Deque[Union[bytes, Callable[[], None]]] = deque()
        self._bytes_waiting = 0
        self._dropped = 0
        self._fails = False
        #: Size without the record that was written in part, None if there is none.
        self._whole: Optional[int] = None

    def change(self, change: Callable[[], None]) -> None:
        """Call a function that changes the file, after the records given so far.

        It is called again with the next record if it raises OSError.
        """
        self._waiting.append(change)
        self.flush()

    def append(self, record: bytes) -> None:
        """Append a record. The file is closed each time, so that a killed run loses none."""
        if self._waiting and self._bytes_waiting + len(record) > _MOST_WAITING:
            if not self._dropped:
                text = "%s: over %d MiB wait for room on the disk; what follows is not kept"
                logger.warning(text, self.path, _MOST_WAITING // 2**20)
            self._dropped += 1
        else:
            self._waiting.append(record)
            self._bytes_waiting += len(record)
        self.flush()

    def flush(self) -> None:
        """Write what waits, as far as there is room."""
        try:
            while self._waiting:
                first = self._waiting[0]
                if callable(first):
                    first()
                else:
                    self._write(first)
                    self._bytes_waiting -= len(first)
                self._waiting.popleft()
        except OSError as error:
            if self._whole is not None:  # readers find whole records only
                with contextlib.suppress(OSError):
                    truncate(self.path, self._whole)
            if not self._fails:
                text = "%s cannot be written (%s). Training goes on; the events are kept meanwhile."
                logger.warning(text, self.path, error.strerror or error)
            self._fails = True
            return
        if self._dropped:
            logger.warning("%s is written again; %d events are missing.", self.path, self._dropped)
        elif self._fails:
            logger.info("%s is written again.", self.path)
        self._fails, self._dropped = False, 0

    def close(self) -> None:
        """Write what waits; warn if that is not possible."""
        if self._waiting:
            self.flush()
        missing = self._dropped + sum(not callable(item) for item in self._waiting)
        if missing:
            logger.warning("%s: the last %d events could not be written.", self.path, missing)

    def _write(self, record: bytes) -> None:
        file = no_link(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        try:
            size = os.fstat(file).st_size
            if self._whole is not None and size > self._whole:
                size = self._whole
                os.ftruncate(file, size)
            self._whole = size
            rest = memoryview(record)
            while rest:
                rest = rest[os.write(file, rest) :]
        finally:
            os.close(file)  # a network file system may say only here that it is full
        self._whole = None


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield lines, an overlong one in parts: a damaged file takes little memory."""
    return iter(partial(file.readline, _LONGEST_LINE), b"")


def keep_lines(path: Path, keeps: Callable[[int, bytes], Optional[bool]]) -> None:
    """Drop the lines of a file, given with their index, for which `keeps` is not true.

    It is None for a line that cannot be read. These are counted in a warning, but for the last
    line, which a killed process may have left incomplete. The file is not held in memory. Raises
    OSError if the path has no regular file of its own, but a link for example.
    """
    if not os.path.lexists(path):
        return
    with open(path, "rb", opener=no_link) as file:
        lines = enumerate(read_lines(file))
        if all(line.endswith(b"\n") and keeps(index, line) for index, line in lines):
            return  # nothing to do, which a full disk does not hinder
        file.seek(0)
        damaged = 0
        with replacing(path) as temporary, temporary.open("wb") as kept:
            for index, line in enumerate(read_lines(file)):
                verdict = keeps(index, line)
                if verdict:
                    kept.write(line.rstrip(b"\r\n") + b"\n")
                is_whole = line.endswith(b"\n") or len(line) >= _LONGEST_LINE
                damaged += verdict is None and is_whole
    if damaged:
        logger.warning("%s: dropped %d lines that cannot be read.", path, damaged)


class EventFile:
    """A TensorBoard event file; a new one comes after those of the folder.

    TensorBoard reads the files in the order of their names, which begin with a time: after the
    clock was set back, it would take the newest file for the oldest.
    """

    def __init__(self, folder: Path) -> None:
        stamps = [int(time.time())]
        for file in folder.glob("events.out.tfevents.*"):
            stamp = _STAMP.match(file.name)
            stamps += [int(stamp.group(1)) + 1] if stamp else []
        name = f"events.out.tfevents.{max(stamps):010d}.{socket.gethostname()}.{os.getpid()}.0"
        self._file = LogFile(folder / name)
        self._records = io.BytesIO()
        self._add(file_version=_VERSION)

    def purge(self, first_step: int) -> None:
        """Let TensorBoard ignore what earlier files have from a step on."""
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self._add(step=first_step, file_version=_VERSION)
        self._add(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def add(self, summary: Summary, step: int = 0) -> None:
        """Add a summary, which `flush` writes."""
        self._add(step=step, summary=summary)

    def _add(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.summary.writer.record_writer import RecordWriter

        event = Event(wall_time=time.time(), **fields)
        RecordWriter(self._records).write(event.SerializeToString())

    def flush(self) -> None:
        """Write what was added."""
        self._file.append(self._records.getvalue())
        self._records = io.BytesIO()

    def close(self) -> None:
        """Write what was added, or warn if that is not possible."""
        self.flush()
        self._file.close()
