"""read_text, read_list and check_data_root. Invalid text files are in test_nih_records.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Callable, Dict, List, Optional

import pytest

from cxr_vit.config.data_sections import DataSection
from cxr_vit.data.text_files import check_data_root, read_list, read_text
from cxr_vit.errors import DataError


def test_read_text_drops_the_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfmit Umlaut: \xc3\xa4")
    assert read_text(path) == "mit Umlaut: ä"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.csv: cannot be read \(No such file"):
        read_text(tmp_path / "absent.csv")


@pytest.mark.parametrize("read", [read_text, read_list])
def test_a_pipe_and_a_device_are_not_read(tmp_path: Path, read: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / "pipe.csv")
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    for name, kind in (("pipe.csv", "a named pipe"), ("zero.csv", "a device")):
        with pytest.raises(DataError, match=rf"{name}: cannot be read \({kind}, not a .* Give the"):
            read(tmp_path / name)


def test_a_file_of_too_many_bytes_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a")
    os.truncate(path, 50_000_001)
    with pytest.raises(DataError, match=r"50,000,001 bytes, more than the limit .* Give the file"):
        read_text(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a" * 30_001, "1 lines, the longest of 30,001 bytes"),
        ("a.png\n" + "\n" * 2_000_000, "2,000,001 lines, the longest of 6 bytes"),
        ("a\r" * 2_000_001, "2,000,001 lines"),
    ],
    ids=["long", "empty", "of an old Mac"],
)
def test_a_file_of_long_lines_or_too_many_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    (tmp_path / "a.csv").write_bytes(text.encode())
    with pytest.raises(DataError, match=message):
        read_text(tmp_path / "a.csv")


@pytest.mark.parametrize("run", ['"', " ", "\t", "/", "/ ", "\\"])
def test_a_line_of_marks_takes_no_quadratic_time(tmp_path: Path, run: str) -> None:
    path = tmp_path / "list.txt"
    path.write_text((run * (20_000 // len(run)) + ",\n") * 300 + "a.png\n")
    assert read_list(path) == {"a.png"}


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
@pytest.mark.parametrize(
    "names",
    [
        ["00000001_000.png", "00000002_001.png", "00000013_000.png"],
        ["00000003 (001).png", "Dr. Jones 1.dcm", "a.png copy.JPG"],
    ],
    ids=["NIH's", "with blanks"],
)
def test_read_list_ignores_quotes_and_further_fields(
    tmp_path: Path, line: str, names: List[str], mark: bytes
) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(mark + "".join(line.format(name) for name in names).encode())
    folder = line.partition("{}")[0].strip('"')
    assert read_list(path) == {folder + name for name in names}
    path.write_bytes(path.read_bytes().rstrip(b"\r\n"))
    assert read_list(path) == {folder + name for name in names}


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("patient 12 left", "patient 12 left"),
        ("1.2.840.10008\t1", "1.2.840.10008"),
        ('"a, b; c.png",1', "a, b; c.png"),
        ("  a.png  ", "a.png"),
        ("r\u00f6ntgen bild.png 1 0", "r\u00f6ntgen bild.png"),
    ],
)
def test_read_list_keeps_names_without_extension_and_quoted_commas(
    tmp_path: Path, line: str, name: str
) -> None:
    (tmp_path / "list.txt").write_text(f"{line}\n", encoding="utf-8")
    assert read_list(tmp_path / "list.txt") == {name}


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_read_list_accepts_any_line_ends(tmp_path: Path, end: str) -> None:
    path = tmp_path / "list.txt"
    path.write_bytes(end.join(["a.png", "images_001/b.png 0 1 0", "c.png", ""]).encode())
    assert read_list(path) == {"a.png", "images_001/b.png", "c.png"}


def test_a_complete_root_passes(tmp_path: Path) -> None:
    (tmp_path / "Data_Entry_2017_v2020.csv").touch()
    check_data_root(DataSection(root=str(tmp_path)))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"root": "{}/absent"}, r"data\.root=.*absent is not a folder"),
        ({"root": "{}/some.csv", "sample_images": 20}, r"data\.root=.*some\.csv is not a folder"),
        ({"root": "{}", "sample_images": 20}, r"no label CSV: looked for .*/Data_Entry_2017"),
        ({"root": "{}", "csv": "{}/absent.csv"}, r"data\.csv=.*absent\.csv: no such file"),
        (
            {"root": "{}", "csv": "{}/some.csv", "test_list": "{}/absent.txt"},
            r"data\.test_list=.*absent\.txt: no such file",
        ),
    ],
)
def test_an_incomplete_root_is_refused(tmp_path: Path, settings: dict, message: str) -> None:
    (tmp_path / "some.csv").touch()
    texts = {
        key: value.format(tmp_path) if isinstance(value, str) else value
        for key, value in settings.items()
    }
    with pytest.raises(DataError, match=message):
        check_data_root(DataSection(**texts))


SPECIAL: Dict[str, Callable[[Path], None]] = {
    "a named pipe": os.mkfifo,
    "a folder": Path.mkdir,
    "a link to itself": lambda path: path.symlink_to(path),
    "a link to none": lambda path: path.symlink_to(path.parent / "absent"),
    "a device": lambda path: path.symlink_to("/dev/null"),
}


@pytest.mark.parametrize("kind", SPECIAL)
@pytest.mark.parametrize(
    ("name", "later", "key"),
    [
        ("Data_Entry_2017_v2020.csv", "Data_Entry_2017.csv", "csv"),
        ("train_val_list.txt", "train_list.txt", "train_list"),
        ("test_list.txt", None, "test_list"),
    ],
)
def test_a_special_file_of_a_known_name_is_not_passed_over(
    tmp_path: Path, kind: str, name: str, later: Optional[str], key: str
) -> None:
    SPECIAL[kind](tmp_path / name)
    for other in filter(None, (later, "sample_labels.csv")):
        (tmp_path / other).touch()
    with pytest.raises(DataError, match=rf"/{name}: .*not a regular file.* or set data\.{key}\."):
        check_data_root(DataSection(root=str(tmp_path)))
    given = DataSection(root=str(tmp_path), **{key: str(tmp_path / "sample_labels.csv")})
    check_data_root(given)


def test_a_sample_may_be_written_later(tmp_path: Path) -> None:
    check_data_root(DataSection(root=str(tmp_path / "absent"), sample_images=20))
    with pytest.raises(DataError, match="is not a folder"):
        check_data_root(DataSection(root=str(tmp_path / "absent")))


def test_the_root_is_checked_before_slow_imports(tmp_path: Path) -> None:
    code = """
import sys, time
from cxr_vit.config.data_sections import DataSection
started = time.perf_counter()
from cxr_vit.data.text_files import check_data_root
from cxr_vit.errors import DataError
try:
    check_data_root(DataSection(root=sys.argv[1]))
except DataError:
    print(sorted({"torch", "pandas", "transformers"} & set(sys.modules)))
    print(time.perf_counter() - started)
"""
    command = [sys.executable, "-c", code, str(tmp_path / "absent")]
    modules, seconds = subprocess.check_output(command, encoding="utf-8").splitlines()
    assert modules == "[]"
    assert float(seconds) < 1
