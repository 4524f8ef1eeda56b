"""The shape of the code (design.md section 1), read from its syntax trees.

Every rule is a function from source files to the list of places that break it, so that it can be
tried on a bad snippet as well as on the code.
"""

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Sequence, Set

import pytest

ROOT = Path(__file__).parents[1]
#: Each imports only from itself and those to its left.
ORDER = ["config", "data", "model", "planner", "engines", "training", "evaluation"]
ROOTS = ["train", "evaluate"]
#: These import nothing of the package.
ANYWHERE = ("cxr_vit.errors", "cxr_vit.engines.processes")
MAX_FILE, MAX_FUNCTION, MAX_ROOT = 350, 60, 100

POPTORCH = {
    "cxr_vit.engines.ipu.engine",
    "cxr_vit.engines.ipu.graphs",
    "cxr_vit.engines.ipu.options",
}
#: These need a newer torch than the IPU's.
PIPELINING = {"cxr_vit.engines.pipeline_engine"}
DISTRIBUTED = {*PIPELINING, "cxr_vit.engines.process_group"}
HUGGING_FACE = {"cxr_vit.model.vit"}

#: Attributes of Hugging Face's ViT, in 4.x or 5.x, that nothing of ours is called.
HUGGING_FACE_ATTRIBUTES = {
    *("vit", "encoder", "embeddings", "patch_embeddings", "cls_token", "mask_token"),
    *("position_embeddings", "pooler", "layernorm", "layernorm_before", "layernorm_after"),
    *("classifier", "intermediate", "q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "dense"),
}
#: Its parameter names, where the versions differ.
HUGGING_FACE_NAMES = re.compile(
    r"vit\.layers|vit\.encoder|encoder\.layer|[qkvo]_proj|attention\.attention|attention\.output"
    r"|intermediate\.dense|output\.dense|mlp\.fc[12]|layernorm_(before|after)"
)


class Source(NamedTuple):
    """A module's dotted name and text."""

    name: str
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def package(self) -> str:
        """`cxr_vit.data.labels` -> `data`; a module at the top is its own package."""
        return self.name.split(".")[1] if "." in self.name else self.name


def read_sources() -> List[Source]:
    paths = [*(ROOT / "cxr_vit").rglob("*.py"), *(ROOT / f"{name}.py" for name in ROOTS)]
    sources = []
    for path in sorted(paths):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources.append(Source(name, path.read_text(encoding="utf-8")))
    return sources


SOURCES = read_sources()
PACKAGE = [source for source in SOURCES if source.name not in ROOTS]
MODULES = {source.name for source in SOURCES}


def snippet(text: str, name: str = "cxr_vit.data.bad") -> List[Source]:
    return [Source(name, text)]


def test_the_code_is_found():
    # else every rule below would hold
    assert {"cxr_vit", "cxr_vit.config.loader", "cxr_vit.model.vit", "train"} <= MODULES
    assert len(SOURCES) > 30


# Imports


class Import(NamedTuple):
    """A module imported, and how."""

    module: str
    line: int
    for_types: bool
    in_function: bool


def imports(source: Source, modules: Set[str]) -> Iterator[Import]:
    """Find all imports; `from package import module` is one of the module."""
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
    elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
        for child in node.body:
            yield from _imports(child, modules, for_types=True, in_function=in_function)
        for child in node.orelse:
            yield from _imports(child, modules, for_types=for_types, in_function=in_function)
    else:
        inside = in_function or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for child in ast.iter_child_nodes(node):
            yield from _imports(child, modules, for_types=for_types, in_function=inside)


def imports_against_the_order(sources: Sequence[Source]) -> List[str]:
    found = []
    for source in sources:
        if source.package not in ORDER:
            continue
        allowed = [f"cxr_vit.{name}" for name in ORDER[: ORDER.index(source.package) + 1]]
        for item in imports(source, MODULES):
            if item.module.split(".")[0] not in ("cxr_vit", "", *ROOTS):
                continue
            inside = item.module.startswith(tuple(f"{name}." for name in allowed))
            if not inside and item.module not in (*allowed, *ANYWHERE):
                found.append(f"{source.name}:{item.line}: {item.module}")
    return found


def test_every_package_has_a_place_in_the_order():
    packages = {path.parent.name for path in (ROOT / "cxr_vit").glob("*/__init__.py")}
    assert packages - set(ORDER) == set()


def test_packages_import_only_from_their_left():
    assert imports_against_the_order(SOURCES) == []


@pytest.mark.parametrize(
    "text",
    [
        "from cxr_vit.config.plans import StagePlan",
        "import cxr_vit.training.trainer",
        "from cxr_vit import model",
        "from cxr_vit.cli import run",
        "from . import labels",
        "def f():\n    from cxr_vit.engines.base import Engine",
        "if TYPE_CHECKING:\n    from cxr_vit.engines.base import Engine",
        "import train",
    ],
)
def test_import_from_the_right_is_noticed(text):
    assert len(imports_against_the_order(snippet(text))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "from cxr_vit.config.schema import Config",
        "from cxr_vit.config import Config",
        "from cxr_vit.data.labels import FINDINGS",
        "from cxr_vit.errors import DataError",
        "import trainingless",
    ],
)
def test_import_from_the_left_is_fine(text):
    assert imports_against_the_order(snippet(text)) == []


