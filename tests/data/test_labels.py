"""multi_hot: findings as text -> columns in one fixed order."""

from __future__ import annotations

import numpy as np
import pytest

from cxr_vit.data.labels import FINDINGS, multi_hot, nih_names
from cxr_vit.errors import DataError


def test_findings_are_in_the_order_of_wang_2017() -> None:
    assert FINDINGS == (
        "Atelectasis",
        "Cardiomegaly",
        "Effusion",
        "Infiltration",
        "Mass",
        "Nodule",
        "Pneumonia",
        "Pneumothorax",
        "Consolidation",
        "Edema",
        "Emphysema",
        "Fibrosis",
        "Pleural_Thickening",
        "Hernia",
    )


def test_no_finding_is_not_a_class_by_default() -> None:
    assert nih_names() == list(FINDINGS)


def test_include_no_finding_appends_a_fifteenth_class() -> None:
    assert nih_names(include_no_finding=True) == [*FINDINGS, "No Finding"]


@pytest.mark.parametrize("column", range(14))
def test_a_single_finding_sets_its_own_column_only(column: int) -> None:
    expected = np.zeros((1, 14), dtype=np.int8)
    expected[0, column] = 1
    np.testing.assert_array_equal(multi_hot([FINDINGS[column]]), expected)


def test_several_findings_set_several_columns_in_any_order() -> None:
    labels = multi_hot(["Hernia|Atelectasis|Mass", "Mass|Hernia|Atelectasis"])
    assert np.flatnonzero(labels[0]).tolist() == [0, 4, 13]
    np.testing.assert_array_equal(labels[0], labels[1])


def test_no_finding_is_a_row_of_zeros_by_default() -> None:
    labels = multi_hot(["No Finding", "Edema"])
    assert labels.sum(axis=1).tolist() == [0, 1]


def test_include_no_finding_sets_only_the_fifteenth_column() -> None:
    labels = multi_hot(["No Finding", "Hernia"], include_no_finding=True)
    assert [np.flatnonzero(row).tolist() for row in labels] == [[14], [13]]


@pytest.mark.parametrize(("include", "columns"), [(False, 14), (True, 15)])
def test_labels_are_int8_with_one_row_per_text(include: bool, columns: int) -> None:
    labels = multi_hot(["Edema"] * 3, include_no_finding=include)
    assert labels.dtype == np.int8
    assert labels.shape == (3, columns)


def test_no_texts_give_an_empty_matrix_of_14_columns() -> None:
    assert multi_hot([]).shape == (0, 14)


def test_repeated_texts_each_get_their_labels() -> None:
    texts = ["Mass", "Edema", "Mass", "No Finding", "Edema", "Mass"]
    expected = [np.flatnonzero(multi_hot([text])[0]).tolist() for text in texts]
    assert [np.flatnonzero(row).tolist() for row in multi_hot(texts)] == expected


def test_an_unknown_finding_names_its_row_and_suggests_the_nearest() -> None:
    with pytest.raises(DataError, match=r"row 2 .*'Cardiomegally'.*Did you mean 'Cardiomegaly'\?"):
        multi_hot(["Edema", "Mass|Cardiomegally"])


def test_all_unknown_findings_are_counted_and_the_first_is_shown() -> None:
    with pytest.raises(DataError, match="row 2 has an unknown finding 'mass'") as caught:
        multi_hot(["Edema", "Hernia|mass", "Foo|Bar", "mass", "Hernia|mass", "No Finding"])
    assert "4 rows in all hold unknown findings, 3 different ones" in str(caught.value)


def test_an_unknown_finding_without_a_near_match_lists_the_known_ones() -> None:
    with pytest.raises(DataError, match=r"Known findings: Atelectasis, .*Hernia") as caught:
        multi_hot(["xyzzy"])
    assert "Did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("no finding", "No Finding"),
        ("Infiltrate", "Infiltration"),
        ("Pleural Thickening", "Pleural_Thickening"),
    ],
)
def test_spellings_in_use_elsewhere_are_suggested(text: str, meant: str) -> None:
    with pytest.raises(DataError, match=f"Did you mean '{meant}'"):
        multi_hot([text])


@pytest.mark.parametrize("text", ["", "Edema|", "edema", "Edema, Mass", " Edema"])
def test_a_text_that_is_almost_a_finding_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="unknown finding"):
        multi_hot([text])


@pytest.mark.parametrize("text", ["", "Edema|"])
def test_an_empty_finding_suggests_no_finding(text: str) -> None:
    with pytest.raises(DataError, match="Write 'No Finding' for an image without a finding"):
        multi_hot([text])


@pytest.mark.parametrize("text", ["No Finding|Edema", "Edema|No Finding"])
@pytest.mark.parametrize("include", [False, True])
def test_no_finding_with_a_finding_is_refused(text: str, include: bool) -> None:
    with pytest.raises(
        DataError, match=r"row 2 .*'No Finding' cannot be combined with a finding"
    ) as caught:
        multi_hot(["Mass", text, text], include_no_finding=include)
    assert "2 in all are like it" in str(caught.value)


def test_a_repeated_finding_counts_once_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    labels = multi_hot(["Edema", "Mass|Mass", "No Finding|No Finding", "Mass|Mass"])
    assert labels.sum(axis=1).tolist() == [1, 1, 0, 1]
    assert "3 rows repeat a finding, first: row 2" in caplog.text


def test_a_clean_column_logs_nothing(caplog: pytest.LogCaptureFixture) -> None:
    multi_hot(["Edema|Mass", "No Finding", "Mass|Edema"])
    assert caplog.records == []
