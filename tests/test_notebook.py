"""The notebook: its pair is in sync, has no outputs, and runs without an error."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Dict, Iterator

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "notebooks" / "chest_xray_walkthrough.py"
NOTEBOOK = SOURCE.with_suffix(".ipynb")
#: Lines of the first cell, which the tests change.
ROOT_LINE, SIZE = "ROOT = None", "IMAGES = 2000"
FIGURES = {
    "images", "prevalence", "plan_timeline", "plan_memory", "training", "roc", "predictions",
    "batches",
}  # fmt: skip
TABLES = 7
#: Appended to the notebook: prints what the tests compare.
FACTS = """
import json
print(json.dumps({
    "shared": leaks["patient in training, %"].astype(float).tolist(),
    "without_looking": leaks["AUROC without looking"].astype(float).tolist(),
    "losses": curve.losses,
    "steps": trainer.global_step,
    "auroc": report["auroc_macro"],
    "differences": same["largest difference from the run"].astype(float).tolist(),
    "probabilities": list(probabilities.shape),
}))
"""


@pytest.fixture(autouse=True)
def jupyter_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jupyter's new paths: with the old ones, older versions warn."""
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")


def read(path: Path) -> Any:
    import jupytext

    return jupytext.read(path)


def execute(folder: Path, monkeypatch: pytest.MonkeyPatch, lines: Dict[str, str]) -> Any:
    """Execute the notebook in a folder outside the checkout, with some lines changed."""
    import nbformat
    from nbclient import NotebookClient

    notebook = read(NOTEBOOK)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for old, new in lines.items():
        assert first.source.count(old) == 1
        first.source = first.source.replace(old, new)
    notebook.cells.append(nbformat.v4.new_code_cell(FACTS))
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    resources = {"metadata": {"path": str(folder)}}
    return NotebookClient(notebook, timeout=300, resources=resources).execute()


def outputs(notebook: Any) -> Iterator[Any]:
    for cell in notebook.cells:
        yield from cell.get("outputs", [])


def pictures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def tables(notebook: Any) -> int:
    return sum(
        'class="dataframe"' in output.get("data", {}).get("text/html", "")
        for output in outputs(notebook)
    )


def facts(notebook: Any) -> Dict[str, Any]:
    """Return what the last cell, `FACTS`, has printed."""
    values: Dict[str, Any] = json.loads(notebook.cells[-1].outputs[-1]["text"])
    return values


def test_pair_is_in_sync():
    source, notebook = read(SOURCE), read(NOTEBOOK)
    assert len(source.cells) > 40
    pairs = [[(cell.cell_type, cell.source) for cell in pair.cells] for pair in (source, notebook)]
    assert pairs[0] == pairs[1], "run: jupytext --sync notebooks/chest_xray_walkthrough.py"


def test_committed_notebook_has_no_outputs():
    cells = [cell for cell in read(NOTEBOOK).cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in cells if cell.outputs] == []
    assert {cell.execution_count for cell in cells} == {None}


@pytest.mark.slow
def test_notebook_runs(tmp_path, monkeypatch):
    notebook = execute(tmp_path, monkeypatch, {SIZE: "IMAGES = 240"})
    found = facts(notebook)
    figures = tmp_path / "runs" / "notebook" / "figures"
    assert {path.stem for path in figures.iterdir()} == FIGURES
    assert pictures(notebook) == len(FIGURES)
    assert tables(notebook) == TABLES
    assert found["shared"][0] > 50 and found["shared"][1] == 0
    assert found["without_looking"][0] > 0.6 and found["without_looking"][1] == 0.5
    assert len(found["losses"]) == found["steps"] == 30
    assert found["auroc"] > 0.6
    assert len(found["differences"]) == 5 and max(found["differences"]) < 1e-6
    assert found["probabilities"] == [4, 14]
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


@pytest.mark.exhaustive
@pytest.mark.slow
def test_one_line_switches_to_other_images(tmp_path, monkeypatch, sample_root):
    """A folder in NIH's layout; nothing is written into it."""
    root = shutil.copytree(sample_root, tmp_path / "nih", ignore=shutil.ignore_patterns("cxr_*"))
    before = sorted(root.rglob("*"))
    work = tmp_path / "work"
    work.mkdir()
    notebook = execute(work, monkeypatch, {ROOT_LINE: f"ROOT = {str(root)!r}", SIZE: "IMAGES = 20"})
    assert pictures(notebook) == len(FIGURES)
    assert len(facts(notebook)["losses"]) == 8
    assert sorted(root.rglob("*")) == before
    assert [path.name for path in work.iterdir()] == ["runs"]
