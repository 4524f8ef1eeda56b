"""Draw the import graph of the packages: the Mermaid block and the picture of docs/architecture.md.

    python docs/draw_architecture.py

Reads the syntax trees, runs none of the code. `tests/test_architecture.py` uses the same functions
and fails if the committed block does not match the code.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Dict, Iterable, Iterator, List, NamedTuple, Sequence, Set

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
PICTURE = ROOT / "docs" / "architecture.png"

#: Scripts outside the package that compose it.
SCRIPTS = ["train", "evaluate"]
#: Modules that every package may import; they import nothing of the package but each other.
GROUND = ["errors", "files", "console"]
#: Each imports only itself, those before it, and the ground.
ROAD = ["config", "data", "model", "engines", "training", "evaluation"]
#: Beside the road: import config, data, model and the ground; nothing on the road imports them.
LEAVES = ["planner", "synthetic", "dataset_report"]
#: Compose all packages; only commands import commands.
COMMANDS = [*SCRIPTS, "cli", "__main__"]


class Source(NamedTuple):
    """A module's dotted name and text."""

    name: str
    text: str

    @property
    def tree(self) -> ast.Module:
        """The syntax tree, parsed at each call."""
        return ast.parse(self.text)

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
    yield from _imports(source.tree, modules, for_types=False, in_function=False)


def _imports(
    node: ast.AST, modules: Set[str], *, for_types: bool, in_function: bool
) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, node.lineno, for_types, in_function)
    elif isinstance(node, ast.ImportFrom):
        base = "." * node.level + (node.module or "")
        for alias in node.names:
            inner = f"{base}.{alias.name}"
            yield Import(inner if inner in modules else base, node.lineno, for_types, in_function)
    else:
        for_types = for_types or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        )
        inside = in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, modules, for_types=for_types, in_function=inside)


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
            if item.module in modules:
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
    names = {"ground": ", ".join(GROUND), "commands": "train.py, evaluate.py, cli"}
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
    """Write the picture: the road in one column, the leaves in another, an arrow per import."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.4, 6.4))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, 7.4), ylim=(-0.6, len(ROAD) + 1.6))
    road = ["ground", *ROAD, "commands"]
    places = {box: (2.2, float(row)) for row, box in enumerate(road)}
    beside = zip(LEAVES, (5.9, 5.9, 5.9), (2.6, 3.5, 4.4))
    places.update({box: (x, y) for box, x, y in beside})
    colours = {"ground": "#e0e0e0", "commands": "#ffe4b8"}
    for box, (x, y) in places.items():
        default = "#cfe3f7" if box in ROAD else "#d8efd3"
        axes.text(
            *(x, y, texts[box]),
            ha="center",
            va="center",
            fontsize=11,
            bbox={"boxstyle": "round,pad=0.45", "fc": colours.get(box, default), "ec": "#555555"},
        )
    for box, targets in reduced(graph).items():
        for target in sorted(targets):
            _arrow(axes, places[box], places[target])
    axes.text(2.2, len(road) - 0.35, "the road", ha="center", fontsize=10, style="italic")
    axes.text(5.9, 5.05, "beside the road", ha="center", fontsize=10, style="italic")
    axes.text(
        *(0.2, -0.5, "An arrow means imports; arrows that others imply are left out."), fontsize=8.5
    )
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})


def _arrow(axes: object, start: Iterable[float], end: Iterable[float]) -> None:
    (x1, y1), (x2, y2) = start, end
    same_column = x1 == x2
    bend = 0.0 if not same_column or y1 - y2 < 1.5 else 0.45
    axes.annotate(  # type: ignore[attr-defined]
        "",
        xy=(x2, y2 + 0.2) if same_column and not bend else (x2 + (0.0 if bend else 0.6), y2 + 0.2),
        xytext=(x1, y1 - 0.22),
        arrowprops={
            "arrowstyle": "-|>",
            "color": "#666666",
            "shrinkA": 0,
            "shrinkB": 0,
            "connectionstyle": f"arc3,rad={bend}",
        },
    )


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
