"""Find CSVs and list files and read them as text; errors name the actual type of a wrong file.

Also writes CSVs that a spreadsheet program does not take for formulas.
"""

from __future__ import annotations

import errno
import gzip
import io
import os
import re
import zlib
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Dict,
    Iterable,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Tuple,
    Union,
)

from cxr_vit.config.data_sections import DataSection
from cxr_vit.config.fields import TableFiles
from cxr_vit.data.names import EXTENSIONS, parts_of
from cxr_vit.errors import DataError
from cxr_vit.files import find_file, replacing
from cxr_vit.regular_files import read_bytes

if TYPE_CHECKING:
    import pandas as pd


class Limits(NamedTuple):
    """The most that is read of a text file: bytes, once unpacked, lines, and bytes of a line."""

    size: int
    lines: int
    line: int


#: NIH's CSV has 112,121 lines of 71 bytes. Tables take ten times their size in memory, and more of
#: it for many columns.
LIMITS = Limits(50_000_000, 2_000_000, 30_000)
#: Of a table of which some columns are read: MIMIC-CXR has 377,110 rows in 60 MB, PadChest 160,868
#: rows with reports.
TABLE_LIMITS = Limits(256_000_000, 2_000_000, 1_000_000)
#: A file of another kind, or one that is too large.
_NO_TEXT_FILE = (errno.EINVAL, errno.EFBIG)

_GZIP = b"\x1f\x8b"

#: First bytes of files often found in place of a text file, and what they are.
_MISTAKEN: Tuple[Tuple[bytes, str], ...] = (
    (b"\xff\xfe", "UTF-16 text. Save it as UTF-8."),
    (b"\xfe\xff", "UTF-16 text. Save it as UTF-8."),
    (b"version https://git-lfs", "a Git LFS pointer in place of the file. Run git lfs pull."),
    (b"<", "a web page or XML. Download the file itself."),
    (_GZIP, "packed with gzip. Unpack it with gunzip."),
    (b"PK\x03\x04", "a zip archive or an Excel workbook. Unpack it, or export it as CSV."),
    (b"\x89PNG", "a PNG image. Give the text file that belongs here."),
)

#: NIH's, the corrected labels first, and that of Kaggle's sample.
CSV_FILES = ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv", "sample_labels.csv")

#: Configuration key -> known names: NIH's, those of the copy at 224 pixels, and those of the
#: validation list that most papers use.
LIST_NAMES: Dict[str, Tuple[str, ...]] = {
    "train_list": ("train_val_list.txt", "train_val_list_NIH.txt", "train_list.txt"),
    "val_list": ("val_list.txt", "val_list_NIH.txt", "community_val_list.txt"),
    "test_list": ("test_list.txt", "test_list_NIH.txt"),
}

#: A name with an extension before further fields: `images_001/00000001_000.png 0 1 0`.
_NAMED = re.compile(r".*\.(?:" + "|".join(sorted(EXTENSIONS)) + r")(?=\s|$)", re.IGNORECASE)

#: Text that spreadsheet programs run as a formula, or that such text was made harmless as.
_FORMULA = re.compile("'*[-=+@\t\r\n\uff1d\uff0b\uff0d\uff20]")
#: Text that needs quotes, also where a semicolon or a tab separates fields.
_NEEDS_QUOTES = re.compile(r"""[\s,;|"']""")


def check_data_root(data: DataSection) -> None:
    """Raise DataError if the root, the CSV or a given list file is missing.

    Nothing is read, and neither torch nor pandas is imported: the error comes before the seconds
    that they take. A root that does not exist is right if `data.sample_images` will write it.
    """
    root = Path(data.root)
    if data.format == "table":
        find_tables(data)
        find_lists(root, data)
    elif data.sample_images is None or root.exists():
        find_csv(root, data.csv)
        find_lists(root, data)


