"""Write a synthetic data set in the layout of NIH ChestX-ray14, for the demo and the tests.

Nothing in it is medical data.
"""

from __future__ import annotations

import logging
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Dict, List, NamedTuple, Sequence, Tuple

import numpy as np
from PIL import Image

from cxr_vit.config.columns import NO_FINDING
from cxr_vit.config.data_sections import DataSection
from cxr_vit.data.labels import FINDINGS
from cxr_vit.data.synthetic.anatomy import draw_image
from cxr_vit.errors import ConfigError, DataError
from cxr_vit.files import lock, remove

logger = logging.getLogger(__name__)

CSV_NAME = "Data_Entry_2017_v2020.csv"
CSV_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,"
    "View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
BOX_NAME = "BBox_List_2017.csv"
BOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
README = """\
Synthetic images in the layout of NIH ChestX-ray14, to try cxr_vit without the real
data. Not medical data: a program has drawn the shapes. Do not use in medicine.
Made by cxr_vit.data.synthetic.dataset.write_sample, {number} images, seed {seed}.
Boxes are in pixels of a 1024 x 1024 image, as in NIH's list."""

# Most frequent first, in the order of the real data. Rare findings are more frequent here, so that
# a small set has some of each.
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

# The eight findings with boxes, in NIH's order, and their names in NIH's list of boxes.
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

# Findings that occur together more often than by chance.
COMPANIONS: Dict[str, Sequence[str]] = {
    "Effusion": ("Atelectasis", "Cardiomegaly", "Consolidation"),
    "Edema": ("Cardiomegaly", "Infiltration"),
    "Pneumonia": ("Infiltration",),
    "Emphysema": ("Pneumothorax",),
    "Fibrosis": ("Pleural_Thickening",),
    "Mass": ("Nodule",),
}

# Width, height and pixel spacing in mm of the original images, by view.
PLATES: Dict[str, Sequence[Tuple[int, int, float]]] = {
    "PA": ((2682, 2749, 0.143), (2992, 2991, 0.143), (2500, 2048, 0.168)),
    "AP": ((2500, 2048, 0.168), (2048, 2500, 0.168), (3056, 2544, 0.139)),
}

SICK_SHARE = 0.5
MAX_FINDINGS = 5
MAX_IMAGES_PER_PATIENT = 12
TEST_SHARE = 0.25
BOXED_SHARE = 0.5  # of the test images with a finding that has boxes


class PlannedImage(NamedTuple):
    """A row of the CSV."""

    patient: int
    follow_up: int
    findings: Tuple[str, ...]
    age: int
    gender: str
    view: str
    plate: Tuple[int, int, float]
    test: bool

    @property
    def name(self) -> str:
        """The file name."""
        return f"{self.patient:08d}_{self.follow_up:03d}.png"

    @property
    def csv_row(self) -> str:
        """The line of `Data_Entry_2017_v2020.csv`."""
        labels = "|".join(self.findings) or NO_FINDING
        width, height, spacing = self.plate
        return (
            f"{self.name},{labels},{self.follow_up},{self.patient},{self.age},{self.gender},"
            f"{self.view},{width},{height},{spacing},{spacing}"
        )


def plan_images(num_images: int, seed: int) -> List[PlannedImage]:
    """Choose patients, split and findings; return the images by patient and follow-up.

    In each part of the split, each finding has a fixed number of images: its prevalence, rounded,
    and at least one. Raises ConfigError if a number is too small.
    """
    problems = []
    if num_images < 20:
        problems.append(f"num_images is {num_images}; 20 or more put every finding in both lists.")
    if seed < 0:
        problems.append(f"seed is {seed}; it must be 0 or more.")
    if problems:
        raise ConfigError(" ".join(problems))
    random = np.random.default_rng((seed, 0, 0, 0))
    counts = _images_per_patient(num_images, random)
    in_test = _test_patients(counts, random)
    patients = np.repeat(np.arange(len(counts)), counts)
    labels = np.zeros((num_images, len(FINDINGS)), dtype=bool)
    for part in (False, True):
        rows = np.flatnonzero(in_test[patients] == part)
        labels[rows] = _assign_findings(patients[rows], random)
    images: List[PlannedImage] = []
    for patient, test in enumerate(in_test):
        images += _history(patient + 1, labels[patients == patient], bool(test), random)
    return images


