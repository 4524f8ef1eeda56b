"""read_records, read_table and find_csv: the known forms of NIH's CSV, and invalid ones."""

from __future__ import annotations

import gzip
import logging
import math
from pathlib import Path
from typing import Sequence

import numpy as np
import pandas as pd
import pytest

from cxr_vit.data.nih import read_records
from cxr_vit.data.records import RELABELS, Records
from cxr_vit.data.table_files import read_table
from cxr_vit.data.text_files import find_csv
from cxr_vit.errors import DataError

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
SAMPLE_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImageWidth,OriginalImageHeight,OriginalImagePixelSpacing_x,OriginalImagePixelSpacing_y"
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


def read(csv: Path, include_no_finding: bool = False) -> Records:
    return read_records(csv, include_no_finding=include_no_finding)


def read_ages(folder: Path, ages: Sequence[str]) -> list:
    rows = [f"{row:08d}_000.png,Mass,0,{row},{age},M,PA,1,1,1,1" for row, age in enumerate(ages)]
    return read(write_csv(folder, rows)).table["age"].tolist()


def test_v2020_columns_are_read_despite_unquoted_commas(tmp_path: Path) -> None:
    table = read(write_csv(tmp_path, V2020_ROWS)).table
    columns = ["image", "findings", "patient", "age", "sex", "view"]
    assert table[columns].to_numpy().tolist() == [
        ["00000001_000.png", "Cardiomegaly", 1, 57.0, "M", "PA"],
        ["00000001_001.png", "Cardiomegaly|Emphysema", 1, 58.0, "M", "PA"],
        ["00000002_000.png", "No Finding", 2, 80.0, "F", "AP"],
    ]


def test_each_row_gets_its_labels(tmp_path: Path) -> None:
    records = read(write_csv(tmp_path, V2020_ROWS))
    assert [np.flatnonzero(row).tolist() for row in records.labels] == [[1], [1, 10], []]


def test_include_no_finding_adds_a_fifteenth_column(tmp_path: Path) -> None:
    records = read(write_csv(tmp_path, V2020_ROWS), include_no_finding=True)
    assert records.labels[:, 14].tolist() == [0, 0, 1]


def test_follow_up_and_the_original_size_are_numbers(tmp_path: Path) -> None:
    table = read(write_csv(tmp_path, V2020_ROWS)).table
    assert table["follow_up"].tolist() == [0, 1, 0]
    assert table["width"].tolist() == [2682, 2894, 2500]
    assert table["height"].tolist() == [2749, 2729, 2048]


def test_the_table_has_these_columns_and_types(tmp_path: Path) -> None:
    table = read(write_csv(tmp_path, V2020_ROWS)).table
    numbers = {
        "patient": np.int64,
        "age": np.float64,
        "follow_up": np.int64,
        "width": np.float64,
        "height": np.float64,
    }
    assert set(table.columns) == {"image", "findings", "sex", "view", *numbers}
    assert {name: table[name].dtype for name in numbers} == numbers


@pytest.mark.parametrize("follow_up", ["", "x", "-3", "nan", "inf"])
@pytest.mark.parametrize("size", ["", "0", "-5", "wide", "nan", "inf"])
def test_unreadable_follow_ups_and_sizes_are_unknown(
    tmp_path: Path, follow_up: str, size: str
) -> None:
    rows = [
        V2020_ROWS[0],
        f"00000003_000.png,Mass,{follow_up},3,57,M,PA,{size},{size},1,1",
    ]
    table = read(write_csv(tmp_path, rows)).table
    assert table["follow_up"].tolist() == [0, -1]
    assert table["width"].isna().tolist() == table["height"].isna().tolist() == [False, True]


