import fcntl
import json
import os
import subprocess
import sys
import threading
import time

import pytest

from cxr_vit import files
from cxr_vit.files import Locked, is_lock_file, lock, remove, replacing, write_text

HOLDER = """
import sys, time
from pathlib import Path
from cxr_vit.files import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".lock"


@pytest.fixture
def holder(path, repository):
    """Another process that holds the lock."""
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, cwd=str(repository), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


@pytest.fixture
def without_locks(monkeypatch):
    """Let the file system of this process have no locks."""

    def refuse(*arguments):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("kind", ["locks", "no locks"])
def test_error_names_the_process_that_holds_the_lock(path, holder, kind, request):
    if kind == "no locks":
        request.getfixturevalue("without_locks")
    words = rf"^process {holder.pid} on {os.uname().nodename}$"
    with pytest.raises(Locked, match=words), lock(path, timeout_s=0.1):
        pass


@pytest.mark.parametrize("kind", ["locks", "no locks"])
def test_lock_of_a_killed_process_is_taken_over(path, holder, kind, request, caplog):
    holder.kill()
    holder.wait()
    assert is_lock_file(path)
    if kind == "no locks":
        request.getfixturevalue("without_locks")
    with lock(path, timeout_s=0.1):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not is_lock_file(path), "its owner is alive and does not hold it"
    words = f"taking over from process {holder.pid} on {os.uname().nodename}, which has ended"
    assert (words in caplog.text) == (kind == "no locks")


def test_process_with_the_number_of_a_killed_one_is_another(path, without_locks):
    owner = {"host": os.uname().nodename, "pid": os.getpid(), "started": "1"}
    path.write_text(json.dumps(owner), encoding="utf-8")
    with lock(path, timeout_s=0.1):
        pass


def test_process_of_another_host_may_be_alive(path, without_locks):
    owner = {"host": "elsewhere", "pid": os.getpid(), "started": "1"}
    path.write_text(json.dumps(owner), encoding="utf-8")
    with pytest.raises(Locked, match="on elsewhere"), lock(path, timeout_s=0.1):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", '{"host": 1}', "\0" * 10, "[" * 4000])
def test_other_content_names_no_owner(path, without_locks, text):
    path.write_text(text, encoding="utf-8")
    with lock(path, timeout_s=0.1):
        pass


def test_waiting_process_does_not_lock_a_removed_file(path):
    # The holder removes the file at the end, and a third process makes a new one.
    events = []

    def wait():
        with lock(path, on_wait=lambda: events.append("waits")):
            events.append("second")

    with lock(path):
        thread = threading.Thread(target=wait)
        thread.start()
        while events != ["waits"]:
            time.sleep(0.01)
        path.unlink()
        with lock(path, timeout_s=0):
            events.append("third")
            time.sleep(3 * files._POLL_S)
            assert events == ["waits", "third"], "two processes would write the run"
    thread.join()
    assert events == ["waits", "third", "second"]


@pytest.mark.parametrize("kind", ["locks", "no locks"])
def test_only_one_of_many_holds_the_lock(path, kind, request):
    if kind == "no locks":
        request.getfixturevalue("without_locks")
    inside, most, refused = [], [], []

    def take():
        try:
            with lock(path, timeout_s=0):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.5)
                inside.pop()
        except Locked as error:
            refused.append(error)

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
        if kind == "no locks":
            time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert max(most, default=0) <= 1
    assert refused


def test_anything_can_be_removed(tmp_path):
    os.mkfifo(str(tmp_path / "pipe"))
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "folder" / "folder").mkdir(parents=True)
    (tmp_path / "file").touch()
    for name in ("pipe", "link", "folder", "file", "absent"):
        remove(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_interrupted_write_keeps_the_old_content(tmp_path):
    file = tmp_path / "a.txt"
    write_text(file, "old")

    def fail():
        with replacing(file) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert file.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
