"""The limits find what they are for."""

from __future__ import annotations

import mmap
import time

import numpy as np
import pytest

from cxr_vit.errors import DataError

from . import guard
from .guard import within_limits


def fails(error):
    def function():
        raise error

    return function


def test_result_and_refusal_are_returned():
    refusal = DataError("a reason")
    assert within_limits(abs, -3) == 3
    assert within_limits(fails(refusal)) is refusal


@pytest.mark.parametrize("error", [KeyError("a"), RecursionError(), MemoryError(), OSError("a")])
def test_other_exception_fails(error):
    with pytest.raises(type(error)):
        within_limits(fails(error))


@pytest.mark.parametrize("text", ["", " \n", "x\nTraceback (most recent call last):\n"])
def test_message_that_says_nothing_fails(text):
    with pytest.raises(AssertionError):
        within_limits(fails(DataError(text)))


def test_slow_reader_fails_though_it_catches_every_exception(monkeypatch):
    monkeypatch.setattr(guard, "SECONDS", 0.05)

    def read():
        try:
            time.sleep(10)
        except Exception as error:
            raise DataError("damaged") from error

    with pytest.raises(AssertionError, match="still running"):
        within_limits(read)


def read_large():
    # Memory of its own: an engine in this process may have kept more than that for malloc.
    with mmap.mmap(-1, 2**26) as memory:
        memory.write(bytes(2**26))


def test_large_reader_fails(monkeypatch):
    monkeypatch.setattr(guard, "MEBIBYTES", 30)
    assert within_limits(lambda: int(np.ones(2**20, np.uint8).sum())) == 2**20
    with pytest.raises(AssertionError, match="MiB"):
        within_limits(read_large)
