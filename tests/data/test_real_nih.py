"""Facts of the real ChestX-ray14 files; skipped if they are not available."""

from __future__ import annotations

import gzip
import re
import shutil
from pathlib import Path
from typing import List

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cxr_vit.config.data_sections import DataSection
from cxr_vit.config.schema import Config
from cxr_vit.data.datamodule import ChestXrayDataModule, _Content
from cxr_vit.data.images import find_images, read_gray
from cxr_vit.data.labels import FINDINGS
from cxr_vit.data.nih import read_records
from cxr_vit.data.records import RELABELS, Records
from cxr_vit.data.splits import SPLIT_NAMES, make_splits, split_hash

NIH = Path(__file__).resolve().parents[3] / "shared" / "data" / "nih"
CSV = "Data_Entry_2017_v2020.csv"
BOXES = "BBox_List_2017.csv"
RELABELLED = "google2019_nih-chest-xray-labels.csv"
LISTS = ("train_val_list.txt", "test_list.txt")
COMMUNITY = "community_val_list.txt"
# Of the drawn official split; resumed runs that used it must get the same images.
DRAWN_HASH = "52f3652519339ef77a0c9f87b86862370bf23515520ba5145de2156b0fb761a9"
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
    not NIH.is_dir(), reason=f"the real NIH files are not available ({NIH})"
)


def unpack(name: str, folder: Path) -> None:
    packed_file = NIH / f"{name}.gz"
    if not packed_file.is_file():
        pytest.skip(f"not available: {packed_file}")
    with gzip.open(packed_file, "rb") as packed, (folder / name).open("wb") as plain:
        shutil.copyfileobj(packed, plain)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of NIH's own files."""
    folder = tmp_path_factory.mktemp("nih")
    for name in (CSV, *LISTS):
        unpack(name, folder)
    return folder


@pytest.fixture(scope="module")
def annotated(tmp_path_factory: pytest.TempPathFactory) -> Records:
    folder = tmp_path_factory.mktemp("annotated")
    for name in (CSV, BOXES, RELABELLED):
        unpack(name, folder)
    return read_records(
        folder / CSV, include_no_finding=False, boxes=folder / BOXES, relabels=folder / RELABELLED
    )