def find_csv(root: Path, given: Optional[TableFiles]) -> Path:
    """Return the label CSV: the given file, else NIH's in `root`; raise DataError without one."""
    _check_root(root)
    assert not isinstance(given, dict), "a file per split is for data.format=table"
    if given is not None:
        return _in_folders(root, given, key="data.csv")
    found = _find(root, None, CSV_FILES, key="data.csv")
    if found is None:
        raise DataError(
            f"no label CSV: looked for {', '.join(str(root / name) for name in CSV_FILES)}."
            " Put NIH's Data_Entry_2017_v2020.csv there or set data.csv."
        )
    return found


def find_tables(data: DataSection) -> Tuple[Dict[str, Path], List[Path]]:
    """Return the files of `data.csv` by split, one of no split as "", and those of `data.join`.

    Raises DataError if one is missing.
    """
    root = Path(data.root)
    _check_root(root)
    given = data.csv if isinstance(data.csv, dict) else {"": data.csv}
    tables = {
        str(split): _in_folders(root, str(path), key=f"data.csv.{split}".rstrip("."))
        for split, path in given.items()
    }
    return tables, [_in_folders(root, path, key="data.join") for path in data.join]


def _check_root(root: Path) -> None:
    if not root.is_dir():
        raise DataError(
            f"data.root={root} is not a folder. Set data.root (or DATASET_DIR, the folder above it)"
            " to the folder of the images, such as NIH's chest-xray-nihcc, or write a synthetic"
            " data set: python -m cxr_vit sample --out data/sample"
        )


def _in_folders(root: Path, given: str, *, key: str) -> Path:
    """Return a file given relative to the current folder or to the root.

    Raises DataError if there is none, or if each has another one.
    """
    found = [path for path in (Path(given), root / given) if path.is_file()]
    if found and not found[0].samefile(found[-1]):
        raise DataError(
            f"{key}={given}: {Path.cwd() / given} and {root.absolute() / given} are two files. Give"
            " the whole path of one, or remove the other."
        )
    if found:
        return found[0]
    places = dict.fromkeys(str(folder / given) for folder in (Path.cwd(), root.absolute()))
    raise DataError(
        f"{key}={given}: no such file. Looked for {' and '.join(places)}. Correct {key} or"
        " data.root."
    )


def find_lists(root: Path, data: DataSection) -> Dict[str, Path]:
    """Return the list files that exist, by key: those given, else those in the root.

    Raises DataError if a given file does not exist, or if one in the root is no regular file.
    """
    found = {
        key: _find(root, getattr(data, key), names, key=f"data.{key}")
        for key, names in LIST_NAMES.items()
    }
    return {key: path for key, path in found.items() if path is not None}


def _find(root: Path, given: Optional[str], names: Sequence[str], *, key: str) -> Optional[Path]:
    """Return what `find_file` does; raise DataError where it passes over a file of a known name.

    Without the error the next name would count, and the split would be another.
    """
    found = find_file(root, given, names, key=key)
    for name in names if given is None else ():
        if root / name == found:
            break
        if os.path.lexists(root / name):
            raise DataError(
                f"{root / name}: a folder, a special file or a link to none, not a regular file."
                f" Put the file itself there, remove it, or set {key}."
            )
    return found


def read_list(path: Path) -> Set[str]:
    """Read a list of names or paths of images, one per line; raise DataError as `read_text` does.

    Further fields of a line are ignored: after a comma, a semicolon or a tab, or after a blank if
    the name has the extension of an image. Other blanks are part of the name.
    """
    return {name for name in map(_listed, read_text(path).splitlines()) if parts_of(name)}


