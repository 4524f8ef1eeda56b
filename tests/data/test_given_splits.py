"""Splits that the table gives, all images as the test split, fractions of the training images."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import List, Optional, Sequence

import numpy as np
import pandas as pd
import pytest

from cxr_vit.config.data_sections import DataSection
from cxr_vit.data.records import Records
from cxr_vit.data.splits import Splits, describe_splits, make_splits, split_hash
from cxr_vit.errors import DataError

PATIENTS = [f"patient {number % 40:02d}" for number in range(100)]


def records_of(
    patients: Sequence[object] = PATIENTS, given: Optional[Sequence[str]] = None
) -> Records:
    images = [f"{patient}/study1/view{row}.jpg" for row, patient in enumerate(patients)]
    table = pd.DataFrame({"image": images, "patient": list(patients)})
    split = None if given is None else np.array(given, dtype=object)
    return Records(table, np.zeros((len(table), 2), np.int8), given_split=split)


def given_by_patient(patients: Sequence[str] = PATIENTS) -> List[str]:
    words = {"0": "train", "1": "train", "2": "val", "3": "test"}
    return [words[patient[-2]] for patient in patients]


def split(records: Records, root: Path, **changes: object) -> Splits:
    return make_splits(records, root, DataSection(root=str(root), **changes))


def numbers(splits: Splits) -> List[List[int]]:
    return [rows.tolist() for rows in splits[:3]]


@pytest.mark.parametrize("kind", ["auto", "table"])
def test_the_table_gives_the_split(tmp_path: Path, kind: str) -> None:
    given = given_by_patient()
    (tmp_path / "train_val_list.txt").write_text("x.png\n")  # the table comes first
    (tmp_path / "test_list.txt").write_text("y.png\n")
    splits = split(records_of(given=given), tmp_path, split=kind)
    for name in ("train", "val", "test"):
        expected = np.flatnonzero(np.array(given) == name)
        np.testing.assert_array_equal(getattr(splits, name), expected)
    assert splits.kind == "table"
    assert describe_splits(splits).startswith("table split (validation of the table): train ")


def test_without_validation_rows_patients_are_drawn_from_train(tmp_path: Path) -> None:
    given = ["train" if word == "val" else word for word in given_by_patient()]
    records = records_of(given=given)
    splits = split(records, tmp_path, val_fraction=0.2, split_seed=3)
    drawn = np.concatenate([splits.train, splits.val])
    np.testing.assert_array_equal(np.sort(drawn), np.flatnonzero(np.array(given) == "train"))
    people = records.table["patient"]
    assert not set(people[splits.train]) & set(people[splits.val])
    assert splits.source == "validation drawn by patient with seed 3"


def test_a_table_may_have_no_test_rows_and_rows_in_no_split(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = ["" if word == "test" else word for word in given_by_patient()]
    splits = split(records_of(given=given), tmp_path, split="table")
    assert len(splits.test) == 0 and len(splits.train) + len(splits.val) == given.count(
        "train"
    ) + given.count("val")
    assert f"{given.count('')} images are in no split of the table and left out" in caplog.text


def test_a_table_without_splits_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.split=table needs .*set data\.columns\.split"):
        split(records_of(), tmp_path, split="table")
    assert split(records_of(), tmp_path, val_fraction=0.1).kind == "patient"


def test_a_patient_in_two_parts_of_the_table_is_refused(tmp_path: Path) -> None:
    given = given_by_patient()
    given[0] = "test"
    with pytest.raises(DataError, match=r"test images share a patient.*Fix the splits of the tab"):
        split(records_of(given=given), tmp_path)


def test_lists_that_are_given_come_before_the_table(tmp_path: Path) -> None:
    records = records_of(given=given_by_patient())
    lists = {}
    for key, words in {"train_list": ["train", "val"], "test_list": ["test"]}.items():
        chosen = records.table["image"][np.isin(records.given_split, words)]
        (tmp_path / key).write_text("\n".join(chosen))
        lists[key] = str(tmp_path / key)
    assert split(records, tmp_path, **lists).kind == "official"
    assert split(records, tmp_path, split="table", **lists).kind == "table"


def test_one_list_of_a_table_with_splits_asks_for_the_others(tmp_path: Path) -> None:
    records = records_of(given=given_by_patient())
    (tmp_path / "v").write_text(records.table["image"][0])
    message = r"lists replace the splits of the table: with data\.val_list, data\.train_list and"
    with pytest.raises(DataError, match=message):
        split(records, tmp_path, val_list=str(tmp_path / "v"))


def test_all_images_are_the_test_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = records_of(given=given_by_patient())
    splits = split(records, tmp_path, split="all", train_fraction=0.5)
    assert numbers(splits) == [[], [], list(range(100))]
    assert describe_splits(splits) == "all split: train 0, val 0, test 100"
    ignored = "data.train_fraction=0.5 is ignored: the {} split has no training images"
    assert caplog.messages == [ignored.format("all")]
    caplog.clear()
    split(records_of(given=["test"] * 100), tmp_path, split="table", train_fraction=0.5)
    assert caplog.messages == [ignored.format("table")]
    usable = np.arange(100) < 10
    assert len(splits.keep(usable).test) == 10
    with pytest.raises(DataError, match="the all split of 0 images leaves none for test"):
        splits.keep(np.zeros(100, dtype=bool))


# Lists of a table's images


@pytest.mark.parametrize("form", ["{}", "images/{}", "/mnt/x/{}", "{} 0 1"])
def test_lists_name_a_tables_images_by_path(tmp_path: Path, form: str) -> None:
    patients = [f"p{number}" for number in range(8)]
    table = pd.DataFrame(
        {"image": [f"{person}/study 1/view1.jpg" for person in patients], "patient": patients}
    )
    records = Records(table, np.zeros((8, 2), np.int8))
    for name, rows in {"train_val_list.txt": slice(0, 6), "test_list.txt": slice(6, 8)}.items():
        (tmp_path / name).write_text("\n".join(map(form.format, table["image"][rows])))
    splits = split(records, tmp_path, val_fraction=0.2)
    assert splits.test.tolist() == [6, 7]
    (tmp_path / "test_list.txt").write_text("p7/study 1/view1.jpg\nview1.jpg\n")
    with pytest.raises(DataError, match=r"'view1\.jpg' does not tell which image it is.*as 'p0/s"):
        split(records, tmp_path, val_fraction=0.2)


@pytest.mark.parametrize("form", ["{}.jpg", "{}.png", "{}", "other/{}.jpg"])
def test_lists_name_images_of_unique_names_by_name_or_stem(tmp_path: Path, form: str) -> None:
    records = records_of([f"p{number}" for number in range(8)])
    stems = [f"view{row}" for row in range(8)]
    for name, rows in {"train_val_list.txt": slice(0, 6), "test_list.txt": slice(6, 8)}.items():
        (tmp_path / name).write_text("\n".join(map(form.format, stems[rows])))
    assert split(records, tmp_path, val_fraction=0.2).test.tolist() == [6, 7]


# Patients by text


@pytest.mark.parametrize("kind", ["patient", "official", "table"])
def test_patients_by_text_are_drawn_as_those_by_number(tmp_path: Path, kind: str) -> None:
    people = [int(patient[-2:]) + 10 for patient in PATIENTS]
    given = ["train" if word == "val" else word for word in given_by_patient()]
    by_text = records_of([f"{number}" for number in people], given)
    by_number = Records(
        by_text.table.assign(patient=np.array(people)), by_text.labels, given_split=np.array(given)
    )
    images = by_text.table["image"]
    (tmp_path / "train_val_list.txt").write_text("\n".join(images[np.array(given) == "train"]))
    (tmp_path / "test_list.txt").write_text("\n".join(images[np.array(given) == "test"]))
    changes = {"split": kind, "val_fraction": 0.2, "train_fraction": 0.5}
    one, other = (split(records, tmp_path, **changes) for records in (by_text, by_number))
    assert numbers(one) == numbers(other)
    assert split_hash(by_text, one) == split_hash(by_number, other)


@pytest.mark.parametrize(("one", "other"), [("7", "7.0"), ("7", "007"), ("p7", "P7"), ("0", "0.0")])
def test_a_patient_in_two_spellings_is_in_one_split(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, one: str, other: str
) -> None:
    people = [one, "a", other, "b", "c", "10", "1", "c"]
    given = ["train", "train", "test", "test", "val", "train", "test", "val"]
    records = records_of(people, given)
    split(records, tmp_path)  # numbers, as NIH's, have one spelling
    records = replace(records, variant="table")
    count = "1 of 3 test images have a patient of train in another spelling, e.g."
    with pytest.raises(DataError, match=rf"^{count} '{other}' and '{one}'.* Write the ids"):
        split(records, tmp_path)
    split(
        replace(records, given_split=np.where(records.given_split == "test", "train", given)),
        tmp_path,
    )
    many = replace(records_of([one, other] * 50), variant="table")
    caplog.clear()
    split(many, tmp_path, split="random", val_fraction=0.5, test_fraction=0)
    assert "data.split=random: 50 of 50 val images share a patient with train" in caplog.text
    few = replace(records_of([one, other]), variant="table")
    caplog.clear()
    split(few, tmp_path, split="random", val_fraction=0.5, test_fraction=0)
    assert "data.split=random: 1 of 1 val images have a patient of train in anoth" in caplog.text


# Fractions of the training images


@pytest.mark.parametrize("kind", ["patient", "random", "table"])
def test_a_fraction_of_the_training_images_is_part_of_a_larger_one(
    tmp_path: Path, kind: str
) -> None:
    people = [f"p{number:04d}" for number in np.random.default_rng(0).integers(0, 900, 3000)]
    given = [("train", "train", "val", "test")[int(person[-1]) % 4] for person in people]
    records = records_of(people, given)
    whole = split(records, tmp_path, split=kind)
    trained = {
        fraction: split(records, tmp_path, split=kind, train_fraction=fraction)
        for fraction in (0.01, 0.1, 0.5, 1.0)
    }
    assert numbers(trained[1.0]) == numbers(whole) and trained[1.0].source == whole.source
    rows = [set(splits.train.tolist()) for splits in trained.values()]
    assert rows[0] < rows[1] < rows[2] < rows[3]
    people_of = records.table["patient"].to_numpy()
    for fraction, splits in trained.items():
        assert numbers(splits)[1:] == numbers(whole)[1:]
        target = round(fraction * len(whole.train))
        assert target <= len(splits.train) <= target + 10
        in_train = np.isin(people_of[whole.train], people_of[splits.train])
        assert in_train.sum() == len(splits.train)  # patients are whole
    count = f"{len(rows[1])} of {len(whole.train)} training images (train_fraction 0.1)"
    assert count in describe_splits(trained[0.1])
    other = split(records, tmp_path, split=kind, train_fraction=0.1, split_seed=2)
    assert set(other.train.tolist()) != rows[1]


def test_a_fraction_that_leaves_no_image_is_refused(tmp_path: Path) -> None:
    records = records_of(given=given_by_patient())
    total = given_by_patient().count("train")
    with pytest.raises(DataError, match=rf"train_fraction=0\.001 of {total} training .* leaves no"):
        split(records, tmp_path, train_fraction=0.001)
    smallest = float(f"{1 / total:.2g}")
    assert len(split(records, tmp_path, train_fraction=smallest).train)
