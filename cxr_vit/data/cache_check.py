"""Check films, and the packed store against them, on all cores. Imports no torch."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Dict, List, Mapping, Optional, Tuple

from cxr_vit.data.cache import StoreIndex, StorePaths, StoreSettings
from cxr_vit.data.cache_build import decode_chunk, stored_checksums
from cxr_vit.data.decoding import Chunk, film_progress, in_chunks, in_parallel

__all__ = ["check_films", "verify_store"]


def check_films(
    paths: Mapping[str, str], settings: StoreSettings, *, workers: int
) -> Dict[str, str]:
    """Decode films without keeping them; return file name -> reason of those of no use.

    Parameters
    ----------
    paths
        File name -> path of the films.
    settings
        How films are read.
    workers
        Processes.
    """
    names = sorted(paths)
    unusable: Dict[str, str] = {}
    decode = partial(decode_chunk, settings=settings, pixels=None)
    chunks = in_chunks([paths[name] for name in names])
    with film_progress("checking films", done=0, total=len(names)) as advance:
        for decoded in in_parallel(decode, chunks, workers=workers):
            for row, reason in enumerate(decoded.reasons, start=decoded.first_row):
                if reason is not None:
                    unusable[names[row]] = reason
            advance(len(decoded.reasons))
    return dict(sorted(unusable.items()))


def verify_store(
    index: StoreIndex, where: StorePaths, paths: Mapping[str, str], *, workers: int
) -> Dict[str, str]:
    """Check every film of a store against its checksum and against its file, decoded anew.

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
    with film_progress("verifying films", done=0, total=len(index.images)) as advance:
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
