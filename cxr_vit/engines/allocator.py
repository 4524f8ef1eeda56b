"""Keep the memory of a step for the next one, in huge pages, with the malloc of glibc."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import sys
from functools import lru_cache
from pathlib import Path

#: Parameters of mallopt (malloc.h), and an advice of madvise (linux/mman.h).
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_MADV_HUGEPAGE = 14
#: The largest thresholds that glibc accepts: the present one, and that of older versions.
_THRESHOLDS = (2**31 - 1, 32 * 2**20)
_DEFAULT_MMAP_MAX = 65_536
_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


@lru_cache(maxsize=None)
def keep_freed_memory() -> bool:
    """Make malloc keep what is freed; grow the heap once, in huge pages.

    By default glibc maps and unmaps each tensor of some megabytes, and the kernel clears its pages
    every time. Returns False, and changes nothing, where the C library is another one or where the
    environment sets it (`MALLOC_...`, `GLIBC_TUNABLES`).
    """
    if sys.platform != "linux" or _is_set_by_environment():
        return False
    with contextlib.suppress(ValueError, OSError, AttributeError):
        if (os.confstr("CS_GNU_LIBC_VERSION") or "").startswith("glibc"):
            libc = ctypes.CDLL(None)
            any(libc.mallopt(_MMAP_THRESHOLD, size) for size in _THRESHOLDS)
            libc.mallopt(_TRIM_THRESHOLD, -1)
            _grow_heap(libc, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)
            return True
    return False


def drop_freed_memory() -> None:
    """Give the freed memory of this process back, as far as glibc allows.

    A process that was forked shares the pages of its parent until the parent writes them: then the
    kernel copies them, and those that the parent keeps for its next step would be there twice.
    """
    with contextlib.suppress(OSError, AttributeError):  # another system or C library
        ctypes.CDLL(None).malloc_trim(0)


def _is_set_by_environment() -> bool:
    names = [name for name in os.environ if name.startswith("MALLOC_")]
    return bool(names) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")


def _addresses_are_limited() -> bool:
    """Whether addresses count as memory: with `ulimit -v` or `-d`, or by the kernel's setting."""
    limits = [resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA)]
    if any(limit != resource.RLIM_INFINITY for limit in limits):
        return True
    return _OVERCOMMIT.exists() and _OVERCOMMIT.read_text().strip() == "2"


def _grow_heap(libc: ctypes.CDLL, size: int) -> None:
    """Reserve addresses at the heap's end and ask for huge pages: memory is taken when used."""
    if _addresses_are_limited():
        return
    libc.sbrk.argtypes, libc.sbrk.restype = [ctypes.c_ssize_t], ctypes.c_size_t
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int]
    start = libc.sbrk(0)
    libc.mallopt(_MMAP_MAX, 0)
    block = libc.malloc(size)
    libc.mallopt(_MMAP_MAX, _DEFAULT_MMAP_MAX)
    page = os.sysconf("SC_PAGE_SIZE")
    start, end = -(-start // page) * page, libc.sbrk(0) // page * page
    if end > start:  # else another malloc is loaded, or a limit forbids it
        libc.madvise(start, end - start, _MADV_HUGEPAGE)
    libc.free(block)
