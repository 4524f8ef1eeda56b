"""Build, check and verify the packed cache, on all cores."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import time
import zlib
from concurrent.futures import Future, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import (
    IO,
    Callable,
    Dict,
    Generator,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Tuple,
    TypeVar,
)

import numpy as np
from pydantic import Field, TypeAdapter
from typing_extensions import Annotated

from cxr_vit.console import progress
from cxr_vit.data.cache import (
    MAX_INDEX_BYTES,
    CacheIndex,
    CachePaths,
    CacheSettings,
    Crc32,
    Reason,
    file_sizes,
    library_versions,
    plain_crc32,
)
from cxr_vit.data.spawn import SpawnedPool, usable_cores
from cxr_vit.errors import DataError
from cxr_vit.files import lock
from cxr_vit.regular_files import no_link, truncate

logger = logging.getLogger(__name__)

#: A fraction of a second of decoding, so that an interruption loses little.
_CHUNK_IMAGES = 64

#: Starting processes takes longer than decoding this many images.
_FEW_IMAGES = 256

Result = TypeVar("Result")


class Chunk(NamedTuple):
    """Consecutive images: the row of the first, and their paths."""

    first_row: int
    paths: List[str]


class DecodedChunk(NamedTuple):
    """The result of a chunk: a checksum per image, or None and the reason."""

    first_row: Annotated[int, Field(ge=0, multiple_of=_CHUNK_IMAGES)]
    crc32: List[Optional[Crc32]]
    reasons: List[Optional[Reason]]


_JOURNAL_LINE = TypeAdapter(DecodedChunk)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a cache's lock file, waiting while another process builds.

    Raises DataError if the folder cannot be written.
    """
    folder = path.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(path, "ab", opener=no_link):
            pass
    except OSError as error:
        raise _cannot_write(path, error) from error
    waiting = f"another process builds the cache in {folder}: waiting for it"
    with lock(path, on_wait=partial(logger.info, waiting)):
        yield


def _cannot_write(path: Path, error: OSError) -> DataError:
    return DataError(
        f"the cache cannot be written to {path.parent} ({path.name}: {error.strerror}). Set"
        " data.cache_dir to a writable folder, or data.cache=off to decode in every epoch."
    )


def build_cache(
    where: CachePaths, settings: CacheSettings, paths: Mapping[str, str], *, workers: Optional[int]
) -> CacheIndex:
    """Decode images into a new cache, or resume an interrupted build.

    The caller holds the lock. An older cache is replaced only when the new one is complete.

    Raises DataError if the disk has too little space.
    """
    names = sorted(paths)
    sizes = file_sizes(paths, names)
    finished = _resume(where, settings, _plan(settings, names, sizes), len(names))
    chunks = [chunk for chunk in _in_chunks(paths, names) if chunk.first_row not in finished]
    done = len(names) - sum(len(chunk.paths) for chunk in chunks)
    if done:
        logger.info("resuming an interrupted cache: %d of %d images are in it", done, len(names))
    started = time.monotonic()
    decode = partial(decode_chunk, settings=settings, pixels=where.partial)
    decoding = in_parallel("decoding images", decode, chunks, workers=workers, done=done)
    with contextlib.closing(decoding), open(where.journal, "ab", opener=no_link) as journal:
        for decoded in decoding:
            finished[decoded.first_row] = decoded
            journal.write(json.dumps(decoded).encode() + b"\n")
            journal.flush()
    in_order = [finished[first_row] for first_row in sorted(finished)]
    crc32 = [crc for decoded in in_order for crc in decoded.crc32]
    unusable = _unusable(names, in_order)
    index = CacheIndex(settings, library_versions(), names, sizes, crc32, unusable)
    # The new pixels are renamed over an older cache's; the index is written last.
    with where.partial.open("rb") as file:
        os.fsync(file.fileno())
    where.index.unlink(missing_ok=True)
    where.partial.replace(where.pixels)
    index.save(where.index)
    where.journal.unlink()
    logger.info(
        "cached %d images in %s (%.1f MB, %.0f s)",
        len(names) - len(index.unusable),
        where.pixels,
        index.cache_bytes / 1e6,
        time.monotonic() - started,
    )
    return index


def _plan(settings: CacheSettings, names: List[str], sizes: List[int]) -> str:
    """Describe the build in one line, the journal's first; a build of another is not resumed."""
    images = "\n".join(f"{name} {size}" for name, size in zip(names, sizes))
    digest = hashlib.sha256(images.encode()).hexdigest()
    facts = {"chunk": _CHUNK_IMAGES, "images": digest, **library_versions()}
    return json.dumps({**settings.as_dict(), **facts})


