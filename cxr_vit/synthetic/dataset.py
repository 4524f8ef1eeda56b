"""A synthetic data set in NIH ChestX-ray14's own layout, for the demo and the tests.

`plan_images` decides who has what, `cxr_vit.synthetic.anatomy` draws, `write_sample` puts the
files where NIH has them. Nothing in it is medical data.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence, Set, Tuple

import numpy as np
from PIL import Image

from cxr_vit.config.schema import DataSection
from cxr_vit.data.labels import FINDINGS, NO_FINDING
from cxr_vit.errors import ConfigError, DataError
from cxr_vit.files import lock
from cxr_vit.synthetic.anatomy import BOX_SPACE, draw_image

__all__ = ["PREVALENCE", "PlannedImage", "plan_images", "write_sample", "write_sample_if_absent"]

logger = logging.getLogger(__name__)


CSV_NAME = "Data_Entry_2017_v2020.csv"

BOX_NAME = "BBox_List_2017.csv"

CSV_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,"
    "View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)

BOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"

# The order is that of the real data; the rare ones are more frequent here, so that a small set
# still has some of each. Commonest first.
PREVALENCE: Dict[str, float] = {
    "Infiltration": 0.19,
    "Effusion": 0.13,
    "Atelectasis": 0.115,
    "Nodule": 0.09,
    "Mass": 0.08,
    "Pneumothorax": 0.07,
    "Consolidation": 0.06,
    "Pleural_Thickening": 0.05,
    "Cardiomegaly": 0.045,
    "Emphysema": 0.04,
    "Edema": 0.035,
    "Fibrosis": 0.03,
    "Pneumonia": 0.025,
    "Hernia": 0.02,
}

# NIH boxed eight findings, and writes one of them in another way.
BOXED: Dict[str, str] = {
    "Atelectasis": "Atelectasis",
    "Effusion": "Effusion",
    "Cardiomegaly": "Cardiomegaly",
    "Infiltration": "Infiltrate",
    "Pneumonia": "Pneumonia",
    "Pneumothorax": "Pneumothorax",
    "Mass": "Mass",
    "Nodule": "Nodule",
}

# Diseases that come together more often than chance.
COMPANIONS: Dict[str, Sequence[str]] = {
    "Effusion": ("Atelectasis", "Cardiomegaly", "Consolidation"),
    "Edema": ("Cardiomegaly", "Infiltration"),
    "Pneumonia": ("Infiltration",),
    "Emphysema": ("Pneumothorax",),
    "Fibrosis": ("Pleural_Thickening",),
    "Mass": ("Nodule",),
}

# Width, height and pixel spacing in mm as the CSV has them, by view.
PLATES: Dict[str, Sequence[Tuple[int, int, float]]] = {
    "PA": ((2682, 2749, 0.143), (2992, 2991, 0.143), (2500, 2048, 0.168)),
    "AP": ((2500, 2048, 0.168), (2048, 2500, 0.168), (3056, 2544, 0.139)),
}

SICK_SHARE = 0.5

MAX_FINDINGS = 5

MAX_FOLLOW_UPS = 12

TEST_SHARE = 0.25

BOXED_SHARE = 0.5  # of the test images


class PlannedImage(NamedTuple):
    """One row of the CSV, before anything is drawn."""

    patient: int
    follow_up: int
    findings: Tuple[str, ...]
    age: int
    gender: str
    view: str
    width: int
    height: int
    spacing: float
    test: bool

    @property
    def name(self) -> str:
        """The file name, as NIH has it."""
        return f"{self.patient:08d}_{self.follow_up:03d}.png"

    def csv_row(self) -> str:
        """The image's line of `Data_Entry_2017_v2020.csv`, eleven fields."""
        fields = (
            self.name,
            "|".join(self.findings) or NO_FINDING,
            self.follow_up,
            self.patient,
            self.age,
            self.gender,
            self.view,
            self.width,
            self.height,
            self.spacing,
            self.spacing,
        )
        return ",".join(str(field) for field in fields)


