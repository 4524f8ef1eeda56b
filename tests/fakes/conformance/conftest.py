"""Fixtures: the stand-in alone, and both implementations of PopTorch."""

from __future__ import annotations

from typing import Any, Iterator, Tuple

import pytest

from fakes import loading

needs_front_end = pytest.mark.skipif(
    loading.available() is not None, reason=str(loading.available())
)


@pytest.fixture
def fake() -> Iterator[Tuple[Any, Any]]:
    with loading.stand_in() as modules:
        yield modules


@pytest.fixture(params=["stand-in", pytest.param("front end", marks=needs_front_end)])
def both(request: pytest.FixtureRequest) -> Iterator[Tuple[Any, Any]]:
    """The stand-in, then the real front end."""
    context = loading.stand_in if request.param == "stand-in" else loading.frontend
    with context() as modules:
        yield modules
