"""Where the pixels of images come from: their files, or the cache. Imports no torch."""

from __future__ import annotations

import json
import mmap
import os
import zlib
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np

from cxr_vit.data.images import RESIZE_FILTER, gray_or_reason, read_gray
from cxr_vit.errors import DataError

__all__ = [
    "BUILD_ANEW",
    "EmptyReader",
    "FileReader",
    "ImageReader",
    "StoreIndex",
    "StoreMap",
    "StorePaths",
    "StoreReader",
    "StoreSettings",
    "open_images",
    "refusal",
]


#: The map is let go of after so many bytes read: they stay in the system's cache, but no longer
#: count as this process's memory, which a pass over all images would otherwise fill with the store.
#: (The system maps more than is read, some two pages for one.)
_RELEASE_BYTES = 2**26


class ImageReader(ABC):
    """A sequence of images, all of one size.

    Parameters
    ----------
    image_size
        Side of an image, pixels.
    """

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def select(self, names: Sequence[str]) -> ImageReader:
        """Return the images of these file names, in this order."""

    @abstractmethod
    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy images into a buffer.

        Parameters
        ----------
        rows
            int64 ``[n]``, rows of this sequence.
        out
            uint8 ``[n, H, W]``, contiguous.

        Raises
        ------
        DataError
            If an image cannot be read any more.
        """


class FileReader(ImageReader):
    """Images decoded from their files each time.

    Parameters
    ----------
    paths
        File name -> path.
    names
        The images of this sequence, in order.
    image_size
        Side of the square they are resized to, pixels.
    max_megapixels
        Larger images are refused.
    """

    def __init__(
        self,
        paths: Mapping[str, str],
        names: Sequence[str],
        *,
        image_size: int,
        max_megapixels: int,
    ) -> None:
        super().__init__(image_size)
        self.max_megapixels = max_megapixels
        self._by_name = paths
        self._paths = [paths[name] for name in names]

    def __len__(self) -> int:
        return len(self._paths)

    def select(self, names: Sequence[str]) -> FileReader:
        """Return the images of these file names, in this order."""
        return FileReader(
            self._by_name, names, image_size=self.image_size, max_megapixels=self.max_megapixels
        )

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Decode and resize images into a buffer."""
        for place, row in enumerate(rows):
            out[place] = read_gray(
                self._paths[row], self.image_size, max_megapixels=self.max_megapixels
            )

    def __getstate__(self) -> Dict[str, Any]:
        # A loader process of its own needs the paths of its images, not of all.
        return {**self.__dict__, "_by_name": {}}


