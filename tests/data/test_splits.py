"""Official, patient-wise and random splits: sizes, seeds, leaks and identity."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Dict, List, Sequence, Set

import numpy as np
import pandas as pd
import pytest

from cxr_vit.config.schema import DataSection
from cxr_vit.data.records import Records
from cxr_vit.data.splits import (
    SPLIT_NAMES,
    Splits,
    describe_sizes,
    make_splits,
    num_sharing_patients,
    split_hash,
)
from cxr_vit.errors import DataError

NIH_NAMES = ("train_val_list.txt", "test_list.txt")

# Of ten films with the default seed; a change here moves films between everybody's splits.
GOLDEN_PATIENT = [[0, 1, 2, 5, 6, 8], [3, 9], [4, 7]]
# printf '[train]\n00000001_000.png\n00000003_002.png[val]\n...' | sha256sum
GOLDEN_HASH = "a09c5af8e21c617f7f94f6aafb0ab3c56b9b8cb8adf21ca5b07fb3d3cd105b62"


def records_of(patients: Sequence[int]) -> Records:
    names = [f"{patient:08d}_{row:03d}.png" for row, patient in enumerate(patients)]
    table = pd.DataFrame({"image": names, "patient": np.asarray(patients, dtype=np.int64)})
    return Records(table, np.zeros((len(names), 14), dtype=np.uint8))


def cohort(num_patients: int = 200) -> Records:
    """Patients with 1 to 12 films each, most with one or two, in the order of their numbers."""
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
    for name, films in zip(names, (train_val, test)):
        (root / name).write_text("".join(f"{film}\n" for film in films), encoding="utf-8")


def write_official(root: Path, records: Records, first_test_patient: int = 151) -> None:
    """Put the patients from this number on into the test list."""
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


# Official


def test_official_tests_on_the_test_list_and_nothing_else(tmp_path: Path) -> None:
    records = cohort()
    write_official(tmp_path, records)
    splits = split(records, tmp_path, split="official")
    expected = np.flatnonzero(records.table["patient"] >= 151)
    np.testing.assert_array_equal(splits.test, expected)
    assert splits.kind == "official"


def test_official_takes_validation_out_of_the_training_list(tmp_path: Path) -> None:
    records = cohort()
    write_official(tmp_path, records)
    splits = split(records, tmp_path, split="official")
    together = np.sort(np.concatenate([splits.train, splits.val]))
    np.testing.assert_array_equal(together, np.flatnonzero(records.table["patient"] < 151))
    assert len(splits.train) and len(splits.val)


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
def test_official_validation_is_about_its_fraction_of_the_training_list(
    tmp_path: Path, fraction: float
) -> None:
    records = cohort()
    write_official(tmp_path, records)
    splits = split(records, tmp_path, split="official", val_fraction=fraction)
    listed = len(splits.train) + len(splits.val)
    # The last patient drawn may overshoot by 11 films.
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


def test_official_leaves_unlisted_films_out_with_a_warning(
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
    assert "3 films are in neither official list" in caplog.text


def test_official_warns_of_nothing_when_every_film_is_listed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    records = cohort()
    write_official(tmp_path, records)
    split(records, tmp_path, split="official")
    assert caplog.records == []


def test_official_lists_may_name_films_that_are_not_there(tmp_path: Path) -> None:
    records = cohort()
    write_official(tmp_path, records)
    subset = records.take(np.arange(0, len(records), 2))
    splits = split(subset, tmp_path, split="official")
    assert sum(map(len, rows_in(splits))) == len(subset)


@pytest.mark.parametrize("names", [NIH_NAMES, ("train_val_list_NIH.txt", "test_list_NIH.txt")])
def test_official_knows_both_spellings_of_the_lists(tmp_path: Path, names: Sequence[str]) -> None:
    films = [1, 1, 2, 3, 4, 5]
    records = records_of(films)
    listed = records.table["image"].tolist()
    write_lists(tmp_path, listed[:4], listed[4:], names)
    assert split(records, tmp_path, split="official", val_fraction=0.3).test.tolist() == [4, 5]


@pytest.mark.parametrize("line_end", ["\r\n", "\n\n", " \n"])
def test_official_lists_may_have_other_line_ends(tmp_path: Path, line_end: str) -> None:
    records = cohort()
    write_official(tmp_path, records)
    plain = split(records, tmp_path, split="official")
    for name in NIH_NAMES:
        text = (tmp_path / name).read_text(encoding="utf-8").replace("\n", line_end)
        (tmp_path / name).write_bytes(text.encode())
    assert rows_in(split(records, tmp_path, split="official")) == rows_in(plain)


@pytest.mark.parametrize("present", [[], ["train_val_list.txt"], ["test_list.txt"]])
def test_official_without_both_lists_is_refused(tmp_path: Path, present: Sequence[str]) -> None:
    for name in present:
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=r"train_val_list\.txt and test_list\.txt") as caught:
        split(cohort(), tmp_path, split="official")
    assert str(tmp_path) in str(caught.value) and "data.split=patient" in str(caught.value)


def test_a_list_that_is_no_utf_8_text_is_refused_by_name(tmp_path: Path) -> None:
    records = cohort()
    write_official(tmp_path, records)
    (tmp_path / "test_list.txt").write_bytes("00000001_000.png\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"test_list\.txt"):
        split(records, tmp_path, split="official")


def test_a_list_with_a_patient_on_both_sides_is_refused(tmp_path: Path) -> None:
    records = records_of([1, 1, 2, 3, 4, 4, 4])
    names = records.table["image"].tolist()
    write_lists(tmp_path, names[:5], names[5:])
    with pytest.raises(DataError, match="2 of 2 test films share a patient with") as caught:
        split(records, tmp_path, split="official", val_fraction=0.2)
    assert "Mend the list files" in str(caught.value)


def test_a_film_in_both_lists_is_refused(tmp_path: Path) -> None:
    records = records_of([1, 2, 3, 4, 5])
    names = records.table["image"].tolist()
    write_lists(tmp_path, names[:4], names[3:])
    with pytest.raises(DataError, match="1 of 2 test films share a patient with"):
        split(records, tmp_path, split="official", val_fraction=0.3)


def test_lists_that_name_none_of_the_films_are_refused(tmp_path: Path) -> None:
    write_lists(tmp_path, ["a.png"], ["b.png"])
    with pytest.raises(DataError, match="leaves none for train"):
        split(cohort(), tmp_path, split="official")


# By patient


def test_patient_split_covers_every_film_once(tmp_path: Path) -> None:
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
def test_patient_split_has_about_its_fractions_of_all_films(
    tmp_path: Path, val: float, test: float
) -> None:
    records = cohort(1000)
    splits = split(records, tmp_path, split="patient", val_fraction=val, test_fraction=test)
    assert len(splits.val) / len(records) == pytest.approx(val, abs=0.005)
    assert len(splits.test) / len(records) == pytest.approx(test, abs=0.005)


def test_patient_split_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    one, two = (split(cohort(), tmp_path, split="patient", split_seed=4) for _ in range(2))
    assert rows_in(one) == rows_in(two)


def test_patient_split_is_another_for_another_seed(tmp_path: Path) -> None:
    one, two = (split(cohort(), tmp_path, split="patient", split_seed=seed) for seed in (4, 5))
    assert one.val.tolist() != two.val.tolist()
    assert one.test.tolist() != two.test.tolist()


def test_patient_split_is_golden_for_a_fixed_seed(tmp_path: Path) -> None:
    records = records_of([1, 1, 2, 3, 4, 5, 5, 6, 7, 8])
    splits = split(records, tmp_path, split="patient", val_fraction=0.2, test_fraction=0.2)
    assert rows_in(splits) == GOLDEN_PATIENT


def test_patient_split_draws_patients_and_not_runs_of_numbers(tmp_path: Path) -> None:
    records = cohort(1000)
    drawn = patients_in(records, split(records, tmp_path, split="patient"))["test"]
    assert min(drawn) < 50 and max(drawn) > 950


# At random


def test_random_split_has_exact_sizes(tmp_path: Path) -> None:
    records = records_of(range(1000))
    splits = split(records, tmp_path, split="random", val_fraction=0.123, test_fraction=0.2)
    assert [len(rows) for rows in rows_in(splits)] == [677, 123, 200]
    np.testing.assert_array_equal(np.sort(np.concatenate(rows_in(splits))), np.arange(1000))
    assert splits.kind == "random"


def test_random_split_may_go_without_a_test_part(tmp_path: Path) -> None:
    splits = split(records_of(range(100)), tmp_path, split="random", test_fraction=0)
    assert [len(rows) for rows in rows_in(splits)] == [95, 5, 0]


def test_random_split_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    one, two = (split(cohort(), tmp_path, split="random", split_seed=4) for _ in range(2))
    assert rows_in(one) == rows_in(two)


def test_random_split_is_another_for_another_seed(tmp_path: Path) -> None:
    one, two = (split(cohort(), tmp_path, split="random", split_seed=seed) for seed in (4, 5))
    assert one.val.tolist() != two.val.tolist()


def test_random_split_draws_films_and_not_patients(tmp_path: Path) -> None:
    records = cohort()
    patients = patients_in(records, split(records, tmp_path, split="random", val_fraction=0.3))
    assert patients["val"] & patients["train"]


def test_random_split_warns_with_the_true_number_of_films_sharing_a_patient(
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
    expected = f"{sharing} of {len(splits.val)} val films share a patient with train"
    assert expected in record.getMessage()


def test_random_split_warns_of_the_test_films_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    split(records_of([1] * 20), tmp_path, split="random", test_fraction=0.2)
    for shared in ("1 of 1 val .* with train", "4 of 4 test .* with train", "4 of 4 test .* val"):
        assert re.search(shared, caplog.text)


def test_random_split_of_single_films_shares_nothing_and_says_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    split(records_of(range(50)), tmp_path, split="random")
    assert caplog.records == []


# Any kind


def test_auto_is_official_where_the_lists_are(tmp_path: Path) -> None:
    records = cohort()
    write_official(tmp_path, records)
    splits = split(records, tmp_path, split="auto")
    assert splits.kind == "official"
    assert rows_in(splits) == rows_in(split(records, tmp_path, split="official"))


@pytest.mark.parametrize("present", [[], ["train_val_list.txt"]])
def test_auto_is_by_patient_where_they_are_not(tmp_path: Path, present: Sequence[str]) -> None:
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
    with pytest.raises(DataError, match="the patient split of 9 films leaves none"):
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
def test_the_order_of_the_csv_does_not_move_a_film(tmp_path: Path, kind: str) -> None:
    records = cohort()
    write_official(tmp_path, records)
    other = reversed_rows(records)
    one, two = (split(table, tmp_path, split=kind) for table in (records, other))
    assert names_in(records, one) == names_in(other, two)


def test_describe_sizes_names_all_three() -> None:
    splits = Splits(np.arange(5), np.arange(2), np.arange(0), "patient")
    assert describe_sizes(splits) == "train 5, val 2, test 0"


def test_sharing_counts_films_and_not_patients() -> None:
    records = records_of([1, 1, 1, 2, 3])
    assert num_sharing_patients(records, np.array([0, 1, 4]), np.array([2, 3])) == 2


# Identity


def test_the_hash_of_a_split_is_golden() -> None:
    splits = Splits(np.array([0, 2]), np.array([1]), np.array([3]), "patient")
    assert split_hash(records_of([1, 2, 3, 4]), splits) == GOLDEN_HASH


def test_the_hash_changes_when_a_film_moves() -> None:
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


def test_the_hash_changes_when_a_film_is_another() -> None:
    splits = Splits(np.array([0]), np.array([1]), np.array([2]), "patient")
    assert split_hash(records_of([1, 2, 3]), splits) != split_hash(records_of([1, 2, 4]), splits)


def test_the_hash_stays_when_nothing_moves() -> None:
    records = records_of([1, 2, 3])
    one = Splits(np.array([0]), np.array([1]), np.array([2]), "patient")
    two = Splits(np.array([0]), np.array([1]), np.array([2]), "official")
    assert split_hash(records, one) == split_hash(records, two)


def test_the_hash_stays_when_only_labels_change() -> None:
    records = records_of([1, 2, 3])
    relabelled = Records(records.table.assign(findings="Hernia"), records.labels + 1)
    splits = Splits(np.array([0]), np.array([1]), np.array([2]), "patient")
    assert split_hash(records, splits) == split_hash(relabelled, splits)
