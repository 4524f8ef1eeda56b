"""Text files from anywhere, read safely. Imports neither torch nor pandas."""

from __future__ import annotations

from pathlib import Path
from typing import Tuple

from cxr_vit.errors import DataError

__all__ = ["read_text"]

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
