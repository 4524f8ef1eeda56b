"""The packed cache: all images of a data set, decoded, in one memory-mapped file with an index."""

from __future__ import annotations

import json
import mmap
import os
import zlib
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from cxr_vit.data.images import RESIZE_FILTER, ImageReader, gray_or_reason
from cxr_vit.errors import DataError
from cxr_vit.files import write_text

_FORMAT = 1

#: Images whose checksums are compared at each start, drawn at random.
_SPOT_CHECKS = 256

#: Unusable images that are decoded again at each start.
_RETRIES = 64

#: A process drops its mapped pages after reading this many bytes. They stay in the system's cache,
#: but a pass over all images would otherwise add the whole cache to the process's memory. (The
#: system maps more than is read, about two pages for one.)
_RELEASE_BYTES = 2**26


@dataclass(frozen=True)
class CacheSettings:
    """What the pixels of a cache depend on, besides the image files."""

    image_size: int
    max_megapixels: int
    resize: str = RESIZE_FILTER
    format: int = _FORMAT


@dataclass(frozen=True)
class CachePaths:
    """The files of a cache.

    `pixels` and `index` are the finished cache; `partial` and `journal` one that is being built, of
    which `journal` records the finished chunks; the building process holds `lock`.
    """

    pixels: Path
    index: Path
    partial: Path
    journal: Path
    lock: Path

    @classmethod
    def of(cls, folder: Path, image_size: int) -> CachePaths:
        """Name the files of the cache of one image size."""
        stem = f"films_{image_size}"  # the first release's name, so that its caches stay readable
        suffixes = (".u8", ".json", ".u8.partial", ".journal", ".lock")
        return cls(*(folder / f"{stem}{suffix}" for suffix in suffixes))


@dataclass(frozen=True)
class CacheIndex:
    """What a cache holds; the lists have one entry per row."""

    settings: CacheSettings
    versions: Dict[str, str]  # of the libraries that decoded and resized the images
    images: List[str]  # file names
    source_bytes: List[int]  # sizes of the files; -1 if unknown
    crc32: List[Optional[int]]  # of the pixels; None for an unusable image, which is black
    unusable: Dict[str, str]  # file name -> reason

    @classmethod
    def load(cls, path: Path) -> CacheIndex:
        """Read an index; raise ValueError if it is damaged or of another version of this code."""
        try:
            values: Dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            index = cls(**{**values, "settings": CacheSettings(**values["settings"])})
            if not len(index.images) == len(index.source_bytes) == len(index.crc32):
                raise ValueError("its lists differ in length")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"its index {path} is damaged or of another version") from error
        return index

    def save(self, path: Path) -> None:
        """Write the index atomically."""
        write_text(path, json.dumps(asdict(self)))

    @property
    def cache_bytes(self) -> int:
        """Size of the file of pixels."""
        return len(self.images) * self.settings.image_size**2


class CacheMap:
    """A memory map of a cache's pixels, `shape` (images, height, width), shared by all processes.

    It refuses a file that replaced its own: a cache that is rebuilt while loader processes start
    holds other images in the same rows.
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
                    f"the cache {self.path} was rebuilt during the run, with other images in its"
                    " rows. Resume the run with --resume."
                )
            self._pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.pixels = np.frombuffer(self._pages, dtype=np.uint8).reshape(self.shape)
        self._unreleased = 0

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy the images of `rows`, int64 ``[n]``, into `out`, uint8 ``[n, H, W]``."""
        # With mode="clip" numpy copies straight into `out`; the rows are always in range.
        np.take(self.pixels, rows, axis=0, out=out, mode="clip")
        self._unreleased += out.nbytes
        if self._unreleased > _RELEASE_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            self._pages.madvise(mmap.MADV_DONTNEED)
            self._unreleased = 0

    def __getstate__(self) -> Dict[str, Any]:
        # A loader process maps the file itself; pixels are not pickled.
        return {"path": self.path, "shape": self.shape, "_file": self._file}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


