"""Official, patient-wise and random splits: sizes, seeds, leaks and identity."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Dict, List, Sequence, Set

import numpy as np
import pandas as pd
import pytest

from cxr_vit.config.data_sections import DataSection
from cxr_vit.data.records import Records
from cxr_vit.data.splits import (
    SPLIT_NAMES,
    Splits,
    describe_sizes,
    describe_splits,
    make_splits,
    num_sharing_patients,
    split_hash,
)
from cxr_vit.errors import DataError

NIH_NAMES = ("train_val_list.txt", "test_list.txt")

# Of ten images with the default seed; a change moves images between the splits of existing runs.
GOLDEN_OFFICIAL = [[0, 1, 2, 5, 6, 7], [3, 4], [8, 9]]
GOLDEN_PATIENT = [[0, 1, 2, 5, 6, 8], [3, 9], [4, 7]]
# printf '[train]\n00000001_000.png\n00000003_002.png[val]\n...' | sha256sum
GOLDEN_HASH = "a09c5af8e21c617f7f94f6aafb0ab3c56b9b8cb8adf21ca5b07fb3d3cd105b62"


def records_of(patients: Sequence[int]) -> Records:
    names = [f"{patient:08d}_{row:03d}.png" for row, patient in enumerate(patients)]
    table = pd.DataFrame({"image": names, "patient": np.asarray(patients, dtype=np.int64)})
    return Records(table, np.zeros((len(names), 14), dtype=np.uint8))


def cohort(num_patients: int = 200) -> Records:
    """Return patients with 1 to 12 images each, most with one or two, ordered by number."""
    sizes = np.random.default_rng(5).geometric(0.35, size=num_patients).clip(max=12)
    return records_of(np.repeat(np.arange(1, num_patients + 1), sizes).tolist())


def reversed_rows(records: Records) -> Records:
    return records.take(np.arange(len(records))[::-1])


def section(root: Path, **changes: object) -> DataSection:
    return DataSection(root=str(root), **changes)


def split(records: Records, root: Path, **changes: object) -> Splits:
    return make_splits(records, root, section(root, **changes))


def write_lists(
    root: Path, train_val: Sequence[str], test: Sequence[str], names: Sequence[str] = NIH_NAMES
) -> None:
    for name, images in zip(names, (train_val, test)):
        (root / name).write_text("".join(f"{image}\n" for image in images), encoding="utf-8")


def write_official(root: Path, records: Records, first_test_patient: int = 151) -> None:
    """Write the lists, with patients from this number on in the test list."""
    in_test = records.table["patient"] >= first_test_patient
    write_lists(root, records.table["image"][~in_test].tolist(), records.table["image"][in_test])


def patients_in(records: Records, splits: Splits) -> Dict[str, Set[int]]:
    patients = records.table["patient"].to_numpy()
    return {name: set(patients[getattr(splits, name)].tolist()) for name in SPLIT_NAMES}


def names_in(records: Records, splits: Splits) -> List[Set[str]]:
    names = records.table["image"].to_numpy()
    return [set(names[getattr(splits, name)]) for name in SPLIT_NAMES]


def rows_in(splits: Splits) -> List[list]:
    return [getattr(splits, name).tolist() for name in SPLIT_NAMES]


def test_official_test_split_is_the_test_list(tmp_path: Path) -> None:
    records = cohort()
    write_official(tmp_path, records)
    splits = split(records, tmp_path, split="official")
    expected = np.flatnonzero(records.table["patient"] >= 151)
    np.testing.assert_array_equal(splits.test, expected)
    assert splits.kind == "official"


def test_official_draws_validation_from_the_training_list(tmp_path: Path) -> None:
    records = cohort()
    write_official(tmp_path, records)
    splits = split(records, tmp_path, split="official")
    together = np.sort(np.concatenate([splits.train, splits.val]))
    np.testing.assert_array_equal(together, np.flatnonzero(records.table["patient"] < 151))
    assert len(splits.train) and len(splits.val)


def test_official_validation_is_golden_for_a_fixed_seed(tmp_path: Path) -> None:
    records = records_of([1, 1, 2, 3, 4, 5, 5, 6, 7, 8])
    write_official(tmp_path, records, first_test_patient=7)
    splits = split(records, tmp_path, split="official", val_fraction=0.2)
    assert rows_in(splits) == GOLDEN_OFFICIAL


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_official_validation_is_about_its_fraction_of_the_training_list(
    tmp_path: Path, fraction: float
) -> None:
    records = cohort()
    write_official(tmp_path, records)
    splits = split(records, tmp_path, split="official", val_fraction=fraction)
    listed = len(splits.train) + len(splits.val)
    # The last patient drawn may overshoot by 11 images.
    assert 0 <= len(splits.val) - round(fraction * listed) <= 11


def test_official_has_no_patient_in_two_splits(tmp_path: Path) -> None:
    records = cohort()
    write_official(tmp_path, records)
    patients = patients_in(records, split(records, tmp_path, split="official", val_fraction=0.3))
    assert not patients["train"] & patients["val"]
    assert not patients["test"] & (patients["train"] | patients["val"])


def test_official_draws_the_same_validation_for_the_same_seed(tmp_path: Path) -> None:
    records = cohort()
    write_official(tmp_path, records)
    one, two = (split(records, tmp_path, split="official", split_seed=9) for _ in range(2))
    assert rows_in(one) == rows_in(two)


def test_official_draws_another_validation_for_another_seed(tmp_path: Path) -> None:
    records = cohort()
    write_official(tmp_path, records)
    one, two = (split(records, tmp_path, split="official", split_seed=seed) for seed in (9, 10))
    assert one.val.tolist() != two.val.tolist()
    assert one.test.tolist() == two.test.tolist()


def test_official_leaves_unlisted_images_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = cohort()
    names = records.table["image"].tolist()
    write_official(tmp_path, records)
    listed = (tmp_path / "train_val_list.txt").read_text().splitlines()
    (tmp_path / "train_val_list.txt").write_text("\n".join(listed[3:]))
    splits = split(records, tmp_path, split="official")
    assert sum(map(len, rows_in(splits))) == len(names) - 3
    assert not set.union(*names_in(records, splits)) & set(listed[:3])
    assert "3 images are in no list file" in caplog.text


def test_official_logs_nothing_if_every_image_is_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = cohort()
    write_official(tmp_path, records)
    split(records, tmp_path, split="official")
    assert caplog.records == []


def test_official_counts_listed_images_that_the_csv_lacks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = cohort()
    write_official(tmp_path, records)
    subset = records.take(np.arange(0, len(records), 2))
    splits = split(subset, tmp_path, split="official")
    assert sum(map(len, rows_in(splits))) == len(subset)
    counts = re.findall(r"list\.txt: the CSV lacks (\d+) of \d+ listed images", caplog.text)
    assert sum(map(int, counts)) == len(records) - len(subset)


@pytest.mark.parametrize(
    "names",
    [
        NIH_NAMES,
        ("train_val_list_NIH.txt", "test_list_NIH.txt"),
        ("train_list.txt", "test_list.txt"),
    ],
)
def test_official_finds_each_known_name_of_the_lists(tmp_path: Path, names: Sequence[str]) -> None:
    images = [1, 1, 2, 3, 4, 5]
    records = records_of(images)
    listed = records.table["image"].tolist()
    write_lists(tmp_path, listed[:4], listed[4:], names)
    assert split(records, tmp_path, split="official", val_fraction=0.3).test.tolist() == [4, 5]


@pytest.mark.parametrize("present", [[], ["train_val_list.txt"], ["test_list.txt"]])
def test_official_without_both_lists_is_refused(tmp_path: Path, present: Sequence[str]) -> None:
    for name in present:
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"train_val_list\.txt and test_list\.txt") as caught:
        split(cohort(), tmp_path, split="official")
    assert str(tmp_path) in str(caught.value) and "data.split=patient" in str(caught.value)


def test_a_list_that_is_not_utf_8_text_is_refused_by_name(tmp_path: Path) -> None:
    records = cohort()
    write_official(tmp_path, records)
    (tmp_path / "test_list.txt").write_bytes("00000001_000.png\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"test_list\.txt"):
        split(records, tmp_path, split="official")


def test_an_empty_list_is_refused_by_name(tmp_path: Path) -> None:
    records = cohort()
    write_official(tmp_path, records)
    (tmp_path / "test_list.txt").write_text("\n\n")
    with pytest.raises(DataError, match=r"test_list\.txt: the file is empty"):
        split(records, tmp_path, split="official")


def test_a_list_with_a_patient_on_both_sides_is_refused(tmp_path: Path) -> None:
    records = records_of([1, 1, 2, 3, 4, 4, 4])
    names = records.table["image"].tolist()
    write_lists(tmp_path, names[:5], names[5:])
    with pytest.raises(DataError, match="2 of 2 test images share a patient with") as caught:
        split(records, tmp_path, split="official", val_fraction=0.2)
    assert "Fix the list files" in str(caught.value)


def test_an_image_in_both_lists_is_refused_by_name(tmp_path: Path) -> None:
    records = records_of([1, 2, 3, 4, 5])
    names = records.table["image"].tolist()
    write_lists(tmp_path, names[:4], names[3:])
    with pytest.raises(
        DataError, match=r"1 images are both in .*train_val_list\.txt and"
    ) as caught:
        split(records, tmp_path, split="official", val_fraction=0.3)
    assert f"test_list.txt, first: {names[3]}" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (name, content)
        for name in (*NIH_NAMES, "val_list.txt")
        for content in ("a.png\nb.png\n", '"",\n')
    ],
)
def test_a_list_that_names_none_of_the_images_is_refused(
    tmp_path: Path, name: str, content: str
) -> None:
    records = cohort()
    write_official(tmp_path, records)
    (tmp_path / name).write_text(content)
    with pytest.raises(
        DataError, match=f"{name}: names none of the {len(records)} images"
    ) as caught:
        split(records, tmp_path, split="official")
    assert "they have '00000001_000.png'" in str(caught.value)


@pytest.mark.parametrize("kind", ["official", "patient", "random"])
def test_leaving_an_image_out_moves_no_other_to_another_split(tmp_path: Path, kind: str) -> None:
    records = cohort()
    write_official(tmp_path, records)
    whole = split(records, tmp_path, split=kind, val_fraction=0.2)
    usable = np.random.default_rng(0).random(len(records)) > 0.1
    kept = whole.keep(usable)
    fewer = records.take(np.flatnonzero(usable)).table["image"]
    for part in SPLIT_NAMES:
        rows = getattr(whole, part)
        expected = records.table["image"].iloc[rows[usable[rows]]].tolist()
        assert fewer.iloc[getattr(kept, part)].tolist() == expected
    assert (kept.kind, kept.source) == (whole.kind, whole.source)


def test_keeping_no_training_image_is_refused(tmp_path: Path) -> None:
    records = cohort()
    whole = split(records, tmp_path, split="patient")
    usable = np.zeros(len(records), dtype=bool)
    usable[whole.val] = True
    with pytest.raises(DataError, match="leaves none for train"):
        whole.keep(usable)


def test_official_source_names_the_files_and_the_seed(tmp_path: Path) -> None:
    records = cohort()
    write_official(tmp_path, records)
    splits = split(records, tmp_path, split_seed=9)
    files = "train_val_list.txt, test_list.txt"
    assert splits.source == f"{files}, validation drawn by patient with seed 9"
    assert describe_splits(splits) == f"official split ({splits.source}): {describe_sizes(splits)}"


def write_validation(root: Path, records: Records, name: str = "val_list.txt") -> Set[int]:
    """List the images of patients 1 to 20 for validation; return their rows."""
    chosen = records.table["patient"] <= 20
    (root / name).write_text("\n".join(records.table["image"][chosen]))
    return set(np.flatnonzero(chosen).tolist())


@pytest.mark.parametrize("name", ["val_list.txt", "val_list_NIH.txt", "community_val_list.txt"])
@pytest.mark.parametrize("kind", ["auto", "official"])
def test_a_validation_list_in_the_root_is_used(tmp_path: Path, name: str, kind: str) -> None:
    records = cohort()
    write_official(tmp_path, records)
    chosen = write_validation(tmp_path, records, name)
    splits = split(records, tmp_path, split=kind)
    assert set(splits.val.tolist()) == chosen
    expected = np.flatnonzero(records.table["patient"].between(21, 150))
    np.testing.assert_array_equal(splits.train, expected)
    assert splits.kind == "official"
    assert splits.source.endswith(f"validation of {name}")


def test_the_training_list_may_lack_the_validation_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = cohort()
    write_official(tmp_path, records)
    write_validation(tmp_path, records)
    whole = split(records, tmp_path)
    names, patients = records.table["image"], records.table["patient"]
    (tmp_path / "train_val_list.txt").write_text("\n".join(names[patients.between(21, 150)]))
    assert rows_in(split(records, tmp_path)) == rows_in(whole)
    assert caplog.records == []


def test_a_given_validation_list_takes_precedence_over_the_root(tmp_path: Path) -> None:
    records = cohort()
    write_official(tmp_path, records)
    write_validation(tmp_path, records)
    mine = tmp_path / "mine.txt"
    mine.write_text("\n".join(records.table["image"][records.table["patient"].between(100, 130)]))
    splits = split(records, tmp_path, val_list=str(mine))
    assert patients_in(records, splits)["val"] == set(range(100, 131))
    assert "validation of mine.txt" in describe_splits(splits)


def test_a_validation_list_that_divides_a_patient_is_refused(tmp_path: Path) -> None:
    records = records_of([1, 1, 1, 2, 3, 4])
    names = records.table["image"].tolist()
    write_lists(tmp_path, names[:5], names[5:])
    (tmp_path / "val_list.txt").write_text(names[2])
    with pytest.raises(DataError, match="1 of 1 val images share a patient with train"):
        split(records, tmp_path)


def test_a_validation_list_that_shares_an_image_with_test_is_refused(tmp_path: Path) -> None:
    records = records_of([1, 2, 3, 4])
    names = records.table["image"].tolist()
    write_lists(tmp_path, names[:2], names[2:])
    (tmp_path / "val_list.txt").write_text("\n".join(names[1:3]))
    with pytest.raises(DataError, match=f"1 images are both in .*val_list.txt.*first: {names[2]}"):
        split(records, tmp_path)


def given_lists(root: Path, records: Records) -> Dict[str, str]:
    folder = root / "lists"
    folder.mkdir()
    write_official(folder, records)
    write_validation(folder, records, "v.txt")
    files = dict(zip(("train_list", "test_list", "val_list"), (*NIH_NAMES, "v.txt")))
    return {key: str(folder / name) for key, name in files.items()}


def test_given_lists_make_auto_official(tmp_path: Path) -> None:
    records = cohort()
    splits = split(records, tmp_path, split="auto", **given_lists(tmp_path, records))
    assert splits.kind == "official"
    assert patients_in(records, splits)["val"] == set(range(1, 21))
    assert patients_in(records, splits)["test"] == set(range(151, 201))


@pytest.mark.parametrize("key", ["train_list", "val_list", "test_list"])
@pytest.mark.parametrize("kind", ["auto", "official"])
def test_a_missing_given_list_is_named_with_its_key(tmp_path: Path, key: str, kind: str) -> None:
    records = cohort()
    write_official(tmp_path, records)
    with pytest.raises(DataError, match=rf"data\.{key}=.*absent\.txt: no such file"):
        split(records, tmp_path, split=kind, **{key: str(tmp_path / "absent.txt")})


def test_auto_with_only_one_list_given_asks_for_the_others(tmp_path: Path) -> None:
    records = cohort()
    given = given_lists(tmp_path, records)
    with pytest.raises(DataError, match=r"data\.train_list and data\.test_list"):
        split(records, tmp_path, split="auto", val_list=given["val_list"])


@pytest.mark.parametrize("kind", ["patient", "random"])
def test_ignored_given_lists_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    records = cohort()
    given = given_lists(tmp_path, records)
    splits = split(records, tmp_path, split=kind, **given)
    assert rows_in(splits) == rows_in(split(records, tmp_path, split=kind))
    ignored = "data.train_list, data.val_list, data.test_list"
    assert f"data.split={kind} ignores {ignored}" in caplog.text


def test_given_lists_are_checked_for_leaks_too(tmp_path: Path) -> None:
    records = records_of([1, 1, 2, 3, 3])
    names = records.table["image"].tolist()
    write_lists(tmp_path, names[:3] + names[4:], [names[3]], ("a.txt", "b.txt"))
    lists = {"train_list": str(tmp_path / "a.txt"), "test_list": str(tmp_path / "b.txt")}
    with pytest.raises(DataError, match="1 of 1 test images share a patient with"):
        split(records, tmp_path, val_fraction=0.3, **lists)


def test_patient_split_covers_every_image_once(tmp_path: Path) -> None:
    records = cohort()
    splits = split(records, tmp_path, split="patient")
    together = np.sort(np.concatenate(rows_in(splits)))
    np.testing.assert_array_equal(together, np.arange(len(records)))
    assert splits.kind == "patient"


@pytest.mark.parametrize("seed", range(5))
def test_patient_split_has_no_patient_in_two_splits(tmp_path: Path, seed: int) -> None:
    records = cohort()
    changes = {"val_fraction": 0.2, "test_fraction": 0.3, "split_seed": seed}
    patients = patients_in(records, split(records, tmp_path, split="patient", **changes))
    assert sum(map(len, patients.values())) == len(set.union(*patients.values())) == 200


@pytest.mark.parametrize(("val", "test"), [(0.05, 0.2), (0.1, 0.1), (0.3, 0.4), (0.5, 0.0)])
def test_patient_split_sizes_are_near_the_fractions(
    tmp_path: Path, val: float, test: float
) -> None:
    records = cohort(1000)
    splits = split(records, tmp_path, split="patient", val_fraction=val, test_fraction=test)
    assert len(splits.val) / len(records) == pytest.approx(val, abs=0.005)
    assert len(splits.test) / len(records) == pytest.approx(test, abs=0.005)


def test_patient_split_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    one, two = (split(cohort(), tmp_path, split="patient", split_seed=4) for _ in range(2))
    assert rows_in(one) == rows_in(two)


def test_patient_split_depends_on_the_seed(tmp_path: Path) -> None:
    one, two = (split(cohort(), tmp_path, split="patient", split_seed=seed) for seed in (4, 5))
    assert one.val.tolist() != two.val.tolist()
    assert one.test.tolist() != two.test.tolist()


def test_patient_split_is_golden_for_a_fixed_seed(tmp_path: Path) -> None:
    records = records_of([1, 1, 2, 3, 4, 5, 5, 6, 7, 8])
    splits = split(records, tmp_path, split="patient", val_fraction=0.2, test_fraction=0.2)
    assert rows_in(splits) == GOLDEN_PATIENT


def test_patient_split_draws_from_the_whole_range_of_numbers(tmp_path: Path) -> None:
    records = cohort(1000)
    drawn = patients_in(records, split(records, tmp_path, split="patient"))["test"]
    assert min(drawn) < 50 and max(drawn) > 950


def test_random_split_has_exact_sizes(tmp_path: Path) -> None:
    records = records_of(range(1000))
    splits = split(records, tmp_path, split="random", val_fraction=0.123, test_fraction=0.2)
    assert [len(rows) for rows in rows_in(splits)] == [677, 123, 200]
    np.testing.assert_array_equal(np.sort(np.concatenate(rows_in(splits))), np.arange(1000))
    assert splits.kind == "random"


def test_random_split_may_have_no_test_images(tmp_path: Path) -> None:
    splits = split(records_of(range(100)), tmp_path, split="random", test_fraction=0)
    assert [len(rows) for rows in rows_in(splits)] == [95, 5, 0]


def test_random_split_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    one, two = (split(cohort(), tmp_path, split="random", split_seed=4) for _ in range(2))
    assert rows_in(one) == rows_in(two)


def test_random_split_depends_on_the_seed(tmp_path: Path) -> None:
    one, two = (split(cohort(), tmp_path, split="random", split_seed=seed) for seed in (4, 5))
    assert one.val.tolist() != two.val.tolist()


def test_random_split_draws_images_instead_of_patients(tmp_path: Path) -> None:
    records = cohort()
    patients = patients_in(records, split(records, tmp_path, split="random", val_fraction=0.3))
    assert patients["val"] & patients["train"]


def test_random_split_warns_with_the_number_of_images_sharing_a_patient(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = cohort()
    splits = split(records, tmp_path, split="random", val_fraction=0.3, test_fraction=0)
    patients = records.table["patient"].tolist()
    trained = {patients[row] for row in splits.train}
    sharing = sum(patients[row] in trained for row in splits.val)
    assert 0 < sharing < len(splits.val)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    expected = f"{sharing} of {len(splits.val)} val images share a patient with train"
    assert expected in record.getMessage()


def test_random_split_warns_of_the_test_images_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    split(records_of([1] * 20), tmp_path, split="random", test_fraction=0.2)
    for shared in ("1 of 1 val .* with train", "4 of 4 test .* with train", "4 of 4 test .* val"):
        assert re.search(shared, caplog.text)


def test_random_split_without_shared_patients_logs_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    split(records_of(range(50)), tmp_path, split="random")
    assert caplog.records == []


def test_auto_is_official_if_both_lists_exist(tmp_path: Path) -> None:
    records = cohort()
    write_official(tmp_path, records)
    splits = split(records, tmp_path, split="auto")
    assert splits.kind == "official"
    assert rows_in(splits) == rows_in(split(records, tmp_path, split="official"))


@pytest.mark.parametrize("present", [[], ["train_val_list.txt"]])
def test_auto_is_by_patient_without_both_lists(tmp_path: Path, present: Sequence[str]) -> None:
    for name in present:
        (tmp_path / name).touch()
    splits = split(cohort(), tmp_path, split="auto")
    assert splits.kind == "patient"
    assert rows_in(splits) == rows_in(split(cohort(), tmp_path, split="patient"))


def test_auto_is_the_default() -> None:
    assert DataSection().split == "auto"


@pytest.mark.parametrize("kind", ["patient", "random"])
def test_an_empty_validation_split_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError, match="leaves none for val: train 8, val 0, test 2") as caught:
        split(records_of(range(10)), tmp_path, split=kind, val_fraction=0.01)
    assert "data.val_fraction" in str(caught.value)


@pytest.mark.parametrize("kind", ["patient", "random"])
def test_an_empty_training_split_is_refused(tmp_path: Path, kind: str) -> None:
    with pytest.raises(DataError, match="leaves none for train"):
        split(records_of(range(10)), tmp_path, split=kind, val_fraction=0.6, test_fraction=0.5)


def test_a_single_patient_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the patient split of 9 images leaves none"):
        split(records_of([3] * 9), tmp_path, split="patient")


@pytest.mark.parametrize("kind", ["official", "patient", "random"])
def test_rows_are_ascending_int64(tmp_path: Path, kind: str) -> None:
    records = cohort()
    write_official(tmp_path, records)
    splits = split(records, tmp_path, split=kind)
    for name in SPLIT_NAMES:
        rows = getattr(splits, name)
        assert rows.dtype == np.int64
        assert (np.diff(rows) > 0).all()


@pytest.mark.parametrize("kind", ["official", "patient"])
def test_the_order_of_the_csv_moves_no_image(tmp_path: Path, kind: str) -> None:
    records = cohort()
    write_official(tmp_path, records)
    other = reversed_rows(records)
    one, two = (split(table, tmp_path, split=kind) for table in (records, other))
    assert names_in(records, one) == names_in(other, two)


def test_describe_sizes_names_all_three() -> None:
    splits = Splits(np.arange(5), np.arange(2), np.arange(0), "patient")
    assert describe_sizes(splits) == "train 5, val 2, test 0"


@pytest.mark.parametrize("kind", ["patient", "random"])
def test_describe_splits_gives_the_seed_of_a_drawn_split(tmp_path: Path, kind: str) -> None:
    splits = split(cohort(), tmp_path, split=kind, split_seed=3)
    assert describe_splits(splits).startswith(f"{kind} split (seed 3): train ")


def test_describe_splits_without_a_source_gives_the_kind() -> None:
    splits = Splits(np.arange(5), np.arange(2), np.arange(0), "patient")
    assert describe_splits(splits) == "patient split: train 5, val 2, test 0"


def test_num_sharing_patients_counts_images() -> None:
    records = records_of([1, 1, 1, 2, 3])
    assert num_sharing_patients(records, np.array([0, 1, 4]), np.array([2, 3])) == 2


def test_the_hash_of_a_split_is_golden() -> None:
    splits = Splits(np.array([0, 2]), np.array([1]), np.array([3]), "patient")
    assert split_hash(records_of([1, 2, 3, 4]), splits) == GOLDEN_HASH


def test_the_hash_changes_if_an_image_moves() -> None:
    records = records_of(range(6))
    arrangements = [
        ([0, 1, 2], [3, 4], [5]),
        ([0, 1], [2, 3, 4], [5]),
        ([0, 1, 2], [3], [4, 5]),
        ([0, 1, 2, 5], [3, 4], []),
        ([3, 1, 2], [0, 4], [5]),
        ([0, 1, 2], [3, 4], []),
    ]
    hashes = {
        split_hash(records, Splits(*(np.array(rows, dtype=np.int64) for rows in parts), "official"))
        for parts in arrangements
    }
    assert len(hashes) == len(arrangements)


def test_the_hash_changes_if_an_image_is_replaced() -> None:
    splits = Splits(np.array([0]), np.array([1]), np.array([2]), "patient")
    assert split_hash(records_of([1, 2, 3]), splits) != split_hash(records_of([1, 2, 4]), splits)


def test_the_hash_does_not_depend_on_the_kind() -> None:
    records = records_of([1, 2, 3])
    one = Splits(np.array([0]), np.array([1]), np.array([2]), "patient")
    two = Splits(np.array([0]), np.array([1]), np.array([2]), "official")
    assert split_hash(records, one) == split_hash(records, two)


def test_the_hash_does_not_depend_on_the_labels() -> None:
    records = records_of([1, 2, 3])
    relabelled = Records(records.table.assign(findings="Hernia"), records.labels + 1)
    splits = Splits(np.array([0]), np.array([1]), np.array([2]), "patient")
    assert split_hash(records, splits) == split_hash(relabelled, splits)
