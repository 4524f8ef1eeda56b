"""read_bytes: regular files only, of a limited size."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from cxr_vit.regular_files import no_link, read_bytes, read_json, truncate


def reason(path: Path, limit: int = 100) -> str:
    with pytest.raises(OSError, match=r".") as caught:
        read_bytes(path, limit=limit)
    assert caught.value.strerror
    return caught.value.strerror


def test_a_file_up_to_the_limit_is_read(tmp_path: Path) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    link.symlink_to(path)
    for content in (b"", b"a" * 99, b"a" * 100):
        path.write_bytes(content)
        assert read_bytes(path, limit=100) == read_bytes(str(link), limit=100) == content
    path.write_bytes(b"a" * 101)
    assert reason(path) == "101 bytes, more than the limit of 100"


def test_a_sparse_file_over_the_limit_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 10**12)
    assert reason(path) == "1,000,000,000,000 bytes, more than the limit of 100"


def test_a_file_without_a_size_is_read_up_to_the_limit() -> None:
    path = Path("/proc/self/environ")
    if not path.is_file():
        pytest.skip("no /proc")
    assert path.stat().st_size == 0
    assert read_bytes(path, limit=10**6) == path.read_bytes()
    assert "more than the limit of 9" in reason(path, limit=9)


@pytest.mark.parametrize("linked", [False, True])
def test_a_named_pipe_does_not_block(tmp_path: Path, linked: bool) -> None:
    path = tmp_path / "pipe"
    os.mkfifo(path)
    if linked:
        path, target = tmp_path / "link", path
        path.symlink_to(target)
    assert reason(path) == "a named pipe, not a regular file"


def test_a_path_that_becomes_a_pipe_does_not_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, file = tmp_path / "pipe", tmp_path / "file"
    os.mkfifo(path)
    file.touch()
    status = file.stat()
    monkeypatch.setattr(Path, "stat", lambda path: status)
    assert reason(path) == "a named pipe, not a regular file"


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null"])
def test_a_link_to_a_device_is_not_read(tmp_path: Path, device: str) -> None:
    (tmp_path / "link").symlink_to(device)
    assert reason(tmp_path / "link") == "a device, not a regular file"


def test_a_socket_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the path of a socket must be short
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        assert reason(Path("socket")) == "a socket, not a regular file"


def test_other_errors_are_those_of_the_system(tmp_path: Path) -> None:
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    assert reason(tmp_path) == "Is a directory"
    assert reason(tmp_path / "absent") == "No such file or directory"
    assert "symbolic links" in reason(tmp_path / "itself")


@pytest.mark.parametrize("name", ["a\0b", "\ud800"])
def test_a_name_that_no_file_can_have_is_an_error_of_the_system(name: str) -> None:
    assert reason(Path(name)) == "no path has such a name"


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * 101)
    before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    for _ in range(5):
        reason(path)
    after = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").is_dir() else 0
    assert before == after


def test_json_object_is_returned(tmp_path: Path) -> None:
    (tmp_path / "file").write_text('{"a": [1, 2.5, null, "\u00e9"]}')
    assert read_json(tmp_path / "file", limit=100) == {"a": [1, 2.5, None, "\u00e9"]}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        *[("[" * 50_000, "nested too deeply"), ("[1]", "no JSON object"), ("", "Expecting value")],
        *[(f'{{"a": {number}}}', "no finite number") for number in ("NaN", "-Infinity", "1e999")],
        *[('{"a": "\\ud800"}', "surrogates not allowed"), ("{", "Expecting")],
    ],
)
def test_what_is_no_strict_json_is_a_value_error(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "file").write_text(text)
    with pytest.raises(ValueError, match=words):
        read_json(tmp_path / "file", limit=100_000)


@pytest.mark.parametrize("mode", ["rb", "r+b", "ab", "wb"])
def test_file_is_opened_at_its_own_path_only(tmp_path: Path, mode: str) -> None:
    path, link, pipe = tmp_path / "file", tmp_path / "link", tmp_path / "pipe"
    path.write_bytes(b"content")
    link.symlink_to(path)
    os.mkfifo(pipe)
    for other, words in ((link, "a symbolic link, not"), (pipe, "a named pipe, not")):
        with pytest.raises(OSError, match=rf"{words} a regular file: '{other}'"):
            open(other, mode, opener=no_link)  # noqa: SIM115
    assert path.read_bytes() == b"content"
    with open(path, mode, opener=no_link):
        pass


def test_path_that_becomes_a_link_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, link = tmp_path / "file", tmp_path / "link"
    path.write_bytes(b"content")
    link.symlink_to(path)
    monkeypatch.setattr(os, "lstat", os.stat)  # as if it were a file at that moment
    with pytest.raises(OSError, match="symbolic links"):
        open(link, "wb", opener=no_link)  # noqa: SIM115
    with pytest.raises(OSError, match="symbolic links"):
        truncate(link, 0)
    assert path.read_bytes() == b"content"
