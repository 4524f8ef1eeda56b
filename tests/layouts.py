"""Tiny copies of the layouts of public data sets: the same files, columns and spellings.

Patients, images and labels are made up. Each function writes into a folder and returns it.
"""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Dict, Iterable, List, Sequence

import numpy as np
from PIL import Image

PIXELS = 64

CHEXPERT = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion",
    "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion",
    "Pleural Other", "Fracture", "Support Devices",
)  # fmt: skip
#: In the order of MIMIC-CXR-JPG.
MIMIC = tuple(sorted(CHEXPERT))
VINDR = (
    "Aortic enlargement", "Atelectasis", "Calcification", "Cardiomegaly", "Clavicle fracture",
    "Consolidation", "Edema", "Emphysema", "Enlarged PA", "ILD", "Infiltration", "Lung Opacity",
    "Lung cavity", "Lung cyst", "Mediastinal shift", "Nodule/Mass", "Pleural effusion",
    "Pleural thickening", "Pneumothorax", "Pulmonary fibrosis", "Rib fracture", "Other lesion",
    "COPD", "Lung tumor", "Pneumonia", "Tuberculosis", "Other diseases", "No finding",
)  # fmt: skip
NIH = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
NIH_SAMPLE = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImageWidth,OriginalImageHeight,OriginalImagePixelSpacing_x,OriginalImagePixelSpacing_y"
)


def write_image(path: Path, seed: int) -> None:
    """Write an image of noise; the suffix says of which kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (PIXELS, PIXELS), dtype=np.uint8)
    Image.fromarray(pixels).save(path, format="JPEG" if path.suffix == ".jpg" else "PNG")


def write_table(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV, packed if the name ends so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [",".join(header), *(",".join(map(str, row)) for row in rows), ""]
    raw = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


def _answers(rows: int, labels: int, words: Sequence[str], seed: int) -> List[List[str]]:
    """Draw words for each row and label; each label has every word at least once."""
    drawn = np.random.default_rng(seed).integers(0, len(words), (rows, labels))
    for row in range(min(rows, len(words))):
        drawn[row] = (row + np.arange(labels)) % len(words)
    return [[words[number] for number in row] for row in drawn]


def chexpert(folder: Path, *, patients: int = 12) -> Path:
    """CheXpert's small version: train.csv, valid.csv and folders by patient and study."""
    for part, first, count in (("train", 1, patients), ("valid", 64541, 4)):
        rows: List[List[object]] = []
        answers = _answers(2 * count, len(CHEXPERT), ("1.0", "0.0", "-1.0", ""), seed=first)
        for number in range(2 * count):
            view = "frontal" if number % 2 == 0 else "lateral"
            path = f"{part}/patient{first + number // 2:05}/study1/view{number % 2 + 1}_{view}.jpg"
            write_image(folder / path, first + number)
            seen = ["Male" if number % 4 < 2 else "Female", 40 + number]
            views = (
                ["Frontal", "AP" if number % 4 else "PA"] if view == "frontal" else ["Lateral", ""]
            )
            rows.append([f"CheXpert-v1.0-small/{path}", *seen, *views, *answers[number]])
        header = ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT]
        write_table(folder / f"{part}.csv", header, rows)
    return folder


def mimic_cxr_jpg(folder: Path, *, patients: int = 12) -> Path:
    """MIMIC-CXR-JPG 2.0.0: three packed tables, images under files/p10/p<subject>/s<study>."""
    splits: List[List[object]] = []
    labels: Dict[str, List[object]] = {}
    metadata: List[List[object]] = []
    answers = _answers(patients, len(MIMIC), ("1.0", "0.0", "-1.0", ""), seed=0)
    for number in range(2 * patients):
        patient = number // 2
        subject, study = str(10000032 + patient), str(50414267 + patient)
        dicom = f"{number:08x}-bde0afdd-112c0b34-7bc16630-4e384014"
        write_image(folder / f"files/p10/p{subject}/s{study}/{dicom}.jpg", number)
        split = ("test", "validate")[patient] if patient < 2 else "train"
        splits.append([dicom, study, subject, split])
        view = "PA" if number % 2 else "LATERAL"
        metadata.append([dicom, subject, study, "CHEST (PA AND LAT)", view, 3056, 2544])
        if patient < patients - 1:  # a study whose report has no labels
            labels[study] = [subject, study, *answers[patient]]
    name = "mimic-cxr-2.0.0-{}.csv.gz"
    header = ["dicom_id", "study_id", "subject_id", "split"]
    write_table(folder / name.format("split"), header, splits)
    write_table(
        folder / name.format("chexpert"), ["subject_id", "study_id", *MIMIC], labels.values()
    )
    header = ["dicom_id", "subject_id", "study_id", "PerformedProcedureStepDescription"]
    header += ["ViewPosition", "Rows", "Columns"]
    write_table(folder / name.format("metadata"), header, metadata)
    return folder


