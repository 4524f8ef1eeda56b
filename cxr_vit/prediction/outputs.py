"""A file of rows that is continued after an interruption, and the images that the model sees."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path
from typing import IO, Any, Dict, Iterator, List, Mapping, Sequence, Union

import numpy as np
from PIL import Image

from cxr_vit.data.views import CENTER
from cxr_vit.errors import DataError
from cxr_vit.files import Locked, lock, replacing, sync, write_text
from cxr_vit.prediction.rows import CsvRows, Done, JsonRows
from cxr_vit.regular_files import no_link, read_json

FileRows = Union[CsvRows, JsonRows]
_MOST_FACTS = 2**26  # bytes
_ANOTHER = "Correct this, or give another --out."
_CONTINUE = (
    "Correct this, and run the same command with --resume: the rows that are there are kept."
)


def facts_file(path: Path) -> Path:
    """Return the file beside an output that says what its rows depend on."""
    return path.with_name(f"{path.name}.json")


def refuse_existing(path: Path, *, resumes: bool) -> None:
    """Raise DataError if an output cannot be made, or is there and is not to be continued."""
    with _locked(path):  # what is written beside it first
        _refuse_existing(path, resumes=resumes)


def _refuse_existing(path: Path, *, resumes: bool) -> None:
    if resumes:
        return
    for each in (path, facts_file(path)):
        if os.path.lexists(each):
            raise DataError(
                f"{each} exists and is not overwritten. Give another --out, remove it, or continue"
                " it with --resume."
            )


class OutputFile:
    """An open file that rows are appended to, and what it says of the images in it.

    Attributes
    ----------
    done
        The rows that were there.
    """

    def __init__(self, path: Path, file: IO[bytes], done: List[Done]) -> None:
        self.done = done
        self._path, self._file = path, file

    def write(self, lines: Sequence[str]) -> None:
        """Append lines and flush them to disk. Raises DataError if that fails."""
        try:
            self._file.write("".join(lines).encode("utf-8"))
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _cannot_write(self._path, error, _CONTINUE) from error


@contextlib.contextmanager
def open_output(
    path: Path, rows: FileRows, facts: Mapping[str, Any], *, resumes: bool
) -> Iterator[OutputFile]:
    """Begin a file of rows, or continue one that was begun with the same facts.

    A last line that was cut off is removed. Raises DataError if the file is there and `resumes` is
    not set, has other facts or other lines, or is written by another process.
    """
    with _locked(path), contextlib.ExitStack() as stack:
        _refuse_existing(path, resumes=resumes)
        try:
            _begin_or_compare(path, json.loads(json.dumps(facts)))
            file = stack.enter_context(open(path, "a+b", opener=no_link))
            output = OutputFile(path, file, _read(path, file, rows))
            if file.tell() == 0:
                output.write([rows.header])
                sync(path.parent)
        except OSError as error:
            raise _cannot_write(path, error) from error
        yield output


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    if not path.name or os.path.isdir(path):  # noqa: PTH112  (Path.is_dir may raise OSError)
        raise DataError(f"--out {path} is a folder. Give the name of a file.")
    if not os.path.isdir(path.parent):  # noqa: PTH112
        raise DataError(f"{path}: the folder {path.parent} does not exist. Make it, or correct it.")
    with contextlib.ExitStack() as stack:
        try:
            held = lock(path.with_name(f".{path.name}.lock"), timeout_s=0, removes=lambda: True)
            stack.enter_context(held)
        except Locked as other:
            raise DataError(
                f"{path} is written by {other}. Wait for its end, or give another --out."
            ) from other
        except OSError as error:
            raise _cannot_write(path, error) from error
        yield


def _cannot_write(path: Path, error: OSError, remedy: str = _ANOTHER) -> DataError:
    return DataError(f"{path} cannot be written ({error.strerror or error}). {remedy}")


def _begin_or_compare(path: Path, facts: Dict[str, Any]) -> None:
    """Write the facts of a new output; raise DataError if one that is there has others."""
    beside = facts_file(path)
    if os.path.lexists(path) or os.path.lexists(beside):
        _refuse_other_facts(path, beside, facts)
    else:
        write_text(beside, json.dumps(facts, indent=2) + "\n")


def _refuse_other_facts(path: Path, beside: Path, facts: Dict[str, Any]) -> None:
    try:
        recorded = _flat(read_json(beside, limit=_MOST_FACTS))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be continued: {beside}, which says what its rows depend on, cannot be"
            f" read ({error}). Give another --out."
        ) from error
    wanted = _flat(facts)
    differing = [key for key in {**wanted, **recorded} if wanted.get(key) != recorded.get(key)]
    if differing:
        key, more = differing[0], len(differing) - 1
        raise DataError(
            f"{path} was begun with other settings, in {beside}: {key} was"
            f" {json.dumps(recorded.get(key))[:200]} and is {json.dumps(wanted.get(key))[:200]}"
            f"{f', and {more} more' if more else ''}. Give the same, or another --out."
        )


def _flat(facts: Mapping[str, Any], start: str = "") -> Dict[str, Any]:
    found: Dict[str, Any] = {}
    for key, value in facts.items():
        name = f"{start}{key}"
        found.update(_flat(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return found


def _read(path: Path, file: IO[bytes], rows: FileRows) -> List[Done]:
    """Read the lines that are there; remove the last one if it is cut off."""
    done: List[Done] = []
    end = 0
    file.seek(0)
    for number, raw in enumerate(file, start=1):
        if not raw.endswith(b"\n"):
            break
        try:
            line = raw.decode("utf-8")
            if number > 1 or not rows.header:
                done.append(rows.done(line))
            elif line != rows.header:
                raise ValueError("other columns")
        except (ValueError, RecursionError) as error:
            reason = str(error).split("\n")[0][:200]
            raise DataError(
                f"{path}: line {number} is none that this command writes ({reason}). Give another"
                " --out."
            ) from error
        end += len(raw)
    file.truncate(end)
    file.seek(end)
    return done


def make_picture_folder(option: str, folder: Path, *, resumes: bool) -> None:
    """Make the folder of an option. Raises DataError if it has files and `resumes` is not set."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_empty = next(folder.iterdir(), None) is None
    except OSError as error:
        raise DataError(f"{option} {folder} cannot be used ({error.strerror}).") from error
    if not (is_empty or resumes):
        raise DataError(f"{option} {folder} is not empty. Give a new folder.")


class SeenImages:
    """A folder of what the model sees, the middle `image_size` pixels, as PNG files."""

    def __init__(self, folder: Path, image_size: int) -> None:
        self._folder, self._size = folder, image_size

    def make(self, *, resumes: bool) -> None:
        """Make the folder. Raises DataError if it has files and `resumes` is not set."""
        make_picture_folder("--preprocess-check", self._folder, resumes=resumes)

    def write(self, number: int, path: str, pixels: np.ndarray) -> None:
        """Write the part of an image, uint8 ``[S, S]``. Raises OSError if that fails."""
        part = CENTER.of(pixels[None], self._size)[0]
        with replacing(self._folder / file_name(number, path, ".png")) as temporary:
            Image.fromarray(part).save(temporary, "PNG")


def file_name(number: int, path: str, suffix: str) -> str:
    """Return a name for a file about an image: safe, and another one for each number."""
    return f"{number:06d}_{safe_name(Path(path).stem)}{suffix}"


def safe_name(text: str) -> str:
    """Return the beginning of a text with nothing but letters, digits, ``_`` and ``-``."""
    return re.sub("[^A-Za-z0-9_-]+", "_", text)[:80]