def test_errors_import_nothing_of_the_package():
    errors = next(source for source in SOURCES if source.name == "cxr_vit.errors")
    assert [item for item in imports(errors, MODULES) if item.module.startswith("cxr_vit")] == []


def import_cycle(sources: Sequence[Source]) -> Optional[List[str]]:
    """Return the first cycle of imports that run when a module is loaded, or None."""
    modules = {source.name for source in sources}
    edges: Dict[str, List[str]] = {
        source.name: [
            item.module
            for item in imports(source, modules)
            if item.module in modules and not item.for_types and not item.in_function
        ]
        for source in sources
    }
    done: Set[str] = set()

    def visit(name: str, path: List[str]) -> Optional[List[str]]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for other in edges[name]:
            cycle = visit(other, [*path, name])
            if cycle:
                return cycle
        done.add(name)
        return None

    return next((cycle for cycle in (visit(name, []) for name in edges) if cycle), None)


def test_modules_import_in_no_cycle():
    assert import_cycle(SOURCES) is None


def test_cycle_is_noticed():
    sources = [Source("a", "import b"), Source("b", "import c"), Source("c", "from a import x")]
    assert import_cycle(sources) == ["a", "b", "c", "a"]


@pytest.mark.parametrize(
    "text", ["def f():\n    import a", "if TYPE_CHECKING:\n    import a", "import elsewhere"]
)
def test_late_import_is_no_cycle(text):
    assert import_cycle([Source("a", "import b"), Source("b", text)]) is None


# What stands in one file only


def imports_of(library: str, sources: Sequence[Source], *, anywhere: Set[str]) -> List[str]:
    """Find a library's imports and uses by dotted name outside the modules `anywhere`."""
    found = []
    for source in sources:
        if source.name in anywhere:
            continue
        found += [
            f"{source.name}:{item.line}"
            for item in imports(source, {library})
            if item.module == library or item.module.startswith(f"{library}.")
        ]
        if "." in library:
            found += [
                f"{source.name}:{node.lineno}"
                for node in ast.walk(source.tree)
                if isinstance(node, ast.Attribute) and _dotted(node) == library
            ]
    return found


def _dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def test_poptorch_is_imported_by_its_engine_alone():
    assert imports_of("poptorch", SOURCES, anywhere=POPTORCH) == []


def poptorch_when_loaded(sources: Sequence[Source]) -> List[str]:
    return [
        f"{source.name}:{item.line}"
        for source in sources
        for item in imports(source, MODULES)
        if item.module.split(".")[0] == "poptorch" and not (item.in_function or item.for_types)
    ]


def test_poptorch_is_imported_inside_functions():
    assert poptorch_when_loaded(SOURCES) == []


def test_poptorch_at_the_top_of_a_file_is_noticed():
    assert poptorch_when_loaded(snippet("import poptorch")) != []
    assert poptorch_when_loaded(snippet("def f():\n    import poptorch")) == []


def test_torch_distributed_is_used_by_the_engines_of_several_processes_alone():
    assert imports_of("torch.distributed", SOURCES, anywhere=DISTRIBUTED) == []


def pipelining_when_loaded(sources: Sequence[Source]) -> List[str]:
    return [
        f"{source.name}:{item.line}"
        for source in sources
        if source.name not in PIPELINING
        for item in imports(source, MODULES)
        if item.module in PIPELINING and not (item.in_function or item.for_types)
    ]


def test_the_pipeline_engine_is_imported_inside_functions():
    assert pipelining_when_loaded(SOURCES) == []


