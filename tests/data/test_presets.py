"""The overlays in configs/data, each on a tiny copy of its data set's layout."""

from __future__ import annotations

from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Tuple

import numpy as np
import pytest

import layouts
from conftest import SMALL
from cxr_vit.config import Config, load_config
from cxr_vit.config.files import packaged_configs
from cxr_vit.data.datamodule import ChestXrayDataModule, prepare, verify_cache
from cxr_vit.data.images import read_gray
from cxr_vit.data.labels import FINDINGS
from cxr_vit.data.text_files import check_data_root
from cxr_vit.errors import DataError

FOLDER = Path(__file__).parents[2] / "configs"
MAIN = sorted(path.name for path in FOLDER.glob("*.yaml"))


class Preset(NamedTuple):
    """A layout, and what is expected of it."""

    write: Callable[[Path], Path]
    names: Tuple[str, ...]
    files: List[str]
    test: int
    images: int
    patients: int
    #: The first image and its patient, sex, age and view.
    first: Tuple[str, object, str, float, str]


PRESETS: Dict[str, Preset] = {
    "chexpert": Preset(
        layouts.chexpert,
        layouts.CHEXPERT,
        ["train.csv", "valid.csv"],
        test=8,
        images=32,
        patients=16,
        first=(
            "CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg",
            *("patient00001", "M", 40.0, "Frontal"),
        ),
    ),
    "mimic_cxr_jpg": Preset(
        layouts.mimic_cxr_jpg,
        layouts.MIMIC,
        [f"mimic-cxr-2.0.0-{name}.csv.gz" for name in ("split", "chexpert", "metadata")],
        test=2,
        images=24,
        patients=12,
        first=(
            "00000000-bde0afdd-112c0b34-7bc16630-4e384014",
            *("10000032", "", np.nan, "LATERAL"),
        ),
    ),
    "vindr_cxr": Preset(
        layouts.vindr_cxr,
        tuple(name for name in layouts.VINDR if name != "Other diseases"),
        ["annotations/image_labels_train.csv", "annotations/image_labels_test.csv"],
        test=4,
        images=16,
        patients=16,
        first=("0" * 32, "0" * 32, "", np.nan, ""),
    ),
    "nih_sample": Preset(
        layouts.nih_sample,
        FINDINGS,
        ["sample_labels.csv"],
        test=6,
        images=24,
        patients=12,
        first=("00000013_000.png", 13, "M", 60.0, "PA"),
    ),
    "hospital": Preset(
        layouts.hospital,
        ("Effusion", "Cardiomegaly", "Pneumothorax"),
        ["hospital.csv"],
        test=8,
        images=40,
        patients=20,
        first=("000000.png", "HOSP-00000", "F", 30.0, ""),
    ),
    "google2019": Preset(
        layouts.google2019,
        ("Fracture", "Pneumothorax", "Airspace opacity", "Nodule or mass"),
        ["google2019_nih-chest-xray-labels.csv"],
        test=12,
        images=24,
        patients=12,
        first=("00000013_000.png", "13", "M", 60.0, "AP"),
    ),
}


class Read(NamedTuple):
    """A preset with the data module of its layout."""

    preset: Preset
    root: Path
    config: Config
    data: ChestXrayDataModule