@pytest.mark.parametrize(
    ("header", "variant"),
    [
        (HEADER, "v2020"),
        (HEADER.replace("Gender", "Sex"), "v2020"),
        (HEADER.replace("Gender", "Sex") + ",", "v2020"),
        (HEADER + ",", "2017"),
        (SAMPLE_HEADER, "Kaggle sample"),
        ("Image Index,Finding Labels,x,Patient ID", "other"),
    ],
)
def test_the_variant_is_identified_by_the_header(tmp_path: Path, header: str, variant: str) -> None:
    records = read(write_csv(tmp_path, V2020_ROWS, header))
    assert records.variant == variant
    assert records.take(np.array([1])).variant == variant
    assert records.table["patient"].tolist() == [1, 1, 2]


def test_kaggles_names_of_width_and_height_are_known(tmp_path: Path) -> None:
    row = "00000013_005.png,Emphysema|Mass,005,00000013,060Y,M,AP,3056,2544,0.139,0.139"
    image = read(write_csv(tmp_path, [row], SAMPLE_HEADER)).table.iloc[0]
    found = image[["patient", "age", "sex", "view", "follow_up", "width", "height"]].tolist()
    assert found == [13, 60, "M", "AP", 5, 3056, 2544]


def test_patient_sex_column_and_trailing_commas_are_read(tmp_path: Path) -> None:
    rows = [f"{row}," for row in V2020_ROWS]
    table = read(write_csv(tmp_path, rows, HEADER.replace("Gender", "Sex") + ",")).table
    assert table["sex"].tolist() == ["M", "M", "F"]
    assert table["height"].tolist() == [2749, 2729, 2048]


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


@pytest.mark.skipif(not OLD_SAMPLE.is_file(), reason="the real 12-row sample is not available")
def test_the_real_sample_of_the_older_format_is_read(caplog: pytest.LogCaptureFixture) -> None:
    records = read(OLD_SAMPLE)
    ages = records.table["age"].tolist()
    assert records.table["patient"].tolist() == [1, 1, 1, 2, 3, 3, 13, 13, 150, 5567, 5567, 5573]
    assert ages[:9] == [58, 58, 58, 81, 81, 74, 61, 60, 55] and ages[10:] == [53, 8]
    assert math.isnan(ages[9]) and "1 ages over 120" in caplog.text
    assert records.labels.sum() == 17 and not records.labels[3].any()


def test_columns_are_found_by_name_in_any_order(tmp_path: Path) -> None:
    header = "Patient ID,View Position,Finding Labels,Image Index"
    csv = write_csv(tmp_path, ["7,AP,Hernia,00000007_000.png"], header)
    records = read(csv)
    assert records.table.loc[0, ["image", "patient", "view", "sex"]].tolist() == [
        "00000007_000.png",
        7,
        "AP",
        "",
    ]
    assert records.table[["age", "width", "height"]].isna().all(axis=None)
    assert records.table["follow_up"].tolist() == [-1]
    assert np.flatnonzero(records.labels[0]).tolist() == [13]


def test_ages_in_months_and_days_become_years(tmp_path: Path) -> None:
    ages = read_ages(tmp_path, ["011M", "018M", "005D", "000Y", "009", "120"])
    assert ages == pytest.approx([11 / 12, 1.5, 5 / 365.25, 0, 9, 120])


def test_an_unreadable_age_is_unknown(tmp_path: Path) -> None:
    ages = read_ages(tmp_path, ["", "old", "-3", "58Z", "44", "44.5"])
    assert [math.isnan(age) for age in ages] == [True] * 4 + [False] * 2
    assert ages[4:] == [44, 44.5]


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
    assert "columns Image Index, Patient ID, Finding Labels" in str(caught.value)


@pytest.mark.parametrize(
    "lines", ["00000001_000.png\n00000001_001.png\n", "\nimages_001/00000001_000.png 0 1 0\n"]
)
def test_a_list_file_given_as_csv_is_recognized(tmp_path: Path, lines: str) -> None:
    csv = tmp_path / "mine.txt"
    csv.write_text(lines, encoding="utf-8")
    with pytest.raises(DataError, match=r"mine\.txt: looks like a list of file names") as caught:
        read(csv)
    assert "00000001_000.png" in str(caught.value)
    assert "set data.csv to Data_Entry_2017_v2020.csv" in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_an_empty_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    csv = tmp_path / "labels.csv"
    csv.write_text(content)
    with pytest.raises(DataError, match=r"labels\.csv: the file is empty"):
        read(csv)