def _identity(status: os.stat_result) -> Tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class CacheReader(ImageReader):
    """Read images from the memory map of a cache.

    `by_name` maps file names to the cache's rows; `names` are the images of this sequence in order.
    """

    def __init__(self, cache: CacheMap, by_name: Mapping[str, int], names: Sequence[str]) -> None:
        super().__init__(cache.shape[-1])
        self._cache = cache
        self._by_name = by_name
        self._rows = np.array([by_name[name] for name in names], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def select(self, names: Sequence[str]) -> CacheReader:
        """Return a reader of some of the images."""
        return CacheReader(self._cache, self._by_name, names)

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy all images at once."""
        self._cache.take(self._rows[rows], out)

    def __getstate__(self) -> Dict[str, Any]:
        # A loader process needs the rows of its own images only.
        return {**self.__dict__, "_by_name": {}}


def open_images(index: CacheIndex, pixels: Path) -> CacheReader:
    """Return a reader of all usable images of a cache, after checking a random sample.

    Raises DataError if one does not match its checksum.
    """
    size = index.settings.image_size
    cache = CacheMap(pixels, (len(index.images), size, size))
    rows = {name: row for row, name in enumerate(index.images) if index.crc32[row] is not None}
    sample = np.random.default_rng().permutation(np.array(list(rows.values()), dtype=np.int64))
    for row in sample[:_SPOT_CHECKS].tolist():
        if zlib.crc32(cache.pixels[row]) != index.crc32[row]:
            raise DataError(
                f"the cache {pixels} is damaged: {index.images[row]} is not what its index says."
                " Rebuild it (remove it and run: python -m cxr_vit prepare --config <file>), or"
                " train without it (data.cache=off)."
            )
    return CacheReader(cache, rows, list(rows))


def refusal(
    index: CacheIndex, pixels: Path, settings: CacheSettings, paths: Mapping[str, str]
) -> Optional[str]:
    """Return why a cache does not fit the images that are needed, or None.

    This is cheap: it compares sizes of files, and contents of unusable images only. `paths` holds
    file name -> path of the needed images whose file exists; others are read from the cache, so
    that it can be copied to a machine without the files.
    """
    for setting, needed in asdict(settings).items():
        built = getattr(index.settings, setting)
        if built != needed:
            return f"it was built with {setting}={built}, and {needed} is needed"
    held_bytes = pixels.stat().st_size if pixels.is_file() else 0
    if held_bytes != index.cache_bytes:
        return f"{pixels} has {held_bytes} bytes and should have {index.cache_bytes}"
    held_names = set(index.images)
    absent = [name for name in paths if name not in held_names]
    if absent:
        return f"{len(absent)} of {len(paths)} images are not in it, first: {absent[0]}"
    there = [(name, size) for name, size in zip(index.images, index.source_bytes) if name in paths]
    sizes = file_sizes(paths, (name for name, _ in there))
    changed = [name for (name, size), now in zip(there, sizes) if now != size]
    if changed:
        return f"{len(changed)} images were changed since, first: {changed[0]}"
    # An image that is fetched again has the size of the damaged one.
    for name in [name for name in index.unusable if name in paths][:_RETRIES]:
        limit = settings.max_megapixels
        image = gray_or_reason(paths[name], settings.image_size, max_megapixels=limit)
        if not isinstance(image, str):
            return f"images that were unusable are usable now, first: {name}"
    return None


def file_sizes(paths: Mapping[str, str], names: Iterable[str]) -> List[int]:
    """Return the size of each image's file, bytes; -1 if it cannot be read."""

    def size(path: str) -> int:
        try:
            return os.stat(path).st_size  # noqa: PTH116  (a Path per image is slow)
        except OSError:
            return -1

    return [size(paths[name]) for name in names]


def library_versions() -> Dict[str, str]:
    """Return the versions of the libraries that decode and resize."""
    return {name: metadata.version(name) for name in ("pillow", "kornia-rs")}