@pytest.fixture(scope="module", params=sorted(PRESETS))
def read(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Read:
    preset = PRESETS[request.param]
    root = preset.write(tmp_path_factory.mktemp("layouts") / request.param)
    files = [FOLDER / "vit_demo.yaml", FOLDER / f"data/{request.param}.yaml"]
    config = load_config(files, [*SMALL, f"data.root={root}"])
    return Read(preset, root, config, ChestXrayDataModule(config))


def test_every_preset_is_tested_and_packaged() -> None:
    assert set(PRESETS) == {path.stem for path in (FOLDER / "data").glob("*.yaml")}
    assert {f"data/{name}" for name in PRESETS} <= set(packaged_configs())


@pytest.mark.parametrize("name", sorted(PRESETS))
@pytest.mark.parametrize("main", MAIN)
def test_a_preset_fits_every_configuration(name: str, main: str) -> None:
    config = load_config([FOLDER / main, FOLDER / f"data/{name}.yaml"], ["data.root=here"])
    alone = load_config(FOLDER / f"data/{name}.yaml", ["data.root=here"])
    kept = ("root", "format", "csv", "columns", "labels", "split", "label_map", "uncertain")
    assert [getattr(config.data, key) for key in kept] == [getattr(alone.data, key) for key in kept]


@pytest.mark.parametrize("name", sorted(set(PRESETS) - {"hospital"}))
def test_a_preset_begins_with_its_commands(name: str) -> None:
    text = (FOLDER / f"data/{name}.yaml").read_text(encoding="utf-8")
    commands = text.partition("#\n")[0].splitlines()
    assert all(f"configs/data/{name}.yaml" in line and "data.root=" in line for line in commands)
    programs = [line.split()[2] for line in commands]
    assert programs == (["evaluate.py"] if name == "google2019" else ["train.py", "evaluate.py"])


def test_names_files_and_images(read: Read) -> None:
    preset, data = read.preset, read.data
    check_data_root(read.config.data)
    assert tuple(data.names) == preset.names
    assert data.files == [read.root / name for name in preset.files]
    assert len(data.records) == preset.images and len(data.skipped) == 0
    assert data.records.table["patient"].nunique() == preset.patients
    table = data.records.table[["image", "patient", "sex", "age", "view"]]
    for value, expected in zip(table.iloc[0], preset.first):
        assert value == expected or (value != value and expected != expected)
    assert f"{preset.images} images of {preset.patients} patients from {data.files[0]}" in (
        data.describe()
    )


def test_splits_share_no_patient(read: Read) -> None:
    splits, patients = read.data.splits, read.data.records.table["patient"].to_numpy()
    assert len(splits.test) == read.preset.test and len(splits.val) > 0
    assert not set(patients[splits.val]) & set(patients[splits.test])
    assert not set(patients[splits.train]) & set(patients[[*splits.val, *splits.test]])
    if read.preset.names[0] == "Fracture":
        with pytest.raises(DataError, match=r"table split has no train images\. It has: val, test"):
            read.data.dataset("train")
    else:
        assert len(splits.train) + len(splits.val) + len(splits.test) == read.preset.images


def test_each_image_is_that_of_its_row(read: Read) -> None:
    files = [str(path) for path in read.root.rglob("*") if path.suffix in (".png", ".jpg")]
    dataset = read.data.dataset("test")
    images = dataset.read_images(np.arange(len(dataset)))
    assert len({image.tobytes() for image in images}) == read.preset.test
    for name, image in zip(dataset.image_names, images):
        (path,) = [path for path in files if name.replace("CheXpert-v1.0-small/", "/") in path]
        np.testing.assert_array_equal(image, read_gray(path, 32))


def test_the_label_map_leads_to_nihs_findings(read: Read) -> None:
    label_map = read.config.data.label_map
    targets = [name for to in label_map.values() for name in ([to] if isinstance(to, str) else to)]
    assert set(label_map) <= set(read.preset.names) and set(targets) <= set(FINDINGS)
    assert label_map or set(read.preset.names) <= set(FINDINGS)


def test_prepare_and_verify(read: Read) -> None:
    assert f"{read.preset.images} of {read.preset.images} images of" in prepare(read.config.data)
    assert "all checksums match" in verify_cache(read.config.data)


def labels_of(name: str, root: Path, *overrides: str) -> ChestXrayDataModule:
    PRESETS[name].write(root)
    files = [FOLDER / f"data/{name}.yaml"]
    return ChestXrayDataModule(load_config(files, [*SMALL, f"data.root={root}", *overrides]))


def test_uncertain_and_blank_labels_of_chexpert(tmp_path: Path) -> None:
    """The first rows of the layout go through 1.0, 0.0, -1.0 and blank, column by column."""
    assert labels_of("chexpert", tmp_path).records.labels[0].tolist() == [
        *(1, 0, -1, 0, 1, 0, -1, 0, 1, 0, -1, 0, 1, 0),
    ]
    data = labels_of("chexpert", tmp_path, "data.blank=unknown", "data.uncertain=positive")
    assert data.records.labels[0].tolist() == [1, 0, 1, -1, 1, 0, 1, -1, 1, 0, 1, -1, 1, 0]
    prevalence = data.prevalence()
    assert ((prevalence > 0) & (prevalence < 1)).all()


def test_a_study_of_mimic_without_labels_is_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = labels_of("mimic_cxr_jpg", tmp_path).records
    assert (records.labels[-2:] == 0).all() and (records.labels[:2] == records.labels[0]).all()
    assert "chexpert.csv.gz: no partner for 2 of 24 rows" in caplog.text


def test_two_of_three_readers_of_vindr_decide(tmp_path: Path) -> None:
    records = labels_of("vindr_cxr", tmp_path).records
    lines = (tmp_path / "annotations/image_labels_train.csv").read_text().splitlines()[1:4]
    votes = np.array([line.split(",")[2:] for line in lines], dtype=int).sum(axis=0)
    kept = [number for number, name in enumerate(layouts.VINDR) if name != "Other diseases"]
    assert records.labels[0].tolist() == (votes[kept] >= 2).astype(int).tolist()
