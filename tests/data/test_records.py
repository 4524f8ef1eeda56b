"""The NIH CSV in its known variants, and the ways in which it can be wrong."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Dict, Sequence

import numpy as np
import pytest

from cxr_vit.data.records import Records, find_csv, read_records
from cxr_vit.errors import DataError

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
V2020_ROWS = (
    "00000001_000.png,Cardiomegaly,0,1,57,M,PA,2682,2749,0.14300000000000002,0.14300000000000002",
    "00000001_001.png,Cardiomegaly|Emphysema,1,1,58,M,PA,2894,2729,0.143,0.143",
    "00000002_000.png,No Finding,0,2,80,F,AP,2500,2048,0.171,0.171",
)
OLD_ROWS = (
    "00000001_000.png,Cardiomegaly,000,00000001,058Y,M,PA,2682,2749,0.143,0.143",
    "00000001_001.png,Cardiomegaly|Emphysema,001,00000001,058Y,M,PA,2894,2729,0.143,0.143",
    "00005567_000.png,Effusion|Pneumonia,000,00005567,412Y,M,AP,3056,2544,0.139,0.139",
)
OLD_SAMPLE = (
    Path(__file__).resolve().parents[3] / "shared/data/nih/Data_Entry_2017_old_format_sample.csv"
)


def write_csv(folder: Path, rows: Sequence[str], header: str = HEADER) -> Path:
    csv = folder / "labels.csv"
    csv.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return csv


def images_of(csv: Path) -> Dict[str, str]:
    names = [line.split(",")[0] for line in csv.read_text(encoding="utf-8").splitlines()[1:]]
    return {name: f"films/{name}" for name in names}


def read(csv: Path) -> Records:
    return read_records(csv, images_of(csv), include_no_finding=False, on_missing="error")


def read_ages(folder: Path, ages: Sequence[str]) -> list:
    rows = [f"{row:08d}_000.png,Mass,0,{row},{age},M,PA,1,1,1,1" for row, age in enumerate(ages)]
    return read(write_csv(folder, rows)).table["age"].tolist()


def many_rows(count: int) -> list:
    return [f"{row:08d}_000.png,Edema,0,{row},50,F,AP,1,1,1,1" for row in range(count)]


def test_v2020_columns_stay_in_place_beside_the_unquoted_commas(tmp_path: Path) -> None:
    table = read(write_csv(tmp_path, V2020_ROWS)).table
    columns = ["image", "findings", "patient", "age", "sex", "view"]
    assert table[columns].to_numpy().tolist() == [
        ["00000001_000.png", "Cardiomegaly", 1, 57.0, "M", "PA"],
        ["00000001_001.png", "Cardiomegaly|Emphysema", 1, 58.0, "M", "PA"],
        ["00000002_000.png", "No Finding", 2, 80.0, "F", "AP"],
    ]


def test_each_row_gets_its_path_and_its_labels(tmp_path: Path) -> None:
    records = read(write_csv(tmp_path, V2020_ROWS))
    assert records.table["path"].tolist() == [
        "films/00000001_000.png",
        "films/00000001_001.png",
        "films/00000002_000.png",
    ]
    assert [np.flatnonzero(row).tolist() for row in records.labels] == [[1], [1, 10], []]


def test_no_finding_becomes_a_fifteenth_column_on_request(tmp_path: Path) -> None:
    csv = write_csv(tmp_path, V2020_ROWS)
    records = read_records(csv, images_of(csv), include_no_finding=True, on_missing="error")
    assert records.labels[:, 14].tolist() == [0, 0, 1]


def test_the_older_format_reads_ages_ids_and_its_trailing_comma(tmp_path: Path) -> None:
    table = read(write_csv(tmp_path, OLD_ROWS[:2], HEADER + ",")).table
    columns = ["image", "findings", "patient", "age", "sex", "view"]
    assert table[columns].to_numpy().tolist() == [
        ["00000001_000.png", "Cardiomegaly", 1, 58.0, "M", "PA"],
        ["00000001_001.png", "Cardiomegaly|Emphysema", 1, 58.0, "M", "PA"],
    ]


def test_patient_ids_are_whole_numbers_in_either_format(tmp_path: Path) -> None:
    old = read(write_csv(tmp_path, OLD_ROWS[:2], HEADER + ",")).table["patient"]
    new = read(write_csv(tmp_path, V2020_ROWS[:2])).table["patient"]
    assert old.dtype == new.dtype == np.int64
    assert old.tolist() == new.tolist()


@pytest.mark.skipif(not OLD_SAMPLE.is_file(), reason="the real 12-row sample is not at hand")
def test_the_real_sample_of_the_older_format_is_read(caplog: pytest.LogCaptureFixture) -> None:
    records = read(OLD_SAMPLE)
    ages = records.table["age"].tolist()
    assert records.table["patient"].tolist() == [1, 1, 1, 2, 3, 3, 13, 13, 150, 5567, 5567, 5573]
    assert ages[:9] == [58, 58, 58, 81, 81, 74, 61, 60, 55] and ages[10:] == [53, 8]
    assert math.isnan(ages[9]) and "1 ages over 120" in caplog.text
    assert records.labels.sum() == 17 and not records.labels[3].any()


def test_columns_are_found_by_name_and_not_by_place(tmp_path: Path) -> None:
    header = "Patient ID,View Position,Finding Labels,Image Index"
    csv = write_csv(tmp_path, ["7,AP,Hernia,00000007_000.png"], header)
    images = {"00000007_000.png": "x.png"}
    records = read_records(csv, images, include_no_finding=False, on_missing="error")
    assert records.table.loc[0, ["image", "patient", "view", "sex"]].tolist() == [
        "00000007_000.png",
        7,
        "AP",
        "",
    ]
    assert math.isnan(records.table["age"][0])
    assert np.flatnonzero(records.labels[0]).tolist() == [13]


def test_ages_in_months_and_days_become_years(tmp_path: Path) -> None:
    ages = read_ages(tmp_path, ["011M", "018M", "005D", "000Y", "009", "120"])
    assert ages == pytest.approx([11 / 12, 1.5, 5 / 365.25, 0, 9, 120])


def test_an_unreadable_age_is_unknown(tmp_path: Path) -> None:
    ages = read_ages(tmp_path, ["", "old", "44"])
    assert math.isnan(ages[0]) and math.isnan(ages[1]) and ages[2] == 44


def test_impossible_ages_become_unknown_and_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ages = read_ages(tmp_path, ["412Y", "57", "148", "121Y"])
    assert [math.isnan(age) for age in ages] == [True, False, True, True]
    assert "3 ages over 120 years" in caplog.text
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_possible_ages_log_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_ages(tmp_path, ["120Y", "1440M", "0"])
    assert caplog.records == []


@pytest.mark.parametrize("column", ["Image Index", "Finding Labels", "Patient ID"])
def test_a_missing_column_is_named_with_the_expected_ones(tmp_path: Path, column: str) -> None:
    csv = write_csv(tmp_path, V2020_ROWS, HEADER.replace(column, "Something"))
    with pytest.raises(DataError, match=f"labels.csv: no column '{column}'") as caught:
        read(csv)
    assert "columns Image Index, Finding Labels, Patient ID" in str(caught.value)


def test_the_list_file_given_as_csv_says_what_was_expected(tmp_path: Path) -> None:
    csv = tmp_path / "train_val_list.txt"
    csv.write_text("00000001_000.png\n00000001_001.png\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"Expected NIH's label CSV .*Finding Labels") as caught:
        read(csv)
    assert "train_val_list.txt" in str(caught.value)
    assert "begins with 00000001_000.png" in str(caught.value)


def test_an_empty_file_is_refused_by_name(tmp_path: Path) -> None:
    csv = tmp_path / "labels.csv"
    csv.touch()
    with pytest.raises(DataError, match=r"labels\.csv: not a readable CSV"):
        read(csv)


def test_a_header_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"labels\.csv: no rows"):
        read(write_csv(tmp_path, []))


def test_duplicate_rows_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    rows = [*V2020_ROWS, V2020_ROWS[2], V2020_ROWS[1]]
    with pytest.raises(DataError, match=r"2 duplicate rows, first: 00000002_000\.png"):
        read(write_csv(tmp_path, rows))


@pytest.mark.parametrize("patient", ["P17", "", "1;2"])
def test_a_patient_id_that_is_no_number_is_refused_with_its_row(
    tmp_path: Path, patient: str
) -> None:
    rows = [V2020_ROWS[0], f"00000002_000.png,Mass,0,{patient},60,M,PA,1,1,1,1"]
    with pytest.raises(DataError, match=f"labels.csv: row 2 has the Patient ID '{patient}'"):
        read(write_csv(tmp_path, rows))


@pytest.mark.parametrize("patient", ["1.5", "inf", "nan", "99999999999999999999"])
def test_a_patient_id_that_is_no_whole_number_is_refused(tmp_path: Path, patient: str) -> None:
    rows = [f"00000002_000.png,Mass,0,{patient},60,M,PA,1,1,1,1"]
    with pytest.raises(DataError, match="Patient ID"):
        read(write_csv(tmp_path, rows))


@pytest.mark.parametrize("name", ["../00000001_000.png", "images/a.png", "a\\b.png", "..", "/a"])
def test_a_path_in_place_of_a_file_name_is_refused(tmp_path: Path, name: str) -> None:
    csv = write_csv(tmp_path, [f"{name},Mass,0,1,60,M,PA,1,1,1,1"])
    with pytest.raises(DataError, match="is a path; it must be a file name"):
        read(csv)


def test_missing_images_are_counted_and_the_first_five_named(tmp_path: Path) -> None:
    csv = write_csv(tmp_path, many_rows(9))
    images = {"00000000_000.png": "a.png", "00000004_000.png": "b.png"}
    with pytest.raises(DataError) as caught:
        read_records(csv, images, include_no_finding=False, on_missing="error")
    message = str(caught.value)
    first_five = ", ".join(f"{row:08d}_000.png" for row in (1, 2, 3, 5, 6))
    assert f"7 of 9 images are missing under {tmp_path}, first: {first_five}." in message
    assert "00000007_000.png" not in message
    assert "data.on_missing=skip" in message


def test_skip_leaves_missing_films_out_and_logs_their_number(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    csv = write_csv(tmp_path, V2020_ROWS)
    images = {name: path for name, path in images_of(csv).items() if name != "00000001_000.png"}
    records = read_records(csv, images, include_no_finding=False, on_missing="skip")
    assert records.table["image"].tolist() == ["00000001_001.png", "00000002_000.png"]
    assert records.table.index.tolist() == [0, 1]
    assert [np.flatnonzero(row).tolist() for row in records.labels] == [[1, 10], []]
    assert "1 of 3 images are missing" in caplog.text


@pytest.mark.parametrize("on_missing", ["error", "skip"])
def test_all_images_missing_is_an_error_whatever_is_set(tmp_path: Path, on_missing: str) -> None:
    csv = write_csv(tmp_path, V2020_ROWS)
    with pytest.raises(DataError, match="3 of 3 images are missing") as caught:
        read_records(csv, {}, include_no_finding=False, on_missing=on_missing)
    assert "on_missing" not in str(caught.value)


def test_images_that_no_row_names_are_left_alone(tmp_path: Path) -> None:
    csv = write_csv(tmp_path, V2020_ROWS)
    images = {**images_of(csv), "roc.png": "figures/roc.png"}
    records = read_records(csv, images, include_no_finding=False, on_missing="error")
    assert len(records) == 3


def test_an_unknown_finding_names_its_row_of_the_csv(tmp_path: Path) -> None:
    rows = [*V2020_ROWS, "00000003_000.png,Hernai,0,3,81,M,PA,1,1,1,1"]
    with pytest.raises(DataError, match=r"row 4 .*'Hernai'.*'Hernia'"):
        read(write_csv(tmp_path, rows))


def test_an_unknown_finding_names_its_row_of_the_csv_when_films_are_skipped(
    tmp_path: Path,
) -> None:
    rows = [*V2020_ROWS, "00000003_000.png,Hernai,0,3,81,M,PA,1,1,1,1"]
    csv = write_csv(tmp_path, rows)
    images = {"00000001_001.png": "a.png", "00000003_000.png": "b.png"}
    with pytest.raises(DataError, match="row 4 "):
        read_records(csv, images, include_no_finding=False, on_missing="skip")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_a_csv_in_another_encoding_is_refused_by_name(tmp_path: Path, encoding: str) -> None:
    csv = tmp_path / "labels.csv"
    text = "\n".join([HEADER, *V2020_ROWS]).replace(",M,", ",männlich,")
    csv.write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match=r"labels\.csv"):
        read_records(csv, {}, include_no_finding=False, on_missing="error")


def test_a_binary_file_is_refused_by_name(tmp_path: Path) -> None:
    csv = tmp_path / "labels.csv"
    csv.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 8)
    with pytest.raises(DataError, match=r"labels\.csv"):
        read_records(csv, {}, include_no_finding=False, on_missing="error")


def test_a_csv_cut_off_in_its_last_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 4 "):
        read(write_csv(tmp_path, [*V2020_ROWS, "00000003_000.png,Hern"]))


def test_a_row_cut_off_after_the_patient_has_empty_sex_and_view(tmp_path: Path) -> None:
    table = read(write_csv(tmp_path, [*V2020_ROWS, "00000003_000.png,Hernia,0,3"])).table
    assert table.loc[3, ["sex", "view"]].tolist() == ["", ""]
    assert math.isnan(table["age"][3])


def test_a_row_cut_off_before_its_findings_is_refused_whatever_the_columns_order(
    tmp_path: Path,
) -> None:
    csv = write_csv(
        tmp_path, ["00000007_000.png,7,Mass", "b.png,8"], "Image Index,Patient ID,Finding Labels"
    )
    with pytest.raises(DataError, match="row 2 "):
        read(csv)


@pytest.mark.filterwarnings("ignore:Length of header")  # pandas, of the fields left over
def test_columns_stay_in_place_where_rows_have_more_fields_than_the_header(tmp_path: Path) -> None:
    header = HEADER.replace("OriginalImage[", '"OriginalImage[').replace("Height]", 'Height]"')
    table = read(write_csv(tmp_path, V2020_ROWS, header)).table
    assert table["patient"].tolist() == [1, 1, 2]
    assert table["view"].tolist() == ["PA", "PA", "AP"]


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    csv = write_csv(tmp_path, V2020_ROWS)
    plain = read(csv).table
    images = images_of(csv)
    csv.write_bytes(b"\xef\xbb\xbf" + csv.read_bytes().replace(b"\n", b"\r\n"))
    other = read_records(csv, images, include_no_finding=False, on_missing="error").table
    assert other.to_numpy().tolist() == plain.to_numpy().tolist()


def test_the_word_none_is_text_and_not_a_missing_value(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown finding 'None'"):
        read(write_csv(tmp_path, ["00000001_000.png,None,0,1,57,M,PA,1,1,1,1"]))


def test_take_returns_rows_in_the_order_asked_numbered_anew(tmp_path: Path) -> None:
    taken = read(write_csv(tmp_path, V2020_ROWS)).take(np.array([2, 1]))
    assert taken.table["image"].tolist() == ["00000002_000.png", "00000001_001.png"]
    assert taken.table.index.tolist() == [0, 1]
    assert taken.labels.sum(axis=1).tolist() == [0, 2]


@pytest.mark.parametrize("name", ["Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv"])
def test_find_csv_knows_both_names_of_nih(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert find_csv(tmp_path, None) == tmp_path / name


def test_find_csv_prefers_the_corrected_labels_of_2020(tmp_path: Path) -> None:
    for name in ("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv"):
        (tmp_path / name).touch()
    assert find_csv(tmp_path, None) == tmp_path / "Data_Entry_2017_v2020.csv"


def test_find_csv_takes_the_given_file_over_those_in_the_root(tmp_path: Path) -> None:
    (tmp_path / "Data_Entry_2017_v2020.csv").touch()
    given = tmp_path / "mine.csv"
    given.touch()
    assert find_csv(tmp_path, str(given)) == given


def test_find_csv_names_the_given_file_that_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "Data_Entry_2017_v2020.csv").touch()
    with pytest.raises(DataError, match=r"absent\.csv.*data\.csv"):
        find_csv(tmp_path, str(tmp_path / "absent.csv"))


def test_find_csv_lists_the_names_it_looked_for(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"Data_Entry_2017_v2020\.csv, .*Data_Entry_2017\.csv"):
        find_csv(tmp_path, None)


def test_find_csv_explains_where_data_come_from_when_the_root_is_absent(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.root=.*absent") as caught:
        find_csv(tmp_path / "absent", None)
    assert "DATASET_DIR" in str(caught.value)
    assert "python -m cxr_vit sample --out" in str(caught.value)