def test_the_pipeline_engine_at_the_top_of_a_file_is_noticed():
    text = "from cxr_vit.engines.pipeline_engine import PipelineEngine"
    assert pipelining_when_loaded(snippet(text)) != []
    assert pipelining_when_loaded(snippet(f"def f():\n    {text}")) == []


def test_what_may_be_imported_anywhere_imports_nothing_of_the_package():
    found = [
        item.module
        for source in SOURCES
        if source.name in ANYWHERE
        for item in imports(source, MODULES)
    ]
    assert found and not [module for module in found if module.startswith("cxr_vit")]


@pytest.mark.parametrize(
    ("library", "text"),
    [
        ("poptorch", "import poptorch"),
        ("poptorch", "def f():\n    from poptorch import Options"),
        ("torch.distributed", "import torch.distributed as dist"),
        ("torch.distributed", "from torch import distributed"),
        ("torch.distributed", "from torch.distributed.pipelining import PipelineStage"),
        ("torch.distributed", "import torch\ntorch.distributed.init_process_group()"),
    ],
)
def test_library_in_the_wrong_file_is_noticed(library, text):
    assert len(imports_of(library, snippet(text), anywhere=set())) == 1
    assert imports_of(library, snippet(text), anywhere={"cxr_vit.data.bad"}) == []


