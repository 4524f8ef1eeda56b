"""read_header and read_columns: CSV, TSV and Parquet as text, and what is no table."""

from __future__ import annotations

import csv
import gzip
import sys
from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from cxr_vit.data import text_files
from cxr_vit.data.table_files import read_columns, read_header
from cxr_vit.errors import DataError

ROWS = [["a.png", "001", "1.0"], ["b,c;d.png", "P 2", ""], ["ä.png", "nan", "NA"]]


def write(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read(path: Path, *names: str) -> Dict[str, List[str]]:
    read_header(path, names)
    return read_columns(path, names).to_dict("list")


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["a.csv", "a.tsv.gz"])
def test_fields_are_text_whatever_separates_them(
    tmp_path: Path, mark: str, end: str, name: str
) -> None:
    lines = [mark.join(f'"{cell}"' for cell in row) for row in [["image", "id", "x"], *ROWS]]
    path = write(tmp_path / name, "\ufeff" + end.join(["", *lines, "", mark * 2, ""]))
    assert read_header(path, ["image"]) == ["image", "id", "x"]
    found = read(path, "x", "image")
    assert found == {"x": ["1.0", "", "NA"], "image": [row[0] for row in ROWS]}


def test_the_separator_is_the_one_that_finds_the_columns(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "image;note, of a doctor;id\na;x,y;1\n")
    assert read(path, "image", "id") == {"image": ["a"], "id": ["1"]}
    path = write(tmp_path / "b.tsv", "\tfirst\n0\tx\n")  # an index that pandas writes
    assert read(path, "first") == {"first": ["x"]}
    assert read(write(tmp_path / "c.csv", "one\nx\n"), "one") == {"one": ["x"]}


def test_blanks_at_the_ends_quoted_lines_and_long_fields_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", 'id , text,\n 1 ," two\nlines "\n2,\n , \n3,x,,\n')
    assert read(path, "id", "text") == {"id": ["1", "2", "3"], "text": ["two\nlines", "", "x"]}
    report = "a" * 140_000
    assert read(write(tmp_path / "b.csv", f"id,text\n1,{report}\n"), "text") == {"text": [report]}
    assert csv.field_size_limit() == 131_072  # of the whole process


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,text\n1,a\n2,b,c\n", r"row 2 has more fields than the 2 .* Quote .* a ',' in"),
        ('id,text\n1,"a\n2,b\n', "not a readable CSV .* in row 1"),
        ("id,text\n", "no rows below the header"),
        ("id,text,id\n1,2,3\n", "the column 'id' is there twice"),
        ("id" + ",x" * 4096 + "\n1\n", "more than 4096 columns"),
        ("id,text,\n1,a\n2\n3\n", r"2 of 3 rows are cut off, first row 2: it has 1 fields, the h"),
        ('id,text\n1,"' + ("a" * 600_000 + "\n") * 2 + '"\n', "not a readable CSV .field larger"),
        ("id,text\n1," + "a" * 1_000_001 + "\n", "the longest of 1,000,004 bytes"),
        ("", "the file is empty"),
        ("id,text\n1,\0\n", "zero bytes"),
    ],
)
def test_what_is_no_table_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=rf"^{tmp_path}/a\.csv: .*{message}"):
        read(write(tmp_path / "a.csv", text), "id")


def test_a_gzip_bomb_and_a_damaged_gzip_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cxr_vit.data.table_files.TABLE_LIMITS", text_files.Limits(10_000, 9999, 9999)
    )
    path = write(tmp_path / "a.csv.gz", "id,x\n" + "1,2\n" * 3000)
    assert len(path.read_bytes()) < 200
    with pytest.raises(DataError, match="unpacks to more than the limit of 10,000 bytes"):
        read_columns(path, ["id"])
    path = write(tmp_path / "b.csv.gz", "id,x\n" + "1,2\n" * 300)
    path.write_bytes(path.read_bytes()[:-9])
    assert read_header(path, ["id"]) == ["id", "x"]
    with pytest.raises(DataError, match=r"damaged gzip .* Fetch the file again"):
        read_columns(path, ["id"])


