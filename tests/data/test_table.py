"""read_table_records: files, joins, columns, labels, splits and repeated images of a table."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path
from typing import Any, List, Sequence, Tuple

import numpy as np
import pytest

from cxr_vit.config.data_sections import DataSection
from cxr_vit.data.label_names import label_names
from cxr_vit.data.records import Records
from cxr_vit.data.table import read_table_records
from cxr_vit.data.text_files import check_data_root
from cxr_vit.errors import DataError

HEADER = "path,who,part,sex,years,view,Mass,Nodule"
ROWS = (
    "a/1.png,P01,train,Male,58.0,PA,1,0",
    "a/2.png,P01,train,Male,060Y,AP,0.0,1.0",
    "b/3,1,Validation,female,,LATERAL,-1,",
    " C:\\x\\4.dcm ,00001,TEST,unknown,500,,yes,NO",
)
COLUMNS = {"image": "path", "patient": "who"}
EVERY = {**COLUMNS, "split": "part", "sex": "sex", "age": "years", "view": "view"}


def write(path: Path, rows: Sequence[str] = ROWS, header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *rows, ""]), encoding="utf-8")
    return path


def section(root: Path, **changes: Any) -> DataSection:
    values: Any = {"csv": "t.csv", "columns": COLUMNS, "labels": ["Mass", "Nodule"], **changes}
    return DataSection(root=str(root), format="table", **values)


def read(root: Path, rows: Sequence[str] = ROWS, header: str = HEADER, **changes: Any) -> Records:
    write(root / "t.csv", rows, header)
    return read_table_records(section(root, **changes))[1]


def refused(root: Path, *args: Any, **changes: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(root, *args, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_column_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    records = read(tmp_path, columns=EVERY)
    table = records.table
    assert list(table.columns) == ["image", "patient", "sex", "age", "view", "source"]
    assert table["image"].tolist() == ["a/1.png", "a/2.png", "b/3", "C:\\x\\4.dcm"]
    assert table["patient"].tolist() == ["P01", "P01", "1", "00001"]
    assert table["sex"].tolist() == ["M", "M", "F", "unknown"]
    assert table["age"].tolist()[:2] == [58, 60] and table["age"].isna().tolist()[2:] == [True] * 2
    assert table["view"].tolist() == ["PA", "AP", "LATERAL", ""]
    assert records.given_split is not None
    assert records.given_split.tolist() == ["train", "train", "val", "test"]
    assert records.labels.dtype == np.int8
    assert records.labels.tolist() == [[1, 0], [0, 1], [-1, -1], [1, 0]]
    assert records.variant == "table"
    assert len(records.boxes) == 0 and np.isnan(records.relabels).all()
    assert "1 ages over 120 years" in caplog.text


def test_columns_that_are_not_named_are_empty(tmp_path: Path) -> None:
    records = read(tmp_path)
    assert records.given_split is None
    for name in ("sex", "view", "source"):
        assert records.table[name].tolist() == [""] * 4
    assert all(map(math.isnan, records.table["age"]))
    taken = records.take(np.array([3, 0]))
    assert taken.table["patient"].tolist() == ["00001", "P01"]
    assert taken.labels.tolist() == [[1, 0], [1, 0]]


def test_several_files_have_one_column_of_sources(tmp_path: Path) -> None:
    header = "path,who,site,Mass,Nodule"
    write(tmp_path / "v.csv", ["south/3.png,c,S,0,1"], header)
    csv, rows = {"train": "t.csv", "val": "v.csv"}, ["north/1.png,a,N,1,0", "2.png,b,,0,0"]
    records = read(tmp_path, rows, header, csv=csv, columns={**COLUMNS, "source": "site"})
    assert records.table["source"].tolist() == ["N", "", "S"]
    folder = {"column": "path", "pattern": "^([^/]+)/"}
    assert "no match of data.columns.source.pattern" in refused(
        tmp_path, rows, header, csv=csv, columns={**COLUMNS, "source": folder}
    )
    records = read(tmp_path, rows[:1], header, csv=csv, columns={**COLUMNS, "source": folder})
    assert records.table["source"].tolist() == ["north", "south"]


def test_a_missing_column_is_named_with_near_ones_and_the_header(tmp_path: Path) -> None:
    message = refused(tmp_path, columns={**COLUMNS, "patient": "whom"}, labels=["Mass", "Nodul"])
    assert message.startswith(f"{tmp_path}/t.csv: no column 'whom', 'Nodul'. Did you mean 'who'?")
    assert "It has the columns path, who, part, sex," in message


@pytest.mark.parametrize(
    "image",
    *[["", " ", "..", "../a.png", "a/../../b.png", "a\\..\\b.png", "a/", "a/.", ".", "a\x01.png"]],
)
def test_what_is_no_image_of_the_folder_is_refused(tmp_path: Path, image: str) -> None:
    message = refused(tmp_path, [ROWS[0], f"{image},P,train,M,1,PA,0,0"])
    assert "no name of an image in 1 of 2 rows, first in row 2" in message


@pytest.mark.parametrize("image", ["a..b.png", "/data/x/1.png", "..a", "é ü.png", "./a.png", "5"])
def test_names_and_paths_stay_as_they_are(tmp_path: Path, image: str) -> None:
    assert read(tmp_path, [f"{image},P,train,M,1,PA,0,0"]).table["image"].tolist() == [image]


def test_an_image_without_patient_is_refused(tmp_path: Path) -> None:
    message = refused(tmp_path, [*ROWS, "5.png, ,train,M,1,PA,0,0"])
    assert "no patient in 1 of 5 rows, first in row 5: '5.png'" in message


def test_a_pattern_takes_its_group_or_its_match(tmp_path: Path) -> None:
    rows = ["x/patient01/a.png,1,t,M,1,PA,0,0", "x/patient02/b.png,2,t,F,1,,0,1"]
    for pattern, found in (("patient\\d+", "patient01"), ("patient(\\d+)", "01")):
        columns = {"image": "path", "patient": {"column": "path", "pattern": pattern}}
        assert read(tmp_path, rows, columns=columns).table["patient"][0] == found
    columns = {**COLUMNS, "view": {"column": "view", "pattern": "^P(.)"}}
    assert read(tmp_path, rows, columns=columns).table["view"].tolist() == ["A", ""]


def test_a_pattern_without_match_is_counted(tmp_path: Path) -> None:
    columns = {**COLUMNS, "patient": {"column": "path", "pattern": "patient(\\d+)"}}
    rows = ["patient1.png,1,t,M,1,PA,0,0", "nobody.png,1,t,M,1,PA,0,0"]
    message = refused(tmp_path, rows, columns=columns)
    assert "no match of data.columns.patient.pattern=patient(\\d+) in the column 'path'" in message
    assert "in 1 of 2 rows, first in row 2: 'nobody.png'" in message


# Labels in a column each


def test_a_text_that_is_too_long_for_a_pattern_is_refused(tmp_path: Path) -> None:
    columns = {**COLUMNS, "patient": {"column": "path", "pattern": r"\w+\d+"}}
    message = refused(tmp_path, [*ROWS, f"{'a' * 500},P,,,,,1,0"], columns=columns)
    assert "a text too long to search for data.columns.patient.pattern" in message
    assert "in 1 of 5 rows, first in row 5" in message and "at most 493 characters" in message


def labels_of(root: Path, *values: str, **changes: Any) -> List[int]:
    rows = [f"{row}.png,P{row},,,,,{value},0" for row, value in enumerate(values)]
    return read(root, rows, **changes).labels[:, 0].tolist()


@pytest.mark.parametrize("meaning", ["negative", "positive", "unknown"])
def test_values_of_a_label(tmp_path: Path, meaning: Any) -> None:
    number = {"negative": 0, "positive": 1, "unknown": -1}[meaning]
    words = {
        1: ["1", "1.0", "1.", "+1.00", "yes", "TRUE", "Positive", "y", "T"],
        0: ["0", "0.0", "-0.0", "no", "False", "NEGATIVE", "n", "f"],
    }
    for value, texts in words.items():
        assert labels_of(tmp_path, *texts) == [value] * len(texts)
    uncertain, blank = ["-1", "-1.0", "U", "uncertain"], ["", " ", "NaN", "na", "NULL", "None"]
    assert labels_of(tmp_path, *uncertain, uncertain=meaning, blank="negative") == [number] * 4
    assert labels_of(tmp_path, *blank, blank=meaning, uncertain="negative") == [number] * 6


@pytest.mark.parametrize("value", ["0.5", "maybe", "2", "10", "1.01", "-2", "inf", "-", "1 0"])
def test_another_value_of_a_label_is_refused(tmp_path: Path, value: str) -> None:
    message = refused(tmp_path, [ROWS[0], f"5.png,P,,,,,1,{value}", f"6.png,P,,,,,1,{value}"])
    assert "not a value of the label 'Nodule' in 2 of 3 rows, first in row 2" in message
    assert repr(value) in message and "Write 1, yes, true, positive, y, t for positive" in message


def test_labels_of_one_value_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    header = f"{HEADER},a,b,c"
    rows = ["1,P,,,,,1,0,1,,0", "2,P,,,,,0,1,1,,", "3,P,,,,,0,1,,,0"]
    read(tmp_path, rows, header, labels=["Mass", "a", "b", "c"])
    assert [record.getMessage().split(": ", 1) for record in caplog.records] == [
        ["a label that is unknown in all images can be neither learned nor scored", "b"],
        ["a label that is 0 wherever it is known can be neither learned nor scored", "c"],
        ["a label that is 1 wherever it is known can be neither learned nor scored", "a"],
    ]


def test_a_pattern_names_the_columns_of_labels(tmp_path: Path) -> None:
    header = HEADER.replace("Mass", "is_[Mass]").replace("Nodule", "is_Nodule").replace("sex", "i")
    records = read(tmp_path, header=header, labels="is_*")
    names = label_names(section(tmp_path, labels="is_*"))
    assert names == ["is_[Mass]", "is_Nodule"] and records.labels.shape == (4, 2)
    for labels, found in (
        ("i?_N*", ["is_Nodule"]),
        ("part", ["part"]),
        ("w*", None),
        ("IS*", None),
    ):
        if found:
            assert label_names(section(tmp_path, labels=labels)) == found
        else:
            with pytest.raises(DataError, match=r"t\.csv: no column .* It has the columns part, i"):
                label_names(section(tmp_path, labels=labels))


def test_a_pattern_of_many_stars_is_matched_at_once(tmp_path: Path) -> None:
    header = f"{HEADER},{'a' * 3000},{'a' * 90}b"
    rows = [f"{row},1,0" for row in ROWS]
    read(tmp_path, rows, header, labels="M*")
    assert label_names(section(tmp_path, labels="*a*a*a*a*a*a*a*a*b")) == ["a" * 90 + "b"]
    for labels in ("M*a?s", "?ass*", "M*s*s", "Mas*"):
        assert label_names(section(tmp_path, labels=labels)) == ["Mass"]
    for labels in ("Mass*Mass", "M*ass*s", "Mas*ss", "Mass?"):
        with pytest.raises(DataError, match="no column"):
            label_names(section(tmp_path, labels=labels))


@pytest.mark.parametrize("name", ["Mass\x1b[31m", "patient", "Mass_probability"])
def test_a_pattern_refuses_columns_that_cannot_be_labels(tmp_path: Path, name: str) -> None:
    message = refused(tmp_path, [f"{row},1" for row in ROWS], f"{HEADER},{name}", labels="*a*")
    assert "control characters" in message or "another column of predictions.csv" in message


def test_a_pattern_refuses_names_that_differ_in_case_only(tmp_path: Path) -> None:
    header = f"{HEADER},mass"
    message = refused(tmp_path, [f"{ROWS[0]},1"], header, labels="*ass")
    assert "the labels 'Mass' and 'mass' differ in case at most" in message


def test_no_finding_together_with_another_label_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = ["1,P,,,,,1,0", "2,P,,,,,1,1", "3,P,,,,,0,1", "4,P,,,,,1,1", "5,P,,,,,-1,1"]
    read(tmp_path, rows, HEADER.replace("Nodule", "No Finding"), labels=["No Finding", "Mass"])
    text = "2 of 5 rows have No Finding together with another label, first row 2"
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path}/t.csv: {text}"]
    caplog.clear()
    for labels in (["Mass", "Nodule"], ["Mass", "Nodule", "no_finding"]):
        listed(
            tmp_path,
            "Nodule",
            "Mass|No Finding",
            "No Finding",
            "no finding|Mass",
            "",
            labels=labels,
        )
        assert [record.getMessage() for record in caplog.records] == [f"{tmp_path}/t.csv: {text}"]
        caplog.clear()


def test_ages_that_are_not_understood_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [f"{row}.png,P,,,{age},,{row % 2},0" for row, age in enumerate(("58", "", "5o", "old"))]
    read(tmp_path, [*rows, "9.png,P,,,500,,1,1"], columns={**COLUMNS, "age": "years"})
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/t.csv: 2 ages are not understood and count as unknown, e.g. '5o'",
        "1 ages over 120 years count as unknown",
    ]


# Labels in one column


def listed(root: Path, *fields: str, labels: Any = ("Mass", "Nodule"), **changes: Any) -> Any:
    rows = [f"{row}.png,P{row},{field}" for row, field in enumerate(fields)]
    columns = {**COLUMNS, "labels": "found"}
    labels = labels if isinstance(labels, str) else list(labels)
    records = read(root, rows, "path,who,found", columns=columns, labels=labels, **changes)
    return records.labels.tolist()


def test_one_column_of_all_labels(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fields = ["Mass", " Nodule | Mass ", "No_Finding", "", "Edema|Mass||Mass", "Nodules|Edema"]
    assert listed(tmp_path, *fields) == [[1, 0], [1, 1], [0, 0], [-1, -1], [1, 0], [0, 0]]
    (message,) = [record.getMessage() for record in caplog.records]
    assert (
        "2 other findings, which count as none of the labels: 'Edema' (2), 'Nodules' (1" in message
    )
    assert "did you mean 'Nodule'?" in message


def test_an_empty_field_is_blank_and_the_separator_is_given(tmp_path: Path) -> None:
    found = listed(tmp_path, "Mass;Nodule", "", blank="negative", label_separator=";")
    assert found == [[1, 1], [0, 0]]


def test_words_for_nothing_are_blank(tmp_path: Path) -> None:
    fields = ["Mass", "|", "nan", "None", "NA", "null", " | ", "none|Mass"]
    blank = [[-1, -1]] * 6
    assert listed(tmp_path, *fields) == [[1, 0], *blank, [1, 0]]
    assert listed(tmp_path, "Mass", "none", labels=["Mass", "none"]) == [[1, 0], [0, 1]]


def test_no_finding_may_be_a_label_in_any_spelling(tmp_path: Path) -> None:
    found = listed(tmp_path, "Mass", "No Finding", labels=["Mass", "no_finding"])
    assert found == [[1, 0], [0, 1]]


def test_a_label_in_another_case_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"2 rows have the label 'mass', which .* spells 'Mass'"):
        listed(tmp_path, "mass", "Nodule", "mass|Nodule")


def test_labels_that_are_not_listed_are_shown_with_counts(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"must be a list.* It holds 'Mass' \(3\), 'Nodule' \(1\)\.$"
    ):
        listed(tmp_path, "Mass", "Nodule|Mass|Mass", "", "Mass", labels="*")


# Splits


def test_words_of_a_split(tmp_path: Path) -> None:
    words = {
        "train": ["train", "Training"],
        "val": ["val", "VALID", "validate", "validation", "dev", "tune"],
        "test": ["test", "testing"],
        "": [""],
    }
    pairs = [(word, split) for split, texts in words.items() for word in texts]
    rows = [f"{row},P,{word},M,1,PA,1,0" for row, (word, _) in enumerate(pairs)]
    given = read(tmp_path, rows, columns={**COLUMNS, "split": "part"}).given_split
    assert given is not None and given.tolist() == [split for _, split in pairs]


def test_other_words_are_refused_with_those_found(tmp_path: Path) -> None:
    rows = [f"{row},P,{word},M,1,PA,1,0" for row, word in enumerate(["train", "fold1", "fold1"])]
    message = refused(tmp_path, rows, columns={**COLUMNS, "split": "part"})
    assert "data.columns.split holds 'fold1' (2), 'train' (1)." in message
    assert "Known words: dev, test, testing," in message


def test_a_file_per_split(tmp_path: Path) -> None:
    write(tmp_path / "val.csv", [ROWS[2]])
    write(tmp_path / "test.csv", [ROWS[3]], HEADER.replace("part,", "").replace("view", "angle"))
    (tmp_path / "test.csv").write_text("who,path,Nodule,Mass\nQ,9.png,0,1\n")
    csv = {"train": "t.csv", "val": "val.csv", "test": "test.csv"}
    records = read(tmp_path, ROWS[:2], csv=csv)
    assert records.given_split is not None
    assert records.given_split.tolist() == ["train", "train", "val", "test"]
    assert records.table["image"].tolist() == ["a/1.png", "a/2.png", "b/3", "9.png"]
    assert records.labels.tolist() == [[1, 0], [0, 1], [-1, -1], [1, 0]]
    files, _ = read_table_records(section(tmp_path, csv=csv))
    assert files == [tmp_path / name for name in csv.values()]
    assert "test.csv: no column 'view'" in refused(
        tmp_path, ROWS[:2], csv=csv, columns={**COLUMNS, "view": "view"}
    )


# Files


def test_a_file_is_found_in_the_current_folder_or_in_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, here = tmp_path / "root", tmp_path / "here"
    for folder in (root, here):
        folder.mkdir()
    monkeypatch.chdir(here)
    data = section(root)
    with pytest.raises(DataError, match="no such file") as caught:
        check_data_root(data)
    assert f"data.csv=t.csv: no such file. Looked for {here}/t.csv and {root}/t.csv." in str(
        caught.value
    )
    in_root, in_here = write(root / "t.csv"), write(here / "t.csv", ROWS[:1])
    for changes in ({}, {"csv": "a.csv", "join": ["t.csv"]}):
        write(root / "a.csv")
        with pytest.raises(DataError, match=rf"{here}/t\.csv and {root}/t\.csv are two files"):
            check_data_root(section(root, **changes))
    in_root.unlink()
    in_root.symlink_to(in_here)
    assert read_table_records(data)[0] == [Path("t.csv")]
    in_root.unlink()
    in_here.rename(in_root)
    check_data_root(data)
    assert read_table_records(data)[0] == [in_root]
    os.rename(in_root, here / "other.csv")
    assert read_table_records(section(root, csv=str(here / "other.csv")))[0] == [here / "other.csv"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"csv": {"train": "t.csv", "val": "absent.csv"}}, r"data\.csv\.val=absent\.csv: no such"),
        ({"join": ["t.csv", "absent.gz"]}, r"data\.join=absent\.gz: no such file"),
        ({"test_list": "absent.txt"}, r"data\.test_list=absent\.txt: no such file"),
    ],
)
def test_a_missing_file_is_named_before_anything_is_read(
    tmp_path: Path, changes: Any, message: str
) -> None:
    (tmp_path / "t.csv").touch()
    with pytest.raises(DataError, match=message):
        check_data_root(section(tmp_path, **changes))
    with pytest.raises(DataError, match=r"data\.root=.*absent is not a folder"):
        check_data_root(section(tmp_path / "absent"))


def joined(root: Path, *others: str, **changes: Any) -> Records:
    names = [f"{number}.csv" for number in range(len(others))]
    for name, text in zip(names, others):
        (root / name).write_text(text)
    rows = ["a.png,P1,s1,1", "b.png,P1,s2,0", "c.png,P2,s1,1"]
    return read(root, rows, "path,who,study,Mass", join=names, **changes)


STUDIES = "study,who,Nodule\ns1,P2,0\ns1,P1,1\ns2,P1,0\ns9,P9,1\n"


def test_tables_are_joined_on_the_columns_they_share(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    seen = "view;path\nPA;b.png\nAP;a.png\n"
    records = joined(tmp_path, STUDIES, seen, columns={**COLUMNS, "view": "view"})
    assert records.table["image"].tolist() == ["a.png", "b.png", "c.png"]
    assert records.labels.tolist() == [[1, 1], [0, 0], [1, 0]]
    assert records.table["view"].tolist() == ["AP", "PA", ""]
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.endswith(
        f"no partner for 1 of 3 rows of {tmp_path}/t.csv; their cells are empty"
    )


def test_a_row_without_a_partner_has_none_in_the_next_table(tmp_path: Path) -> None:
    seen = "path,report\na.png,r1\nb.png,r2\n"
    records = joined(tmp_path, seen, "report,Nodule\nr1,1\n,0\n")
    assert records.labels.tolist() == [[1, 1], [0, -1], [1, -1]]
    with pytest.raises(DataError, match=r"a partner for none of the 3 .* Row 1 has '' there and"):
        joined(tmp_path, "path,report\nb.png,r2\n", "report,Nodule\nr9,1\n")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (STUDIES + "s2,P1,0\n", r"0\.csv: a repeated study with who in 1 of 5 rows.*'s2, P1'"),
        ("id,Nodule\n1,0\n", r"shares no column with .*t\.csv has path, who, study, Mass; 0\.csv"),
        ("path,Nodule\nx/a.png,1\n", r"a partner for none of the 3 rows .*'a\.png' there and 'x/a"),
    ],
)
def test_tables_that_cannot_be_joined_are_refused(tmp_path: Path, other: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        joined(tmp_path, other)


# Repeated images


READERS: Tuple[Tuple[str, List[str]], ...] = (
    ("a", ["1,0", "0,0", "0,1"]),
    ("b", ["1,-1", "1,-1", "0,0"]),
    ("c", ["1,-1", "0,-1"]),
    ("d", ["0,1"]),
)


def votes(*, middle: str = "P,train,M,50,PA") -> List[str]:
    rows = [f"{image},{middle},{labels}" for image, votes in READERS for labels in votes]
    return rows[::2] + rows[1::2]


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("any", {"a": [1, 1], "b": [1, 0], "c": [1, -1], "d": [0, 1]}),
        ("majority", {"a": [0, 0], "b": [1, 0], "c": [-1, -1], "d": [0, 1]}),
    ],
)
def test_several_readers_of_an_image_vote(tmp_path: Path, policy: Any, expected: Any) -> None:
    records = read(tmp_path, votes(), columns=EVERY, repeated_images=policy)
    assert dict(zip(records.table["image"], records.labels.tolist())) == expected
    assert records.given_split is not None and records.given_split.tolist() == ["train"] * 4
    assert records.table["age"].tolist() == [50] * 4
    for meaning, label in (("positive", 1), ("negative", 0)):
        changes = {"repeated_images": policy, "uncertain": meaning}
        tie = read(tmp_path, ["c,P,,,,,1,0", "c,P,,,,,0,"], **changes).labels.tolist()
        assert tie == [[1 if policy == "any" else label, 0]]


def test_repeated_images_are_refused_by_default(tmp_path: Path) -> None:
    message = refused(tmp_path, votes())
    assert "a repeated image in 5 of 9 rows" in message and "data.repeated_images" in message


def test_rows_of_several_files_are_named_as_in_their_file(tmp_path: Path) -> None:
    write(tmp_path / "v.csv", ["e,P2,,M,1,,0,1", "c,P3,,M,1,,0,1", "e,P2,,M,1,,0,1"])
    rows = [f"{image},P{image},,M,1,,1,0" for image in "abc"]
    csv = {"train": "t.csv", "val": "v.csv"}
    assert refused(tmp_path, rows, csv=csv).startswith(
        f"{tmp_path}/v.csv: a repeated image (row 3 of {tmp_path}/t.csv) in 2 of 3 rows, first in"
        " row 2: 'c'."
    )
    assert refused(tmp_path, rows, csv=csv, repeated_images="any").startswith(
        f"{tmp_path}/v.csv: another patient than in the image's first row (row 3 of"
        f" {tmp_path}/t.csv) in 1 of 3 rows, first in row 2: 'c'."
    )


@pytest.mark.parametrize(
    ("middle", "key"),
    [
        ("Q,train,M,50,PA", "patient"),
        ("P,val,M,50,PA", "split"),
        ("P,train,F,50,PA", "sex"),
        ("P,train,M,,PA", "age"),
        ("P,train,M,50,AP", "view"),
    ],
)
def test_rows_of_an_image_must_agree(tmp_path: Path, middle: str, key: str) -> None:
    rows = [*votes(), f"d,{middle},0,1"]
    message = refused(tmp_path, rows, columns=EVERY, repeated_images="any")
    assert (
        f"another {key} than in the image's first row in 1 of 10 rows, first in row 10" in message
    )


def test_rows_of_an_image_have_one_source(tmp_path: Path) -> None:
    rows, columns = ["a,P,north,1,0", "a,P,south,0,0"], {**COLUMNS, "source": "site"}
    message = refused(
        tmp_path, rows, "path,who,site,Mass,Nodule", columns=columns, repeated_images="any"
    )
    assert "another source than in the image's first row in 1 of 2 rows" in message


def test_unknown_ages_agree(tmp_path: Path) -> None:
    rows = votes(middle="P,train,M,,PA")
    assert len(read(tmp_path, rows, columns=EVERY, repeated_images="any")) == 4


def test_other_log_lines_are_information(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    read(tmp_path, votes(), repeated_images="any")
    assert "9 rows of 4 images; a label is positive by data.repeated_images=any" in caplog.text


def test_another_separator_of_labels_is_named(tmp_path: Path) -> None:
    rows, columns = ("1.png,a,Mass;Nodule", "2.png,b,Mass"), {**COLUMNS, "labels": "all"}
    message = refused(tmp_path, rows, "path,who,all", columns=columns)
    assert "1 rows have 'Mass;Nodule'" in message and "label_separator=';'" in message
