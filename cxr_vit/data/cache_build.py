"""Build the packed store, on all cores. Imports no torch.

A store grows aside, in `.partial`, which has its full size from the start; a chunk of films is
written in place and then, with the checksums of its pixels, noted in the journal. A process that
goes on after another was killed believes a line of the journal only where the pixels have its
checksums. So nothing is lost or done twice, and the store is the same to the byte, however often
it was interrupted.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import time
import zlib
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import IO, Dict, Iterator, List, Mapping, NamedTuple, Optional, Sequence

import numpy as np

from cxr_vit.data.cache import (
    StoreIndex,
    StorePaths,
    StoreSettings,
    file_sizes,
    library_versions,
)
from cxr_vit.data.decoding import CHUNK_FILMS, Chunk, film_progress, in_chunks, in_parallel
from cxr_vit.data.images import gray_or_reason
from cxr_vit.errors import DataError

__all__ = ["DecodedChunk", "build_store", "decode_chunk", "locked", "stored_checksums"]

logger = logging.getLogger(__name__)


class DecodedChunk(NamedTuple):
    """What became of a chunk: for each film a checksum, or None and the reason."""

    first_row: int
    crc32: List[Optional[int]]
    reasons: List[Optional[str]]


@contextlib.contextmanager
def locked(lock: Path) -> Iterator[None]:
    """Hold a lock file; wait while another process builds. The system frees that of a dead one.

    Raises
    ------
    DataError
        If the folder cannot be written.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise DataError(
            f"the cache cannot be written to {lock.parent} ({error.strerror}). Set data.cache_dir"
            " to a folder you may write to, or data.cache=off to decode in every epoch."
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("another process builds the cache in %s: waiting for it", lock.parent)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            logger.warning("%s: this file system has no locks; build it once", lock.parent)
        yield


def build_store(
    where: StorePaths, settings: StoreSettings, paths: Mapping[str, str], *, workers: int
) -> StoreIndex:
    """Decode films into a new store, or go on with one that was interrupted.

    The caller holds the lock. An older store is replaced only when the new one is whole.

    Parameters
    ----------
    where
        The store's files.
    settings
        How the films are made.
    paths
        File name -> path of the films.
    workers
        Processes.

    Raises
    ------
    DataError
        If there is no room for it.
    """
    names = sorted(paths)
    sizes = file_sizes(paths, names)
    finished = _resume(where, _plan(settings, names, sizes), len(names), settings)
    chunks = [
        chunk
        for chunk in in_chunks([paths[name] for name in names])
        if chunk.first_row not in finished
    ]
    done = len(names) - sum(len(chunk.paths) for chunk in chunks)
    if done:
        logger.info(
            "going on with an interrupted cache: %d of %d films are in it", done, len(names)
        )
    started = time.monotonic()
    decode = partial(decode_chunk, settings=settings, pixels=where.partial)
    with where.journal.open("a", encoding="utf-8") as journal, film_progress(
        "decoding films", done=done, total=len(names)
    ) as advance:
        for decoded in in_parallel(decode, chunks, workers=workers):
            finished[decoded.first_row] = decoded
            journal.write(json.dumps(decoded) + "\n")
            journal.flush()
            advance(len(decoded.crc32))
    index = _finish(where, settings, names, sizes, finished)
    seconds = time.monotonic() - started
    logger.info(
        "cached %d films in %s (%.1f MB, %.0f s)",
        len(names) - len(index.unusable),
        where.pixels,
        index.store_bytes / 1e6,
        seconds,
    )
    return index


def _plan(settings: StoreSettings, names: Sequence[str], sizes: Sequence[int]) -> str:
    """Say in a line what is to be built; a store that was begun otherwise is begun anew."""
    films = "\n".join(f"{name} {size}" for name, size in zip(names, sizes))
    digest = hashlib.sha256(films.encode()).hexdigest()
    facts = {"chunk": CHUNK_FILMS, "films": digest, **library_versions()}
    return json.dumps({**asdict(settings), **facts})


def _resume(
    where: StorePaths, plan: str, num_films: int, settings: StoreSettings
) -> Dict[int, DecodedChunk]:
    """Return the chunks that are done, by first row, with the files ready to go on."""
    total_bytes = num_films * settings.image_size**2
    lines: List[bytes] = []
    if where.journal.is_file():
        lines = where.journal.read_bytes().splitlines(keepends=True)
    if not where.partial.exists() and where.pixels.exists() and not where.index.exists():
        where.pixels.replace(where.partial)  # killed between the last two renames
    if not where.partial.exists() or not lines or lines[0] != f"{plan}\n".encode():
        _start(where, plan, total_bytes)
        return {}
    whole = [line for line in lines if line.endswith(b"\n")]  # the last may have been cut short
    os.truncate(where.journal, sum(map(len, whole)))
    os.truncate(where.partial, total_bytes)
    noted = list(filter(None, map(_parse, whole[1:])))
    with where.partial.open("rb") as pixels:
        return {
            decoded.first_row: decoded
            for decoded in noted
            if _are_written(pixels, decoded, settings.image_size**2)
        }


def _parse(line: bytes) -> Optional[DecodedChunk]:
    """Read a line of the journal; None for one that a loss of power has damaged."""
    try:
        return DecodedChunk(*json.loads(line))
    except (ValueError, TypeError):
        return None


def _start(where: StorePaths, plan: str, total_bytes: int) -> None:
    for path in (where.journal, where.partial):
        path.unlink(missing_ok=True)
    free = shutil.disk_usage(where.partial.parent).free
    if free < total_bytes:
        raise DataError(
            f"the cache needs {total_bytes / 1e9:.2f} GB in {where.partial.parent}, where"
            f" {free / 1e9:.2f} GB are free. Make room, or set data.cache_dir to another disk, or"
            " data.cache=off to decode in every epoch."
        )
    with where.partial.open("wb") as file:
        file.truncate(total_bytes)
    where.journal.write_text(plan + "\n", encoding="utf-8")


def _are_written(pixels: IO[bytes], decoded: DecodedChunk, film_bytes: int) -> bool:
    stored = stored_checksums(pixels, decoded.first_row, len(decoded.crc32), film_bytes)
    return all(noted in (None, there) for noted, there in zip(decoded.crc32, stored))


def stored_checksums(
    pixels: IO[bytes], first_row: int, num_films: int, film_bytes: int
) -> List[int]:
    """Return the CRC-32 of films next to each other in an open store."""
    pixels.seek(first_row * film_bytes)
    return [zlib.crc32(pixels.read(film_bytes)) for _ in range(num_films)]


def decode_chunk(chunk: Chunk, *, settings: StoreSettings, pixels: Optional[Path]) -> DecodedChunk:
    """Decode a chunk and, if there is a file of pixels, write it in its place."""
    size = settings.image_size
    films = np.zeros((len(chunk.paths), size, size), dtype=np.uint8)
    crc32: List[Optional[int]] = []
    reasons: List[Optional[str]] = []
    for place, path in enumerate(chunk.paths):
        film = gray_or_reason(path, size, max_megapixels=settings.max_megapixels)
        if isinstance(film, str):
            crc32.append(None)
            reasons.append(film)
        else:
            films[place] = film
            crc32.append(zlib.crc32(film.tobytes()))
            reasons.append(None)
    if pixels is not None:
        try:
            with pixels.open("r+b") as file:
                file.seek(chunk.first_row * size**2)
                file.write(films.tobytes())
        except OSError as error:
            raise DataError(
                f"{pixels}: {error.strerror}. Mend that and run the command again: it goes on"
                " where it stopped."
            ) from error
    return DecodedChunk(chunk.first_row, crc32, reasons)


def _finish(
    where: StorePaths,
    settings: StoreSettings,
    names: List[str],
    sizes: List[int],
    finished: Mapping[int, DecodedChunk],
) -> StoreIndex:
    """Put the new store in the place of an older one; its index comes last."""
    in_order = [finished[first_row] for first_row in sorted(finished)]
    reasons = [reason for decoded in in_order for reason in decoded.reasons]
    index = StoreIndex(
        settings,
        library_versions(),
        names,
        sizes,
        [crc for decoded in in_order for crc in decoded.crc32],
        {name: reason for name, reason in zip(names, reasons) if reason is not None},
    )
    with where.partial.open("rb") as file:
        os.fsync(file.fileno())
    where.index.unlink(missing_ok=True)
    where.partial.replace(where.pixels)
    index.save(where.index)
    where.journal.unlink()
    return index