def test_a_header_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"labels\.csv: no rows below the header"):
        read(write_csv(tmp_path, []))


@pytest.mark.parametrize("mark", [";", "\t"])
@pytest.mark.parametrize("packs", [False, True])
def test_other_field_separators_and_a_packed_file_are_read(
    tmp_path: Path, mark: str, packs: bool
) -> None:
    plain = read(write_csv(tmp_path, V2020_ROWS))
    rows = [row.replace(",", mark) for row in V2020_ROWS]
    csv = write_csv(tmp_path, rows, HEADER.replace(",", mark))
    if packs:
        csv.write_bytes(gzip.compress(csv.read_bytes()))
    records = read(csv)
    pd.testing.assert_frame_equal(records.table, plain.table)
    assert records.variant == plain.variant == "v2020"


def test_duplicate_rows_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    rows = [*V2020_ROWS, V2020_ROWS[2], V2020_ROWS[1]]
    with pytest.raises(
        DataError, match="repeated 'Image Index' in 2 of 5 rows, first in row 4"
    ) as caught:
        read(write_csv(tmp_path, rows))
    assert "'00000002_000.png'" in str(caught.value)
    assert "Keep one row per image" in str(caught.value)


@pytest.mark.parametrize("patient", ["P17", "", "1;2"])
def test_a_patient_id_that_is_not_a_number_is_refused_with_its_row(
    tmp_path: Path, patient: str
) -> None:
    rows = [V2020_ROWS[0], f"00000002_000.png,Mass,0,{patient},60,M,PA,1,1,1,1"]
    with pytest.raises(DataError, match=f"Patient ID.* 1 of 2 rows, .* row 2: '{patient}'"):
        read(write_csv(tmp_path, rows))


@pytest.mark.parametrize("patient", ["1.5", "inf", "nan", "99999999999999999999"])
def test_a_patient_id_that_is_not_a_whole_number_is_refused(tmp_path: Path, patient: str) -> None:
    rows = [f"00000002_000.png,Mass,0,{patient},60,M,PA,1,1,1,1"]
    with pytest.raises(DataError, match="Patient ID"):
        read(write_csv(tmp_path, rows))


@pytest.mark.parametrize(
    "name",
    [
        *("../00000001_000.png", "images/a.png", "a\\b.png", "..", ".", "", "/a", "C:a.png"),
        *("C:\\a.png", "\\\\server\\a.png", "a\tb.png", "~/a.png"),
    ],
)
def test_a_path_in_place_of_a_file_name_is_refused(tmp_path: Path, name: str) -> None:
    csv = write_csv(tmp_path, [V2020_ROWS[0], f"{name},Mass,0,1,60,M,PA,1,1,1,1"])
    with pytest.raises(DataError, match="a path or empty in 1 of 2 rows, first in row 2") as caught:
        read(csv)
    assert repr(name) in str(caught.value)
    assert "It must be a file name" in str(caught.value)


@pytest.mark.parametrize("name", ["a..b.png", "image 7.png", "1.2.840.png", ".hidden.png", "é.png"])
def test_other_file_names_are_kept_unchanged(tmp_path: Path, name: str) -> None:
    csv = write_csv(tmp_path, [f"{name},Mass,0,1,60,M,PA,1,1,1,1"])
    assert read(csv).table["image"].tolist() == [name]


def test_a_patient_id_that_differs_from_the_file_name_is_refused(
    tmp_path: Path,
) -> None:
    rows = [
        *V2020_ROWS,
        "00000003_000.png,Mass,0,4,60,M,PA,1,1,1,1",
        "00000004_000.png,Mass,0,00000003,60,M,PA,1,1,1,1",
    ]
    with pytest.raises(DataError, match="2 of 5 rows, first in row 4") as caught:
        read(write_csv(tmp_path, rows))
    assert "00000003_000.png of patient 4" in str(caught.value)


