"""Rows of the result: what is said of labels without a threshold, and of hostile file names."""

from __future__ import annotations

from cxr_vit.prediction.rows import CsvRows, Decider, JsonRows, Row, TableRows, plain_path


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


def test_each_path_has_a_name_of_its_own_that_a_resumed_run_finds() -> None:
    paths = [
        "a\nb.png",
        "a\\nb.png",
        "a\\\\nb.png",
        "\udcff.png",
        "\\udcff.png",
        "=a.png",
        "'=a.png",
    ]
    names = [plain_path(path) for path in paths]
    assert len(set(names)) == len(paths)
    assert [name.encode().decode("unicode_escape") for name in names] == paths
    decider = Decider(["Mass"])
    for rows in (CsvRows(decider, []), JsonRows(decider)):
        lines = [rows.line(Row(name, {"Mass": 0.5}, {}, [], [], None, {})) for name in names]
        assert [rows.done(line).image for line in lines] == names
