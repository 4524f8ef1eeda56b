"""Match the names of images, as tables and lists write them, with files and with each other."""

from __future__ import annotations

from collections import Counter
from typing import Dict, Iterable, List, Sequence

from cxr_vit.errors import DataError

#: Extensions of files that are read as images.
IMAGE_EXTENSIONS = frozenset(["png", "jpg", "jpeg", "dcm", "dicom"])

#: Extensions that a table may have where the folder has another format.
EXTENSIONS = IMAGE_EXTENSIONS | frozenset(["dicm", "tif", "tiff", "bmp", "gif", "webp", "jp2"])

#: Folders deeper than this do not tell images apart in tables that people write.
_DEEPEST = 16
#: Texts that may be of one file by these folders; the time to find files grows with their number.
_MOST_ALIKE = 100


def parts_of(text: str) -> List[str]:
    r"""Split a path at ``/`` and ``\``: a table may come from another system."""
    return [part for part in text.replace("\\", "/").split("/") if part.strip() not in ("", ".")]


def extension(name: str) -> str:
    """Return the extension of an image's file name, in lower case; "" if it has none.

    Of ``"1.2.840.10008"``, an identifier of DICOM, no part is an extension.
    """
    stem, _, end = name.rpartition(".")
    end = end.lower()
    return end if stem and end in EXTENSIONS else ""


def stem(name: str) -> str:
    """Return a file name without its extension."""
    end = extension(name)
    return name[: -len(end) - 1] if end else name


class NameIndex:
    """Names or paths of images, to be found by the end of another path of the same image.

    Two paths are of the same image if their file names are equal but for the extension, and if so
    are the `depth` - 1 folders above them, as far as a text has folders. The depth is the smallest
    that keeps the texts apart: 1 if file names are unique, 3 for ``patient/study/view1.jpg``.
    Raises DataError if folders keep too many apart that are far above the files.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        split = {text: parts_of(text) or [text] for text in texts}
        self.depth = _depth(split.values())
        self._texts: Dict[str, List[str]] = {}
        depths = set()
        for text, parts in split.items():
            depths.add(min(self.depth, len(parts)))
            key = "/".join([*parts[-self.depth : -1], stem(parts[-1])])
            alike = self._texts.setdefault(key, [])
            alike.append(text)
            if len(alike) > _MOST_ALIKE:
                raise DataError(
                    f"more than {_MOST_ALIKE} names of images agree in their last {_DEEPEST} parts"
                    f" at most, e.g. {alike[0][-300:]!r} and {alike[1][-300:]!r}. Give shorter"
                    " paths, or one spelling of each."
                )
        self._depths = sorted(depths)

    def beginnings(self, folders: Sequence[str]) -> List[str]:
        """Return what `find` needs to know of the folders above a file."""
        above = [depth - 1 for depth in self._depths if depth - 1 <= len(folders)]
        return ["/".join([*folders[len(folders) - count :], ""]) for count in above]

    def find(self, beginnings: Sequence[str], name: str) -> List[str]:
        """Return the texts that may be of the file `name` in the folders of `beginnings`."""
        end = stem(name)
        if len(beginnings) == 1:
            return self._texts.get(beginnings[0] + end, [])
        return [text for start in beginnings for text in self._texts.get(start + end, [])]

    def matching(self, path: str) -> List[str]:
        """Return the texts of the same image as another path, those that fit it best."""
        *folders, name = parts_of(path)
        texts = self.find(self.beginnings(folders), name)
        if len(texts) < 2:
            return texts
        split = map(parts_of, texts)
        fits = [(agreement(folders, parts[:-1]), parts[-1:] == [name]) for parts in split]
        best = max(fits)
        return [text for text, fit in zip(texts, fits) if fit == best]


def _depth(paths: Iterable[Sequence[str]]) -> int:
    depth, alike = 1, list(paths)
    while depth < _DEEPEST:
        ends = ["/".join(parts[-depth:]) for parts in alike]
        counts = Counter(ends)
        alike = [parts for parts, end in zip(alike, ends) if counts[end] > 1]
        if all(len(parts) <= depth for parts in alike):
            break
        depth += 1
    return depth


def agreement(folders: Sequence[str], others: Sequence[str]) -> int:
    """Count the folders that agree, from the last one up."""
    count = 0
    for one, other in zip(reversed(folders), reversed(others)):
        if one != other:
            break
        count += 1
    return count
