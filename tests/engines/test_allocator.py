"""Freed memory is kept, in huge pages, where malloc is glibc's and the environment allows it."""

import os
import resource
import sys
from pathlib import Path

import pytest

from cxr_vit.engines import allocator
from cxr_vit.engines.allocator import keep_freed_memory

GLIBC = sys.platform == "linux" and "CS_GNU_LIBC_VERSION" in os.confstr_names

change = keep_freed_memory.__wrapped__


@pytest.fixture
def unset(monkeypatch):
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUN"))]:
        monkeypatch.delenv(name)


def heap_flags():
    """Return the flags of each part of the heap (man 5 proc, smaps)."""
    maps = Path("/proc/self/smaps").read_text().split("[heap]")[1:]
    return [part.split("VmFlags:")[1].split("\n")[0].split() for part in maps]


@pytest.mark.skipif(not GLIBC, reason="needs glibc")
def test_heap_gets_huge_pages(unset):
    assert keep_freed_memory()
    assert any("hg" in flags for flags in heap_flags())


@pytest.mark.parametrize(
    ("name", "value"),
    [("MALLOC_TRIM_THRESHOLD_", "1000000"), ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")],
)
def test_environment_wins(unset, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert not change()


def test_other_system_is_left_alone(unset, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not change()


@pytest.mark.skipif(not GLIBC, reason="needs glibc")
@pytest.mark.parametrize("limited", [None, resource.RLIMIT_AS, resource.RLIMIT_DATA])
def test_no_addresses_are_reserved_where_they_count_as_memory(monkeypatch, tmp_path, limited):
    limits = {limited: 2**40}
    monkeypatch.setattr(
        resource, "getrlimit", lambda kind: (limits.get(kind, resource.RLIM_INFINITY),) * 2
    )
    monkeypatch.setattr(allocator, "_OVERCOMMIT", tmp_path / "overcommit")
    (tmp_path / "overcommit").write_text("2\n" if limited is None else "0\n")

    class Library:
        def __getattr__(self, name):
            raise AssertionError(f"{name} is called")

    allocator._grow_heap(Library(), 2**20)
