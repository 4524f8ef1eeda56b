"""The facts of the real ChestX-ray14 files, where they lie beside the repository."""

from __future__ import annotations

import gzip
import re
import shutil
from pathlib import Path
from typing import Dict

import numpy as np
import pytest
from PIL import Image

from cxr_vit.config.schema import DataSection
from cxr_vit.data import datamodule
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.images import find_images, read_gray
from cxr_vit.data.labels import FINDINGS
from cxr_vit.data.records import Records, read_records
from cxr_vit.data.splits import SPLIT_NAMES, Splits, make_splits

NIH = Path(__file__).resolve().parents[3] / "shared" / "data" / "nih"
CSV = "Data_Entry_2017_v2020.csv"
LISTS = ("train_val_list.txt", "test_list.txt", "community_val_list.txt")
POSITIVES = {
    "Atelectasis": 11559,
    "Cardiomegaly": 2776,
    "Effusion": 13317,
    "Infiltration": 19894,
    "Mass": 5782,
    "Nodule": 6331,
    "Pneumonia": 1431,
    "Pneumothorax": 5302,
    "Consolidation": 4667,
    "Edema": 2303,
    "Emphysema": 2516,
    "Fibrosis": 1686,
    "Pleural_Thickening": 3385,
    "Hernia": 227,
}

pytestmark = pytest.mark.skipif(
    not NIH.is_dir(), reason=f"the real NIH files are not at hand ({NIH})"
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nih")
    for name in (CSV, *LISTS):
        with gzip.open(NIH / f"{name}.gz", "rb") as packed, (folder / name).open("wb") as plain:
            shutil.copyfileobj(packed, plain)
    return folder


@pytest.fixture(scope="module")
def images(root: Path) -> Dict[str, str]:
    """An index as if every film were there; none is opened."""
    with (root / CSV).open(encoding="utf-8") as lines:
        next(lines)
        return {line.split(",", 1)[0]: "not opened" for line in lines}


@pytest.fixture(scope="module")
def records(root: Path, images: Dict[str, str]) -> Records:
    return read_records(root / CSV, images, include_no_finding=True, on_missing="error")


def test_the_csv_has_its_112120_films_of_30805_patients(records: Records) -> None:
    assert len(records) == 112_120
    assert records.table["image"].nunique() == 112_120
    assert records.table["patient"].nunique() == 30_805


def test_the_label_counts_are_those_of_nih(records: Records) -> None:
    counts = records.labels.sum(axis=0, dtype=np.int64).tolist()
    assert dict(zip([*FINDINGS, "No Finding"], counts)) == {**POSITIVES, "No Finding": 60_361}


def test_no_film_has_no_finding_beside_a_finding_and_none_has_nothing(records: Records) -> None:
    healthy = records.labels[:, 14] == 1
    np.testing.assert_array_equal(healthy, ~records.labels[:, :14].any(axis=1))


def test_ages_run_from_0_to_95_and_none_is_unknown(records: Records) -> None:
    ages = records.table["age"]
    assert not ages.isna().any()
    assert (ages.min(), ages.max()) == (0, 95)


def test_sexes_and_views_are_those_of_nih(records: Records) -> None:
    assert records.table["sex"].value_counts().to_dict() == {"M": 63_340, "F": 48_780}
    assert records.table["view"].value_counts().to_dict() == {"PA": 67_310, "AP": 44_810}


def test_the_official_split_has_86524_and_25596_films(root: Path, records: Records) -> None:
    splits = make_splits(records, root, DataSection(root=str(root)))
    assert splits.kind == "official"
    assert len(splits.train) + len(splits.val) == 86_524
    assert len(splits.test) == 25_596
    assert len(splits.val) == pytest.approx(0.05 * 86_524, abs=184)  # the largest patient's films


def test_the_official_split_shares_no_patient(root: Path, records: Records) -> None:
    splits = make_splits(records, root, DataSection(root=str(root)))
    patients = records.table["patient"].to_numpy()
    parts = [set(patients[getattr(splits, name)].tolist()) for name in SPLIT_NAMES]
    assert len(parts[0]) + len(parts[1]) == 28_008
    assert len(parts[2]) == 2_797
    assert len(set.union(*parts)) == 30_805


def test_a_random_split_has_the_tutorials_size_and_its_leak(
    root: Path, records: Records, caplog: pytest.LogCaptureFixture
) -> None:
    section = DataSection(root=str(root), split="random", val_fraction=0.05, test_fraction=0)
    splits = make_splits(records, root, section)
    assert [len(getattr(splits, name)) for name in SPLIT_NAMES] == [106_514, 5_606, 0]
    found = re.search(r"(\d+) of 5606 val films share a patient with train", caplog.text)
    assert found is not None
    assert 0.82 < int(found.group(1)) / 5606 < 0.85


def test_a_patient_split_of_the_real_films_is_near_its_fractions(
    root: Path, records: Records
) -> None:
    section = DataSection(root=str(root), split="patient", val_fraction=0.1, test_fraction=0.2)
    splits = make_splits(records, root, section)
    assert len(splits.val) / len(records) == pytest.approx(0.1, abs=0.002)
    assert len(splits.test) / len(records) == pytest.approx(0.2, abs=0.002)


def test_the_loss_that_knows_only_the_prevalence_is_0_1637(
    root: Path, images: Dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datamodule, "find_images", lambda _: images)
    module = ChestXrayDataModule(DataSection(root=str(root)))
    train_val, test, val = (
        set((root / name).read_text().split())
        for name in ("train_val_list.txt", "test_list.txt", "community_val_list.txt")
    )
    names = module.records.table["image"]
    parts = (names.isin(part).to_numpy() for part in (train_val - val, val, test))
    module.splits = Splits(*(np.flatnonzero(part) for part in parts), "official")
    assert len(module.splits.train) == 75_312
    prior = module.prevalence()
    labels = module.records.labels[module.splits.train]
    losses = -(labels * np.log(prior) + (1 - labels.astype(float)) * np.log(1 - prior))
    assert prior.shape == (14,)
    assert losses.mean() == pytest.approx(0.1637, abs=0.0005)


def test_the_21_full_films_are_read_gray_at_the_size_asked() -> None:
    films = find_images(NIH / "images")
    assert len(films) == 21
    modes = []
    for path in films.values():
        with Image.open(path) as stored:
            modes.append(stored.mode)
            assert stored.size == (1024, 1024)
        film = read_gray(path, 224)
        assert film.dtype == np.uint8 and film.shape == (224, 224)
        assert 20 < film.mean() < 235 and film.std() > 20
    assert (modes.count("L"), modes.count("RGBA")) == (19, 2)


@pytest.mark.parametrize("name", ["00002578_000.png", "00004934_000.png"])
def test_a_real_rgba_film_is_its_red_channel(name: str) -> None:
    with Image.open(NIH / "images" / name) as stored:
        assert stored.mode == "RGBA"
        red = np.array(stored.getchannel("R"))
    np.testing.assert_array_equal(read_gray(NIH / "images" / name, 1024), red)


def test_the_thousand_small_films_are_found_and_named_as_in_the_csv(images: Dict[str, str]) -> None:
    films = find_images(NIH / "nih1000_64px")
    assert len(films) == 1000
    assert set(films) <= set(images)


@pytest.mark.parametrize("size", [64, 32])
def test_small_films_are_read_at_the_size_asked(size: int) -> None:
    films = find_images(NIH / "nih1000_64px")
    for name in sorted(films)[::200]:
        film = read_gray(films[name], size)
        assert film.dtype == np.uint8 and film.shape == (size, size)
        assert film.std() > 10
