"""Where the pixels of films come from: their files, or the cache. Imports no torch."""

from __future__ import annotations

import mmap
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

import numpy as np

from cxr_vit.data.images import read_gray

__all__ = ["CachedFilms", "FilmFiles", "Films"]

#: The map is let go of after so many bytes: they stay in the system's cache, but no longer count
#: as this process's memory, which a pass over all films would otherwise fill with the whole store.
_RELEASE_BYTES = 2**28


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


class CachedFilms(Films):
    """Films straight from the memory map of a store; every process maps the same pages.

    Parameters
    ----------
    store
        The store's file of pixels.
    rows_by_name
        File name -> row of the store.
    names
        The films of this sequence, in order.
    num_stored
        Number of rows of the store.
    image_size
        Side of a film, pixels.
    """

    def __init__(
        self,
        store: Path,
        rows_by_name: Mapping[str, int],
        names: Sequence[str],
        *,
        num_stored: int,
        image_size: int,
    ) -> None:
        super().__init__(image_size)
        self.store = store
        self._shape = (num_stored, image_size, image_size)
        self._by_name = rows_by_name
        self._rows = np.array([rows_by_name[name] for name in names], dtype=np.int64)
        self._map: Optional[Tuple[mmap.mmap, np.ndarray]] = None
        self._unreleased = 0

    def __len__(self) -> int:
        return len(self._rows)

    def select(self, names: Sequence[str]) -> CachedFilms:
        """Return the films of these file names, in this order."""
        return CachedFilms(
            self.store,
            self._by_name,
            names,
            num_stored=self._shape[0],
            image_size=self.image_size,
        )

    def read(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy films into a buffer, one copy for all of them."""
        if self._map is None:
            self._map = self._open()
        pages, pixels = self._map
        # `clip` only because numpy copies into `out` directly then; the rows are in range.
        np.take(pixels, self._rows[rows], axis=0, out=out, mode="clip")
        self._unreleased += out.nbytes
        if self._unreleased > _RELEASE_BYTES and hasattr(mmap, "MADV_DONTNEED"):
            pages.madvise(mmap.MADV_DONTNEED)
            self._unreleased = 0

    def _open(self) -> Tuple[mmap.mmap, np.ndarray]:
        with self.store.open("rb") as file:
            pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return pages, np.frombuffer(pages, dtype=np.uint8).reshape(self._shape)

    def __getstate__(self) -> Dict[str, Any]:
        # A loader process of its own maps the file anew; the pixels do not travel.
        return {**self.__dict__, "_map": None, "_by_name": {}}
