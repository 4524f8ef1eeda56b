"""Find the image files that a command line names: files, folders and lists."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Dict, Iterator, List, Sequence

from cxr_vit.data.dicom import is_dicom
from cxr_vit.data.images import walk
from cxr_vit.data.names import IMAGE_EXTENSIONS, extension
from cxr_vit.data.table_files import read_columns, read_header, refuse_absent
from cxr_vit.data.text_files import read_list
from cxr_vit.errors import DataError
from cxr_vit.regular_files import read_bytes

#: Columns of a table that hold the images, the first one counts: NIH's, CheXpert's and others.
IMAGE_COLUMNS = (
    *("image", "Image Index", "Path", "path", "file", "filename", "file_name"),
    *("image_path", "image_id", "ImageID", "dicom", "dicom_path", "dicom_id"),
)
_TABLES, _LISTS = (".csv", ".tsv", ".parquet"), (".txt",)
#: An index of the DICOM files of a folder; no image.
_DICOM_INDEX = "DICOMDIR"
_LARGEST_FILE = 2**40


def check_paths(paths: Sequence[Path]) -> None:
    """Raise DataError if a path does not exist."""
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise DataError(
            f"{missing[0]}{more}: no such file or folder. Give image files, folders of them, or a"
            " CSV that lists them."
        )


def find_inputs(paths: Sequence[Path]) -> List[str]:
    """Return the paths of the images, each file once.

    The order is that of the given paths; files of a folder are sorted by path, those of a table are
    in its order. A file that a table or a list names may be missing.

    Raises DataError if a path does not exist, a folder cannot be read, a table has no column of
    images, or there are no images.
    """
    check_paths(paths)
    found: Dict[str, str] = {}
    folders: Dict[str, str] = {}
    for path in paths:
        for name in _images_of(path):
            folder, base = os.path.split(name)
            if folder not in folders:
                folders[folder] = os.path.realpath(folder)
            found.setdefault(os.path.join(folders[folder], base), name)
    if not found:
        raise DataError(
            f"no images in {', '.join(map(str, paths))}. Files are found by the extensions"
            f" {', '.join(sorted(IMAGE_EXTENSIONS))}, and DICOM files by their content."
        )
    return list(found.values())


def _images_of(path: Path) -> Iterator[str]:
    if path.is_dir():
        yield from _in_folder(path)
    elif path.suffix.lower() in _TABLES:
        yield from (str(path.parent / name) for name in _in_table(path))
    elif path.suffix.lower() in _LISTS:
        yield from (str(path.parent / name) for name in sorted(read_list(path)))
    else:
        yield str(path)


def _in_folder(root: Path) -> Iterator[str]:
    """Yield the images of a folder, sorted by path; hidden files and folders are left out."""

    def refuse(error: OSError) -> None:
        raise DataError(
            f"{error.filename}: the folder cannot be read ({error.strerror}). Make it readable, or"
            " give the folders below it one by one."
        )

    found: List[str] = []
    for folder, names in walk(root, on_error=refuse, hidden=False):
        for name in names:
            path = os.path.join(folder, name)
            if not name.startswith(".") and (
                extension(name) in IMAGE_EXTENSIONS or _is_dicom_file(path)
            ):
                found.append(path)
    yield from sorted(found)


def _is_dicom_file(path: str) -> bool:
    """Whether the content of a file is DICOM's: the names of many have no extension."""
    if Path(path).name == _DICOM_INDEX:
        return False
    try:
        return is_dicom(read_bytes(path, limit=_LARGEST_FILE, length=132))
    except OSError:
        return False


def _in_table(path: Path) -> List[str]:
    header = read_header(path, IMAGE_COLUMNS)
    column = next((name for name in IMAGE_COLUMNS if name in header), IMAGE_COLUMNS[0])
    remedy = f"The images are read from one of {', '.join(IMAGE_COLUMNS)}: rename yours."
    refuse_absent(str(path), [column], header, remedy)
    return [name for name in read_columns(path, [column])[column] if name]
