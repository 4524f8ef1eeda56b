"""The packed cache: all images of a data set, decoded, in one file with an index."""

from __future__ import annotations

import json
import os
import secrets
import stat
import weakref
import zlib
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import (
    Any,
    ClassVar,
    Dict,
    FrozenSet,
    Iterable,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter
from typing_extensions import Annotated

from cxr_vit.config.data_sections import DataSection
from cxr_vit.data.images import ImageReader, gray_or_reason
from cxr_vit.errors import DataError
from cxr_vit.files import write_text

_FORMAT = 1

#: Images whose checksums are compared at each start, drawn at random.
_SPOT_CHECKS = 256

#: While reading, a checksum is compared once in this many images, about 1 % of the time it takes.
_CHECK_EVERY = 256

#: Unusable images that are decoded again at each start.
_RETRIES = 64

#: Larger indexes and journals are not read; 112,120 names take 5 MB, 377,110 paths 40 MB.
MAX_INDEX_BYTES = 2**27

#: Fields of the index and the journal are checked by type and range: they come from a file.
FROM_FILE = ConfigDict(strict=True, extra="forbid")
Name = Annotated[str, Field(pattern=r"^[^/\x00-\x1f\x7f]+$", max_length=255)]
#: A file name, or a path as a table has it.
ImageName = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]+$", max_length=4096)]
Reason = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f]*$", max_length=1000)]
Crc32 = Annotated[int, Field(ge=0, lt=2**32)]
_Positive = Annotated[int, Field(ge=1, lt=2**16)]


@dataclass(frozen=True)
class CacheSettings:
    """What the pixels of a cache depend on, besides the image files."""

    __pydantic_config__: ClassVar[ConfigDict] = FROM_FILE

    image_size: _Positive
    max_megapixels: _Positive
    resize: Reason = "bilinear, antialiased (Pillow)"
    format: int = _FORMAT
    dicom_window: Optional[Reason] = None

    @classmethod
    def of(cls, data: DataSection) -> CacheSettings:
        """Return what the configuration needs."""
        resize = f"{data.resample}, antialiased (Pillow)"
        window = data.dicom_window
        return cls(data.read_size, data.max_megapixels, resize, dicom_window=window)

    def as_dict(self) -> Dict[str, Any]:
        """Return the settings as they are written; earlier releases know no `dicom_window`."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def decode(self, path: str) -> Union[np.ndarray, str]:
        """Read an image as these settings say, uint8 ``[H, W]``, or return why it is unusable."""
        resample = self.resize.partition(",")[0]
        return gray_or_reason(
            path,
            self.image_size,
            max_megapixels=self.max_megapixels,
            resample=resample,
            dicom_window=self.dicom_window,
        )


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

    __pydantic_config__: ClassVar[ConfigDict] = FROM_FILE

    settings: CacheSettings
    versions: Dict[Name, Name]  # of the libraries that decoded and resized the images
    images: List[ImageName]
    source_bytes: List[Annotated[int, Field(ge=-1, lt=2**63)]]  # sizes of the files; -1 if unknown
    crc32: List[Optional[Crc32]]  # of the pixels; None for an unusable image, which is black
    unusable: Dict[ImageName, Reason]  # name -> reason

    @classmethod
    def load(cls, path: Path) -> CacheIndex:
        """Read an index.

        Raises FileNotFoundError or NotADirectoryError if there is none, ValueError if it cannot be
        read, is damaged or of another version of this code.
        """
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_INDEX_BYTES:
                raise ValueError("no file, or a very large one")
            index = _INDEX.validate_json(path.read_bytes())
            index.check()
        except (FileNotFoundError, NotADirectoryError):
            raise
        except OSError as error:
            raise ValueError(f"its index {path} cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise ValueError(f"its index {path} is damaged or of another version") from error
        return index

    def check(self) -> None:
        """Raise ValueError if the lists do not belong together."""
        if not len(self.images) == len(self.source_bytes) == len(self.crc32):
            raise ValueError("its lists differ in length")
        if len(set(self.images)) != len(self.images):
            raise ValueError("an image is in it twice")
        if {name for name, crc in zip(self.images, self.crc32) if crc is None} != set(
            self.unusable
        ):
            raise ValueError("an image has neither or both of a checksum and a reason")

    def save(self, path: Path) -> None:
        """Write the index atomically."""
        write_text(path, json.dumps({**asdict(self), "settings": self.settings.as_dict()}))

    @property
    def cache_bytes(self) -> int:
        """Size of the file of pixels."""
        return len(self.images) * self.settings.image_size**2


_INDEX = TypeAdapter(CacheIndex)


class CacheFile:
    """The pixels of a cache, `shape` (images, height, width), read from one open file.

    A file that is changed in place is noticed and refused. One that is replaced by a rebuild is
    read to the end of the process, as the open file keeps the pixels; a process that opens it later
    is refused, because the new file holds other images in the same rows.
    """

    def __init__(self, path: Path, shape: Tuple[int, int, int]) -> None:
        self.path = path
        self.shape = shape
        self._opened: Optional[Tuple[int, ...]] = None
        self._open()

    def _open(self) -> None:
        try:
            self._file = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise self._problem(f"cannot be opened ({error.strerror})") from error
        weakref.finalize(self, os.close, self._file)
        status = os.fstat(self._file)
        identity = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        if self._opened not in (None, identity):
            raise DataError(
                f"the cache {self.path} was rebuilt during the run, with other images in its"
                " rows. Resume the run with --resume."
            )
        self._opened = identity

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy the images of `rows`, int64 ``[n]``, into `out`, uint8 ``[n, H, W]``.

        Raises DataError if the file was changed or cannot be read.
        """
        image_bytes = self.shape[1] * self.shape[2]
        # Positional reads: forked processes share the file, and a memory map of a file that is
        # truncated would end the process with SIGBUS.
        try:
            self._check_unchanged()
            for image, row in zip(out, rows.tolist()):
                if os.preadv(self._file, [image], row * image_bytes) != image_bytes:
                    self._check_unchanged()
                    raise self._problem("ends before its last image")
        except OSError as error:
            raise self._problem(f"cannot be read ({error.strerror})") from error

    def _check_unchanged(self) -> None:
        status = os.fstat(self._file)
        assert self._opened is not None
        if (status.st_size, status.st_mtime_ns) != self._opened[2:]:
            size, before = status.st_size, self._opened[2]
            how = "was changed" if size >= before else f"was cut from {before} to {size} bytes"
            raise self._problem(f"{how} while it was read")

    def _problem(self, what: str) -> DataError:
        return DataError(
            f"the cache {self.path} {what}. Compare it with its index (python -m cxr_vit prepare"
            " --verify), or remove it and build it again (python -m cxr_vit prepare --config"
            " <file>). A run that stopped continues with --resume."
        )

    def damaged(self, image: str) -> DataError:
        """Return the error for an image whose checksum is wrong."""
        return self._problem(f"is damaged: {image} is not what its index says")

    def __getstate__(self) -> Dict[str, Any]:
        # A loader process opens the file itself; pixels are not pickled.
        return {"path": self.path, "shape": self.shape, "_opened": self._opened}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()