@pytest.mark.parametrize("name", ["3_000.png", "00000003_000.jpg", "00000003_0000.png", "x.png"])
def test_names_of_another_form_are_not_compared_with_the_patient(tmp_path: Path, name: str) -> None:
    csv = write_csv(tmp_path, [f"{name},Mass,0,4,60,M,PA,1,1,1,1"])
    assert read(csv).table["patient"].tolist() == [4]


def test_an_unknown_finding_names_its_row_of_the_csv(tmp_path: Path) -> None:
    rows = [*V2020_ROWS, "00000003_000.png,Hernai,0,3,81,M,PA,1,1,1,1"]
    with pytest.raises(DataError, match=r"row 4 .*'Hernai'.*'Hernia'"):
        read(write_csv(tmp_path, rows))


def test_no_finding_with_a_finding_is_refused_with_file_and_row(tmp_path: Path) -> None:
    rows = [*V2020_ROWS, "00000003_000.png,Mass|No Finding,0,3,81,M,PA,1,1,1,1"]
    with pytest.raises(DataError, match=r"labels\.csv: row 4 .*cannot be combined with a finding"):
        read(write_csv(tmp_path, rows))


@pytest.mark.parametrize(
    ("encoding", "what"),
    [
        ("utf-16", "UTF-16"),
        ("utf-16-le", "UTF-16"),
        ("utf-16-be", "UTF-16"),
        ("latin-1", "Latin-1"),
        ("cp1252", "Latin-1"),
    ],
)
def test_a_csv_in_another_encoding_is_refused_by_name(
    tmp_path: Path, encoding: str, what: str
) -> None:
    csv = tmp_path / "labels.csv"
    text = "\n".join([HEADER, *V2020_ROWS]).replace(",M,", ",männlich,")
    csv.write_bytes(text.encode(encoding))
    with pytest.raises(DataError, match=rf"labels\.csv: .*{what}.* Save it as UTF-8") as caught:
        read(csv)
    assert what != "Latin-1" or "byte 0xe4 in line 2" in str(caught.value)


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "a PNG image"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\x1f\x8b\x08\x00", "damaged gzip"),
        (b"PK\x03\x04", "a zip archive or an Excel workbook"),
        (b"Image\x00Index", "zero bytes"),
    ],
)
def test_a_file_of_another_kind_is_refused_by_name(tmp_path: Path, start: bytes, what: str) -> None:
    csv = tmp_path / "labels.csv"
    csv.write_bytes(start)
    with pytest.raises(DataError, match=rf"labels\.csv: .*{what}"):
        read(csv)


def test_a_folder_in_place_of_the_csv_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        read(tmp_path)


def test_an_unclosed_quote_is_refused_by_name(tmp_path: Path) -> None:
    rows = [V2020_ROWS[0], V2020_ROWS[1].replace("Cardio", '"Cardio')]
    with pytest.raises(DataError, match=r"labels\.csv: not a readable CSV"):
        read(write_csv(tmp_path, rows))


def test_a_csv_truncated_in_its_last_row_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="first in row 4: ''"):
        read(write_csv(tmp_path, [*V2020_ROWS, "00000003_000.png,Hern"]))


def test_a_row_truncated_after_the_patient_has_empty_sex_and_view(tmp_path: Path) -> None:
    table = read(write_csv(tmp_path, [*V2020_ROWS, "00000003_000.png,Hernia,0,3"])).table
    assert table.loc[3, ["sex", "view"]].tolist() == ["", ""]
    assert math.isnan(table["age"][3])


def test_a_row_truncated_before_its_findings_is_refused_in_any_column_order(
    tmp_path: Path,
) -> None:
    csv = write_csv(
        tmp_path, ["00000007_000.png,7,Mass", "b.png,8"], "Image Index,Patient ID,Finding Labels"
    )
    with pytest.raises(DataError, match="row 2 "):
        read(csv)


