"""The packed store: every film once, decoded and resized, in one file. Imports no torch.

`films_<size>.u8` holds uint8 ``[N, size, size]``, the films in the order of their names whatever
the split; `films_<size>.json` says which films they are and how they were made, and is written
last: a store without it is not finished. A film that could not be used has a row that is never
read, and its reason in the index.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Union

import numpy as np

from cxr_vit.data.films import CachedFilms, StoreMap
from cxr_vit.data.images import RESIZE_FILTER, gray_or_reason
from cxr_vit.errors import DataError

__all__ = ["BUILD_ANEW", "StoreIndex", "StorePaths", "StoreSettings", "open_films", "refusal"]

_FORMAT = 1
#: Films of a store, drawn anew at each start, whose checksums are compared.
_LOOKED_AT = 256
#: Films of no use that are looked at again at each start.
_READ_AGAIN = 64
BUILD_ANEW = (
    "Build it anew (remove it and run: python -m cxr_vit prepare --config <file>), or do without it"
    " (data.cache=off)."
)


@dataclass(frozen=True)
class StoreSettings:
    """What the pixels of a store hang on, besides the files."""

    image_size: int
    max_megapixels: int
    resize: str = RESIZE_FILTER
    format: int = _FORMAT


@dataclass(frozen=True)
class StorePaths:
    """The files of a store.

    `pixels` and `index` are the store; `partial` and `journal` one that is being built, of which
    `journal` says what is done; `lock` is held by the process that builds.
    """

    pixels: Path
    index: Path
    partial: Path
    journal: Path
    lock: Path

    @classmethod
    def of(cls, folder: Path, image_size: int) -> StorePaths:
        """Name the files of the store of one image size."""
        stem = f"films_{image_size}"
        return cls(
            folder / f"{stem}.u8",
            folder / f"{stem}.json",
            folder / f"{stem}.u8.partial",
            folder / f"{stem}.journal",
            folder / f"{stem}.lock",
        )


@dataclass(frozen=True)
class StoreIndex:
    """What a store holds.

    Attributes
    ----------
    settings
        How the films were made.
    versions
        Of the libraries that decoded and resized them.
    images
        File names, by row.
    source_bytes
        Sizes of their files.
    crc32
        Checksums of their pixels; None for a film that could not be used.
    unusable
        File name -> reason.
    """

    settings: StoreSettings
    versions: Dict[str, str]
    images: List[str]
    source_bytes: List[int]
    crc32: List[Optional[int]]
    unusable: Dict[str, str]

    @classmethod
    def load(cls, path: Path) -> StoreIndex:
        """Read an index.

        Raises
        ------
        ValueError
            If it is damaged or of another version of this code.
        """
        try:
            values: Dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            index = cls(**{**values, "settings": StoreSettings(**values["settings"])})
            lengths = {len(index.images), len(index.source_bytes), len(index.crc32)}
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"its index {path} is damaged or of another version") from error
        if len(lengths) != 1:
            raise ValueError(f"its index {path} is damaged")
        return index

    def save(self, path: Path) -> None:
        """Write the index aside, then rename it."""
        aside = path.with_name(path.name + ".partial")
        with aside.open("w", encoding="utf-8") as file:
            json.dump(asdict(self), file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)

    @property
    def store_bytes(self) -> int:
        """Size of the file of pixels."""
        return len(self.images) * self.settings.image_size**2


def library_versions() -> Dict[str, str]:
    """Return the versions of what decodes and resizes."""
    return {name: metadata.version(name) for name in ("pillow", "kornia-rs")}


def file_sizes(paths: Mapping[str, str], names: Iterable[str]) -> List[int]:
    """Return the sizes of the films' files, bytes; -1 for one that cannot be looked at."""

    def size(path: str) -> int:
        try:
            return os.stat(path).st_size  # noqa: PTH116  (112,120 times)
        except OSError:
            return -1

    return [size(paths[name]) for name in names]


def refusal(
    index: StoreIndex,
    pixels: Path,
    settings: StoreSettings,
    paths: Mapping[str, str],
) -> Optional[str]:
    """Say why a store may not be used for these films, or return None.

    Cheap: sizes of files are compared, not their contents (but of films of no use). Films whose
    files are gone may still be read from the store, so that it can be taken to a machine without
    them.

    Parameters
    ----------
    index, pixels
        The store.
    settings
        How the films should have been made.
    paths
        File name -> path of the films wanted, of those whose files are there.
    """
    for setting, value in asdict(settings).items():
        held = getattr(index.settings, setting)
        if held != value:
            return f"it was made with {setting}={held}, and {value} is wanted"
    held_bytes = pixels.stat().st_size if pixels.is_file() else 0
    if held_bytes != index.store_bytes:
        return f"{pixels} has {held_bytes} bytes and should have {index.store_bytes}"
    held_names = set(index.images)
    absent = [name for name in paths if name not in held_names]
    if absent:
        return f"{len(absent)} of {len(paths)} films are not in it, first: {absent[0]}"
    there = [(name, size) for name, size in zip(index.images, index.source_bytes) if name in paths]
    sizes = file_sizes(paths, (name for name, _ in there))
    changed = [name for (name, size), now in zip(there, sizes) if now != size]
    if changed:
        return f"{len(changed)} films were changed since, first: {changed[0]}"
    # A film fetched again has the size of the damaged one.
    unusable = [name for name in index.unusable if name in paths][:_READ_AGAIN]
    mended = [name for name in unusable if not isinstance(_read(paths[name], settings), str)]
    if mended:
        return f"films that could not be used were mended, first: {mended[0]}"
    return None


def _read(path: str, settings: StoreSettings) -> Union[np.ndarray, str]:
    return gray_or_reason(path, settings.image_size, max_megapixels=settings.max_megapixels)


def open_films(index: StoreIndex, pixels: Path) -> CachedFilms:
    """Return all films of a store that can be used.

    Raises
    ------
    DataError
        If a few of them, looked at for that, are not those of the index.
    """
    size = index.settings.image_size
    store = StoreMap(pixels, (len(index.images), size, size))
    rows = {name: row for row, name in enumerate(index.images) if index.crc32[row] is not None}
    films = CachedFilms(store, rows, list(rows))
    usable = np.array(list(rows.values()), dtype=np.int64)
    looked_at = np.random.default_rng().permutation(usable)[:_LOOKED_AT].tolist()
    damaged = [row for row in looked_at if zlib.crc32(store.pixels[row]) != index.crc32[row]]
    if damaged:
        raise DataError(
            f"the cache {pixels} is damaged: {index.images[damaged[0]]} is not what its index says."
            f" {BUILD_ANEW}"
        )
    return films