def vindr_cxr(folder: Path, *, images: int = 12, suffix: str = ".png") -> Path:
    """VinDr-CXR of PhysioNet: three readers per training image, one row per test image.

    The images are PNGs, which any decoder reads; `suffix` is that of their names. The test table
    has no column of readers, and spells one label in another way.
    """
    answers = _answers(3 * images, len(VINDR), ("0", "1"), seed=0)
    readers: List[List[object]] = []
    for number in range(3 * images):
        name = f"{number // 3:032x}"
        readers.append([name, f"R{number % 3 + 8}", *answers[number]])
        write_image(folder / f"train/{name}{suffix}", number // 3)
    write_table(
        folder / "annotations/image_labels_train.csv", ["image_id", "rad_id", *VINDR], readers
    )
    tested = _answers(4, len(VINDR), ("0", "1"), seed=1)
    rows = [[f"{0xA0 + number:032x}", *answer] for number, answer in enumerate(tested)]
    for number, row in enumerate(rows):
        write_image(folder / f"test/{row[0]}{suffix}", 100 + number)
    header = [name.replace("Other diseases", "Other disease") for name in VINDR]
    write_table(folder / "annotations/image_labels_test.csv", ["image_id", *header], rows)
    return folder


def nih_sample(folder: Path, *, patients: int = 12) -> Path:
    """Kaggle's sample of NIH's images: sample_labels.csv and sample/images."""
    findings = ("No Finding", "Mass|Nodule", "Effusion", "Hernia")
    rows: List[List[object]] = []
    for number in range(2 * patients):
        name = f"{number // 2 + 13:08}_{number % 2:03}.png"
        write_image(folder / "sample/images" / name, number)
        about = [f"{number % 2:03}", f"{number // 2 + 13:08}", "060Y", "M", "PA", 3056, 2544]
        rows.append([name, findings[number % 4], *about, 0.139, 0.139])
    write_table(folder / "sample_labels.csv", NIH_SAMPLE.split(","), rows)
    return folder


def google2019(folder: Path, *, patients: int = 12) -> Path:
    """Google's labels of 2019 beside NIH's images: lines end as in the file, with CR and LF."""
    answers = _answers(2 * patients, 4, ("YES", "NO"), seed=0)
    rows: List[List[object]] = []
    for number in range(2 * patients):
        name = f"{number // 2 + 13:08}_{number % 2:03}.png"
        write_image(folder / "images" / name, number)
        about = [
            "No Finding",
            number % 2,
            number // 2 + 13,
            60,
            "M",
            "AP",
            3056,
            2544,
            0.139,
            0.139,
        ]
        split = "test" if number // 2 % 2 else "val"
        rows.append([name, *about, *answers[number], split])
    header = [*NIH.split(","), "Fracture", "Pneumothorax", "Airspace opacity", "Nodule or mass"]
    path = folder / "google2019_nih-chest-xray-labels.csv"
    write_table(path, [*header, "Set Id"], rows)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    return folder


def hospital(folder: Path, *, patients: int = 20) -> Path:
    """A hospital's own table: one row per image, text patients, three labels, some not read."""
    answers = _answers(2 * patients, 3, ("1", "0", ""), seed=0)
    rows: List[List[object]] = []
    for number in range(2 * patients):
        name = f"{number:06}.png"
        write_image(folder / f"ward {number % 3}" / name, number)
        about = [f"HOSP-{number // 2:05}", "F" if number % 4 < 2 else "M", 30 + number // 2]
        rows.append([name, *about, *answers[number]])
    header = ["file", "patient", "sex", "age", "Effusion", "Cardiomegaly", "Pneumothorax"]
    write_table(folder / "hospital.csv", header, rows)
    return folder