class EmptyReader(ImageReader):
    """Images without pixels: only their number is known.

    Parameters
    ----------
    count
        How many.
    """

    def __init__(self, count: int) -> None:
        super().__init__(image_size=0)
        self._count = count

    def __len__(self) -> int:
        return self._count

    def select(self, names: Sequence[str]) -> EmptyReader:
        """Return as many images."""
        return EmptyReader(len(names))

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Leave the buffer, which holds no pixel."""
        assert out.size == 0, out.shape


class StoreMap:
    """The memory map of a store's pixels; every process maps the same pages.

    It keeps to the file it was made with: one that takes its place, while loader processes still
    start, holds other images in the same rows.

    Parameters
    ----------
    path
        The file.
    shape
        Images, height, width.
    """

    def __init__(self, path: Path, shape: Tuple[int, int, int]) -> None:
        self.path = path
        self.shape = shape
        self._file = _identity(path.stat())
        self._open()

    def _open(self) -> None:
        with self.path.open("rb") as file:
            if _identity(os.fstat(file.fileno())) != self._file:
                raise DataError(
                    f"the cache {self.path} was built anew during the run, with other images in its"
                    " rows. Go on with --resume."
                )
            self._pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.pixels = np.frombuffer(self._pages, dtype=np.uint8).reshape(self.shape)
        self._unreleased = 0

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy images (int64 ``[n]``) into a buffer (uint8 ``[n, H, W]``), one copy for all."""
        # `clip` only because numpy copies into `out` directly then; the rows are in range.
        np.take(self.pixels, rows, axis=0, out=out, mode="clip")
        self._unreleased += out.nbytes
        if self._unreleased > _RELEASE_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._pages.madvise(mmap.MADV_DONTNEED)
            self._unreleased = 0

    def __getstate__(self) -> Dict[str, Any]:
        # A loader process of its own maps the file anew; the pixels do not travel.
        return {"path": self.path, "shape": self.shape, "_file": self._file}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def _identity(status: os.stat_result) -> Tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class StoreReader(ImageReader):
    """Images straight from the memory map of a store.

    Parameters
    ----------
    store
        The store's pixels.
    rows_by_name
        File name -> row of the store.
    names
        The images of this sequence, in order.
    """

    def __init__(
        self, store: StoreMap, rows_by_name: Mapping[str, int], names: Sequence[str]
    ) -> None:
        super().__init__(store.shape[-1])
        self._store = store
        self._by_name = rows_by_name
        self._rows = np.array([rows_by_name[name] for name in names], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def select(self, names: Sequence[str]) -> StoreReader:
        """Return the images of these file names, in this order."""
        return StoreReader(self._store, self._by_name, names)

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy images into a buffer, one copy for all of them."""
        self._store.take(self._rows[rows], out)

    def __getstate__(self) -> Dict[str, Any]:
        # A loader process of its own needs the rows of its images, not of all.
        return {**self.__dict__, "_by_name": {}}


_FORMAT = 1

#: Images of a store, drawn anew at each start, whose checksums are compared.
_LOOKED_AT = 256

#: Images of no use that are looked at again at each start.
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
        How the images were made.
    versions
        Of the libraries that decoded and resized them.
    images
        File names, by row.
    source_bytes
        Sizes of their files.
    crc32
        Checksums of their pixels; None for an image that could not be used.
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
    """Return the sizes of the images' files, bytes; -1 for one that cannot be looked at."""

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
    """Say why a store may not be used for these images, or return None.

    Cheap: sizes of files are compared, not their contents (but of images of no use). Images whose
    files are gone may still be read from the store, so that it can be taken to a machine without
    them.

    Parameters
    ----------
    index, pixels
        The store.
    settings
        How the images should have been made.
    paths
        File name -> path of the images wanted, of those whose files are there.
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
        return f"{len(absent)} of {len(paths)} images are not in it, first: {absent[0]}"
    there = [(name, size) for name, size in zip(index.images, index.source_bytes) if name in paths]
    sizes = file_sizes(paths, (name for name, _ in there))
    changed = [name for (name, size), now in zip(there, sizes) if now != size]
    if changed:
        return f"{len(changed)} images were changed since, first: {changed[0]}"
    # An image fetched again has the size of the damaged one.
    unusable = [name for name in index.unusable if name in paths][:_READ_AGAIN]
    mended = [name for name in unusable if not isinstance(_read(paths[name], settings), str)]
    if mended:
        return f"images that could not be used were mended, first: {mended[0]}"
    return None


def _read(path: str, settings: StoreSettings) -> Union[np.ndarray, str]:
    return gray_or_reason(path, settings.image_size, max_megapixels=settings.max_megapixels)


def open_images(index: StoreIndex, pixels: Path) -> StoreReader:
    """Return all images of a store that can be used.

    Raises
    ------
    DataError
        If a few of them, looked at for that, are not those of the index.
    """
    size = index.settings.image_size
    store = StoreMap(pixels, (len(index.images), size, size))
    rows = {name: row for row, name in enumerate(index.images) if index.crc32[row] is not None}
    images = StoreReader(store, rows, list(rows))
    usable = np.array(list(rows.values()), dtype=np.int64)
    looked_at = np.random.default_rng().permutation(usable)[:_LOOKED_AT].tolist()
    damaged = [row for row in looked_at if zlib.crc32(store.pixels[row]) != index.crc32[row]]
    if damaged:
        raise DataError(
            f"the cache {pixels} is damaged: {index.images[damaged[0]]} is not what its index says."
            f" {BUILD_ANEW}"
        )
    return images