def _resume(
    where: CachePaths, settings: CacheSettings, plan: str, num_images: int
) -> Dict[int, DecodedChunk]:
    """Prepare the partial file and the journal; return the finished chunks by first row.

    Links at these paths are removed, not followed: they may lead to other files.
    """
    total_bytes = num_images * settings.image_size**2
    lines: List[bytes] = []
    if _is_own_file(where.journal) and where.journal.stat().st_size <= MAX_INDEX_BYTES:
        lines = where.journal.read_bytes().splitlines(keepends=True)
    has_partial = os.path.lexists(where.partial)
    if not has_partial and _is_own_file(where.pixels) and not where.index.exists():
        where.pixels.replace(where.partial)  # killed before the index was written
    if not _is_own_file(where.partial) or not lines or not _has_plan(lines[0], plan):
        _start(where, plan, total_bytes)
        return {}
    complete = [line for line in lines if line.endswith(b"\n")]  # the last may be cut short
    truncate(where.journal, sum(map(len, complete)))
    truncate(where.partial, total_bytes)
    with where.partial.open("rb") as pixels:
        parsed = [_parse(line, pixels, settings, num_images) for line in complete[1:]]
    return {decoded.first_row: decoded for decoded in parsed if decoded is not None}


def _is_own_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()


def _has_plan(line: bytes, plan: str) -> bool:
    """Compare the values only: the first release gave one of the keys another name."""
    try:
        recorded = list(json.loads(line).values())
    except (ValueError, AttributeError, RecursionError):
        return False
    return line.endswith(b"\n") and recorded == list(json.loads(plan).values())


def _start(where: CachePaths, plan: str, total_bytes: int) -> None:
    try:
        where.journal.unlink(missing_ok=True)
        where.partial.unlink(missing_ok=True)
    except OSError as error:  # a folder of that name
        raise _cannot_write(Path(error.filename), error) from error
    free = shutil.disk_usage(where.partial.parent).free
    if free < total_bytes:
        raise DataError(
            f"the cache needs {total_bytes / 1e9:.2f} GB in {where.partial.parent}, where"
            f" {free / 1e9:.2f} GB are free. Make room, or set data.cache_dir to another disk, or"
            " data.cache=off to decode in every epoch."
        )
    with open(where.partial, "xb", opener=no_link) as pixels:
        pixels.truncate(total_bytes)
    with open(where.journal, "x", encoding="utf-8", opener=no_link) as journal:
        journal.write(plan + "\n")


def _parse(
    line: bytes, pixels: IO[bytes], settings: CacheSettings, num_images: int
) -> Optional[DecodedChunk]:
    """Read a line of the journal; None if it or the pixels are not what a build writes."""
    try:
        decoded = _JOURNAL_LINE.validate_json(line, strict=True)
    except ValueError:
        return None
    count = min(_CHUNK_IMAGES, num_images - decoded.first_row)
    if not len(decoded.crc32) == len(decoded.reasons) == count:
        return None
    image_bytes = settings.image_size**2
    black = zlib.crc32(bytes(image_bytes))
    stored = _stored_checksums(pixels, decoded.first_row, count, image_bytes)
    for crc, reason, there in zip(decoded.crc32, decoded.reasons, stored):
        if (crc is None) != (reason is not None) or there != (black if crc is None else crc):
            return None
    return decoded


def _stored_checksums(
    pixels: IO[bytes], first_row: int, num_images: int, image_bytes: int
) -> List[int]:
    pixels.seek(first_row * image_bytes)
    return [zlib.crc32(pixels.read(image_bytes)) for _ in range(num_images)]


def decode_chunk(chunk: Chunk, *, settings: CacheSettings, pixels: Optional[Path]) -> DecodedChunk:
    """Decode a chunk and, if a file of pixels is given, write it there at its rows."""
    size = settings.image_size
    images = np.zeros((len(chunk.paths), size, size), dtype=np.uint8)
    decoded = DecodedChunk(chunk.first_row, [], [])
    for position, path in enumerate(chunk.paths):
        image = settings.decode(path)
        if isinstance(image, str):
            crc, reason = None, re.sub(r"[\x00-\x1f\x7f]+", " ", image)[:1000]
        else:
            images[position] = image
            crc, reason = zlib.crc32(image.tobytes()), None
        decoded.crc32.append(crc)
        decoded.reasons.append(reason)
    if pixels is not None:
        try:
            with open(pixels, "r+b", opener=no_link) as file:
                file.seek(chunk.first_row * size**2)
                file.write(images.tobytes())
        except OSError as error:
            advice = "Fix this and run the command again; the build resumes."
            raise DataError(f"{pixels}: {error.strerror}. {advice}") from error
    return decoded


