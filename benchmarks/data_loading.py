"""Measure how many images per second one process reads, relative to the tutorial's transform.

    python -m benchmarks.data_loading [--images DIR] [--out FILE]

A few thousand images are linked from the real ones, so that the store is larger than the
processor's caches. All files are in the page cache: the benchmark measures work, not the disk. The
ways take turns over several rounds; a ratio is the median over the rounds. Prints a table and
writes a JSON file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Sequence, Tuple

import cv2
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader

from benchmarks.linked_images import NIH, original_images, write_linked_set
from benchmarks.machine import describe_machine
from cxr_vit.cli import run
from cxr_vit.config.data_sections import AugmentSection
from cxr_vit.data.augment import Augmentation
from cxr_vit.data.cache import CacheIndex, CachePaths, CacheSettings, open_images
from cxr_vit.data.cache_build import build_cache
from cxr_vit.data.dataset import ChestXrayDataset, collate
from cxr_vit.data.images import MAX_MEGAPIXELS, FileReader
from cxr_vit.data.nih import read_records
from cxr_vit.data.records import Records
from cxr_vit.data.text_files import find_csv

BATCH_SIZE = 128
#: Images decoded per round, the same ones in every way that decodes.
DECODED = 2 * BATCH_SIZE
#: Passes over the store per round, plain and with augmentation.
PASSES, AUGMENTED_PASSES = 8, 1
#: Batches of a loader before timing starts: its process starts and fills its queue.
WARM_BATCHES = 4
AUGMENT = AugmentSection(
    rotation=10,
    shift=0.05,
    scale=0.1,
    crop=0.7,
    brightness=0.2,
    contrast=0.2,
    gamma=0.2,
    horizontal_flip=0.5,
)
TUTORIAL = "tutorial"
#: Way -> description, and the ratio to the tutorial's that it should reach.
WAYS: Dict[str, Tuple[str, float]] = {
    TUTORIAL: ("PIL, RGB, resize, tensor, normalise, fp16", 0),
    "direct": ("files through ChestXrayDataset", 1.5),
    "cached": ("cache through ChestXrayDataset", 500),
    "augmented": ("the same, every augmentation on", 50),
    "memory_map": ("bare memory map, no data set", 0),
    "loader_0": ("cached, torch's DataLoader, 0 workers", 0),
    "loader_1": ("cached, torch's DataLoader, 1 worker", 0),
    "build": ("cache build, one core", 1.4),
}


class Images(NamedTuple):
    """The data set: its folder, the paths of the images by name, records and store."""

    root: Path
    paths: Dict[str, str]
    records: Records
    settings: CacheSettings
    store: CachePaths


def tutorial_transform(size: int) -> Tuple[Callable[[Image.Image], torch.Tensor], str]:
    """Return the tutorial's transform and its description.

    Without torchvision (0.15.2 belongs to torch 2.0.1) it is made of the same operations in PIL and
    torch; the tensors are equal.
    """
    try:
        import torchvision
        from torchvision import transforms
    except ImportError:
        return lambda image: _transform_by_hand(image, size), (
            "the same operations in PIL and torch; torchvision is not installed"
        )
    steps = [
        transforms.Lambda(lambda image: image.convert("RGB")),
        transforms.Resize((size, size)),
        transforms.ToTensor(),
        transforms.Normalize(mean=[0.5] * 3, std=[0.5] * 3),
        transforms.ConvertImageDtype(torch.float16),
    ]
    return transforms.Compose(steps), f"torchvision {torchvision.__version__}"


def _transform_by_hand(image: Image.Image, size: int) -> torch.Tensor:
    resized = image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous().float().div(255)
    mean = torch.full((3, 1, 1), 0.5)
    return pixels.clone().sub_(mean).div_(mean).to(torch.float16)


def make_images(root: Path, originals: Sequence[Path], num_images: int, size: int) -> Images:
    """Link the images and build their store."""
    names = write_linked_set(root, originals, num_images)
    paths = {name: str(root / "images" / name) for name in names}
    records = read_records(find_csv(root, None), include_no_finding=False)
    settings = CacheSettings(size, MAX_MEGAPIXELS)
    store = CachePaths.of(root / "cache", size)
    store.pixels.parent.mkdir()
    build_cache(store, settings, paths, workers=1)
    return Images(root, paths, records, settings, store)


def direct_dataset(images: Images) -> ChestXrayDataset:
    """Return a data set that decodes the files at each access."""
    source = FileReader(
        images.paths,
        list(images.paths),
        image_size=images.settings.image_size,
        max_megapixels=images.settings.max_megapixels,
    )
    return ChestXrayDataset(images.records, source)


def cached_dataset(images: Images, *, augmented: bool) -> ChestXrayDataset:
    """Return a data set that reads the store."""
    source = open_images(CacheIndex.load(images.store.index), images.store.pixels)
    size = images.settings.image_size
    augmentation = Augmentation(AUGMENT, num_samples=len(source), image_size=size, seed=0)
    return ChestXrayDataset(
        images.records,
        source.select(list(images.paths)),
        augmentation=augmentation if augmented else None,
    )


def shuffled(num_images: int, passes: int, round_: int) -> List[List[int]]:
    """Return batches of draws over `passes` epochs; each epoch of each round has its own order."""
    draws = [
        epoch * num_images + np.random.default_rng(epoch).permutation(num_images)
        for epoch in range(round_ * passes, (round_ + 1) * passes)
    ]
    stream = np.concatenate(draws)
    return [
        stream[start : start + BATCH_SIZE].tolist() for start in range(0, len(stream), BATCH_SIZE)
    ]


def timed(act: Callable[[Any], Any], batches: Sequence[Sequence[Any]]) -> float:
    """Return the samples per second of an action over batches."""
    start = time.perf_counter()
    for batch in batches:
        act(batch)
    return sum(map(len, batches)) / (time.perf_counter() - start)


def timed_loader(dataset: ChestXrayDataset, batches: List[List[int]], workers: int) -> float:
    """Return the samples per second of torch's loader, made as in the engines, once it runs."""
    loader: Iterable[Any] = DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
    )
    stream = iter(loader)
    for _ in itertools.islice(stream, WARM_BATCHES):
        pass
    start = time.perf_counter()
    count = sum(len(batch.images) for batch in stream)
    return count / (time.perf_counter() - start)


