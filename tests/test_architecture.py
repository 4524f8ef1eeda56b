"""Rules for the structure of the code (docs/architecture.md), checked on its syntax trees.

Each rule is a function from sources to the list of violations, so that it is tested on a bad
snippet as well as on the code.
"""

import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Set

import pytest

from docs.draw_architecture import (
    COMMANDS,
    GROUND,
    LEAVES,
    PAGE,
    PICTURE,
    ROAD,
    SCRIPTS,
    Source,
    block_of_page,
    imports,
    labels,
    levels,
    mermaid,
    package_graph,
    package_of,
    read_sources,
)

ROOT = Path(__file__).parents[1]
SOURCES = read_sources()
MODULES = {source.name for source in SOURCES}
PACKAGE = [source for source in SOURCES if source.name not in SCRIPTS]

#: Package -> the packages it may import besides itself and the ground.
ALLOWED = {
    **{package: ROAD[:index] for index, package in enumerate(ROAD)},
    **{package: ["config", "data", "evaluation", "model"] for package in LEAVES},
    **{module: [] for module in GROUND},
}
#: Limits that keep the package readable; a file over 700 lines is rarely one idea.
MAX_FILES, MAX_LINES, MAX_LEVELS = 200, 38_500, 9
MAX_FILE, MAX_FUNCTION, MAX_SCRIPT = 700, 60, 50

#: Nothing but the composition of the parts.
COMPOSITIONS = {*SCRIPTS, "cxr_vit.commands.train", "cxr_vit.commands.evaluate"}

POPTORCH = {name for name in MODULES if name.startswith("cxr_vit.engines.ipu.")}
#: Needs a newer torch than the IPU's.
PIPELINING = {"cxr_vit.engines.pipeline_engine"}
DISTRIBUTED = {*PIPELINING, "cxr_vit.engines.process_group"}
HUGGING_FACE = {"cxr_vit.model.vit", "cxr_vit.model.key_names"}
#: Knows the files of a model folder and the keys of config.json, not the modules of the model.
HUB = {"cxr_vit.model.source"}
#: Uses the hub's format of a model card, and asks nothing.
CARD = {"cxr_vit.evaluation.model_card"}

#: Reads pickles, with an unpickler that makes tensors only.
PICKLES = {"cxr_vit.commands.convert_weights"}

#: What can run code that is in its input, or that its input names.
EXECUTING = re.compile(
    r"^(eval|exec|compile|__import__)$|^builtins\.|^(pickle|marshal|shelve|dill|joblib|runpy)\."
    r"|^torch\.(load|jit\.load|hub\.)|(gather|broadcast|scatter|send|recv)_object\w*$"
    r"|^yaml\.(load|load_all|unsafe_\w+|full_\w+)$|(^|\.)Auto(Config|Model)\w*\.|\.from_pretrained$"
)

#: Attributes of Hugging Face's ViT, in 4.x or 5.x; nothing of ours has these names.
HUGGING_FACE_ATTRIBUTES = {
    *("vit", "encoder", "embeddings", "patch_embeddings", "cls_token", "mask_token"),
    *(
        "distillation_token",
        "position_embeddings",
        "lambda1",
        "pooler",
        "layernorm",
        "layernorm_before",
        "layernorm_after",
    ),
    *("classifier", "intermediate", "q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2", "dense"),
}
#: Its parameter names, where the versions differ.
HUGGING_FACE_NAMES = re.compile(
    r"(vit|deit|dinov2)\.(layers|encoder)|encoder\.layer|[qkvo]_proj|attention\.attention|attention\.output"
    r"|intermediate\.dense|output\.dense|mlp\.fc[12]|layernorm_(before|after)"
)


def snippet(text: str, name: str = "cxr_vit.data.bad") -> List[Source]:
    return [Source(name, text)]


def test_sources_are_found():
    # Without them every rule below would hold.
    assert {"cxr_vit", "cxr_vit.config.loader", "cxr_vit.model.vit", "train"} <= MODULES
    assert len(SOURCES) > 30


# The order of the packages


def is_ours(module: str) -> bool:
    return module.split(".")[0] in ("cxr_vit", "", *SCRIPTS)


def imports_against_the_order(sources: Sequence[Source]) -> List[str]:
    """List imports, also those for types and in functions, that the order does not allow."""
    found = []
    for source in sources:
        package = source.package
        if package in COMMANDS or package == "cxr_vit":
            continue
        allowed = [package, *GROUND, *ALLOWED[package]]
        for item in imports(source, MODULES):
            is_known = "." in item.module.lstrip(".") and package_of(item.module) in allowed
            if is_ours(item.module) and not is_known:
                found.append(f"{source.name}:{item.line}: {item.module}")
    return found