@pytest.fixture
def community(root: Path, tmp_path: Path) -> Path:
    """A folder of NIH's lists and the validation list that most papers use."""
    for name in LISTS:
        shutil.copy(root / name, tmp_path)
    unpack(COMMUNITY, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def records(root: Path) -> Records:
    return read_records(root / CSV, include_no_finding=True)


def test_the_csv_has_its_112120_images_of_30805_patients(records: Records) -> None:
    assert len(records) == 112_120
    assert records.table["image"].nunique() == 112_120
    assert records.table["patient"].nunique() == 30_805


def test_the_label_counts_are_those_of_nih(records: Records) -> None:
    counts = records.labels.sum(axis=0, dtype=np.int64).tolist()
    assert dict(zip([*FINDINGS, "No Finding"], counts)) == {**POSITIVES, "No Finding": 60_361}


def test_every_image_has_findings_or_no_finding(records: Records) -> None:
    healthy = records.labels[:, 14] == 1
    np.testing.assert_array_equal(healthy, ~records.labels[:, :14].any(axis=1))


def test_ages_run_from_0_to_95_and_none_is_unknown(records: Records) -> None:
    ages = records.table["age"]
    assert not ages.isna().any()
    assert (ages.min(), ages.max()) == (0, 95)


def test_sexes_and_views_are_those_of_nih(records: Records) -> None:
    assert records.table["sex"].value_counts().to_dict() == {"M": 63_340, "F": 48_780}
    assert records.table["view"].value_counts().to_dict() == {"PA": 67_310, "AP": 44_810}


def test_the_csv_is_v2020_with_its_original_sizes_and_follow_ups(records: Records) -> None:
    table = records.table
    assert records.variant == "v2020"
    assert (table["width"].min(), table["width"].max()) == (1143, 3827)
    assert (table["height"].min(), table["height"].max()) == (966, 4715)
    assert ((table["width"] == 2500) & (table["height"] == 2048)).sum() == 37_153
    # v2020 reordered the follow-ups by time, so they differ from the file names.
    named = table["image"].str[9:12].astype(np.int64)
    assert (table["follow_up"] != named).sum() == 24_106


def test_the_984_boxes_are_on_880_images_labelled_with_their_findings(annotated: Records) -> None:
    boxes = annotated.boxes
    assert (len(boxes), boxes["row"].nunique()) == (984, 880)
    assert boxes["finding"].value_counts().to_dict() == {
        "Atelectasis": 180,
        "Effusion": 153,
        "Cardiomegaly": 146,
        "Infiltration": 123,
        "Pneumonia": 120,
        "Pneumothorax": 98,
        "Mass": 85,
        "Nodule": 79,
    }
    columns = [FINDINGS.index(name) for name in boxes["finding"]]
    assert annotated.labels[boxes["row"], columns].all()


def test_the_boxed_images_are_all_in_the_test_split(root: Path, annotated: Records) -> None:
    splits = make_splits(annotated, root, DataSection(root=str(root)))
    assert set(annotated.boxes["row"]) <= set(splits.test.tolist())
    assert len(annotated.take(splits.test).boxes) == 984
    assert len(annotated.take(splits.train).boxes) == 0


def test_radiologists_read_4376_images_again(root: Path, annotated: Records) -> None:
    read = ~np.isnan(annotated.relabels).any(axis=1)
    assert read.sum() == 4_376
    positives = annotated.relabels[read].sum(axis=0).astype(int).tolist()
    assert dict(zip(RELABELS, positives)) == {
        "Fracture": 186,
        "Pneumothorax": 238,
        "Airspace opacity": 2_166,
        "Nodule or mass": 605,
    }
    splits = make_splits(annotated, root, DataSection(root=str(root)))
    assert read[splits.test].sum() == 1_962


def sizes_of(records: Records, root: Path) -> List[int]:
    splits = make_splits(records, root, DataSection(root=str(root)))
    return [len(getattr(splits, name)) for name in SPLIT_NAMES]


def test_the_communitys_list_gives_75312_11212_and_25596_images(
    community: Path, records: Records, caplog: pytest.LogCaptureFixture
) -> None:
    splits = make_splits(records, community, DataSection(root=str(community)))
    assert splits.kind == "official" and splits.source.endswith(f"validation of {COMMUNITY}")
    assert [len(getattr(splits, name)) for name in SPLIT_NAMES] == [75_312, 11_212, 25_596]
    patients = records.table["patient"].to_numpy()
    parts = [set(patients[getattr(splits, name)].tolist()) for name in SPLIT_NAMES]
    assert [len(part) for part in parts] == [24_342, 3_666, 2_797]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 30_805
    assert caplog.records == []


def test_the_lists_of_medical_mae_with_folders_and_labels_give_the_same(
    community: Path, records: Records
) -> None:
    for name in (*LISTS, COMMUNITY):
        lines = (community / name).read_text().split()
        (community / name).write_text("".join(f"images/{line} 0 1 0\r\n" for line in lines))
    assert sizes_of(records, community) == [75_312, 11_212, 25_596]


def test_the_drawn_validation_equals_that_of_earlier_runs(root: Path, records: Records) -> None:
    splits = make_splits(records, root, DataSection(root=str(root)))
    assert split_hash(records, splits) == DRAWN_HASH


def test_the_official_split_has_86524_and_25596_images(root: Path, records: Records) -> None:
    splits = make_splits(records, root, DataSection(root=str(root)))
    assert splits.kind == "official"
    assert len(splits.train) + len(splits.val) == 86_524
    assert len(splits.test) == 25_596
    assert len(splits.val) == pytest.approx(0.05 * 86_524, abs=184)  # the largest patient's images


def test_the_official_split_shares_no_patient(root: Path, records: Records) -> None:
    splits = make_splits(records, root, DataSection(root=str(root)))
    patients = records.table["patient"].to_numpy()
    parts = [set(patients[getattr(splits, name)].tolist()) for name in SPLIT_NAMES]
    assert len(parts[0]) + len(parts[1]) == 28_008
    assert len(parts[2]) == 2_797
    assert len(set.union(*parts)) == 30_805


def test_a_random_split_has_the_tutorials_sizes_and_leak(
    root: Path, records: Records, caplog: pytest.LogCaptureFixture
) -> None:
    section = DataSection(root=str(root), split="random", val_fraction=0.05, test_fraction=0)
    splits = make_splits(records, root, section)
    assert [len(getattr(splits, name)) for name in SPLIT_NAMES] == [106_514, 5_606, 0]
    found = re.search(r"(\d+) of 5606 val images share a patient with train", caplog.text)
    assert found is not None
    assert 0.82 < int(found.group(1)) / 5606 < 0.85


def test_a_patient_split_of_the_real_images_is_near_its_fractions(
    root: Path, records: Records
) -> None:
    section = DataSection(root=str(root), split="patient", val_fraction=0.1, test_fraction=0.2)
    splits = make_splits(records, root, section)
    assert len(splits.val) / len(records) == pytest.approx(0.1, abs=0.002)
    assert len(splits.test) / len(records) == pytest.approx(0.2, abs=0.002)


def test_the_loss_of_the_prevalence_alone_is_0_1637(community: Path, annotated: Records) -> None:
    # The images are not available; prevalence() needs only the records and the splits.
    data = DataSection(root=str(community))
    module = ChestXrayDataModule(Config(data=data))
    splits = make_splits(annotated, community, data)
    module._content = _Content(Path(), None, annotated, splits, pd.DataFrame())
    assert len(module.splits.train) == 75_312
    prior = module.prevalence()
    labels = module.records.labels[module.splits.train]
    losses = -(labels * np.log(prior) + (1 - labels.astype(float)) * np.log(1 - prior))
    assert prior.shape == (14,)
    assert losses.mean() == pytest.approx(0.1637, abs=0.0005)


def test_the_21_full_images_are_read_gray_at_the_given_size() -> None:
    images = find_images(NIH / "images")
    assert len(images) == 21
    modes = []
    for path in images.values():
        with Image.open(path) as stored:
            modes.append(stored.mode)
            assert stored.size == (1024, 1024)
        image = read_gray(path, 224)
        assert image.dtype == np.uint8 and image.shape == (224, 224)
        assert 20 < image.mean() < 235 and image.std() > 20
    assert (modes.count("L"), modes.count("RGBA")) == (19, 2)


@pytest.mark.parametrize("name", ["00002578_000.png", "00004934_000.png"])
def test_a_real_rgba_image_is_its_red_channel(name: str) -> None:
    with Image.open(NIH / "images" / name) as stored:
        assert stored.mode == "RGBA"
        red = np.array(stored.getchannel("R"))
    np.testing.assert_array_equal(read_gray(NIH / "images" / name, 1024), red)


def test_the_thousand_small_images_are_found_and_named_as_in_the_csv(records: Records) -> None:
    images = find_images(NIH / "nih1000_64px")
    assert len(images) == 1000
    assert set(images) <= set(records.table["image"])


@pytest.mark.parametrize("size", [64, 32])
def test_small_images_are_read_at_the_given_size(size: int) -> None:
    images = find_images(NIH / "nih1000_64px")
    for name in sorted(images)[::200]:
        image = read_gray(images[name], size)
        assert image.dtype == np.uint8 and image.shape == (size, size)
        assert image.std() > 10
