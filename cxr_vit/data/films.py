"""Where the pixels of films come from: their files, or the cache. Imports no torch."""

from __future__ import annotations

import mmap
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Dict, Mapping, Sequence, Tuple

import numpy as np

from cxr_vit.data.images import read_gray
from cxr_vit.errors import DataError

__all__ = ["CachedFilms", "FilmFiles", "Films", "NoFilms", "StoreMap"]

#: The map is let go of after so many bytes read: they stay in the system's cache, but no longer
#: count as this process's memory, which a pass over all films would otherwise fill with the store.
#: (The system maps more than is read, some two pages for one.)
_RELEASE_BYTES = 2**26


class Films(ABC):
    """A sequence of films, all of one size.

    Parameters
    ----------
    image_size
        Side of a film, pixels.
    """

    def __init__(self, image_size: int) -> None:
        self.image_size = image_size

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def select(self, names: Sequence[str]) -> Films:
        """Return the films of these file names, in this order."""

    @abstractmethod
    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy films into a buffer.

        Parameters
        ----------
        rows
            int64 ``[n]``, rows of this sequence.
        out
            uint8 ``[n, H, W]``, contiguous.

        Raises
        ------
        DataError
            If a film cannot be read any more.
        """


class FilmFiles(Films):
    """Films decoded from their files each time.

    Parameters
    ----------
    paths
        File name -> path.
    names
        The films of this sequence, in order.
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

    def select(self, names: Sequence[str]) -> FilmFiles:
        """Return the films of these file names, in this order."""
        return FilmFiles(
            self._by_name, names, image_size=self.image_size, max_megapixels=self.max_megapixels
        )

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Decode and resize films into a buffer."""
        for place, row in enumerate(rows):
            out[place] = read_gray(
                self._paths[row], self.image_size, max_megapixels=self.max_megapixels
            )

    def __getstate__(self) -> Dict[str, Any]:
        # A loader process of its own needs the paths of its films, not of all.
        return {**self.__dict__, "_by_name": {}}


class NoFilms(Films):
    """Films without pixels: only their number is known.

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

    def select(self, names: Sequence[str]) -> NoFilms:
        """Return as many films."""
        return NoFilms(len(names))

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Leave the buffer, which holds no pixel."""
        assert out.size == 0, out.shape


class StoreMap:
    """The memory map of a store's pixels; every process maps the same pages.

    It keeps to the file it was made with: one that takes its place, while loader processes still
    start, holds other films in the same rows.

    Parameters
    ----------
    path
        The file.
    shape
        Films, height, width.
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
                    f"the cache {self.path} was built anew during the run, with other films in its"
                    " rows. Go on with --resume."
                )
            self._pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self.pixels = np.frombuffer(self._pages, dtype=np.uint8).reshape(self.shape)
        self._unreleased = 0

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy films (int64 ``[n]``) into a buffer (uint8 ``[n, H, W]``), one copy for all."""
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


class CachedFilms(Films):
    """Films straight from the memory map of a store.

    Parameters
    ----------
    store
        The store's pixels.
    rows_by_name
        File name -> row of the store.
    names
        The films of this sequence, in order.
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

    def select(self, names: Sequence[str]) -> CachedFilms:
        """Return the films of these file names, in this order."""
        return CachedFilms(self._store, self._by_name, names)

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy films into a buffer, one copy for all of them."""
        self._store.take(self._rows[rows], out)

    def __getstate__(self) -> Dict[str, Any]:
        # A loader process of its own needs the rows of its films, not of all.
        return {**self.__dict__, "_by_name": {}}
