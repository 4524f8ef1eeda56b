"""read_text and read_list. Invalid text files are in test_nih_records.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from cxr_vit.data.text_files import read_list, read_text
from cxr_vit.errors import DataError


def test_read_text_drops_the_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfmit Umlaut: \xc3\xa4")
    assert read_text(path) == "mit Umlaut: ä"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.csv: cannot be read \(No such file"):
        read_text(tmp_path / "absent.csv")


@pytest.mark.parametrize(
    "line",
    [
        "{}\r\n",
        "{}\n\n",
        "{} \n",
        "images_001/{}\n",
        "D:\\NIH images\\images\\{}\r\n",
        "{} 0 1 0 0\n",
        "images_001/{}\t0\t1\n",
        "{},1,a/b\n",
        '"{}","Mass|Nodule"\n',
        "{};x\n",
    ],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_read_list_ignores_folders_quotes_and_further_fields(
    tmp_path: Path, line: str, mark: bytes
) -> None:
    names = ["00000001_000.png", "00000002_001.png", "00000013_000.png"]
    path = tmp_path / "list.txt"
    path.write_bytes(mark + "".join(line.format(name) for name in names).encode())
    assert read_list(path) == set(names)
    path.write_bytes(path.read_bytes().rstrip(b"\r\n"))
    assert read_list(path) == set(names)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_read_list_accepts_any_line_ends(tmp_path: Path, end: str) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(end.join(["a.png", "images_001/b.png 0 1 0", "c.png", ""]).encode())
    assert read_list(path) == {"a.png", "b.png", "c.png"}
