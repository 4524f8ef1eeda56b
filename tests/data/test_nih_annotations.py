"""read_boxes and read_relabels: NIH's boxes and Google's second labels, valid and invalid."""

from __future__ import annotations

from pathlib import Path
from typing import Sequence

import numpy as np
import pytest

from cxr_vit.data.nih import (
    RELABELS,
    find_boxes,
    find_relabels,
    read_boxes,
    read_relabels,
)
from cxr_vit.errors import DataError

BOX_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
RELABEL_HEADER = "Image Index,Fracture,Pneumothorax,Airspace opacity,Nodule or mass"
GOOGLE_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],Fracture,Pneumothorax,"
    "Airspace opacity,Nodule or mass,Set Id"
)


def write(folder: Path, header: str, rows: Sequence[str], end: str = "\n") -> Path:
    csv = folder / "given.csv"
    csv.write_bytes((end.join([header, *rows]) + end).encode())
    return csv


def write_boxes(folder: Path, *rows: str) -> Path:
    return write(folder, BOX_HEADER, rows)


def test_boxes_are_read_and_empty_columns_ignored(tmp_path: Path) -> None:
    csv = write_boxes(tmp_path, "a.png,Mass,1.5,2,3,4", "b.png,Nodule,5,6,7,8.25,,,")
    boxes = read_boxes(csv)
    assert boxes.columns.tolist() == ["image", "finding", "x", "y", "width", "height"]
    assert boxes.to_numpy().tolist() == [
        ["a.png", "Mass", 1.5, 2, 3, 4],
        ["b.png", "Nodule", 5, 6, 7, 8.25],
    ]
    assert (boxes[["x", "y", "width", "height"]].dtypes == np.float64).all()


def test_infiltrate_is_read_as_infiltration(tmp_path: Path) -> None:
    boxes = read_boxes(write_boxes(tmp_path, "a.png,Infiltrate,1,2,3,4"))
    assert boxes["finding"].tolist() == ["Infiltration"]


def test_an_image_may_have_several_boxes_of_a_finding(tmp_path: Path) -> None:
    csv = write_boxes(tmp_path, "a.png,Mass,1,2,3,4", "a.png,Mass,10,20,3,4")
    assert read_boxes(csv)["x"].tolist() == [1, 10]


def test_an_unknown_finding_is_refused_with_its_row(tmp_path: Path) -> None:
    rows = ["a.png,Mass,1,2,3,4", "b.png,Nodul,1,2,3,4", "c.png,Zzz,1,2,3,4"]
    with pytest.raises(DataError, match=r"given\.csv: an unknown finding in 2 of 3 rows") as caught:
        read_boxes(write_boxes(tmp_path, *rows))
    assert "first in row 2: 'Nodul'. Did you mean 'Nodule'?" in str(caught.value)


def test_an_unknown_finding_without_a_near_match_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Known findings: Atelectasis"):
        read_boxes(write_boxes(tmp_path, "b.png,Zzz,1,2,3,4"))


@pytest.mark.parametrize("box", ["1,2,3,x", "1,2,,4", "nan,2,3,4", "1,inf,3,4", "1,2,3"])
def test_a_box_that_is_not_four_numbers_is_refused(tmp_path: Path, box: str) -> None:
    csv = write_boxes(tmp_path, "a.png,Mass,1,2,3,4", f"b.png,Mass,{box}")
    with pytest.raises(DataError, match="not four numbers in 1 of 2 rows, first in row 2"):
        read_boxes(csv)


@pytest.mark.parametrize("box", ["1,2,0,4", "1,2,3,-4", "1,2,0,0"])
def test_a_box_without_extent_is_refused(tmp_path: Path, box: str) -> None:
    with pytest.raises(DataError, match="without extent in 1 of 1 rows, first in row 1") as caught:
        read_boxes(write_boxes(tmp_path, f"b.png,Mass,{box}"))
    assert "must be positive" in str(caught.value)


@pytest.mark.parametrize("box", ["-2,2,3,4", "1,-2,3,4", "1000,2,26,4", "1,2,3,1024", "9e9,1,1,1"])
def test_a_box_that_leaves_the_image_is_refused(tmp_path: Path, box: str) -> None:
    with pytest.raises(DataError, match="leaves the image in 1 of 1 rows") as caught:
        read_boxes(write_boxes(tmp_path, f"b.png,Mass,{box}"))
    assert "1024 x 1024" in str(caught.value)


@pytest.mark.parametrize("box", ["0,0,1024,1024", "-0.5,-0.5,10,10", "1000,1000,24.5,24.5"])
def test_a_box_may_reach_the_edge_within_a_pixel(tmp_path: Path, box: str) -> None:
    assert len(read_boxes(write_boxes(tmp_path, f"b.png,Mass,{box}"))) == 1