def _images_per_patient(num_images: int, random: np.random.Generator) -> np.ndarray:
    """Return int64 ``[patients]``: about half have one image, the mean is near 3."""
    most = min(MAX_IMAGES_PER_PATIENT, num_images // 5)
    counts: List[int] = []
    while sum(counts) < num_images:
        count = 1 if random.random() < 0.52 else 1 + int(random.geometric(0.25))
        counts.append(min(count, most, num_images - sum(counts)))
    return np.array(counts, dtype=np.int64)


def _test_patients(counts: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Choose test patients, bool ``[patients]``, with at most a quarter of all images."""
    room = max(round(TEST_SHARE * int(counts.sum())), 1)
    in_test = np.zeros(len(counts), dtype=bool)
    for patient in random.permutation(len(counts)):
        if counts[patient] <= room:
            in_test[patient] = True
            room -= int(counts[patient])
    return in_test


def _assign_findings(patients: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Assign the findings of a part's images, given their patients, int64 ``[n]``.

    Returns bool ``[n, 14]``: each column has exactly its quota, each row at most five findings.
    """
    number = len(patients)
    quota = {name: max(round(share * number), 1) for name, share in PREVALENCE.items()}
    # The patient's part weighs more than the image's: a patient's images share findings.
    chance = random.random((patients.max() + 1, len(FINDINGS) + 1))[patients]
    chance = 0.7 * chance + 0.3 * random.random(chance.shape)
    sick = max(round(SICK_SHARE * number), -(-sum(quota.values()) // (MAX_FINDINGS - 1)))
    healthy = np.argsort(chance[:, -1], kind="stable")[: max(number - sick, 0)]
    labels = np.zeros((number, len(FINDINGS)), dtype=bool)
    for name in reversed(list(PREVALENCE)):  # rare findings first
        column = FINDINGS.index(name)
        load = labels.sum(axis=1)
        score = chance[:, column] - 0.05 * load
        for other in FINDINGS:
            if other in COMPANIONS.get(name, ()) or name in COMPANIONS.get(other, ()):
                score += 0.2 * labels[:, FINDINGS.index(other)]
        score[load == 0] += 0.25  # otherwise too few sick images would get any finding
        score[load >= MAX_FINDINGS] = -2.0
        score[healthy] = -1.0
        labels[np.argsort(-score, kind="stable")[: quota[name]], column] = True
    return labels


def _history(
    patient: int, labels: np.ndarray, test: bool, random: np.random.Generator
) -> List[PlannedImage]:
    """Plan the images of one patient in order of time; `labels` is bool ``[images, 14]``."""
    age = int(np.clip(round(48 + 17 * float(random.standard_normal())), 4, 88))
    gender = "M" if random.random() < 0.56 else "F"
    images = []
    for follow_up, row in enumerate(labels):
        findings = tuple(sorted(name for name, has in zip(FINDINGS, row) if has))
        view = "AP" if random.random() < (0.55 if findings else 0.30) else "PA"
        plate = PLATES[view][int(random.integers(0, 3))]
        images.append(PlannedImage(patient, follow_up, findings, age, gender, view, plate, test))
        age = min(age + int(random.integers(0, 3) == 2), 95)
    return images


def write_sample(out: Path, *, num_images: int = 2000, image_size: int = 128, seed: int = 0) -> int:
    """Write a synthetic data set to a new or empty folder; return the number of images.

    An interrupted call leaves nothing at `out`. The same seed writes the same files. With 2000
    images or more, each finding has at least eight in each list. Boxes are in pixels of NIH's
    1024 x 1024 images whatever the size. Raises ConfigError if a number is too small, and DataError
    if `out` is a file or a folder that is not empty.
    """
    if image_size < 32:
        raise ConfigError(f"image_size is {image_size}; at least 32 pixels are needed.")
    images = plan_images(num_images, seed)
    out = Path(out).resolve()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise DataError(
            f"{out} exists and is not an empty folder. Give a new folder, or remove this one: the"
            " sample is never mixed with other files."
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(".partial", f".{out.name}.", out.parent) as temporary:
        partial = Path(temporary, out.name)
        boxes = _write_images(partial / "images", images, image_size, seed)
        files = {
            CSV_NAME: [CSV_HEADER, *(image.csv_row for image in images)],
            "train_val_list.txt": [image.name for image in images if not image.test],
            "test_list.txt": [image.name for image in images if image.test],
            "README.txt": [README.format(number=num_images, seed=seed)],
            BOX_NAME: [BOX_HEADER, *boxes],
        }
        for name, lines in files.items():
            (partial / name).write_bytes(("\n".join(lines) + "\n").encode("ascii"))
        partial.rename(out)  # also replaces an empty folder
    return len(images)


def write_sample_if_absent(data: DataSection) -> None:
    """Write a synthetic data set of `data.sample_images` images if `data.root` does not exist.

    If several processes call it at once, one of them writes.
    """
    root = Path(data.root)
    if data.sample_images is None or root.exists():
        return
    lock_file = root.resolve().parent / f".{root.name}.lock"
    try:
        lock_file.parent.mkdir(parents=True, exist_ok=True)
        with lock(lock_file):
            if not root.exists():  # otherwise another process has written it
                logger.warning(
                    "data.root=%s does not exist: writing a synthetic data set there (%d images,"
                    " none of them real; data.sample_images)",
                    root,
                    data.sample_images,
                )
                write_sample(root, num_images=data.sample_images)
    except OSError as error:
        raise DataError(
            f"data.root={root} does not exist and cannot be written: {error.strerror}. Set"
            " data.root to a folder with images, or to a place you may write to."
        ) from error
    finally:
        remove(lock_file)  # later processes find the root


def _write_images(
    folder: Path, images: Sequence[PlannedImage], image_size: int, seed: int
) -> List[str]:
    """Draw and write the images; return the rows of the list of boxes, grouped by finding."""
    folder.mkdir(parents=True)
    candidates = [image.name for image in images if image.test and set(image.findings) & set(BOXED)]
    order = np.random.default_rng((seed, 0, 0, 1)).permutation(len(candidates))
    boxed = [candidates[row] for row in order[: max(round(BOXED_SHARE * len(candidates)), 1)]]
    rows: Dict[str, List[str]] = {name: [] for name in BOXED}
    for image in images:
        key = {"seed": seed, "patient": image.patient, "follow_up": image.follow_up}
        drawn = draw_image(image.findings, size=image_size, view=image.view, **key)
        # More compression gains little on the noise of the images.
        Image.fromarray(drawn.pixels).save(folder / image.name, compress_level=1)
        for name in set(image.findings) & set(BOXED) if image.name in boxed else ():
            for box in drawn.boxes[name]:
                numbers = ",".join(f"{number:.2f}" for number in box)
                rows[name].append(f"{image.name},{BOXED[name]},{numbers}")
    return [row for of_finding in rows.values() for row in of_finding]
