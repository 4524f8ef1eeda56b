"""Text files from anywhere: what is read, and what is said of the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from cxr_vit.data.nih import read_table, read_text
from cxr_vit.errors import DataError


def test_text_comes_without_its_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfmit Umlaut: \xc3\xa4")
    assert read_text(path) == "mit Umlaut: ä"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.csv: cannot be read \(No such file"):
        read_text(tmp_path / "absent.csv")


def test_blanks_around_a_column_name_do_not_matter(tmp_path: Path) -> None:
    csv = tmp_path / "table.csv"
    csv.write_text("a , b\n1,2\n", encoding="utf-8")
    assert read_table(csv, ["a", "b"], key="data.x", example="x.csv")["b"].tolist() == ["2"]


def test_a_list_of_file_names_in_place_of_a_table_is_refused_with_the_key(tmp_path: Path) -> None:
    csv = tmp_path / "table.csv"
    csv.write_text("00000001_000.png\n00000001_001.png\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"looks like a list .*set data\.x to x\.csv"):
        read_table(csv, ["a", "b"], key="data.x", example="x.csv")
