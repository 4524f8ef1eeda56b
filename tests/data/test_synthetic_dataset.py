"""The synthetic data set: NIH's layout, the same files for the same seed, signs in their boxes."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Optional

import numpy as np
import pytest
from PIL import Image

from cxr_vit.config import Config
from cxr_vit.config.data_sections import DataSection
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.labels import FINDINGS
from cxr_vit.data.synthetic.anatomy import draw_image
from cxr_vit.data.synthetic.dataset import (
    BOXED,
    PREVALENCE,
    plan_images,
    write_sample,
    write_sample_if_absent,
)
from cxr_vit.errors import ConfigError, DataError

NUM_IMAGES = 120
NIH_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,"
    "View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sample") / "new" / "set"
    assert write_sample(out, num_images=NUM_IMAGES, image_size=64, seed=3) == NUM_IMAGES
    return out


def read_rows(folder: Path) -> list:
    lines = (folder / "Data_Entry_2017_v2020.csv").read_text().splitlines()
    return [line.split(",") for line in lines[1:]]


def read_names(path: Path) -> list:
    return path.read_text().splitlines()


def test_layout_matches_nih(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == [
        "BBox_List_2017.csv",
        "Data_Entry_2017_v2020.csv",
        "README.txt",
        "images",
        "test_list.txt",
        "train_val_list.txt",
    ]
    text = (folder / "Data_Entry_2017_v2020.csv").read_bytes()
    assert text.split(b"\n")[0].decode() == NIH_HEADER
    assert text.endswith(b"\n") and b"\r" not in text and b'"' not in text
    rows = read_rows(folder)
    assert len(rows) == NUM_IMAGES and {len(row) for row in rows} == {11}
    assert sorted(row[0] for row in rows) == sorted(p.name for p in (folder / "images").iterdir())
    assert "synthetic" in (folder / "README.txt").read_text().lower()


def test_rows_have_the_fields_of_nih(folder: Path) -> None:
    for name, labels, follow_up, patient, age, gender, view, *plate in read_rows(folder):
        assert re.match(r"^\d{8}_\d{3}\.png$", name)
        assert int(name[:8]) == int(patient) and int(name[9:12]) == int(follow_up)
        assert labels == "No Finding" or set(labels.split("|")) <= set(FINDINGS)
        assert 0 < int(age) <= 95 and gender in ("M", "F") and view in ("PA", "AP")
        assert all(float(number) > 0 for number in plate)


def test_images_are_square_gray_and_eight_bit(folder: Path) -> None:
    for path in (folder / "images").iterdir():
        with Image.open(path) as image:
            assert (image.mode, image.size) == ("L", (64, 64))
            assert np.asarray(image).std() > 20  # a picture, not a flat field


def test_follow_ups_belong_to_one_patient(folder: Path) -> None:
    rows = read_rows(folder)
    by_patient: dict = {}
    for row in rows:
        by_patient.setdefault(row[3], []).append(row)
    assert any(len(images) > 1 for images in by_patient.values())
    for images in by_patient.values():
        assert [int(row[2]) for row in images] == list(range(len(images)))
        ages = [int(row[4]) for row in images]
        assert ages == sorted(ages) and len({row[5] for row in images}) == 1


def test_images_of_a_patient_share_more_findings_than_images_of_two() -> None:
    images = plan_images(2000, 0)
    sick = [image for image in images if image.findings]

    def shared(step: int, same: bool) -> float:
        pairs = [(a, b) for a, b in zip(sick, sick[step:]) if (a.patient == b.patient) == same]
        return float(np.mean([bool(set(a.findings) & set(b.findings)) for a, b in pairs]))

    assert shared(1, True) > 1.3 * shared(50, False)


def test_lists_split_by_patient(folder: Path) -> None:
    train, test = (read_names(folder / name) for name in ("train_val_list.txt", "test_list.txt"))
    assert sorted(train + test) == sorted(row[0] for row in read_rows(folder))
    assert not {name[:8] for name in train} & {name[:8] for name in test}
    assert 0.2 * NUM_IMAGES <= len(test) <= 0.25 * NUM_IMAGES


def test_same_seed_writes_the_same_files(folder: Path, tmp_path: Path) -> None:
    write_sample(tmp_path / "again", num_images=NUM_IMAGES, image_size=64, seed=3)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    again = tmp_path / "again"
    assert files == sorted(p.relative_to(again) for p in again.rglob("*") if p.is_file())
    for path in files:
        assert (folder / path).read_bytes() == (again / path).read_bytes(), path


def test_other_seed_draws_another_set() -> None:
    assert plan_images(NUM_IMAGES, 3) != plan_images(NUM_IMAGES, 4)
    images = [draw_image((), size=32, seed=seed, patient=1, follow_up=0).pixels for seed in (3, 4)]
    assert not np.array_equal(*images)


def test_image_does_not_depend_on_other_images() -> None:
    def draw() -> np.ndarray:
        return draw_image(("Mass",), size=32, seed=0, patient=5, follow_up=1).pixels

    first = draw()
    draw_image(("Edema",), size=32, seed=0, patient=6, follow_up=0)
    assert np.array_equal(first, draw())


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_plan_matches_the_prevalence(seed: int) -> None:
    images = plan_images(2000, seed)
    counts = Counter(name for image in images for name in image.findings)
    in_order = [counts[name] for name in PREVALENCE]
    assert in_order == sorted(in_order, reverse=True) and len(set(in_order)) == len(FINDINGS)
    assert list(PREVALENCE)[:2] + list(PREVALENCE)[-1:] == ["Infiltration", "Effusion", "Hernia"]
    assert 0.018 <= in_order[-1] / 2000 <= 0.022 and 0.18 <= in_order[0] / 2000 <= 0.20
    assert 0.45 <= sum(not image.findings for image in images) / 2000 <= 0.55
    assert max(len(image.findings) for image in images) in (4, 5)
    share = {
        sick: np.mean([image.view == "AP" for image in images if bool(image.findings) == sick])
        for sick in (True, False)
    }
    assert share[True] > share[False] + 0.1


@pytest.mark.parametrize(("number", "least"), [(20, 1), (120, 1), (600, 2), (2000, 8)])
def test_every_finding_is_in_both_lists(number: int, least: int) -> None:
    for seed in range(3):
        images = plan_images(number, seed)
        assert len(images) == number and max(len(image.findings) for image in images) <= 5
        for part in (False, True):
            counts = Counter(n for image in images if image.test == part for n in image.findings)
            assert min(counts[name] for name in FINDINGS) >= least


@pytest.mark.parametrize("finding", FINDINGS)
def test_sign_changes_its_region(finding: str) -> None:
    for patient in range(1, 13):
        keys = {"size": 64, "seed": 0, "patient": patient, "follow_up": 0}
        drawn = draw_image((finding,), **keys)
        bare = draw_image((), **keys)
        change = np.abs(drawn.pixels.astype(int) - bare.pixels.astype(int))
        claimed = np.zeros(change.shape, dtype=bool)
        for x, y, width, height in drawn.boxes[finding]:
            assert width > 0 and height > 0
            left, top = round(x / 16), round(y / 16)
            claimed[top : top + round(height / 16), left : left + round(width / 16)] = True
        assert change[claimed].mean() > 8, patient  # gray levels; the noise is the same in both
        assert change[claimed].mean() > 8 * change[~claimed].mean(), patient


# The highest and lowest middle of a sign, as shares of the height, and whether it is in both lungs.
PLACES = {
    "Effusion": (0.5, 0.9, False),
    "Consolidation": (0.1, 0.45, False),
    "Pneumonia": (0.5, 0.75, False),
    "Pneumothorax": (0.1, 0.5, False),
    "Atelectasis": (0.5, 0.85, False),
    "Pleural_Thickening": (0.3, 0.7, False),
    "Fibrosis": (0.5, 0.85, True),
    "Edema": (0.35, 0.6, True),
    "Emphysema": (0.3, 0.7, True),
    "Cardiomegaly": (0.5, 0.75, True),
    "Hernia": (0.5, 0.75, True),
}


@pytest.mark.parametrize("finding", PLACES)
def test_sign_lies_in_the_zone_of_its_disease(finding: str) -> None:
    highest, lowest, both = PLACES[finding]
    left_edges = set()
    for patient in range(1, 13):
        drawn = draw_image((finding,), size=64, seed=0, patient=patient, follow_up=0)
        [(x, y, width, height)] = drawn.boxes[finding]
        assert highest < (y + height / 2) / 1024 < lowest, patient
        assert (x < 512 - 64 and x + width > 512 + 64) == both, patient
        left_edges.add(x > 512 - 64)
    assert left_edges == ({False} if both else {False, True})  # one-sided: on either side


@pytest.mark.parametrize("finding", sorted(set(FINDINGS) - {"Hernia"}))  # has both gas and fluid
def test_signs_of_air_are_darker_and_others_brighter(finding: str) -> None:
    keys = {"size": 64, "seed": 0, "patient": 1, "follow_up": 0}
    change = draw_image((finding,), **keys).pixels.astype(int) - draw_image(
        (), **keys
    ).pixels.astype(int)
    assert (change.sum() < 0) == (finding in ("Emphysema", "Pneumothorax"))


def test_masses_are_larger_than_nodules() -> None:
    widths = {
        finding: [
            draw_image((finding,), size=128, seed=0, patient=patient, follow_up=0).boxes[finding][
                0
            ][2]
            for patient in range(1, 13)
        ]
        for finding in ("Mass", "Nodule")
    }
    assert min(widths["Mass"]) > 1.5 * max(widths["Nodule"])


def test_follow_ups_have_different_pixels() -> None:
    first, second = (
        draw_image((), size=64, seed=0, patient=1, follow_up=follow_up).pixels
        for follow_up in (0, 1)
    )
    assert (first != second).mean() > 0.5


def test_boxes_are_listed_as_nih_lists_them(folder: Path) -> None:
    lines = (folder / "BBox_List_2017.csv").read_text().splitlines()
    assert lines[0] == "Image Index,Finding Label,Bbox [x,y,w,h],,," and len(lines) > 5
    findings = {row[0]: row[1].split("|") for row in read_rows(folder)}
    test_names = set(read_names(folder / "test_list.txt"))
    written_as = {label: name for name, label in BOXED.items()}
    assert "Infiltrate" in written_as
    boxed = set()
    for line in lines[1:]:
        name, label, x, y, width, height = line.split(",")  # six fields, as NIH's rows
        assert name in test_names and written_as[label] in findings[name]
        assert float(x) >= 0 and float(y) >= 0 and float(width) > 0 and float(height) > 0
        assert float(x) + float(width) <= 1024 and float(y) + float(height) <= 1024
        boxed.add(name)
    assert boxed < test_names  # only some of them


def test_boxes_do_not_depend_on_the_image_size() -> None:
    small, large = (
        draw_image(("Mass",), size=size, seed=0, patient=2, follow_up=0).boxes["Mass"][0]
        for size in (64, 256)
    )
    assert small == pytest.approx(large, abs=2 * 1024 / 64)


def test_folder_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(DataError, match="not an empty folder"):
        write_sample(tmp_path, num_images=20, image_size=32)
    with pytest.raises(DataError, match="not an empty folder"):
        write_sample(tmp_path / "note.txt", num_images=20, image_size=32)
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    out = tmp_path / "set"
    out.mkdir()
    assert write_sample(out, num_images=20, image_size=32) == 20
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    assert len(list((out / "images").iterdir())) == 20


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_interrupted_call_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    written = []

    def fail_at_third(image: Image.Image, path: Path, **options: int) -> None:
        if len(written) == 2:
            raise error
        written.append(path)
        path.write_bytes(b"image")

    monkeypatch.setattr(Image.Image, "save", fail_at_third)
    with pytest.raises(type(error)):
        write_sample(tmp_path / "set", num_images=20, image_size=32)
    assert len(written) == 2 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("wrong", [{"num_images": 19}, {"image_size": 31}, {"seed": -1}])
def test_number_that_is_too_small_is_refused(tmp_path: Path, wrong: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        write_sample(tmp_path / "set", **{"num_images": 20, "image_size": 32, **wrong})
    assert list(tmp_path.iterdir()) == []


def test_unknown_finding_is_refused() -> None:
    with pytest.raises(KeyError, match="Cough"):
        draw_image(("Cough",), size=32, seed=0, patient=1, follow_up=0)


def test_write_sample_if_absent_writes_a_readable_data_set_and_warns(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = DataSection(root=str(tmp_path / "new" / "set"), sample_images=20, image_size=16)
    write_sample_if_absent(data)
    (warning,) = caplog.messages
    assert f"data.root={tmp_path / 'new' / 'set'} does not exist" in warning
    assert "synthetic" in warning and "20 images" in warning
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["set"]  # no lock file
    module = ChestXrayDataModule(Config(data=data))
    assert len(module.records) == 20
    assert module.splits.kind == "official"
    assert module.dataset("train")[0].image.shape == (1, 16, 16)


@pytest.mark.parametrize(("there", "sample_images"), [(True, 20), (False, None)])
def test_write_sample_if_absent_writes_nothing_if_the_root_exists_or_no_sample_is_set(
    tmp_path: Path, there: bool, sample_images: Optional[int]
) -> None:
    root = tmp_path / "set"
    if there:
        root.mkdir()
    write_sample_if_absent(DataSection(root=str(root), sample_images=sample_images))
    assert root.exists() == there
    assert list(tmp_path.rglob("*")) == [root] * there


def test_write_sample_if_absent_names_a_root_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    root = tmp_path / "file" / "set"
    with pytest.raises(DataError, match=rf"data\.root={root} does not exist and cannot be written"):
        write_sample_if_absent(DataSection(root=str(root), sample_images=20))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