def test_another_table_given_as_boxes_is_refused_with_the_key(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'Finding Label', 'Bbox \[x'") as caught:
        read_boxes(write(tmp_path, GOOGLE_HEADER, ["a.png" + ",1" * 15]))
    assert "BBox_List_2017.csv" in str(caught.value) and "Set data.boxes" in str(caught.value)


def test_a_box_file_without_rows_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows below the header"):
        read_boxes(write_boxes(tmp_path))


def test_relabels_are_zeros_and_ones_indexed_by_image(tmp_path: Path) -> None:
    answers = read_relabels(
        write(tmp_path, RELABEL_HEADER, ["b.png,YES,NO,NO,YES", "a.png" + ",NO" * 4])
    )
    assert answers.columns.tolist() == list(RELABELS)
    assert answers.loc["b.png"].tolist() == [1, 0, 0, 1]
    assert answers.loc["a.png"].tolist() == [0, 0, 0, 0]
    assert (answers.dtypes == np.float32).all()


def test_googles_other_columns_and_line_ends_are_ignored(tmp_path: Path) -> None:
    row = "00000013_008.png,No Finding,8,13,60,M,AP,3056,2544,0.139,0.139,NO,NO,YES,NO,test"
    answers = read_relabels(write(tmp_path, GOOGLE_HEADER, [row], end="\r\n"))
    assert answers.loc["00000013_008.png"].tolist() == [0, 0, 1, 0]


def test_case_and_spaces_of_an_answer_are_ignored(tmp_path: Path) -> None:
    answers = read_relabels(write(tmp_path, RELABEL_HEADER, ["a.png,yes, No,NO ,Yes"]))
    assert answers.loc["a.png"].tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("answer", ["", "HEDGE", "1"])
def test_an_answer_that_is_neither_yes_nor_no_is_refused(tmp_path: Path, answer: str) -> None:
    rows = ["a.png,YES,NO,NO,YES", f"b.png,YES,NO,{answer},YES"]
    with pytest.raises(DataError, match="neither YES nor NO under 'Airspace opacity'") as caught:
        read_relabels(write(tmp_path, RELABEL_HEADER, rows))
    assert f"first in row 2: {answer!r}" in str(caught.value)


def test_a_truncated_answer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither YES nor NO under 'Nodule or mass'"):
        read_relabels(write(tmp_path, RELABEL_HEADER, ["a.png,YES,NO,NO"]))


def test_an_image_relabelled_twice_is_refused(tmp_path: Path) -> None:
    rows = ["a.png,YES,NO,NO,YES", "a.png,NO,NO,NO,YES"]
    with pytest.raises(
        DataError, match=r"a repeated image in 1 of 2 rows, first in row 2: 'a\.png'"
    ):
        read_relabels(write(tmp_path, RELABEL_HEADER, rows))


def test_another_table_given_as_relabels_is_refused_with_the_key(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no column 'Fracture'.*Set data\.relabels"):
        read_relabels(write_boxes(tmp_path, "a.png,Mass,1,2,3,4"))


@pytest.mark.parametrize("name", ["BBox_List_2017.csv", "BBox_List_2017_Official_NIH.csv"])
def test_boxes_are_found_by_either_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    assert find_boxes(tmp_path) == tmp_path / name


def test_relabels_are_found_by_name(tmp_path: Path) -> None:
    name = "google2019_nih-chest-xray-labels.csv"
    (tmp_path / name).touch()
    assert find_relabels(tmp_path, None) == tmp_path / name


@pytest.mark.parametrize("find", [find_boxes, find_relabels])
def test_a_root_without_annotations_gives_none(tmp_path: Path, find: object) -> None:
    assert find(tmp_path) is None
    assert find(tmp_path / "absent") is None


@pytest.mark.parametrize("find", [find_boxes, find_relabels])
def test_a_given_file_takes_precedence_over_the_root(tmp_path: Path, find: object) -> None:
    for name in ("BBox_List_2017.csv", "google2019_nih-chest-xray-labels.csv", "mine.csv"):
        (tmp_path / name).touch()
    assert find(tmp_path, str(tmp_path / "mine.csv")) == tmp_path / "mine.csv"


@pytest.mark.parametrize(("find", "key"), [(find_boxes, "boxes"), (find_relabels, "relabels")])
def test_a_missing_given_file_is_named_with_its_key(tmp_path: Path, find: object, key: str) -> None:
    with pytest.raises(DataError, match=rf"data\.{key}=.*absent\.csv: no such file"):
        find(tmp_path, str(tmp_path / "absent.csv"))