def test_a_header_is_read_without_the_rest_of_a_large_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", "id,x\n" + "é,2\n" * 400_000 + "\0")
    assert read_header(path, ["id"]) == ["id", "x"]


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow (extra: parquet)")
    from pyarrow.parquet import write_table

    columns = {
        "image": ["a.png ", None, "c.png", "d.png"],
        "patient": pyarrow.array(["x", "y", "x", "1.0"]).dictionary_encode(),
        "whole": [1, None, -1, 2],
        "real": [1.0, float("nan"), -1.0, 0.5],
        "yes": [True, None, False, True],
        "nothing": pyarrow.nulls(4),
        "a.b": ["1", "2", "3", "4"],
        "list": [["a"], ["b"], None, None],
        "bytes": [b"a", b"b", b"c", b"d"],
    }
    path = tmp_path / "a.parquet"
    write_table(pyarrow.table(columns), path)
    return path


def test_parquet_is_read_as_text(parquet: Path) -> None:
    header = ["image", "patient", "whole", "real", "yes", "nothing", "a.b", "list", "bytes"]
    assert read_header(parquet, []) == header
    assert read(parquet, *header[:-2]) == {
        "image": ["a.png", "", "c.png", "d.png"],
        "patient": ["x", "y", "x", "1.0"],
        "whole": ["1", "", "-1", "2"],
        "real": ["1", "", "-1", "0.5"],
        "yes": ["True", "", "False", "True"],
        "nothing": [""] * 4,
        "a.b": ["1", "2", "3", "4"],
    }


@pytest.mark.parametrize("name", ["list", "bytes"])
def test_a_parquet_column_that_is_no_text_is_refused(parquet: Path, name: str) -> None:
    with pytest.raises(DataError, match=rf"the column '{name}' is of the type .* Write it as text"):
        read(parquet, name)


def test_a_parquet_file_of_much_text_in_few_bytes_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow (extra: parquet)")
    from pyarrow.parquet import write_table

    monkeypatch.setattr("cxr_vit.data.parquet.TABLE_LIMITS", text_files.Limits(10**7, 30_000, 9))
    path = tmp_path / "a.parquet"
    write_table(pyarrow.table({"a": ["x" * 1000] * 20_000}), path)
    assert path.stat().st_size < 10_000
    with pytest.raises(DataError, match="more than 10,000,000 characters"):
        read(path, "a")
    write_table(pyarrow.table({"a": [None] * 40_000}), path)
    with pytest.raises(DataError, match="40,000 rows; at most 30,000 are read"):
        read(path, "a")


@pytest.mark.parametrize("encoding", ["PLAIN", "RLE_DICTIONARY"])
def test_a_parquet_bomb_is_refused_after_few_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    """Plain text by the size in its metadata, repeated text after the first rows."""
    pyarrow = pytest.importorskip("pyarrow", reason="Parquet needs pyarrow (extra: parquet)")
    from pyarrow import parquet

    monkeypatch.setattr("cxr_vit.data.parquet.TABLE_LIMITS", text_files.Limits(10**6, 30_000, 9))
    is_dictionary = encoding == "RLE_DICTIONARY"
    how = {} if is_dictionary else {"column_encoding": {"a": encoding}}
    table = pyarrow.table({"a": ["x" * 1000] * 20_000, "b": ["y" * 2000] * 20_000})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path, compression="gzip", use_dictionary=is_dictionary, **how)
    whole, read_rows = parquet.ParquetFile.iter_batches, []

    def counted(*args: Any, **options: Any) -> Iterator[Any]:
        for batch in whole(*args, **options):
            read_rows.append(batch.num_rows)
            yield batch

    monkeypatch.setattr(parquet.ParquetFile, "iter_batches", counted)
    with pytest.raises(DataError, match=r"bytes in the columns|more than 1,000,000 characters"):
        read(path, "a")
    assert sum(read_rows) <= (0 if encoding == "PLAIN" else 1024)


def test_a_damaged_parquet_file_is_refused(parquet: Path) -> None:
    whole = parquet.read_bytes()
    for damaged in (whole[:-100], whole[:4] + bytes(40) + whole[44:]):
        parquet.write_bytes(damaged)
        with pytest.raises(DataError, match="not a readable Parquet file"):
            read(parquet, "image", "patient", "whole")


def test_parquet_without_pyarrow_names_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1....PAR1")
    with pytest.raises(DataError, match=r'needs pyarrow\. Run: pip install "cxr-vit\[parquet\]"'):
        read_header(tmp_path / "a.parquet", [])
