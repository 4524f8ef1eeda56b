"""Choose where images come from, their files or the cache, and say which are of no use.

Imports no torch.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from cxr_vit.config.schema import DataSection
from cxr_vit.data.images import find_images
from cxr_vit.data.store import (
    FileReader,
    ImageReader,
    StoreIndex,
    StorePaths,
    StoreSettings,
    library_versions,
    open_images,
    refusal,
)
from cxr_vit.data.store_build import (
    build_store,
    check_images,
    default_workers,
    locked,
    verify_store,
)
from cxr_vit.errors import DataError

__all__ = [
    "ImageSource",
    "Once",
    "images_folder",
    "just_call",
    "open_image_source",
    "store_paths",
    "verify",
]


logger = logging.getLogger(__name__)

_PREPARE = "python -m cxr_vit prepare --config <file>"

#: Lets one process of several do a thing, and gives all what came of it (JSON-able).
Once = Callable[[str, Callable[[], Any]], Any]


class ImageSource(NamedTuple):
    """The images that can be used, and why the others cannot.

    `missing` are names without a file, `bad` names and reasons of files that are no images, `place`
    says where the pixels come from.
    """

    images: ImageReader
    missing: List[str]
    bad: Dict[str, str]
    place: str


def images_folder(data: DataSection) -> Path:
    """Return the folder that is searched for images."""
    return Path(data.root if data.images is None else data.images)


def store_paths(data: DataSection) -> StorePaths:
    """Name the files of the cache for a configuration."""
    folder = Path(data.root) / "cxr_vit_cache" if data.cache_dir is None else Path(data.cache_dir)
    return StorePaths.of(folder, data.image_size)


def just_call(name: str, make: Callable[[], Any]) -> Any:
    """Do a thing here: what `Once` comes to where there is one process."""
    return make()


def open_image_source(
    data: DataSection, names: Sequence[str], *, renew: bool = False, once: Once = just_call
) -> ImageSource:
    """Find the images of a CSV, in the cache or as files.

    Parameters
    ----------
    data
        The `data` section: `cache` says whether the cache is built on first use (`auto`), must be
        there (`require`), or is left alone (`off`): then every image is decoded once, to see that
        it can be.
    names
        File names.
    renew
        Build the cache anew where it does not fit (and whatever `cache` says).
    once
        Does what takes long and need not be done in every process.

    Raises
    ------
    DataError
        If the cache is wanted and missing, out of date, damaged, or cannot be written.
    """
    paths = _find(data, names)
    where = store_paths(data)
    if not paths and not where.index.exists():  # it will be refused
        return _from_files(data, names, paths, just_call)
    if data.cache == "off" and not renew:
        return _from_files(data, names, paths, once)
    settings = StoreSettings(data.image_size, data.max_megapixels)
    index, reason = _look(where, settings, paths)
    if not renew:
        _refuse(where, reason)
        if index is None and data.cache == "require":
            raise DataError(
                f"data.cache=require, and there is no finished cache {where.pixels}. Build it:"
                f" {_PREPARE}"
            )
    if index is None or (renew and where.journal.exists()):
        with locked(where.lock):
            index, reason = _look(where, settings, paths)  # another process may have built it
            if not renew:
                _refuse(where, reason)
            elif reason is not None:
                logger.info("the cache %s does not fit: %s", where.pixels, reason)
                _keep_what_has_no_file(where, images_folder(data))
            if index is None:
                workers = default_workers(data.cache_workers)
                index = build_store(where, settings, paths, workers=workers)
            else:  # left by a kill between the last two steps
                where.journal.unlink(missing_ok=True)
    return _from_store(where, index, names)


def _find(data: DataSection, names: Sequence[str]) -> Dict[str, str]:
    """Return file name -> path of the images of the CSV that are there, in its order."""
    folder = images_folder(data)
    if data.images is not None and not folder.is_dir():
        raise DataError(
            f"data.images={folder} is not a folder. Name the one that holds the images."
        )
    found = find_images(folder, set(names))
    return {name: found[name] for name in names if name in found}


def _keep_what_has_no_file(where: StorePaths, images: Path) -> None:
    """Refuse to replace a store that holds what cannot be decoded again here."""
    try:
        index = StoreIndex.load(where.index)
    except ValueError:
        lost = [] if find_images(images) else ["all of them"]
    else:
        there = find_images(images, set(index.images))  # also those of another CSV
        lost = [
            name
            for name, crc in zip(index.images, index.crc32)
            if crc is not None and name not in there
        ]
    if lost:
        raise DataError(
            f"the cache {where.pixels} does not fit, but building it anew would lose images whose"
            f" files are not here ({len(lost)}, first: {lost[0]}). Bring the files, or name another"
            f" data.cache_dir; remove {where.index} if they are no longer wanted."
        )


def _refuse(where: StorePaths, reason: Optional[str]) -> None:
    if reason is not None:
        raise DataError(
            f"the cache {where.pixels} is refused: {reason}. Build it anew ({_PREPARE}), or do"
            " without it (data.cache=off)."
        )


def _look(
    where: StorePaths, settings: StoreSettings, paths: Mapping[str, str]
) -> Tuple[Optional[StoreIndex], Optional[str]]:
    """Return the index of a store that fits; else None, and the reason if there is a store."""
    if not where.index.exists():
        return None, None
    try:
        index = StoreIndex.load(where.index)
    except FileNotFoundError:  # another process is just replacing it
        return None, None
    except ValueError as error:
        return None, str(error)
    reason = refusal(index, where.pixels, settings, paths)
    if reason is None and index.versions != library_versions():
        logger.info(
            "the cache %s was made with %s; prepare --verify compares it with what is here now",
            where.pixels,
            ", ".join(f"{name} {version}" for name, version in index.versions.items()),
        )
    return (index, None) if reason is None else (None, reason)


def _from_store(where: StorePaths, index: StoreIndex, names: Sequence[str]) -> ImageSource:
    held = set(index.images)
    return ImageSource(
        open_images(index, where.pixels),
        [name for name in names if name not in held],
        {name: index.unusable[name] for name in names if name in index.unusable},
        str(where.pixels),
    )


def _from_files(
    data: DataSection, names: Sequence[str], paths: Mapping[str, str], once: Once
) -> ImageSource:
    settings = StoreSettings(data.image_size, data.max_megapixels)
    workers = default_workers(data.cache_workers)
    bad: Dict[str, str] = once(
        "bad images", partial(check_images, paths, settings, workers=workers)
    )
    usable = [name for name in names if name in paths and name not in bad]
    images = FileReader(
        paths, usable, image_size=data.image_size, max_megapixels=data.max_megapixels
    )
    missing = [name for name in names if name not in paths]
    return ImageSource(images, missing, bad, "their files, decoded each time")


class Verified(NamedTuple):
    """What a look at every image of a store found.

    `wrong` file name -> what is wrong; how many images were compared with their files; and how many
    have none here, and were only checked for damage.
    """

    wrong: Dict[str, str]
    compared: int
    without_file: int


def verify(data: DataSection, names: Sequence[str]) -> Verified:
    """Check every image of the cache, by its checksum and against its file.

    Parameters
    ----------
    data
        The `data` section.
    names
        File names of the CSV.

    Raises
    ------
    DataError
        If there is no cache, or training would refuse it at once.
    """
    paths = _find(data, names)
    where = store_paths(data)
    settings = StoreSettings(data.image_size, data.max_megapixels)
    index, reason = _look(where, settings, paths)
    _refuse(where, reason)
    if index is None:
        raise DataError(f"there is no finished cache {where.pixels}. Build it: {_PREPARE}")
    wrong = verify_store(index, where, paths, workers=default_workers(data.cache_workers))
    compared = sum(name in paths for name in index.images)
    return Verified(wrong, compared, len(index.images) - compared)
