"""Find the image files that a command line names: files, folders and lists."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, Optional, Sequence

from cxr_vit.console import count
from cxr_vit.data.dicom import is_dicom
from cxr_vit.data.images import find_images, walk
from cxr_vit.data.names import IMAGE_EXTENSIONS, extension
from cxr_vit.data.table_files import read_columns, read_header, refuse_absent
from cxr_vit.data.text_files import read_list
from cxr_vit.errors import DataError
from cxr_vit.regular_files import read_bytes

logger = logging.getLogger(__name__)

#: Columns of a table that hold the images, the first one counts: NIH's, CheXpert's and others.
IMAGE_COLUMNS = (
    *("image", "Image Index", "Path", "path", "file", "filename", "file_name"),
    *("image_path", "image_id", "ImageID", "dicom", "dicom_path", "dicom_id"),
)
_TABLES, _LISTS = (".csv", ".tsv", ".parquet"), (".txt",)
#: An index of the DICOM files of a folder; no image.
_DICOM_INDEX = "DICOMDIR"
_LARGEST_FILE = 2**40
_PATHS_IN_LIST = "Give paths in the list, relative to its folder, in place of names."


def check_paths(paths: Sequence[Path]) -> None:
    """Raise DataError if a path does not exist, or cannot be looked at."""
    problems = [(path, problem) for path in paths for problem in [_problem(path)] if problem]
    if problems:
        path, problem = problems[0]
        more = f" and {len(problems) - 1} more" if len(problems) > 1 else ""
        raise DataError(
            f"{path}{more}: {problem}. Give image files, folders of them, or a CSV that lists them."
        )


def _problem(path: Path) -> Optional[str]:
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return "no such file or folder"
    except OSError as error:
        return error.strerror or str(error)
    return None


def find_inputs(paths: Sequence[Path]) -> List[str]:
    """Return the paths of the images, each file once.

    The order is that of the given paths; files of a folder are sorted by path, those of a table are
    in its order. What a table or a list names is relative to its folder, else it is looked up below
    it as the images of a training are (`find_images`). Some of it may be missing.

    Raises DataError if a path does not exist, a folder cannot be read, a table has no column of
    images, nothing that a list names is there, or there are no images.
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
        yield from _listed(path, _in_table(path))
    elif path.suffix.lower() in _LISTS:
        yield from _listed(path, sorted(read_list(path)))
    else:
        yield str(path)


def _listed(path: Path, names: Sequence[str]) -> Iterable[str]:
    """Return the paths of the images that a list names, in its order."""
    folder = path.parent
    missing = [name for name in names if not os.path.lexists(folder / name)]
    # NIH's tables have names, and the files are in folders below.
    below = [name for name in missing if not Path(name).is_absolute()]
    found = find_images(folder, below, remedy=_PATHS_IN_LIST) if below else {}
    if missing and len(missing) == len(names) and not found:
        raise DataError(
            f"{path}: none of the {len(names)} images that it lists is there, e.g. {names[0]!r}."
            f" They are searched in {folder} and the folders below it. Put the list above the"
            " images, or give the whole paths in it."
        )
    return [found.get(name) or str(folder / name) for name in names]


def _in_folder(root: Path) -> Iterator[str]:
    """Yield the images of a folder, sorted by path; hidden files and folders are left out."""

    def refuse(error: OSError) -> None:
        raise DataError(
            f"{error.filename}: the folder cannot be read ({error.strerror}). Make it readable, or"
            " give the folders below it one by one."
        )

    found: List[str] = []
    others = 0
    for folder, names in walk(root, on_error=refuse, hidden=False):
        for name in names:
            path = os.path.join(folder, name)
            if name.startswith("."):
                continue
            if extension(name) in IMAGE_EXTENSIONS or _is_dicom_file(path):
                found.append(path)
            else:
                others += 1
    if others:
        logger.info("%s: %s of other kinds left out", root, count(others, "file"))
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
