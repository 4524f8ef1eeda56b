"""Decode many images on all cores, a chunk at a time. Imports no torch."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
import time
import zlib
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import (
    IO,
    Callable,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    TypeVar,
)

import numpy as np

from cxr_vit.console import progress
from cxr_vit.data.images import gray_or_reason
from cxr_vit.data.store import (
    StoreIndex,
    StorePaths,
    StoreSettings,
    file_sizes,
    library_versions,
)
from cxr_vit.errors import DataError

__all__ = [
    "CHUNK_IMAGES",
    "Chunk",
    "DecodedChunk",
    "build_store",
    "check_images",
    "decode_chunk",
    "default_workers",
    "in_chunks",
    "in_parallel",
    "locked",
    "stored_checksums",
    "verify_store",
]


logger = logging.getLogger(__name__)

#: Images a task: a fraction of a second of decoding, so that little is lost with a process.
CHUNK_IMAGES = 64

#: Processes take longer to start than so few images to decode.
_FEW_IMAGES = 256


Result = TypeVar("Result")


class Chunk(NamedTuple):
    """Images next to each other: the row of the first, and their paths."""

    first_row: int
    paths: List[str]


def in_chunks(paths: Sequence[str]) -> List[Chunk]:
    """Cut images into tasks."""
    return [
        Chunk(start, list(paths[start : start + CHUNK_IMAGES]))
        for start in range(0, len(paths), CHUNK_IMAGES)
    ]


def default_workers(given: Optional[int]) -> int:
    """Return `data.cache_workers`, by default the cores this process may use."""
    if given is not None:
        return given
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_parallel(
    function: Callable[[Chunk], Result], chunks: Sequence[Chunk], *, workers: int
) -> Iterator[Result]:
    """Yield the results of a function on each chunk, as they come.

    Parameters
    ----------
    function
        Picklable: a function of a module, or a partial of one.
    chunks
        The work.
    workers
        Processes; one, or few images, and this process does it.

    Raises
    ------
    DataError
        If a process ends before its work.
    """
    if workers == 1 or sum(len(chunk.paths) for chunk in chunks) <= _FEW_IMAGES:
        for chunk in chunks:
            yield function(chunk)
        return
    # Spawned and not forked: this process may have threads (torch's, a progress bar's).
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
    futures: List[Future[Result]] = []
    try:
        with _interrupts_held():
            # One by one: a signal may come through all the same, and what is submitted by then
            # has to be known to be cancelled.
            for chunk in chunks:
                futures.append(pool.submit(function, chunk))  # noqa: PERF401
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:  # which every future has got by now
        raise DataError(
            "a process that decodes images ended before its work: killed, out of memory, or started"
            ' from a script without `if __name__ == "__main__":`. Run the command again, which'
            " goes on where it stopped; data.cache_workers=1 decodes in the main process."
        ) from error
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    finally:
        pool.shutdown()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Start processes that leave Ctrl-C to their parent: they inherit what it holds back."""
    resource_tracker.ensure_running()  # which would let it through as it starts
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """Do not outlive the parent, even if it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch(sentinel: int) -> None:
        multiprocessing.connection.wait([sentinel])
        os._exit(1)

    threading.Thread(target=watch, args=(parent.sentinel,), daemon=True).start()


class DecodedChunk(NamedTuple):
    """What became of a chunk: for each image a checksum, or None and the reason."""

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
    """Decode images into a new store, or go on with one that was interrupted.

    The caller holds the lock. An older store is replaced only when the new one is whole.

    Parameters
    ----------
    where
        The store's files.
    settings
        How the images are made.
    paths
        File name -> path of the images.
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
            "going on with an interrupted cache: %d of %d images are in it", done, len(names)
        )
    started = time.monotonic()
    decode = partial(decode_chunk, settings=settings, pixels=where.partial)
    with where.journal.open("a", encoding="utf-8") as journal, progress(
        "decoding images", done=done, total=len(names)
    ) as advance:
        for decoded in in_parallel(decode, chunks, workers=workers):
            finished[decoded.first_row] = decoded
            journal.write(json.dumps(decoded) + "\n")
            journal.flush()
            advance(len(decoded.crc32))
    index = _finish(where, settings, names, sizes, finished)
    seconds = time.monotonic() - started
    logger.info(
        "cached %d images in %s (%.1f MB, %.0f s)",
        len(names) - len(index.unusable),
        where.pixels,
        index.store_bytes / 1e6,
        seconds,
    )
    return index


