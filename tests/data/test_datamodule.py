"""ChestXrayDataModule on a folder in NIH's layout."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Dict, Optional

import numpy as np
import pytest
import torch
from PIL import Image

from cxr_vit.config.data_sections import DataSection
from cxr_vit.config.schema import BatchSection, Config
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.labels import FINDINGS
from cxr_vit.data.splits import SPLIT_NAMES
from cxr_vit.errors import ConfigError, DataError

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position"
)
IMAGES = 40
CSV = "Data_Entry_2017_v2020.csv"


def findings_of(row: int) -> str:
    return "Effusion|Mass" if row % 4 == 0 else "No Finding"


def write_set(root: Path) -> None:
    """Write 40 patients with one image each; the last ten are the official test split."""
    (root / "images").mkdir(parents=True)
    names = [f"{row:08d}_000.png" for row in range(IMAGES)]
    for row, name in enumerate(names):
        Image.new("L", (16, 16), row).save(root / "images" / name)
    rows = [f"{name},{findings_of(row)},0,{row},50,F,AP" for row, name in enumerate(names)]
    (root / CSV).write_text("\n".join([HEADER, *rows]) + "\n", encoding="utf-8")
    (root / "train_val_list.txt").write_text("\n".join(names[:30]), encoding="utf-8")
    (root / "test_list.txt").write_text("\n".join(names[30:]), encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_set(tmp_path / "nih")
    return tmp_path / "nih"


def module_of(root: Path, **changes: object) -> ChestXrayDataModule:
    settings: Dict[str, object] = {"val_fraction": 0.2, "image_size": 16, **changes}
    module = ChestXrayDataModule(Config(data=DataSection(root=str(root), **settings)))
    module.setup()
    return module


def test_the_module_combines_csv_splits_and_images(root: Path) -> None:
    module = module_of(root)
    assert module.splits.kind == "official"
    assert [len(module.dataset(name)) for name in ("train", "val", "test")] == [24, 6, 10]
    assert module.names == list(FINDINGS)
    assert module.csv == root / CSV


def test_a_dataset_holds_the_images_of_its_split_in_order(root: Path) -> None:
    module = module_of(root)
    test = module.dataset("test")
    assert test.image_names == [f"{row:08d}_000.png" for row in range(30, 40)]
    assert [int(test[row].image.max()) for row in range(10)] == list(range(30, 40))


def test_a_part_of_larger_images_is_seen(root: Path) -> None:
    gradient = np.add.outer(np.arange(16), 10 * np.arange(16)).astype(np.uint8)
    for path in (root / "images").iterdir():
        Image.fromarray(gradient).save(path)
    module = module_of(root, image_size=8, resize=16)
    assert "images at 16 x 16, of which the model sees 8 x 8, from" in module.describe()
    assert [path.name for path in root.glob("cxr_vit_cache/*.u8")] == ["films_16.u8"]
    assert module.dataset("test")[3].image[0].tolist() == gradient[4:12, 4:12].tolist()
    train = module.dataset("train", augmented=True)
    assert train.image_size == 8
    firsts = {int(train[row].image[0, 0, 0]) for row in range(24)}
    assert len(firsts) > 10 and firsts <= set(gradient[:9, :9].flatten().tolist())
    assert train.read_images([0]).shape == (1, 16, 16)


def test_a_dataset_pairs_each_image_with_its_own_labels(root: Path) -> None:
    train = module_of(root).dataset("train")
    for row in range(len(train)):
        sick = int(train[row].image.max()) % 4 == 0
        columns = torch.nonzero(train[row].labels).flatten().tolist()
        assert columns == ([2, 4] if sick else [])


def test_a_dataset_has_the_image_size_of_the_configuration(root: Path) -> None:
    assert module_of(root, image_size=12).dataset("val")[0].image.shape == (1, 12, 12)


def test_include_no_finding_adds_a_fifteenth_class(root: Path) -> None:
    module = module_of(root, include_no_finding=True)
    assert module.names == [*FINDINGS, "No Finding"]
    assert module.dataset("val").num_classes == 15
    assert len(module.prevalence()) == 15


def test_an_empty_split_is_refused_and_the_others_are_named(root: Path) -> None:
    module = module_of(root, split="patient", test_fraction=0)
    with pytest.raises(DataError, match=r"patient split has no test images\. It has: train, val"):
        module.dataset("test")


def test_the_default_split_is_test(root: Path) -> None:
    assert module_of(root).default_split() == "test"


def test_the_default_split_is_val_without_test_images(root: Path) -> None:
    assert module_of(root, split="patient", test_fraction=0).default_split() == "val"


def test_prevalence_counts_training_images_only(root: Path) -> None:
    module = module_of(root)
    train = module.splits.train
    positives = sum(row % 4 == 0 for row in train.tolist())
    expected = np.full(14, 0.5 / (len(train) + 1))
    expected[[2, 4]] = (positives + 0.5) / (len(train) + 1)
    np.testing.assert_allclose(module.prevalence(), expected, rtol=1e-12)
    assert positives / len(train) != 0.25  # so that counting all rows would fail


def test_prevalence_is_never_zero_or_one(root: Path) -> None:
    text = (root / CSV).read_text(encoding="utf-8")
    (root / CSV).write_text(
        text.replace("Effusion|Mass", "Hernia").replace("No Finding", "Hernia"), encoding="utf-8"
    )
    prevalence = module_of(root).prevalence()
    assert prevalence.dtype == np.float64
    assert prevalence[13] > 0.9
    assert ((prevalence > 0) & (prevalence < 1)).all()
    assert np.isfinite(np.log(prevalence / (1 - prevalence))).all()


def test_the_csv_may_be_outside_the_root(root: Path, tmp_path: Path) -> None:
    (root / CSV).rename(tmp_path / "mine.csv")
    module = module_of(root, csv=str(tmp_path / "mine.csv"))
    assert module.csv == tmp_path / "mine.csv"
    assert len(module.records) == IMAGES


def test_a_missing_image_is_an_error(root: Path) -> None:
    (root / "images" / "00000007_000.png").unlink()
    with pytest.raises(DataError, match=r"1 of 40 images are missing[^:]*:\n  00000007_000\.png"):
        module_of(root)


def test_a_missing_image_is_reported_with_the_searched_folder(root: Path, tmp_path: Path) -> None:
    (tmp_path / "csvs").mkdir()
    (root / CSV).rename(tmp_path / "csvs" / "mine.csv")
    (root / "images" / "00000007_000.png").unlink()
    with pytest.raises(DataError, match=f"missing under {root}"):
        module_of(root, csv=str(tmp_path / "csvs" / "mine.csv"))


def test_on_missing_skip_leaves_a_missing_image_out(root: Path) -> None:
    (root / "images" / "00000035_000.png").unlink()
    module = module_of(root, on_missing="skip")
    assert len(module.records) == 39
    assert "00000035_000.png" not in module.dataset("test").image_names
    assert int(module.dataset("test")[5].image.max()) == 36


def test_the_fingerprint_holds_the_hash_of_the_csv(root: Path) -> None:
    expected = hashlib.sha256((root / CSV).read_bytes()).hexdigest()
    assert module_of(root).fingerprint()["csv_sha256"] == expected


def test_the_fingerprint_is_the_same_for_the_same_data(root: Path) -> None:
    assert module_of(root).fingerprint() == module_of(root).fingerprint()


def test_the_fingerprint_changes_with_the_seed_of_the_split(root: Path) -> None:
    one, two = (module_of(root, split_seed=seed).fingerprint() for seed in (1, 2))
    assert one["split_sha256"] != two["split_sha256"]
    assert one["csv_sha256"] == two["csv_sha256"]


def test_the_fingerprint_names_the_kind_of_split(root: Path) -> None:
    assert module_of(root, split="patient").fingerprint()["split_kind"] == "patient"


def test_unchanged_data_log_nothing(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorded = module_of(root).fingerprint()
    caplog.clear()  # the cache was built, of images of one gray value
    module_of(root).warn_if_changed(recorded)
    assert caplog.records == []


def test_a_changed_split_is_logged(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorded = module_of(root, split_seed=1).fingerprint()
    caplog.clear()
    module = module_of(root, split_seed=2)
    assert module.warn_if_changed(recorded) == ["split_sha256"]
    record, hint = caplog.records
    assert record.levelno == hint.levelno == logging.WARNING
    assert "images of the training may be scored" in hint.getMessage()
    assert "split_sha256" in record.getMessage()
    assert recorded["split_sha256"] in record.getMessage()
    assert module.fingerprint()["split_sha256"] in record.getMessage()


def test_a_changed_csv_is_logged(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    recorded = module_of(root).fingerprint()
    caplog.clear()
    text = (root / CSV).read_text(encoding="utf-8")
    (root / CSV).write_text(text.replace("Effusion|Mass", "Effusion"), encoding="utf-8")
    module_of(root).warn_if_changed(recorded)
    (record,) = caplog.records
    assert "csv_sha256" in record.getMessage()


def test_all_images_of_the_test_list_may_be_missing(root: Path) -> None:
    for row in range(30, 40):
        (root / "images" / f"{row:08d}_000.png").unlink()
    module = module_of(root, on_missing="skip")
    assert len(module.splits.test) == 0
    assert module.default_split() == "val"
    assert module.skipped["image"].tolist() == [f"{row:08d}_000.png" for row in range(30, 40)]


@pytest.mark.parametrize("split", ["official", "patient", "random"])
def test_an_unusable_image_moves_no_other_to_another_split(root: Path, split: str) -> None:
    def parts(**changes: object) -> Dict[str, set]:
        module = module_of(root, split=split, cache="off", **changes)
        names = module.records.table["image"]
        return {part: set(names.iloc[getattr(module.splits, part)]) for part in SPLIT_NAMES}

    whole = parts()
    broken = {"00000003_000.png", "00000017_000.png", "00000031_000.png"}
    for name in broken:
        (root / "images" / name).write_bytes(b"<html>")
    assert parts(on_bad_image="skip") == {part: names - broken for part, names in whole.items()}


def test_missing_and_damaged_images_are_reported_together(root: Path) -> None:
    (root / "images" / "00000007_000.png").unlink()
    (root / "images" / "00000008_000.png").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        module_of(root)
    assert "1 of 40 images are missing" in str(caught.value)
    assert "1 of 40 images are unusable:\n  00000008_000.png: the file is empty" in str(
        caught.value
    )


def test_describe_gives_images_patients_and_sizes(root: Path) -> None:
    assert module_of(root).describe() == (
        f"40 images of 40 patients from {root / CSV}, official split (train_val_list.txt,"
        " test_list.txt, validation drawn by patient with seed 1337): train 24, val 6, test 10\n"
        f"images at 16 x 16 from {root / 'cxr_vit_cache' / 'films_16.u8'}"
    )


@pytest.mark.parametrize("given", [None, "labels.csv"])
def test_an_absent_root_without_a_sample_explains_where_to_get_data(
    tmp_path: Path, given: Optional[str]
) -> None:
    with pytest.raises(DataError, match=r"data\.root=.*absent") as caught:
        module_of(tmp_path / "absent", csv=given)
    assert "DATASET_DIR" in str(caught.value) and "NIH" in str(caught.value)
    assert "python -m cxr_vit sample --out" in str(caught.value)


def test_the_constructor_reads_nothing(tmp_path: Path) -> None:
    data = DataSection(root=str(tmp_path / "absent"))
    assert len(ChestXrayDataModule(Config(data=data)).names) == 14


def test_the_training_loader_yields_the_host_batches_of_an_epoch(root: Path) -> None:
    batch = BatchSection(micro_batch_size=2, gradient_accumulation=2, device_iterations=2)
    data = DataSection(root=str(root), val_fraction=0.2, image_size=16)
    module = ChestXrayDataModule(Config(data=data, batch=batch))
    batches = list(module.train_dataloader())
    assert {tuple(batch.images.shape) for batch in batches} == {(8, 1, 16, 16)}
    rows = torch.cat([batch.indices for batch in batches]).tolist()
    assert len(set(rows)) == len(rows) == len(module.splits.train) // 8 * 8


@pytest.mark.parametrize("split", ["val", "test"])
def test_the_evaluation_loaders_yield_each_image_once_in_order(root: Path, split: str) -> None:
    module = module_of(root)
    batches = list(getattr(module, f"{split}_dataloader")())
    rows = torch.cat([batch.indices for batch in batches]).tolist()
    assert rows == list(range(len(getattr(module.splits, split))))


def test_loader_that_no_training_calls_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Mine\.train_dataloader is never called.*dataset"):
        type("Mine", (ChestXrayDataModule,), {"train_dataloader": lambda self: []})
