"""Rows of the result: what is said of labels without a threshold, and of hostile file names."""

from __future__ import annotations

from cxr_vit.prediction.rows import Decider, Row, TableRows


def test_table_says_among_how_many_labels_there_is_no_finding() -> None:
    decider = Decider(["Mass", "Hernia"], {"Mass": 0.5})
    row = Row("a.png", {"Mass": 0.25, "Hernia": 1.0}, {}, [], [], None, {})
    assert decider.never_found() == ["Hernia"]
    assert TableRows(decider).line(row) == (
        "a.png: no finding among 1 of 2 labels; highest Hernia 1.00, Mass 0.25\n"
    )
    assert TableRows(Decider(decider.labels)).line(row) == (
        "a.png: highest Hernia 1.00, Mass 0.25\n"
    )
