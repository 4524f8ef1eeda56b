"""Choose where images are read from, their files or the cache, and list the unusable ones."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from cxr_vit.config.data_sections import DataSection
from cxr_vit.data.cache import (
    CacheIndex,
    CachePaths,
    CacheSettings,
    library_versions,
    open_images,
    plain_crc32,
    refusal,
)
from cxr_vit.data.cache_build import build_cache, check_cache, check_images, locked
from cxr_vit.data.images import FileReader, ImageReader, find_images
from cxr_vit.errors import DataError

logger = logging.getLogger(__name__)

_PREPARE = "python -m cxr_vit prepare --config <file>"

#: Calls a function in one process only and returns its result, JSON-able, in all of them.
RunOnce = Callable[[str, Callable[[], Any]], Any]


class ImageSource(NamedTuple):
    """The usable images, and why the others are unusable."""

    reader: ImageReader
    missing: List[str]  # file names without a file
    bad: Dict[str, str]  # file name -> reason
    origin: str  # where the pixels come from, for messages
    plain: List[str]  # images whose checksum says that all pixels are equal; see `plain_images`


def run_here(name: str, function: Callable[[], Any]) -> Any:
    """Call the function in this process: the `RunOnce` of a single process."""
    return function()


def plain_images(source: ImageSource) -> List[str]:
    """Return the images whose pixels are all equal: black ones, for example.

    Only the images with the checksum of such an image are read, one by one.
    """
    size = source.reader.image_size
    pixels = np.empty((1, size, size), dtype=np.uint8)
    found = []
    for name in source.plain:
        source.reader.select([name]).read(np.zeros(1, dtype=np.int64), pixels)
        if pixels.min() == pixels.max():
            found.append(name)
    return found


def _warn_of_plain(source: ImageSource) -> None:
    found = plain_images(source)
    if found:
        text = (
            "%d images are of one gray value, as black ones are, first: %s; data-report lists them"
        )
        logger.warning(text, len(found), found[0])


def images_folder(data: DataSection) -> Path:
    """Return the folder that is searched for images."""
    return Path(data.root if data.images is None else data.images)


def cache_paths(data: DataSection) -> CachePaths:
    """Return the files of the cache."""
    folder = Path(data.root) / "cxr_vit_cache" if data.cache_dir is None else Path(data.cache_dir)
    return CachePaths.of(folder, data.read_size)


def open_image_source(
    data: DataSection, names: Sequence[str], *, renew: bool = False, once: RunOnce = run_here
) -> ImageSource:
    """Open the images of a CSV, from the cache or from their files.

    With `data.cache` ``"auto"`` the cache is built if there is none; ``"require"`` fails then;
    ``"off"`` reads the files, after decoding each once, in one process, to find the unusable ones.
    `renew` builds or rebuilds the cache if it is missing or does not fit, whatever `cache` says.

    Raises DataError if the cache is required and missing, does not fit, is damaged, or cannot be
    written.
    """
    paths = _find(data, names)
    where = cache_paths(data)
    if not paths and not where.index.exists():  # the caller refuses a data set without images
        return _from_files(data, names, paths, run_here)
    if data.cache == "off" and not renew:
        return _from_files(data, names, paths, once)
    settings, is_new = CacheSettings.of(data), False
    index, reason = _load_fitting(where, settings, paths)
    if not renew:
        _refuse(where, reason)
        if index is None and data.cache == "require":
            raise DataError(f"data.cache=require, and {_no_cache(where)}")
    if index is None or (renew and where.journal.exists()):
        with locked(where.lock):
            index, reason = _load_fitting(where, settings, paths)  # another process may have built
            if not renew:
                _refuse(where, reason)
            elif reason is not None:
                logger.info("the cache %s does not fit: %s", where.pixels, reason)
                _keep_images_without_files(where, images_folder(data))
            if index is None:
                index = build_cache(where, settings, paths, workers=data.cache_workers)
                is_new = True
            else:  # left by a kill between the last two steps of a build
                where.journal.unlink(missing_ok=True)
    source = _from_store(where, index, names)
    if is_new:
        _warn_of_plain(source)
    return source


def verify(data: DataSection, names: Sequence[str]) -> Tuple[Dict[str, str], int, int]:
    """Compare every image of the cache with its checksum and its file.

    Returns what is wrong by file name, and the numbers of images with and without a file. Raises
    DataError if there is no cache, or one that training would refuse.
    """
    paths = _find(data, names)
    where = cache_paths(data)
    index, reason = _load_fitting(where, CacheSettings.of(data), paths)
    _refuse(where, reason)
    if index is None:
        raise DataError(_no_cache(where))
    wrong = check_cache(index, where, paths, workers=data.cache_workers)
    compared = sum(name in paths for name in index.images)
    return wrong, compared, len(index.images) - compared


def _find(data: DataSection, names: Sequence[str]) -> Dict[str, str]:
    """Return file name -> path of the images whose file exists, in the CSV's order."""
    folder = images_folder(data)
    if data.images is not None and not folder.is_dir():
        raise DataError(f"data.images={folder} is not a folder. Give the folder of the images.")
    found = find_images(folder, set(names))
    return {name: found[name] for name in names if name in found}