def _plan(settings: StoreSettings, names: Sequence[str], sizes: Sequence[int]) -> str:
    """Say in a line what is to be built; a store that was begun otherwise is begun anew."""
    images = "\n".join(f"{name} {size}" for name, size in zip(names, sizes))
    digest = hashlib.sha256(images.encode()).hexdigest()
    facts = {"chunk": CHUNK_IMAGES, "images": digest, **library_versions()}
    return json.dumps({**asdict(settings), **facts})


def _resume(
    where: StorePaths, plan: str, num_images: int, settings: StoreSettings
) -> Dict[int, DecodedChunk]:
    """Return the chunks that are done, by first row, with the files ready to go on."""
    total_bytes = num_images * settings.image_size**2
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


def _are_written(pixels: IO[bytes], decoded: DecodedChunk, image_bytes: int) -> bool:
    stored = stored_checksums(pixels, decoded.first_row, len(decoded.crc32), image_bytes)
    return all(noted in (None, there) for noted, there in zip(decoded.crc32, stored))


def stored_checksums(
    pixels: IO[bytes], first_row: int, num_images: int, image_bytes: int
) -> List[int]:
    """Return the CRC-32 of images next to each other in an open store."""
    pixels.seek(first_row * image_bytes)
    return [zlib.crc32(pixels.read(image_bytes)) for _ in range(num_images)]


def decode_chunk(chunk: Chunk, *, settings: StoreSettings, pixels: Optional[Path]) -> DecodedChunk:
    """Decode a chunk and, if there is a file of pixels, write it in its place."""
    size = settings.image_size
    images = np.zeros((len(chunk.paths), size, size), dtype=np.uint8)
    crc32: List[Optional[int]] = []
    reasons: List[Optional[str]] = []
    for place, path in enumerate(chunk.paths):
        image = gray_or_reason(path, size, max_megapixels=settings.max_megapixels)
        if isinstance(image, str):
            crc32.append(None)
            reasons.append(image)
        else:
            images[place] = image
            crc32.append(zlib.crc32(image.tobytes()))
            reasons.append(None)
    if pixels is not None:
        try:
            with pixels.open("r+b") as file:
                file.seek(chunk.first_row * size**2)
                file.write(images.tobytes())
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


def check_images(
    paths: Mapping[str, str], settings: StoreSettings, *, workers: int
) -> Dict[str, str]:
    """Decode images without keeping them; return file name -> reason of those of no use.

    Parameters
    ----------
    paths
        File name -> path of the images.
    settings
        How images are read.
    workers
        Processes.
    """
    names = sorted(paths)
    unusable: Dict[str, str] = {}
    decode = partial(decode_chunk, settings=settings, pixels=None)
    chunks = in_chunks([paths[name] for name in names])
    with progress("checking images", done=0, total=len(names)) as advance:
        for decoded in in_parallel(decode, chunks, workers=workers):
            for row, reason in enumerate(decoded.reasons, start=decoded.first_row):
                if reason is not None:
                    unusable[names[row]] = reason
            advance(len(decoded.reasons))
    return dict(sorted(unusable.items()))


def verify_store(
    index: StoreIndex, where: StorePaths, paths: Mapping[str, str], *, workers: int
) -> Dict[str, str]:
    """Check every image of a store against its checksum and against its file, decoded anew.

    Parameters
    ----------
    index, where
        The store.
    paths
        File name -> path, of the files that are there; the others are only checked for damage.
    workers
        Processes.

    Returns
    -------
    dict
        File name -> what is wrong.
    """
    wrong: Dict[str, str] = {}
    verify = partial(_verify_chunk, settings=index.settings, pixels=where.pixels)
    chunks = in_chunks([paths.get(name, "") for name in index.images])
    with progress("verifying images", done=0, total=len(index.images)) as advance:
        for first_row, stored, decoded in in_parallel(verify, chunks, workers=workers):
            for row, (there, anew) in enumerate(zip(stored, decoded), start=first_row):
                noted, name = index.crc32[row], index.images[row]
                if noted is not None and there != noted:
                    wrong[name] = "its pixels in the cache are damaged"
                elif name in paths and anew != noted:
                    wrong[name] = "the cache does not hold what its file holds now"
            advance(len(stored))
    return dict(sorted(wrong.items()))


def _verify_chunk(
    chunk: Chunk, *, settings: StoreSettings, pixels: Path
) -> Tuple[int, List[int], List[Optional[int]]]:
    """Return the first row, the checksums of the pixels stored, and those of the files."""
    with pixels.open("rb") as file:
        stored = stored_checksums(file, chunk.first_row, len(chunk.paths), settings.image_size**2)
    return chunk.first_row, stored, decode_chunk(chunk, settings=settings, pixels=None).crc32
