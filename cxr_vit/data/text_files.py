"""Text files from anywhere, read safely. Imports neither torch nor pandas."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Dict, Set, Tuple

from cxr_vit.config.schema import DataSection
from cxr_vit.errors import DataError

__all__ = ["LIST_NAMES", "find_lists", "read_list", "read_text"]


#: What lies in place of a text file, by how it begins.
_MISTAKEN: Tuple[Tuple[bytes, str], ...] = (
    (b"\xff\xfe", "UTF-16 text. Save it as UTF-8."),
    (b"\xfe\xff", "UTF-16 text. Save it as UTF-8."),
    (b"version https://git-lfs", "a Git LFS pointer in place of the file. Run git lfs pull."),
    (b"<", "a web page or XML. Download the file itself."),
    (b"\x1f\x8b", "packed with gzip. Unpack it with gunzip."),
    (b"PK\x03\x04", "a zip archive or an Excel workbook. Unpack it, or export it as CSV."),
    (b"\x89PNG", "a PNG image. Give the text file that belongs here."),
)


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without its byte order mark if it has one.

    Raises
    ------
    DataError
        If the file cannot be read, is empty, or is anything but UTF-8 text.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}).") from error
    if not raw.strip():
        raise DataError(f"{path}: the file is empty. Fetch it again.")
    for start, what in _MISTAKEN:
        if raw.startswith(start):
            raise DataError(f"{path}: this is {what}")
    if b"\0" in raw:
        raise DataError(f"{path}: not text, or UTF-16 (it holds zero bytes). Save it as UTF-8.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: not UTF-8 text (byte 0x{raw[error.start]:02x} in line {line}); perhaps"
            " Latin-1 or Windows-1252. Save it as UTF-8."
        ) from error


#: Key of the configuration -> spellings in use: NIH's, that of the copy at 224 pixels, and those of
#: the validation list that most papers use.
LIST_NAMES: Dict[str, Tuple[str, ...]] = {
    "train_list": ("train_val_list.txt", "train_val_list_NIH.txt", "train_list.txt"),
    "val_list": ("val_list.txt", "val_list_NIH.txt", "community_val_list.txt"),
    "test_list": ("test_list.txt", "test_list_NIH.txt"),
}

#: The first field of a line, without its folder and quotes: `images_001/00000001_000.png 0 1 0`.
_LISTED = re.compile(r'^[ \t"]*(?:[^,;\t\n]*[/\\])?([^\s,;"/\\]+)', re.MULTILINE)


def find_lists(root: Path, data: DataSection) -> Dict[str, Path]:
    """Return the list files that are there, by key: those given, else those in the root."""
    found: Dict[str, Path] = {}
    for key, names in LIST_NAMES.items():
        given = getattr(data, key)
        candidates = [root / name for name in names] if given is None else [Path(given)]
        there = [path for path in candidates if path.is_file()]
        if there:
            found[key] = there[0]
        elif given is not None:
            raise DataError(
                f"data.{key}={given}: no such file. Correct data.{key} or leave it out."
            )
    return found


def read_list(path: Path) -> Set[str]:
    """Read a list of file names, one a line.

    Parameters
    ----------
    path
        UTF-8, any line ends. A folder before the name and further fields after it, as in
        ``images_001/00000001_000.png 0 1 0``, are passed over.

    Raises
    ------
    DataError
        If it cannot be read, is empty or no UTF-8 text.
    """
    return set(_LISTED.findall("\n".join(read_text(path).splitlines())))
