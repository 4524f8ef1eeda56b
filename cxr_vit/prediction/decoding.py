"""Decode images in order, in processes, one chunk ahead of the model."""

from __future__ import annotations

import contextlib
from collections import deque
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import Callable, Deque, Dict, Generator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from cxr_vit.data.cache import CacheSettings
from cxr_vit.data.dicom_header import read_dicom_header
from cxr_vit.data.spawn import SpawnedPool, usable_cores

#: Files that a process decodes at a time.
_TASK_FILES = 16
#: Starting processes takes longer than decoding this many files.
_FEW_FILES = 64

_ENDED = (
    "the process that decoded it ended: the file is damaged, or there is too little memory. Export"
    " it as a plain PNG."
)


class DecodedFile(NamedTuple):
    """The content of a file: pixels uint8 ``[S, S]``, or None and the reason."""

    pixels: Optional[np.ndarray]
    error: Optional[str]
    #: What a DICOM file's header gives cause to doubt.
    warnings: List[str]
    #: The tags of a DICOM file that were asked for, keyword -> text.
    tags: Dict[str, str]


@dataclass(frozen=True)
class DecodedChunk:
    """Consecutive images.

    Attributes
    ----------
    first
        Number of the first among all images, from 0.
    paths
        Their paths.
    files
        What was read of each.
    """

    first: int
    paths: Sequence[str]
    files: List[DecodedFile]

    def pixels(self, size: int) -> np.ndarray:
        """Return the images, uint8 ``[n, size, size]``; one that cannot be used is black."""
        images = np.zeros((len(self.files), size, size), np.uint8)
        for image, file in zip(images, self.files):
            if file.pixels is not None:
                image[:] = file.pixels
        return images


def decode_files(
    paths: Sequence[str], settings: CacheSettings, keep: Sequence[str]
) -> List[DecodedFile]:
    """Decode files, and read of DICOM headers the warnings and the tags to `keep`."""
    return [_decode(path, settings, keep) for path in paths]


def _decode(path: str, settings: CacheSettings, keep: Sequence[str]) -> DecodedFile:
    pixels, header = settings.decode(path), read_dicom_header(path, keep)
    if isinstance(pixels, str):
        return DecodedFile(None, pixels, *header)
    return DecodedFile(pixels, None, *header)


Decode = Callable[[Sequence[str]], List[DecodedFile]]


class Chunk(NamedTuple):
    """Consecutive images: the number of the first, from 0, and their paths."""

    first: int
    paths: Sequence[str]


def chunks_of(paths: Sequence[str], size: int, is_done: Sequence[bool]) -> List[Chunk]:
    """Return the chunks of `size` images that are not done as a whole.

    They begin at multiples of the size, whatever is done: an image is then in the same batch as in
    a run without interruption, and has the same probabilities to the last bit.
    """
    starts = range(0, len(paths), size)
    chunks = [Chunk(first, paths[first : first + size]) for first in starts]
    return [chunk for chunk in chunks if not all(is_done[chunk.first : chunk.first + size])]


def in_order(
    chunks: Sequence[Chunk],
    settings: CacheSettings,
    *,
    keep: Sequence[str] = (),
    workers: Optional[int] = None,
) -> Generator[DecodedChunk, None, None]:
    """Yield decoded chunks, of which the next one is decoded meanwhile.

    `workers` None is a process for each core; with one, or few files, this process decodes. A file
    with which a process ends has an error.
    """
    decode = partial(decode_files, settings=settings, keep=list(keep))
    workers = workers or usable_cores()
    if workers == 1 or sum(len(chunk.paths) for chunk in chunks) <= _FEW_FILES:
        for chunk in chunks:
            yield DecodedChunk(*chunk, decode(chunk.paths))
        return
    with contextlib.closing(_Decoders(decode, workers)) as decoders:
        for chunk, following in zip(chunks, [*chunks[1:], None]):
            if chunk is chunks[0]:
                decoders.submit(chunk.paths)
            if following is not None:
                decoders.submit(following.paths)
            yield DecodedChunk(*chunk, decoders.next())


class _Decoders:
    """Processes that decode, with the chunks that they work on."""

    def __init__(self, decode: Decode, workers: int) -> None:
        self._decode, self._workers = decode, workers
        self._pool = SpawnedPool(workers)
        self._chunks: Deque[List[Tuple[List[str], Future[List[DecodedFile]]]]] = deque()

    def submit(self, paths: Sequence[str]) -> None:
        """Begin to decode a chunk."""
        tasks = [
            list(paths[start : start + _TASK_FILES]) for start in range(0, len(paths), _TASK_FILES)
        ]
        self._chunks.append([(task, self._submit(task)) for task in tasks])

    def _submit(self, task: List[str]) -> Future[List[DecodedFile]]:
        try:
            return self._pool.submit(self._decode, task)
        except BrokenProcessPool:  # its tasks are repeated one by one, those to come are not
            self._pool = SpawnedPool(self._workers)
            return self._pool.submit(self._decode, task)

    def next(self) -> List[DecodedFile]:
        """Return the files of the first chunk that was not returned yet."""
        return [file for task, future in self._chunks.popleft() for file in self._of(task, future)]

    def _of(self, task: List[str], future: Future[List[DecodedFile]]) -> List[DecodedFile]:
        try:
            return future.result()
        except BrokenProcessPool:
            return self._one_by_one(task)

    def _one_by_one(self, task: List[str]) -> List[DecodedFile]:
        """Decode files in a process of their own, which tells with which of them it ends."""
        files: List[DecodedFile] = []
        while len(files) < len(task):
            with contextlib.suppress(BrokenProcessPool), SpawnedPool(1) as pool:
                for path in task[len(files) :]:
                    files += pool.submit(self._decode, [path]).result()
                return files
            files.append(DecodedFile(None, _ENDED, [], {}))
        return files

    def close(self) -> None:
        """End the processes."""
        for chunk in self._chunks:
            for _, future in chunk:
                future.cancel()
        self._pool.shutdown()