def plan_images(num_images: int, seed: int) -> List[PlannedImage]:
    """Decide patients, split and findings, without drawing.

    Each finding gets a fixed number of images in each part of the split, its prevalence rounded and
    at least one, so that counts do not hang on luck.

    Parameters
    ----------
    num_images
        How many images, at least 20.
    seed
        Not negative; the same seed gives the same plan.

    Returns
    -------
    list of PlannedImage
        Sorted by patient and follow-up.

    Raises
    ------
    ConfigError
        If `num_images` or `seed` is too small.
    """
    problems = []
    if num_images < 20:
        problems.append(
            f"num_images is {num_images}; at least 20 are needed to have every finding "
            "in both lists."
        )
    if seed < 0:
        problems.append(f"seed is {seed}; it must be 0 or more.")
    if problems:
        raise ConfigError(" ".join(problems))
    random = np.random.default_rng((seed, 0, 0, 0))
    counts = _images_per_patient(num_images, random)
    in_test = _test_patients(counts, random)
    patients = np.repeat(np.arange(len(counts)), counts)
    is_test = in_test[patients]
    labels = np.zeros((num_images, len(FINDINGS)), dtype=bool)
    for part in (False, True):
        rows = np.flatnonzero(is_test == part)
        labels[rows] = _assign_findings(patients[rows], random)
    images: List[PlannedImage] = []
    for patient in range(len(counts)):
        rows = np.flatnonzero(patients == patient)
        images += _history(patient + 1, labels[rows], bool(in_test[patient]), random)
    return images