def _load_fitting(
    where: CachePaths, settings: CacheSettings, paths: Mapping[str, str]
) -> Tuple[Optional[CacheIndex], Optional[str]]:
    """Return the index of a cache that fits; else None, and the reason if there is a cache."""
    try:
        index = CacheIndex.load(where.index)
    except (FileNotFoundError, NotADirectoryError):
        return None, None
    except ValueError as error:
        return None, str(error)
    reason = refusal(index, where.pixels, settings, paths)
    if reason is not None:
        return None, reason
    if index.versions != library_versions():
        versions = ", ".join(f"{name} {version}" for name, version in index.versions.items())
        text = "the cache %s was made with %s; prepare --verify compares it with files decoded now"
        logger.info(text, where.pixels, versions)
    return index, None


def _no_cache(where: CachePaths) -> str:
    return f"there is no finished cache {where.pixels}. Build it: {_PREPARE}"


def _refuse(where: CachePaths, reason: Optional[str]) -> None:
    if reason is not None:
        raise DataError(
            f"the cache {where.pixels} is refused: {reason}. Rebuild it ({_PREPARE}), or train"
            " without it (data.cache=off)."
        )


def _keep_images_without_files(where: CachePaths, images: Path) -> None:
    """Raise if a rebuild would lose images that cannot be decoded again."""
    try:
        index = CacheIndex.load(where.index)
    except ValueError:
        lost = [] if find_images(images) else ["all of them"]
    else:
        there = find_images(images, set(index.images))  # also those of another CSV
        usable = [name for name, crc in zip(index.images, index.crc32) if crc is not None]
        lost = [name for name in usable if name not in there]
    if lost:
        raise DataError(
            f"the cache {where.pixels} does not fit, but rebuilding it would lose images whose"
            f" files are not here ({len(lost)}, first: {lost[0]}). Restore the files or set another"
            f" data.cache_dir; remove {where.index} if the images are no longer needed."
        )


def _from_store(where: CachePaths, index: CacheIndex, names: Sequence[str]) -> ImageSource:
    held = set(index.images)
    missing = [name for name in names if name not in held]
    bad = {name: index.unusable[name] for name in names if name in index.unusable}
    checksums, needed = plain_crc32(index.settings.image_size), set(names)
    rows = zip(index.images, index.crc32)
    plain = [name for name, crc in rows if crc in checksums and name in needed]
    return ImageSource(open_images(index, where.pixels), missing, bad, str(where.pixels), plain)


def _from_files(
    data: DataSection, names: Sequence[str], paths: Mapping[str, str], once: RunOnce
) -> ImageSource:
    check = partial(check_images, paths, CacheSettings.of(data), workers=data.cache_workers)
    bad, plain = once("bad images", check)
    usable = [name for name in names if name in paths and name not in bad]
    missing = [name for name in names if name not in paths]
    reader = FileReader(
        paths,
        usable,
        image_size=data.read_size,
        max_megapixels=data.max_megapixels,
        resample=data.resample,
        dicom_window=data.dicom_window,
    )
    source = ImageSource(reader, missing, bad, "their files, decoded each time", plain)
    _warn_of_plain(source)
    return source