def test_rows_with_more_fields_than_the_header_keep_their_columns(tmp_path: Path) -> None:
    header = HEADER.replace("OriginalImage[", '"OriginalImage[').replace("Height]", 'Height]"')
    table = read(write_csv(tmp_path, V2020_ROWS, header)).table
    assert table["patient"].tolist() == [1, 1, 2]
    assert table["view"].tolist() == ["PA", "PA", "AP"]


def test_a_table_of_many_columns_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("Image Index,Finding Labels,Patient ID" + "," * 4095 + "\na.png,Mass,1\n")
    with pytest.raises(DataError, match=r"a\.csv: more than 4096 columns\. Give a table"):
        read_table(path, [], key="data.csv", example="Data_Entry_2017.csv")


def test_a_long_value_is_quoted_in_part(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("Image Index,Finding Labels,Patient ID\na.png,Mass," + "9" * 9000 + "\n")
    with pytest.raises(DataError, match=r"first in row 1: '9{100}'") as caught:
        read_records(path, include_no_finding=False)
    assert len(str(caught.value)) < 500


def test_windows_line_ends_and_a_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    csv = write_csv(tmp_path, V2020_ROWS)
    plain = read(csv).table
    csv.write_bytes(b"\xef\xbb\xbf" + csv.read_bytes().replace(b"\n", b"\r\n"))
    pd.testing.assert_frame_equal(read(csv).table, plain)


def test_the_word_none_is_not_a_missing_value(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown finding 'None'"):
        read(write_csv(tmp_path, ["00000001_000.png,None,0,1,57,M,PA,1,1,1,1"]))


def test_take_returns_rows_in_the_given_order_renumbered(tmp_path: Path) -> None:
    taken = read(write_csv(tmp_path, V2020_ROWS)).take(np.array([2, 1]))
    assert taken.table["image"].tolist() == ["00000002_000.png", "00000001_001.png"]
    assert taken.table.index.tolist() == [0, 1]
    assert taken.labels.sum(axis=1).tolist() == [0, 2]


def test_records_of_a_table_and_labels_have_no_boxes_or_relabels(tmp_path: Path) -> None:
    whole = read(write_csv(tmp_path, V2020_ROWS))
    records = Records(whole.table, whole.labels)
    assert records.boxes.columns.tolist() == ["row", "finding", "x", "y", "width", "height"]
    assert len(records.boxes) == 0
    assert records.relabels.shape == (3, 4) and records.relabels.dtype == np.float32
    assert np.isnan(records.relabels).all()
    assert records.variant == "other"
    taken = records.take(np.array([2, 0]))
    assert len(taken) == len(taken.relabels) == 2
    assert taken.boxes.columns.tolist() == records.boxes.columns.tolist()
    assert len(records.take(np.array([], dtype=np.int64)).relabels) == 0


BOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
BOXES = (
    "00000002_000.png,Infiltrate,10.5,20,30,40.25",
    "00000001_001.png,Cardiomegaly,1,2,3,4,,,",
    "00000009_000.png,Mass,5,6,7,8",
    "00000001_001.png,Emphysema,100,200,300,400",
)
RELABEL_HEADER = f"Image Index,{','.join(RELABELS)}"
RELABEL_ROWS = ("00000002_000.png,NO,YES,NO,YES", "00000009_000.png,YES,YES,YES,YES")


def read_annotated(folder: Path) -> Records:
    boxes, relabels = folder / "boxes.csv", folder / "relabels.csv"
    boxes.write_text("\n".join([BOX_HEADER, *BOXES]))
    relabels.write_text("\n".join([RELABEL_HEADER, *RELABEL_ROWS]))
    csv = write_csv(folder, V2020_ROWS)
    return read_records(csv, include_no_finding=False, boxes=boxes, relabels=relabels)


def test_boxes_point_to_the_rows_of_their_images(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    boxes = read_annotated(tmp_path).boxes
    assert boxes["row"].dtype == np.int64
    assert boxes.to_numpy().tolist() == [
        [2, "Infiltration", 10.5, 20, 30, 40.25],
        [1, "Cardiomegaly", 1, 2, 3, 4],
        [1, "Emphysema", 100, 200, 300, 400],
    ]
    assert "left out 1 of 4 boxes, of images that the CSV lacks" in caplog.text


def test_a_box_of_an_unlabelled_finding_is_kept_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    read_annotated(tmp_path)
    assert "1 boxes have a finding that is not among their image's labels" in caplog.text


def test_relabels_are_nan_for_images_that_were_not_relabelled(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    relabels = read_annotated(tmp_path).relabels
    assert relabels.dtype == np.float32 and relabels.shape == (3, 4)
    assert np.isnan(relabels[:2]).all()
    assert relabels[2].tolist() == [0, 1, 0, 1]
    assert "left out 1 of 2 labels, of images that the CSV lacks" in caplog.text


def test_boxes_of_images_outside_the_csv_are_left_out(tmp_path: Path) -> None:
    boxes = tmp_path / "boxes.csv"
    boxes.write_text(f"{BOX_HEADER}\n{BOXES[2]}\n")
    records = read_records(write_csv(tmp_path, V2020_ROWS), include_no_finding=False, boxes=boxes)
    assert len(records.boxes) == 0 and records.boxes["row"].dtype == np.int64
    assert len(records.take(np.array([1])).boxes) == 0


@pytest.mark.parametrize("rows", [[1], [2, 1], [1, 0, 2], [0], [1, 1], []])
def test_boxes_and_relabels_follow_their_images(tmp_path: Path, rows: list) -> None:
    records = read_annotated(tmp_path)
    taken = records.take(np.array(rows, dtype=np.int64))
    sides = ["finding", "x", "y", "width", "height"]
    for new, old in enumerate(rows):
        of_new = taken.boxes[taken.boxes["row"] == new][sides]
        of_old = records.boxes[records.boxes["row"] == old][sides]
        assert of_new.to_numpy().tolist() == of_old.to_numpy().tolist()
    np.testing.assert_array_equal(taken.relabels, records.relabels[rows])
    assert taken.boxes["row"].isin(range(len(rows))).all()
    assert taken.boxes["row"].dtype == np.int64


def test_take_accepts_a_mask(tmp_path: Path) -> None:
    records = read_annotated(tmp_path)
    masked = records.take(np.array([False, True, True]))
    pd.testing.assert_frame_equal(masked.boxes, records.take(np.array([1, 2])).boxes)


def test_spaces_around_a_column_name_are_ignored(tmp_path: Path) -> None:
    csv = tmp_path / "table.csv"
    csv.write_text("a , b\n1,2\n", encoding="utf-8")
    assert read_table(csv, ["a", "b"], key="data.x", example="x.csv")["b"].tolist() == ["2"]


def test_a_list_of_file_names_given_as_a_table_is_refused_with_the_key(tmp_path: Path) -> None:
    csv = tmp_path / "table.csv"
    csv.write_text("00000001_000.png\n00000001_001.png\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"looks like a list .*set data\.x to x\.csv"):
        read_table(csv, ["a", "b"], key="data.x", example="x.csv")


@pytest.mark.parametrize(
    "name", ["Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv", "sample_labels.csv"]
)
def test_find_csv_knows_the_names_of_nih_and_of_kaggles_sample(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert find_csv(tmp_path, None) == tmp_path / name


def test_find_csv_prefers_the_corrected_labels_of_2020(tmp_path: Path) -> None:
    for name in ("Data_Entry_2017.csv", "Data_Entry_2017_v2020.csv"):
        (tmp_path / name).touch()
    assert find_csv(tmp_path, None) == tmp_path / "Data_Entry_2017_v2020.csv"


def test_find_csv_prefers_the_given_file(tmp_path: Path) -> None:
    (tmp_path / "Data_Entry_2017_v2020.csv").touch()
    given = tmp_path / "mine.csv"
    given.touch()
    assert find_csv(tmp_path, str(given)) == given


def test_find_csv_names_a_missing_given_file(tmp_path: Path) -> None:
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