def hugging_face_names(sources: Sequence[Source]) -> List[str]:
    """Find Hugging Face's attributes, and parameter names that its versions spell differently."""
    found = []
    for source in sources:
        tree = source.tree
        documentation = _docstrings(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in HUGGING_FACE_ATTRIBUTES:
                found.append(f"{source.name}:{node.lineno}: .{node.attr}")
            elif (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and node not in documentation
                and HUGGING_FACE_NAMES.search(node.value)
            ):
                found.append(f"{source.name}:{node.lineno}: {node.value!r}")
    return found


def _docstrings(tree: ast.Module) -> Set[ast.AST]:
    """Find the texts that stand for themselves: docstrings."""
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def test_only_vit_knows_hugging_faces_names():
    assert hugging_face_names([s for s in SOURCES if s.name not in HUGGING_FACE]) == []


def test_vit_has_the_names_that_are_looked_for():
    vit = [source for source in SOURCES if source.name in HUGGING_FACE]
    found = "\n".join(hugging_face_names(vit))
    assert all(name in found for name in (".encoder", ".layernorm", "vit.layers", "q_proj"))


@pytest.mark.parametrize(
    "text",
    [
        "layers = model.vit.layers",
        "trunk.encoder.layer[0]",
        "name.startswith('vit.encoder.layer.')",
        "layer.attention.q_proj",
        "prefix = f'vit.layers.{index}'",
    ],
)
def test_hugging_faces_name_is_noticed(text):
    assert hugging_face_names(snippet(text)) != []


def test_own_name_and_docstring_are_fine():
    text = '"""Holds `vit.encoder.layer`."""\nplan.layers(stage)\n'
    assert hugging_face_names(snippet(text)) == []


# Grammar and size


def newer_grammar(source: Source) -> Optional[str]:
    try:
        ast.parse(source.text, feature_version=(3, 8))
    except SyntaxError as error:
        return f"{source.name}:{error.lineno}: {error.msg}"
    return None


def test_every_file_is_python_38():
    assert [problem for problem in map(newer_grammar, SOURCES) if problem] == []


def test_newer_grammar_is_noticed():
    text = "match x:\n    case 1:\n        pass\n"
    assert newer_grammar(Source("bad", text)) is not None


def long_files(sources: Sequence[Source]) -> List[str]:
    found = []
    for source in sources:
        lines = len(source.text.splitlines())
        if lines > (MAX_ROOT if source.name in ROOTS else MAX_FILE):
            found.append(f"{source.name}: {lines} lines")
    return found


def test_files_are_short():
    assert long_files(SOURCES) == []


def test_long_file_is_noticed():
    assert long_files(snippet("x\n" * MAX_FILE)) == []
    assert long_files(snippet("x\n" * (MAX_FILE + 1))) != []
    assert long_files(snippet("x\n" * (MAX_ROOT + 1), "train")) != []


def long_functions(sources: Sequence[Source]) -> List[str]:
    return [
        f"{source.name}:{node.lineno}: {node.name}, {node.end_lineno - node.lineno + 1} lines"
        for source in sources
        for node in ast.walk(source.tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and node.end_lineno is not None
        and node.end_lineno - node.lineno + 1 > MAX_FUNCTION
    ]


def test_functions_are_short():
    assert long_functions(SOURCES) == []


def test_long_function_is_noticed():
    assert long_functions(snippet("def f():\n" + "    x\n" * (MAX_FUNCTION - 1))) == []
    assert long_functions(snippet("def f():\n" + "    x\n" * MAX_FUNCTION)) != []
    assert long_functions(snippet("class A:\n  def f():\n" + "    x\n" * MAX_FUNCTION)) != []


# What reads well


def undocumented(sources: Sequence[Source]) -> List[str]:
    """Find public functions, classes and methods without a docstring, and modules."""
    found = []
    for source in sources:
        if not ast.get_docstring(source.tree):
            found.append(source.name)
        found += [f"{source.name}.{name}" for name in _undocumented(source.tree)]
    return found


def _undocumented(node: ast.AST) -> Iterator[str]:
    for child in getattr(node, "body", []):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if child.name.startswith("_"):
            continue
        if not ast.get_docstring(child):
            yield child.name
        if isinstance(child, ast.ClassDef):
            yield from (f"{child.name}.{name}" for name in _undocumented(child))


def test_everything_public_has_a_docstring():
    assert undocumented(SOURCES) == []


def test_missing_docstring_is_noticed():
    text = (
        '"""."""\ndef f(): pass\nclass A:\n  """."""\n  def g(self): pass\n  def _h(self): pass\n'
    )
    assert undocumented(snippet(text)) == ["cxr_vit.data.bad.f", "cxr_vit.data.bad.A.g"]
    assert undocumented(snippet("x = 1")) == ["cxr_vit.data.bad"]


def unfinished(sources: Sequence[Source]) -> List[str]:
    found = []
    for source in sources:
        for token in tokenize.generate_tokens(io.StringIO(source.text).readline):
            is_comment = token.type in (tokenize.COMMENT, tokenize.STRING)
            if (is_comment and re.search(r"\b(TODO|FIXME|XXX)\b", token.string)) or (
                token.type == tokenize.NAME and token.string == "NotImplementedError"
            ):
                found.append(f"{source.name}:{token.start[0]}: {token.string}")
    return found


def test_nothing_is_unfinished():
    assert unfinished(SOURCES) == []


@pytest.mark.parametrize(
    "text",
    [
        "# TODO: this\n",
        "x = 1  # FIXME\n",
        '"""TODO."""\n',
        "def f():\n    raise NotImplementedError\n",
        "def f():\n    raise NotImplementedError('later')\n",
    ],
)
def test_unfinished_code_is_noticed(text):
    assert len(unfinished(snippet(text))) == 1


def vague_names(names: Set[str]) -> List[str]:
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "tools", "core"}
    return sorted(name for name in names if vague & set(re.split(r"[._]", name)))


def test_no_module_has_a_vague_name():
    assert vague_names(MODULES) == []


def test_vague_name_is_noticed():
    names = {"cxr_vit.data.utils", "cxr_vit.image_helpers", "cxr_vit.misc.labels", "cxr_vit.data"}
    assert vague_names(names) == sorted(names - {"cxr_vit.data"})


# What an import costs

LIGHT = [
    "cxr_vit",
    "cxr_vit.errors",
    "cxr_vit.config",
    "cxr_vit.cli",
    "cxr_vit.__main__",
    "cxr_vit.config.plans",
    *("cxr_vit.planner.search", "cxr_vit.planner.figures"),
    "cxr_vit.training.schedule",
    "cxr_vit.training.run_folder",
    "train",
    "evaluate",
]
#: Imports each module and reports which heavy libraries are there after it.
IMPORT_THEM = """
import importlib, json, sys
after = {}
for name in sys.argv[1:]:
    importlib.import_module(name)
    after[name] = sorted({"torch", "transformers", "pandas", "torchmetrics"} & set(sys.modules))
print(json.dumps(after))
"""


def heavy_after(*modules: str) -> Dict[str, List[str]]:
    output = subprocess.check_output(
        [sys.executable, "-c", IMPORT_THEM, *modules], cwd=str(ROOT), encoding="utf-8"
    )
    found: Dict[str, List[str]] = json.loads(output)
    return found


def test_light_modules_import_no_torch():
    assert heavy_after(*LIGHT) == {name: [] for name in LIGHT}


def test_heavy_import_is_noticed():
    assert heavy_after("cxr_vit", "pandas") == {"cxr_vit": [], "pandas": ["pandas"]}