def timed_build(images: Images) -> float:
    """Return the images per second of a cache build in this process alone."""
    folder = images.root / "build"
    folder.mkdir()
    paths = dict(itertools.islice(images.paths.items(), DECODED))
    where = CachePaths.of(folder, images.settings.image_size)
    start = time.perf_counter()
    build_cache(where, images.settings, paths, workers=1)
    seconds = time.perf_counter() - start
    shutil.rmtree(folder)
    return len(paths) / seconds


def make_ways(
    images: Images, transform: Callable[[Image.Image], torch.Tensor]
) -> Dict[str, Callable[[int], float]]:
    """Return way -> function of the round that returns its samples per second."""
    direct = direct_dataset(images)
    cached, augmented = (cached_dataset(images, augmented=on) for on in (False, True))
    count, size = len(cached), images.settings.image_size
    pixels = np.memmap(images.store.pixels, dtype=np.uint8, mode="r").reshape(count, size, size)
    buffer = np.empty((BATCH_SIZE, size, size), dtype=np.uint8)
    same = [list(range(start, start + BATCH_SIZE)) for start in range(0, DECODED, BATCH_SIZE)]
    files = [[list(images.paths.values())[row] for row in rows] for rows in same]

    def by_tutorial(paths: Sequence[str]) -> torch.Tensor:
        return torch.stack([transform(Image.open(path)) for path in paths])

    def by_map(rows: List[int]) -> np.ndarray:
        wanted = np.asarray(rows) % count
        return np.take(pixels, wanted, axis=0, out=buffer[: len(rows)], mode="clip")

    def plain(round_: int) -> List[List[int]]:
        return shuffled(count, PASSES, round_)

    return {
        TUTORIAL: lambda round_: timed(by_tutorial, files),
        "direct": lambda round_: timed(direct.__getitems__, same),
        "cached": lambda round_: timed(cached.__getitems__, plain(round_)),
        "augmented": lambda round_: timed(
            augmented.__getitems__, shuffled(count, AUGMENTED_PASSES, round_)
        ),
        "memory_map": lambda round_: timed(by_map, plain(round_)),
        "loader_0": lambda round_: timed_loader(cached, plain(round_), 0),
        "loader_1": lambda round_: timed_loader(cached, plain(round_), 1),
        "build": lambda round_: timed_build(images),
    }


