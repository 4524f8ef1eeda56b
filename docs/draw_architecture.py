"""Draw the import graph of the packages: the Mermaid block and the picture of docs/architecture.md.

    python docs/draw_architecture.py

Reads the syntax trees, runs none of the code. `tests/test_architecture.py` uses the same functions
and fails if the committed block does not match the code.
"""

from __future__ import annotations

import ast
import re
from functools import lru_cache
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Sequence, Set, Tuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PICTURE = ROOT / "docs" / "architecture.png"

#: Scripts outside the package that compose it.
SCRIPTS = ["train", "evaluate"]
#: Modules that every package may import; they import nothing of the package but each other.
GROUND = ["errors", "files", "regular_files", "checkpoint_files", "console", "version", "web_page"]
#: Each imports only itself, those before it, and the ground.
ROAD = ["config", "data", "evaluation", "model", "engines", "training"]
#: Beside the road: import those up to model and the ground; nothing on the road imports them.
LEAVES = ["planner", "dataset_report", "saliency", "prediction"]
#: Compose all packages; only commands import commands.
COMMANDS = [*SCRIPTS, "cli", "commands", "__main__"]
#: Horizontal places in the picture, inches, and colours; the level gives the vertical place.
COLUMNS = {
    **{"commands": 4.2, "training": 4.2, "engines": 4.2, "config": 4.2, "ground": 4.2},
    **{"data": 4.2, "model": 4.2, "evaluation": 4.2},
    **{"dataset_report": 1.4, "planner": 7.0, "saliency": 6.6, "prediction": 1.6},
}
COLOURS = {"commands": "#ffe4b8", "road": "#cfe3f7", "leaf": "#d8efd3", "ground": "#e0e0e0"}


class Source(NamedTuple):
    """A module's dotted name and text."""

    name: str
    text: str

    @property
    def tree(self) -> ast.Module:
        """The syntax tree, which is shared: do not change it."""
        return _parse(self.text)

    @property
    def package(self) -> str:
        """`cxr_vit.data.labels` -> `data`; a module outside the packages is its own."""
        return package_of(self.name)


class Import(NamedTuple):
    """A module imported, and where."""

    module: str
    line: int
    for_types: bool
    in_function: bool


def package_of(module: str) -> str:
    """`cxr_vit.data.labels` -> `data`; a module outside the packages is its own."""
    return module.split(".")[1] if "." in module else module


def read_sources() -> List[Source]:
    """Return all modules of the package, and the scripts."""
    paths = [*(ROOT / "cxr_vit").rglob("*.py"), *(ROOT / f"{name}.py" for name in SCRIPTS)]
    sources = []
    for path in sorted(paths):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources.append(Source(name, path.read_text(encoding="utf-8")))
    return sources


def imports(source: Source, modules: Set[str]) -> Iterator[Import]:
    """Yield all imports, also those for types and in functions.

    `from package import name` yields `package.name` if that is one of `modules`, else `package`.
    """
    for base, name, *where in _statements(source.text):
        inner = f"{base}.{name}"
        yield Import(inner if name and inner in modules else base, *where)


@lru_cache(maxsize=None)
def _parse(text: str) -> ast.Module:
    return ast.parse(text)


@lru_cache(maxsize=None)
def _statements(text: str) -> List[Tuple[str, str, int, bool, bool]]:
    """Return what is imported: module, name (empty for `import module`), and where, as Import."""
    return list(_imports(_parse(text), for_types=False, in_function=False))


def _imports(
    node: ast.AST, *, for_types: bool, in_function: bool
) -> Iterator[Tuple[str, str, int, bool, bool]]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield alias.name, "", node.lineno, for_types, in_function
    elif isinstance(node, ast.ImportFrom):
        base = "." * node.level + (node.module or "")
        for alias in node.names:
            yield base, alias.name, node.lineno, for_types, in_function
    else:
        for_types = for_types or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        )
        inside = in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, for_types=for_types, in_function=inside)


def box_of(package: str) -> str:
    """Return the box of the picture that holds a package or module."""
    if package in GROUND:
        return "ground"
    return "commands" if package in COMMANDS else package