class CacheReader(ImageReader):
    """Read images from a cache.

    `by_name` maps file names to the cache's rows, `crc32`, uint32, rows to checksums; `names` are
    the images of this sequence in order.
    """

    def __init__(
        self,
        cache: CacheFile,
        by_name: Mapping[str, int],
        crc32: np.ndarray,
        names: Sequence[str],
    ) -> None:
        super().__init__(cache.shape[-1])
        self._cache = cache
        self._by_name = by_name
        self._crc32 = crc32
        self._rows = np.array([by_name[name] for name in names], dtype=np.int64)
        self._own_crc32 = crc32[self._rows]
        self._unchecked = _CHECK_EVERY  # the first batch of each process is checked

    def __len__(self) -> int:
        return len(self._rows)

    def select(self, names: Sequence[str]) -> CacheReader:
        """Return a reader of some of the images."""
        return CacheReader(self._cache, self._by_name, self._crc32, names)

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy all images at once, and compare the checksum of one of them now and then."""
        self._cache.take(self._rows[rows], out)
        self._unchecked += len(rows)
        if self._unchecked >= _CHECK_EVERY and len(rows):
            self._unchecked = 0
            self._check(rows, out, secrets.randbelow(len(rows)))

    def source(self, row: int) -> str:
        """Return the path of the cache."""
        return str(self._cache.path)

    def check(self, count: int) -> None:
        """Compare the checksums of randomly drawn images; raise DataError if one is wrong."""
        rows = np.random.default_rng().permutation(len(self))[:count]
        image = np.empty((1, *self._cache.shape[1:]), dtype=np.uint8)
        for row in rows:
            self._cache.take(self._rows[[row]], image)
            self._check(np.array([row]), image, 0)

    def _check(self, rows: np.ndarray, images: np.ndarray, position: int) -> None:
        row = rows[position]
        if zlib.crc32(images[position]) != self._own_crc32[row]:
            number = int(self._rows[row])
            names = [name for name, held in self._by_name.items() if held == number]
            raise self._cache.damaged(names[0] if names else f"image {number} of its index")

    def __getstate__(self) -> Dict[str, Any]:
        # A loader process needs the rows of its own images only.
        return {**self.__dict__, "_by_name": {}, "_crc32": self._crc32[:0]}


def open_images(index: CacheIndex, pixels: Path) -> CacheReader:
    """Return a reader of all usable images of a cache, after checking a random sample.

    Raises DataError if one does not match its checksum.
    """
    size = index.settings.image_size
    cache = CacheFile(pixels, (len(index.images), size, size))
    rows = {name: row for row, name in enumerate(index.images) if index.crc32[row] is not None}
    crc32 = np.array([crc or 0 for crc in index.crc32], dtype=np.uint32)
    reader = CacheReader(cache, rows, crc32, list(rows))
    reader.check(_SPOT_CHECKS)
    return reader


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
        if not isinstance(settings.decode(paths[name]), str):
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


def plain_crc32(size: int) -> FrozenSet[int]:
    """Return the checksums of the 256 images whose pixels are all equal, `size` pixels square.

    A checksum is linear: that of a pixel value follows from its bits.
    """
    black, *bits = [
        zlib.crc32(bytes([value]) * size**2) for value in (0, *(2**b for b in range(8)))
    ]
    checksums = {black}
    for crc in bits:
        checksums |= {other ^ black ^ crc for other in checksums}
    return frozenset(checksums)


def library_versions() -> Dict[str, str]:
    """Return the versions of the libraries that decode and resize."""
    return {name: metadata.version(name) for name in ("pillow", "kornia-rs")}