def test_every_package_has_a_place_in_the_order():
    packages = {source.package for source in SOURCES} - {"cxr_vit"}
    assert packages == {*GROUND, *ROAD, *LEAVES, *COMMANDS}


def test_packages_import_only_what_the_order_allows():
    assert imports_against_the_order(SOURCES) == []


@pytest.mark.parametrize(
    "text",
    [
        "from cxr_vit.model.stages import StagedViT",
        "import cxr_vit.training.trainer",
        "from cxr_vit import model",
        "from cxr_vit.cli import run",
        "from cxr_vit.dataset_report.report import write_data_report",
        "from . import labels",
        "def f():\n    from cxr_vit.engines.base import Engine",
        "if TYPE_CHECKING:\n    from cxr_vit.engines.base import Engine",
        "import train",
    ],
)
def test_import_against_the_order_is_found(text):
    assert len(imports_against_the_order(snippet(text))) == 1


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("cxr_vit.planner.bad", "from cxr_vit.engines.processes import Launch"),
        ("cxr_vit.planner.bad", "from cxr_vit.training.trainer import Trainer"),
        ("cxr_vit.engines.bad", "from cxr_vit.planner.estimate import make_plan"),
        ("cxr_vit.evaluation.bad", "from cxr_vit.dataset_report.report import write"),
        ("cxr_vit.errors", "from cxr_vit.config import Config"),
    ],
)
def test_leaf_on_the_road_is_found(module, text):
    assert len(imports_against_the_order(snippet(text, module))) == 1


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
def test_import_along_the_order_is_allowed(text):
    assert imports_against_the_order(snippet(text)) == []


def import_cycle(sources: Sequence[Source]) -> Optional[List[str]]:
    """Return the first cycle of imports of any kind, or None."""
    modules = {source.name for source in sources}
    edges: Dict[str, List[str]] = {
        source.name: [item.module for item in imports(source, modules) if item.module in modules]
        for source in sources
    }
    done: Set[str] = set()

    def visit(name: str, path: List[str]) -> Optional[List[str]]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return None
        for target in edges[name]:
            cycle = visit(target, [*path, name])
            if cycle:
                return cycle
        done.add(name)
        return None

    return next((cycle for cycle in (visit(name, []) for name in edges) if cycle), None)


def test_modules_import_each_other_without_a_cycle():
    assert import_cycle(SOURCES) is None


@pytest.mark.parametrize(
    "text",
    [
        "from a import x",
        "def f():\n    import a",
        "if TYPE_CHECKING:\n    from a import X",
    ],
)
def test_cycle_is_found(text):
    sources = [Source("a", "import b"), Source("b", "import c"), Source("c", text)]
    assert import_cycle(sources) == ["a", "b", "c", "a"]


def test_import_of_another_library_is_no_cycle():
    assert import_cycle([Source("a", "import b"), Source("b", "import elsewhere")]) is None


# The picture


def test_package_graph_has_few_levels():
    height = levels(package_graph(SOURCES))
    assert height["ground"] == 0
    assert max(height.values()) <= MAX_LEVELS, height


def test_picture_shows_the_code():
    graph = package_graph(SOURCES)
    expected = mermaid(graph, labels(graph))
    assert block_of_page(PAGE.read_text(encoding="utf-8")) == expected, (
        "run: python docs/draw_architecture.py"
    )
    assert PICTURE.is_file()


def test_levels_count_the_longest_chain():
    graph = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert levels(graph) == {"a": 2, "b": 1, "c": 0}
    assert "a --> c" not in mermaid(graph, {name: name for name in graph})


# Imports that are allowed in few places


def imports_of(library: str, sources: Sequence[Source], *, allowed: Set[str]) -> List[str]:
    """List a library's imports, and uses by dotted name, outside the allowed modules."""
    found = []
    for source in sources:
        if source.name in allowed:
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


def test_poptorch_is_imported_under_engines_ipu_only():
    assert imports_of("poptorch", SOURCES, allowed=POPTORCH) == []
    assert imports_of("poptorch", SOURCES, allowed=set()) != []


def test_torch_distributed_is_used_in_two_modules_only():
    assert imports_of("torch.distributed", SOURCES, allowed=DISTRIBUTED) == []
    assert imports_of("torch.distributed", SOURCES, allowed=set()) != []


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
def test_library_in_the_wrong_module_is_found(library, text):
    assert len(imports_of(library, snippet(text), allowed=set())) == 1
    assert imports_of(library, snippet(text), allowed={"cxr_vit.data.bad"}) == []