def _images_per_patient(num_images: int, random: np.random.Generator) -> np.ndarray:
    """Follow-ups of each patient, int64: about half have one image, the mean is near 3."""
    most = min(MAX_FOLLOW_UPS, num_images // 5)
    counts: List[int] = []
    while sum(counts) < num_images:
        count = 1 if random.random() < 0.52 else 1 + int(random.geometric(0.25))
        counts.append(min(count, most, num_images - sum(counts)))
    return np.array(counts, dtype=np.int64)


def _test_patients(counts: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Whole patients, bool [patients], until a quarter of the images is reached, never passed."""
    room = max(round(TEST_SHARE * int(counts.sum())), 1)
    in_test = np.zeros(len(counts), dtype=bool)
    for patient in random.permutation(len(counts)):
        if counts[patient] <= room:
            in_test[patient] = True
            room -= int(counts[patient])
    return in_test


def _assign_findings(patients: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Give the findings of one part of the split to its images.

    Parameters
    ----------
    patients
        int64 [n], the patient of each image.
    random
        The plan's stream.

    Returns
    -------
    numpy.ndarray
        bool [n, 14]; each column has exactly its quota of images, no row more than five findings.
    """
    number = len(patients)
    quota = {name: max(round(share * number), 1) for name, share in PREVALENCE.items()}
    # Images of one patient draw near each other: the patient's part weighs more than the image's.
    chance = random.random((patients.max() + 1, len(FINDINGS) + 1))[patients]
    chance = 0.7 * chance + 0.3 * random.random(chance.shape)
    sick = max(round(SICK_SHARE * number), -(-sum(quota.values()) // (MAX_FINDINGS - 1)))
    healthy = np.argsort(chance[:, -1], kind="stable")[: max(number - sick, 0)]
    labels = np.zeros((number, len(FINDINGS)), dtype=bool)
    for name in reversed(list(PREVALENCE)):  # the rare first, the common fill what is left
        column = FINDINGS.index(name)
        load = labels.sum(axis=1)
        score = chance[:, column] - 0.05 * load
        for other in FINDINGS:
            if other in COMPANIONS.get(name, ()) or name in COMPANIONS.get(other, ()):
                score += 0.2 * labels[:, FINDINGS.index(other)]
        score[load == 0] += 0.25  # else too few of the sick images would get a finding at all
        score[load >= MAX_FINDINGS] = -2.0
        score[healthy] = -1.0
        labels[np.argsort(-score, kind="stable")[: quota[name]], column] = True
    return labels


def _history(
    patient: int, labels: np.ndarray, test: bool, random: np.random.Generator
) -> List[PlannedImage]:
    """The images of one patient in order of time; `labels` is bool [images, 14]."""
    age = int(np.clip(round(48 + 17 * float(random.standard_normal())), 4, 88))
    gender = "M" if random.random() < 0.56 else "F"
    images = []
    for follow_up, row in enumerate(labels):
        findings = tuple(sorted(name for name, has in zip(FINDINGS, row) if has))
        view = "AP" if random.random() < (0.55 if findings else 0.30) else "PA"
        width, height, spacing = PLATES[view][int(random.integers(0, 3))]
        images.append(
            PlannedImage(
                patient, follow_up, findings, age, gender, view, width, height, spacing, test
            )
        )
        age = min(age + int(random.integers(0, 3) == 2), 95)
    return images


def write_sample(out: Path, *, num_images: int = 2000, image_size: int = 128, seed: int = 0) -> int:
    """Write a synthetic set in NIH's layout; an interrupted run leaves nothing at `out`.

    The boxes in `BBox_List_2017.csv` are in pixels of NIH's 1024 x 1024 images whatever
    `image_size` is, for half of the test images.

    Parameters
    ----------
    out
        The folder to make. It may exist if it is empty.
    num_images
        How many images, at least 20. With 2000 or more, each finding has eight images in either list.
    image_size
        Width and height of the images in pixels, at least 32.
    seed
        Not negative. The same seed writes the same lists and the same pixels.

    Returns
    -------
    int
        The number of images written.

    Raises
    ------
    ConfigError
        If a number is too small.
    DataError
        If `out` is a file or a folder with something in it.
    """
    if image_size < 32:
        raise ConfigError(f"image_size is {image_size}; signs show from 32 pixels on.")
    images = plan_images(num_images, seed)
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(
            f"{out} exists and is not an empty folder. Name a new folder, or remove "
            "this one: the sample is never mixed with other files."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        _write_lists(partial, images, seed)
        boxes = _write_images(partial / "images", images, image_size, seed)
        _write_lines(partial / BOX_NAME, [BOX_HEADER, *boxes])
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return len(images)


def write_sample_if_absent(data: DataSection) -> None:
    """Write the synthetic data set of `data.sample_images` where `data.root` does not exist.

    Processes that call it at once write one data set.
    """
    root = Path(data.root)
    if data.sample_images is None or root.exists():
        return
    folder = root.resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / f".{root.name}.lock"):
        if root.exists():  # written by another process meanwhile
            return
        logger.warning(
            "data.root=%s does not exist: writing a synthetic data set there (%d images, none of"
            " them real; data.sample_images)",
            root,
            data.sample_images,
        )
        write_sample(root, num_images=data.sample_images)


def _write_lists(folder: Path, images: Sequence[PlannedImage], seed: int) -> None:
    _write_lines(folder / CSV_NAME, [CSV_HEADER, *(image.csv_row() for image in images)])
    _write_lines(folder / "train_val_list.txt", [image.name for image in images if not image.test])
    _write_lines(folder / "test_list.txt", [image.name for image in images if image.test])
    _write_lines(
        folder / "README.txt",
        [
            "Synthetic images in the layout of NIH ChestX-ray14. Not medical data, and of no use to",
            "medicine: shapes drawn by a program, to try cxr_vit without the real set.",
            f"Made by cxr_vit.synthetic.dataset.write_sample, {len(images)} images, seed {seed}.",
            f"Boxes are in pixels of a {BOX_SPACE} x {BOX_SPACE} image, as NIH's are.",
        ],
    )


def _boxed_images(images: Sequence[PlannedImage], seed: int) -> Set[str]:
    """Names of the test images whose boxes are given."""
    random = np.random.default_rng((seed, 0, 0, 1))
    candidates = [image.name for image in images if image.test and set(image.findings) & set(BOXED)]
    order = random.permutation(len(candidates))
    return {candidates[index] for index in order[: max(round(BOXED_SHARE * len(candidates)), 1)]}


def _write_images(
    folder: Path, images: Sequence[PlannedImage], image_size: int, seed: int
) -> List[str]:
    """Draw and write the images; return the rows of the box list, by finding as NIH has them."""
    folder.mkdir()
    boxed = _boxed_images(images, seed)
    rows: Dict[str, List[str]] = {name: [] for name in BOXED}
    for image in images:
        key = {"seed": seed, "patient": image.patient, "follow_up": image.follow_up}
        drawn = draw_image(image.findings, size=image_size, view=image.view, **key)
        save_image(folder / image.name, drawn.pixels)
        if image.name in boxed:
            for name in sorted(set(image.findings) & set(BOXED)):
                for box in drawn.boxes[name]:
                    numbers = ",".join(f"{number:.2f}" for number in box)
                    rows[name].append(f"{image.name},{BOXED[name]},{numbers}")
    return [row for name in BOXED for row in rows[name]]


def save_image(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 [H, W] as an 8-bit grayscale PNG; little compression, as grain packs badly."""
    Image.fromarray(pixels).save(path, compress_level=1)


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_bytes(("\n".join(lines) + "\n").encode("ascii"))