def package_graph(sources: Sequence[Source]) -> Dict[str, Set[str]]:
    """Return box -> boxes it imports, from the imports of all modules."""
    modules = {source.name for source in sources}
    graph: Dict[str, Set[str]] = {}
    for source in sources:
        if source.name == "cxr_vit":
            continue
        own = graph.setdefault(box_of(source.package), set())
        for item in imports(source, modules):
            if item.module in modules and item.module != "cxr_vit":  # the names of all packages
                own.add(box_of(package_of(item.module)))
    return {box: targets - {box} for box, targets in graph.items()}


def levels(graph: Dict[str, Set[str]]) -> Dict[str, int]:
    """Return box -> number of boxes in the longest chain of imports below it.

    Raises
    ------
    RecursionError
        If the graph has a cycle.
    """
    found: Dict[str, int] = {}

    def level(box: str) -> int:
        if box not in found:
            found[box] = max((level(target) + 1 for target in graph[box]), default=0)
        return found[box]

    return {box: level(box) for box in sorted(graph)}


def reduced(graph: Dict[str, Set[str]]) -> Dict[str, Set[str]]:
    """Leave out each arrow that a longer way implies."""

    def below(box: str) -> Set[str]:
        return set().union(graph[box], *(below(target) for target in graph[box]))

    return {
        box: targets - set().union(*(below(target) for target in targets))
        for box, targets in graph.items()
    }


def labels(graph: Dict[str, Set[str]]) -> Dict[str, str]:
    """Return box -> its text."""
    names = {"ground": ", ".join(GROUND), "commands": "train.py, evaluate.py, cli, commands"}
    return {box: names.get(box, box) for box in graph}


def mermaid(graph: Dict[str, Set[str]], texts: Dict[str, str]) -> str:
    """Return the graph as a Mermaid flowchart, top down, without implied arrows."""
    height, arrows = levels(graph), reduced(graph)
    boxes = sorted(graph, key=lambda box: (-height[box], box))
    lines = ["```mermaid", "flowchart TD"]
    lines += [f'    {box}["{texts[box]}"]' for box in boxes]
    lines += [f"    {box} --> {target}" for box in boxes for target in sorted(arrows[box])]
    return "\n".join([*lines, "```"])


def block_of_page(text: str) -> str:
    """Return the Mermaid block of the page."""
    found = re.search(r"```mermaid\n.*?```", text, flags=re.DOTALL)
    assert found is not None, f"{PAGE.name} has no Mermaid block"
    return found.group()


def draw(graph: Dict[str, Set[str]], texts: Dict[str, str]) -> None:
    """Write the picture: a row per level, an arrow per import that no longer way implies."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    height = levels(graph)
    figure = Figure(figsize=(8.4, 5.6))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, 8.4), ylim=(-1.0, max(height.values()) + 0.5))
    patches = {}
    for box, column in COLUMNS.items():
        kind = "leaf" if box in LEAVES else box if box in COLOURS else "road"
        style = {"boxstyle": "round,pad=0.5", "fc": COLOURS[kind], "ec": "#555555"}
        place = (column, height[box])
        text = axes.text(*place, texts[box], ha="center", va="center", fontsize=11, bbox=style)
        patches[box] = text.get_bbox_patch()
    for box, targets in reduced(graph).items():
        for target in sorted(targets):
            axes.annotate(
                "",
                xy=(COLUMNS[target], height[target]),
                xytext=(COLUMNS[box], height[box]),
                arrowprops={
                    **{"arrowstyle": "-|>", "color": "#666666", "zorder": 0},
                    **{"patchA": patches[box], "patchB": patches[target]},
                },
            )
    legend = (
        "Blue: the road. Green: beside it, imported by nothing on the road. An arrow means imports;"
        "\narrows that longer ways imply are left out."
    )
    axes.text(0.25, -0.85, legend, fontsize=9)
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})


def main() -> None:
    """Rewrite the block of the page, and draw the picture."""
    sources = read_sources()
    graph = package_graph(sources)
    texts = labels(graph)
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.replace(block_of_page(text), mermaid(graph, texts)), encoding="utf-8")
    draw(graph, texts)
    print(f"{max(levels(graph).values())} levels above the ground; wrote {PAGE} and {PICTURE}")


if __name__ == "__main__":
    main()