def imported_on_load(names: Set[str], sources: Sequence[Source]) -> List[str]:
    """List imports of these modules outside functions: they run when a module is loaded."""
    return [
        f"{source.name}:{item.line}"
        for source in sources
        if source.name not in names
        for item in imports(source, MODULES)
        if item.module in names and not (item.in_function or item.for_types)
    ]


@pytest.mark.parametrize("names", [{"poptorch"}, PIPELINING], ids=["poptorch", "pipeline engine"])
def test_optional_dependency_is_imported_inside_functions(names):
    assert imported_on_load(names, SOURCES) == []


def test_optional_dependency_at_the_top_of_a_module_is_found():
    text = "from cxr_vit.engines.pipeline_engine import PipelineEngine"
    assert imported_on_load(PIPELINING, snippet(text)) != []
    assert imported_on_load(PIPELINING, snippet(f"def f():\n    {text}")) == []
    assert imported_on_load({"poptorch"}, snippet("import poptorch")) != []


def hugging_face_names(sources: Sequence[Source]) -> List[str]:
    """List Hugging Face's attributes, and parameter names that its versions spell differently."""
    found = []
    for source in sources:
        tree = source.tree
        docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr in HUGGING_FACE_ATTRIBUTES:
                found.append(f"{source.name}:{node.lineno}: .{node.attr}")
            elif (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and node not in docstrings
                and HUGGING_FACE_NAMES.search(node.value)
            ):
                found.append(f"{source.name}:{node.lineno}: {node.value!r}")
    return found


def test_only_the_vit_module_uses_hugging_face_names():
    assert hugging_face_names([s for s in SOURCES if s.name not in HUGGING_FACE]) == []


def test_hugging_face_names_are_found_in_the_vit_module():
    vit = [source for source in SOURCES if source.name in HUGGING_FACE]
    found = "\n".join(hugging_face_names(vit))
    assert all(name in found for name in (".encoder", ".layernorm", "q_proj", "mlp"))


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
def test_hugging_face_name_elsewhere_is_found(text):
    assert hugging_face_names(snippet(text)) != []


def test_own_name_and_docstring_are_allowed():
    text = '"""Holds `vit.encoder.layer`."""\nplan.layers(stage)\n'
    assert hugging_face_names(snippet(text)) == []


# No code from files


