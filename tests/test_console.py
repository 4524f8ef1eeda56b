"""Progress on a terminal and without one."""

import logging

import pytest

from cxr_vit import console
from cxr_vit.console import columns, progress


def test_progress_without_a_terminal_logs_a_line_every_30_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [1000.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: clock[0])
    caplog.set_level(logging.INFO, logger="cxr_vit")
    with progress("decoding images", done=100, total=1000) as advance:
        for seconds in (0, 10, 10, 11, 5):
            clock[0] += seconds
            advance(60)
    assert caplog.messages == ["decoding images: 340 of 1000, 8/s, 85 s left"]


@pytest.mark.parametrize(("done", "total"), [(0, 300), (100, 300), (300, 300)])
def test_progress_on_a_terminal_shows_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], done: int, total: int
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then assumes a terminal
    with progress("decoding images", done=done, total=total) as advance:
        for _ in range(done, total, 50):
            advance(50)
    assert "decoding images" in capsys.readouterr().err


def test_columns_are_aligned_left_then_right():
    rows = [["a", "bc", "1"], ["abc", "d", "23"]]
    assert columns(rows) == ["a    bc   1", "abc   d  23"]
    assert columns(rows, left=2) == ["a    bc   1", "abc  d   23"]