def _listed(line: str) -> str:
    line = line.strip(" \t")
    if line.startswith('"'):
        return line[1:].partition('"')[0].strip()
    # Each step takes time in proportion to the line: it may be long and hold nothing but marks.
    field = line.replace(";", ",").replace("\t", ",").partition(",")[0].strip(' "')
    named = _NAMED.match(field)
    return named.group() if named else field


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without its byte order mark.

    Raises DataError if the file cannot be read, is too large or empty, or is not UTF-8 text.
    """
    raw = read_raw(path, LIMITS.size)
    check_text(path, raw, LIMITS)
    return raw.decode("utf-8-sig")


def read_raw(path: Path, limit: int, *, unpacks: bool = False) -> bytes:
    """Return the bytes of a file, unpacked if `unpacks` and it is packed with gzip.

    Raises DataError if the file cannot be read or is damaged, or if there are more than `limit`.
    """
    try:
        raw = read_bytes(path, limit=limit)
    except OSError as error:
        raise _unreadable(path, error) from error
    if not (unpacks and raw.startswith(_GZIP)):
        return raw
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
            raw = file.read(limit + 1)  # no more, whatever it unpacks to
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip ({error}). Fetch the file again.") from error
    if len(raw) > limit:
        raise DataError(
            f"{path}: unpacks to more than the limit of {limit:,} bytes. Give the file that belongs"
            " here."
        )
    return raw


def read_start(path: Path, length: int) -> bytes:
    """Return the first bytes of a file, unpacked if it is packed with gzip, at most `length`.

    Raises DataError if it cannot be read.
    """
    try:
        raw = read_bytes(path, limit=TABLE_LIMITS.size, length=length)
        if raw.startswith(_GZIP):
            return zlib.decompressobj(wbits=31).decompress(raw, length)
    except OSError as error:
        raise _unreadable(path, error) from error
    except zlib.error as error:
        raise DataError(f"{path}: damaged gzip ({error}). Fetch the file again.") from error
    return raw


def _unreadable(path: Path, error: OSError) -> DataError:
    advice = " Give the file that belongs here." if error.errno in _NO_TEXT_FILE else ""
    return DataError(f"{path}: cannot be read ({error.strerror}).{advice}")


def check_text(path: Path, raw: bytes, limits: Limits) -> None:
    """Raise DataError if the content of a file is no UTF-8 text within the limits."""
    if not raw.strip():
        raise DataError(f"{path}: the file is empty. Fetch it again.")
    for start, what in _MISTAKEN:
        if raw.startswith(start):
            raise DataError(f"{path}: this is {what}")
    lines = [len(line) for line in io.BytesIO(raw.replace(b"\r", b"\n"))]
    if len(lines) > limits.lines or max(lines) > limits.line:
        raise DataError(
            f"{path}: no table or list of images: {len(lines):,} lines, the longest of"
            f" {max(lines):,} bytes; at most {limits.lines:,} and {limits.line:,} are read. Give"
            " the file that belongs here."
        )
    if b"\0" in raw:
        raise DataError(f"{path}: not text, or UTF-16 (it holds zero bytes). Save it as UTF-8.")
    try:
        raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}: not UTF-8 text (byte 0x{raw[error.start]:02x} in line {line}); perhaps"
            " Latin-1 or Windows-1252. Save it as UTF-8."
        ) from error


def csv_line(cells: Iterable[Union[str, float, None]]) -> str:
    """Return a line of a CSV; None and NaN are empty.

    Text that a spreadsheet program would run as a formula begins with an apostrophe, as OWASP
    advises against CSV injection; `original_text` removes it. Numbers stay numbers.
    """
    return ",".join(map(_cell, cells)) + "\n"


def _cell(value: Union[str, float, None]) -> str:
    if value is None or value != value:
        return ""
    if not isinstance(value, str):
        return str(value)
    text = f"'{value}" if _FORMULA.match(value) else value
    escaped = text.replace('"', '""')
    return f'"{escaped}"' if _NEEDS_QUOTES.search(text) else text


def original_text(text: str) -> str:
    """Return the text that `csv_line` wrote as such a cell."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def write_csv(path: Path, table: pd.DataFrame) -> None:
    """Write a table atomically, with cells as `csv_line` makes them."""
    rows = zip(*(table[column].to_numpy() for column in table))
    # A name that is not UTF-8 is written with \x escapes.
    options: Any = {"encoding": "utf-8", "errors": "backslashreplace", "newline": ""}
    with replacing(path) as temporary, temporary.open("w", **options) as file:
        file.writelines(map(csv_line, [table.columns, *rows]))