def check_images(
    paths: Mapping[str, str], settings: CacheSettings, *, workers: Optional[int]
) -> Tuple[Dict[str, str], List[str]]:
    """Decode images without storing them.

    Returns the reason for each unusable one by name, and the names of those that have the checksum
    of an image of one gray value.
    """
    names = sorted(paths)
    decode = partial(decode_chunk, settings=settings, pixels=None)
    chunks = _in_chunks(paths, names)
    in_order = sorted(in_parallel("checking images", decode, chunks, workers=workers))
    crc32 = (crc for decoded in in_order for crc in decoded.crc32)
    plain = plain_crc32(settings.image_size)
    return _unusable(names, in_order), [name for name, crc in zip(names, crc32) if crc in plain]


def _unusable(names: List[str], in_order: List[DecodedChunk]) -> Dict[str, str]:
    reasons = [reason for decoded in in_order for reason in decoded.reasons]
    return {name: reason for name, reason in zip(names, reasons) if reason is not None}


def check_cache(
    index: CacheIndex, where: CachePaths, paths: Mapping[str, str], *, workers: Optional[int]
) -> Dict[str, str]:
    """Compare every image of a cache with its checksum, and with its file, decoded again.

    `paths` maps file names to the paths of files that exist; other images are only checked for
    damage. Returns what is wrong by file name.
    """
    wrong: Dict[str, str] = {}
    verify = partial(_verify_chunk, settings=index.settings, pixels=where.pixels)
    chunks = _in_chunks(paths, index.images)
    for stored, decoded in in_parallel("verifying images", verify, chunks, workers=workers):
        for row, (in_cache, in_file) in enumerate(zip(stored, decoded.crc32), decoded.first_row):
            crc, name = index.crc32[row], index.images[row]
            if crc is not None and in_cache != crc:
                wrong[name] = "its pixels in the cache are damaged"
            elif name in paths and in_file != crc:
                wrong[name] = "the cache does not hold what its file holds now"
    return dict(sorted(wrong.items()))


def _verify_chunk(
    chunk: Chunk, *, settings: CacheSettings, pixels: Path
) -> Tuple[List[int], DecodedChunk]:
    with pixels.open("rb") as file:
        stored = _stored_checksums(file, chunk.first_row, len(chunk.paths), settings.image_size**2)
    return stored, decode_chunk(chunk, settings=settings, pixels=None)


def _in_chunks(paths: Mapping[str, str], names: List[str]) -> List[Chunk]:
    return [
        Chunk(start, [paths.get(name, "") for name in names[start : start + _CHUNK_IMAGES]])
        for start in range(0, len(names), _CHUNK_IMAGES)
    ]


def in_parallel(
    label: str,
    function: Callable[[Chunk], Result],
    chunks: List[Chunk],
    *,
    workers: Optional[int],
    done: int = 0,
) -> Generator[Result, None, None]:
    """Yield the result of a picklable function on each chunk, in any order, and show progress.

    `workers` None uses a process per available core; with 1, or few images, this process does it.
    `done` images were finished earlier. Raises DataError if a process ends before its work.
    """
    workers = workers or usable_cores()
    left = sum(len(chunk.paths) for chunk in chunks)
    results: Iterator[Tuple[Chunk, Result]]
    if workers == 1 or left <= _FEW_IMAGES:
        results = ((chunk, function(chunk)) for chunk in chunks)
    else:
        results = _in_processes(function, chunks, workers)
    with progress(label, done=done, total=done + left) as advance:
        for chunk, result in results:
            yield result
            advance(len(chunk.paths))


def _in_processes(
    function: Callable[[Chunk], Result], chunks: List[Chunk], workers: int
) -> Iterator[Tuple[Chunk, Result]]:
    pool = SpawnedPool(workers)
    futures: Dict[Future[Result], Chunk] = {}
    try:
        # No comprehension: after a signal, the futures submitted so far must be cancelled.
        for chunk in chunks:
            futures[pool.submit(function, chunk)] = chunk
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:  # it has ended all futures
        raise DataError(
            "a process that decodes images ended before its work: killed, or out of memory. Run the"
            " command again; the build resumes. data.cache_workers=1 decodes in the main process."
        ) from error
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    finally:
        pool.shutdown()
