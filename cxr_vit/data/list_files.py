"""The files that list a split's films: their names, and what they list.

Imports neither torch nor pandas.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Dict, Set, Tuple

from cxr_vit.config.schema import DataSection
from cxr_vit.data.text_files import read_text
from cxr_vit.errors import DataError

__all__ = ["LIST_NAMES", "find_lists", "read_list"]

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