def executing_calls(sources: Sequence[Source]) -> List[str]:
    """List what can run code from a file or from another process."""
    found = []
    for source in sources:
        for node in ast.walk(source.tree):
            names = []
            if isinstance(node, ast.Import):
                names = [f"{alias.name}." for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [f"{node.module}.{alias.name}." for alias in node.names]
            elif isinstance(node, ast.Call):
                names = [_dotted(node.func)]
                found += [
                    f"{source.name}:{node.lineno}: {item.arg}"
                    for item in node.keywords
                    if item.arg in ("allow_pickle", "trust_remote_code")
                    and not (isinstance(item.value, ast.Constant) and item.value.value is False)
                ]
            found += [
                f"{source.name}:{node.lineno}: {name}" for name in names if EXECUTING.search(name)
            ]
    return found


def test_no_file_and_no_process_can_run_code():
    assert executing_calls([source for source in SOURCES if source.name not in PICKLES]) == []


def test_pickles_are_read_as_weights_only():
    (source,) = (source for source in SOURCES if source.name in PICKLES)
    assert [call.partition(": ")[2] for call in executing_calls([source])] == ["torch.load"]
    (call,) = (
        node
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and _dotted(node.func) == "torch.load"
    )
    (value,) = (item.value for item in call.keywords if item.arg == "weights_only")
    assert isinstance(value, ast.Constant)
    assert value.value is True


@pytest.mark.parametrize(
    "text",
    [
        "eval(text)",
        "exec(text)",
        "builtins.eval(text)",
        "__import__(name)",
        "import pickle",
        "from pickle import loads",
        "import torch\ntorch.load(path)",
        "torch.load(path, weights_only=True)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "yaml.load(text, Loader=Loader)",
        "yaml.unsafe_load(text)",
        "dist.all_gather_object(gathered, part)",
        "dist.gather_object(part, gathered)",
        "dist.broadcast_object_list(parts)",
        "from transformers import AutoConfig",
        "AutoModel.from_pretrained(folder)",
        "ViTConfig.from_pretrained(folder)",
        "load(folder, trust_remote_code=True)",
    ],
)
def test_call_that_can_run_code_is_found(text):
    assert len(executing_calls(snippet(text))) == 1


def test_calls_of_similar_names_are_allowed():
    text = (
        "re.compile(x)\nself.module.eval()\nengine.compile(batch)\nnp.load(path)\n"
        "np.load(path, allow_pickle=False)\nyaml.safe_load(text)\nyaml.compose(x, Loader=Own)\n"
        "dist.all_gather(a, b)\nload(x, trust_remote_code=False)\nload_checkpoint(path)"
    )
    assert executing_calls(snippet(text)) == []


def test_only_one_module_asks_the_hub():
    assert imports_of("huggingface_hub", SOURCES, allowed=HUB | CARD) == []
    assert imports_of("huggingface_hub", SOURCES, allowed=set()) != []
    assert imports_of("transformers", [s for s in SOURCES if s.name in HUB], allowed=set()) == []


# Grammar and size


def newer_grammar(source: Source) -> Optional[str]:
    try:
        ast.parse(source.text, feature_version=(3, 8))
    except SyntaxError as error:
        return f"{source.name}:{error.lineno}: {error.msg}"
    return None


def test_every_file_is_valid_python_38():
    assert [problem for problem in map(newer_grammar, SOURCES) if problem] == []


def test_newer_grammar_is_found():
    text = "match x:\n    case 1:\n        pass\n"
    assert newer_grammar(Source("bad", text)) is not None


def long_files(sources: Sequence[Source]) -> List[str]:
    found = []
    for source in sources:
        lines = len(source.text.splitlines())
        if lines > (MAX_SCRIPT if source.name in COMPOSITIONS else MAX_FILE):
            found.append(f"{source.name}: {lines} lines")
    return found


def test_package_is_small():
    assert len(PACKAGE) <= MAX_FILES
    assert sum(len(source.text.splitlines()) for source in PACKAGE) <= MAX_LINES


def test_files_are_short():
    assert long_files(SOURCES) == []


def test_long_file_is_found():
    assert long_files(snippet("x\n" * MAX_FILE)) == []
    assert long_files(snippet("x\n" * (MAX_FILE + 1))) != []
    assert long_files(snippet("x\n" * (MAX_SCRIPT + 1), "train")) != []


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


def test_long_function_is_found():
    assert long_functions(snippet("def f():\n" + "    x\n" * (MAX_FUNCTION - 1))) == []
    assert long_functions(snippet("def f():\n" + "    x\n" * MAX_FUNCTION)) != []
    assert long_functions(snippet("class A:\n  def f():\n" + "    x\n" * MAX_FUNCTION)) != []


# Documentation and names


def undocumented(sources: Sequence[Source]) -> List[str]:
    """List modules and public functions, classes and methods without a docstring."""
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


def test_missing_docstring_is_found():
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


def test_no_code_is_unfinished():
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
def test_unfinished_code_is_found(text):
    assert len(unfinished(snippet(text))) == 1


def vague_names(names: Set[str]) -> List[str]:
    vague = {"utils", "util", "helpers", "helper", "common", "misc", "tools", "core"}
    return sorted(name for name in names if vague & set(re.split(r"[._]", name)))


def test_no_module_has_a_vague_name():
    assert vague_names(MODULES) == []


def test_vague_name_is_found():
    names = {"cxr_vit.data.utils", "cxr_vit.image_helpers", "cxr_vit.misc.labels", "cxr_vit.data"}
    assert vague_names(names) == sorted(names - {"cxr_vit.data"})


# The cost of an import

#: Needed by `--help`, by a configuration error, and by `plan`: they answer without torch.
LIGHT = sorted(
    {
        *("cxr_vit", "cxr_vit.cli", "cxr_vit.__main__", *COMPOSITIONS),
        *(name for name in MODULES if package_of(name) in {*GROUND, "config", "planner"}),
        "cxr_vit.engines.processes",
        "cxr_vit.training.run_folder",
    }
)
#: Imports each module and prints which heavy libraries are loaded after it.
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
    tables = "cxr_vit.commands.summary_tables"  # the last: it needs pandas
    expected = {**{name: [] for name in LIGHT}, tables: ["pandas"]}
    assert heavy_after(*LIGHT, tables) == expected


def test_training_begins_without_what_only_figures_and_scores_need():
    code = (
        "import sys, cxr_vit.commands.callbacks, cxr_vit.training.trainer\n"
        "print(sorted({'matplotlib', 'torch', 'torchmetrics'} & set(sys.modules)))"
    )
    output = subprocess.check_output([sys.executable, "-c", code], cwd=str(ROOT), encoding="utf-8")
    assert output.strip() == "['torch']"


def test_heavy_import_is_found():
    assert heavy_after("cxr_vit", "pandas") == {"cxr_vit": [], "pandas": ["pandas"]}