def cached_equals_direct(images: Images) -> bool:
    """Whether the stored pixels equal the decoded files bit for bit, for the images decoded."""
    direct, cached = direct_dataset(images), cached_dataset(images, augmented=False)
    rows = range(DECODED)
    return all(np.array_equal(direct.read_images([row]), cached.read_images([row])) for row in rows)


def summarise(rates: Dict[str, List[float]]) -> Dict[str, Dict[str, Any]]:
    """Return the figures of each way."""
    summary = {}
    for way, (what, goal) in WAYS.items():
        ratios = [rate / base for rate, base in zip(rates[way], rates[TUTORIAL])]
        summary[way] = {
            "what": what,
            "samples_per_s": statistics.median(rates[way]),
            "ratio": statistics.median(ratios),
            "lowest_ratio": min(ratios),
            "highest_ratio": max(ratios),
            "goal": goal or None,
            "samples_per_s_by_round": rates[way],
        }
    return summary


def print_table(summary: Dict[str, Dict[str, Any]]) -> None:
    """Print one line per way."""
    print(f"{'':12} {'':42} {'samples/s':>10} {'ratio':>8} {'lowest..highest':>16}   goal")
    for way, figures in summary.items():
        span = f"{figures['lowest_ratio']:.4g}..{figures['highest_ratio']:.4g}"
        goal = ""
        if figures["goal"]:
            verdict = "reached" if figures["ratio"] >= figures["goal"] else "MISSED"
            goal = f"{figures['goal']:g}, {verdict}"
        print(
            f"{way:12} {figures['what']:42} {figures['samples_per_s']:10,.0f}"
            f" {figures['ratio']:8.4g} {span:>16}   {goal}"
        )


def measure(arguments: argparse.Namespace, root: Path) -> Dict[str, Any]:
    """Measure all ways in interleaved rounds; return the content of the JSON file."""
    originals = original_images(arguments.images)
    images = make_images(root, originals, arguments.num_images, arguments.image_size)
    transform, description = tutorial_transform(arguments.image_size)
    equal = cached_equals_direct(images)
    ways = make_ways(images, transform)
    rates: Dict[str, List[float]] = {way: [] for way in WAYS}
    for round_ in range(arguments.rounds + 1):
        for way, act in ways.items():
            rate = act(round_)
            if round_:  # the first one warms up
                rates[way].append(rate)
    cache_bytes = images.store.pixels.stat().st_size
    packages = ("torch", "numpy", "pillow", "kornia-rs", "opencv-python-headless")
    modes = [Image.open(path).mode for path in originals]
    return {
        **describe_machine(*packages),
        "tutorial_transform": description,
        "image_size": arguments.image_size,
        "original_images": {mode: modes.count(mode) for mode in sorted(set(modes))},
        "images": arguments.num_images,
        "store_mb": round(cache_bytes / 1e6, 1),
        "batch_size": BATCH_SIZE,
        "rounds": arguments.rounds,
        "augment": AUGMENT.model_dump(),
        "cached_equals_direct": equal,
        "ways": summarise(rates),
    }


def main(argv: Sequence[str]) -> int:
    """Measure, print a table and write the JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=Path, default=NIH / "images", metavar="DIR")
    parser.add_argument(
        "--num-images", type=int, default=4096, metavar="N", help="images in the store"
    )
    parser.add_argument("--image-size", type=int, default=224, metavar="PIXELS")
    parser.add_argument("--rounds", type=int, default=5, metavar="N")
    parser.add_argument("--out", type=Path, default=Path("data_loading.json"), metavar="FILE")
    arguments = parser.parse_args(argv)
    if arguments.num_images < DECODED or arguments.rounds < 1:
        parser.error(f"at least {DECODED} images and one round are needed")
    logging.getLogger("cxr_vit").setLevel(logging.WARNING)  # there are many builds
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    with tempfile.TemporaryDirectory(prefix="data_loading-") as root:
        result = measure(arguments, Path(root))
    print(
        f"{result['machine']}, one process, {result['images']} images in {result['store_mb']:.0f}"
        f" MB; the tutorial's transform: {result['tutorial_transform']}"
    )
    print_table(result["ways"])
    equal = result["cached_equals_direct"]
    print(f"the cached pixels {'equal' if equal else 'DIFFER FROM'} the direct ones")
    arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0 if equal else 1


if __name__ == "__main__":
    run(main)
