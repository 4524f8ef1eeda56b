"""README, CONTRIBUTING and docs/: commands parse, examples compile, links lead somewhere.

tests/test_docs_run.py runs commands and examples, tests/test_site.py builds the site.
"""

import ast
import json
import re
from pathlib import Path
from typing import Iterator, List, Set

import pytest
import yaml

from cxr_vit.cli import COMMANDS, evaluate_arguments, main, train_arguments
from cxr_vit.config import Config, load_config
from pages import DOCS, NEEDS, PAGES, ROOT, blocks, command_of, commands

ALL = commands()


def arguments_of(command: str) -> List[List[str]]:
    """Return the words after a command of cxr-vit, once each, with a launcher or without."""
    found = {
        tuple(line.arguments[1:])
        for line in ALL
        if line.arguments and line.arguments[0] == command and "--help" not in line.arguments
    }
    return sorted(map(list, found))


def test_readme_is_short_and_begins_with_two_commands():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 200
    readme = [command.text for command in ALL if command.page == "README.md"]
    assert readme[:2] == ["make demo", "make test"]


def test_commands_are_found():
    assert len(arguments_of("train")) > 10
    assert len(arguments_of("plan")) > 5


@pytest.mark.parametrize("words", arguments_of("train"), ids=" ".join)
def test_train_command_is_a_valid_configuration(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = train_arguments(words)
    written_by_a_command = ("<name>", "best.yaml", "my_ipus.yaml")
    files = [
        file for file in arguments.files if not any(w in str(file) for w in written_by_a_command)
    ]
    load_config(files, arguments.overrides)


@pytest.mark.parametrize("words", arguments_of("evaluate"), ids=" ".join)
def test_evaluate_command_parses(words):
    arguments = evaluate_arguments(words)
    load_config([], arguments.overrides)


@pytest.mark.parametrize("command", ALL, ids=lambda command: command.text)
def test_command_that_is_not_run_says_what_it_needs(command):
    """A word of the table in docs/index.md, so that a reader knows what was not tried."""
    if command.arguments:
        assert command.arguments[0] in {*COMMANDS, "--help"}
    if command.needs:
        assert command.needs.startswith(NEEDS), f"unknown: needs {command.needs}"
    elif command.words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert set(command.words[1:]) <= set(targets)
    elif command.words[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / path).exists() for path in command.words[3:])
    else:  # run by tests/test_docs_run.py
        assert command.arguments, f"say what it needs: {command.text}"


def test_table_of_the_quick_start_explains_every_need():
    page = (DOCS / "index.md").read_text(encoding="utf-8")
    assert [need for need in NEEDS if f"needs {need}`" not in page] == []


def test_needs_are_read_from_the_comment():
    line = "A=1 torchrun --nproc-per-node 2 train.py x=1   # the second; needs GPUs and time"
    command = command_of("page.md", line)
    assert command.needs == "GPUs and time"
    assert command.variables == ["A=1"]
    assert command.launcher == ["torchrun", "--nproc-per-node", "2"]
    assert command.arguments == ["train", "x=1"]
    assert command_of("page.md", "python -m cxr_vit plan  # fast").needs is None


def test_scripts_and_modules_exist():
    missing = []
    for command in ALL:
        words = command.words
        if words[:2] == ["python", "-m"] and words[2].startswith(("benchmarks.", "docs.")):
            path = f"{words[2].replace('.', '/')}.py"
        elif words[0] == "python" and words[1].endswith(".py"):
            path = words[1]
        else:
            continue
        missing += [] if (ROOT / path).is_file() else [command.text]
    assert missing == []


def test_make_targets_of_ci_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {command.words[1] for command in ALL if command.words[0] == "make"}
    for path in (ROOT / ".ci" / "run", ROOT / ".github" / "workflows" / "ci.yml"):
        named |= set(
            re.findall(r"^(?:\s*- run:)?\s*make ([\w-]+)$", path.read_text(), re.MULTILINE)
        )
    assert {"demo", "docs", "lint", "test", "test-sdk34"} <= named <= targets


def test_workflow_runs_the_parts_of_the_ci_script():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    steps = {step["run"] for job in jobs.values() for step in job["steps"] if "run" in step}
    assert steps == set(re.findall(r"make [\w-]+", script))


QUOTED = [
    (page.name, *found)
    for page in PAGES
    for found in re.findall(
        r"```\n\$ python -m cxr_vit ((?:plan|import-ipu-config) .*)\n((?:.*\n)+?)```",
        page.read_text(encoding="utf-8"),
    )
]


@pytest.mark.parametrize(("page", "command", "quoted"), QUOTED)
def test_quoted_output_is_the_real_one(page, command, quoted, monkeypatch, capsys):
    """Every quoted line but `...` is in the real output, in this order."""
    monkeypatch.chdir(ROOT)
    assert main(command.split()) == 0
    printed = iter(capsys.readouterr().out.splitlines())
    lines = [line for line in quoted.splitlines() if line != "..."]
    assert len(lines) > 10
    assert [line for line in lines if line not in printed] == []


def test_a_plan_and_a_search_are_quoted():
    assert {"--search" in command for _, command, _ in QUOTED} == {True, False}


@pytest.mark.parametrize("text", [text for _, text in blocks("yaml")])
def test_yaml_example_loads(text, tmp_path):
    (tmp_path / "example.yaml").write_text(text)
    load_config([tmp_path / "example.yaml"])


@pytest.mark.parametrize("text", [text for _, text in blocks("python")])
def test_python_example_compiles(text):
    compile(text, "example", "exec")


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_links_lead_to_files_and_headings(page):
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    missing = []
    for link in re.findall(r"\]\(([^)]+?)\)", text):
        if link.startswith(("http:", "https:")):
            continue
        name, _, anchor = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            missing.append(link)
    assert missing == []


def anchors(page: Path) -> List[str]:
    """Return the anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings]
    return [heading.replace(" ", "-") for heading in plain]


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_paths_in_the_page_exist(page):
    """A path in backquotes that begins with one of our folders names a file that is there."""
    path = re.compile(r"`((?:cxr_vit|tests|configs|benchmarks|docs)/(?!notes/)[\w./*-]+)`")
    names = path.findall(page.read_text(encoding="utf-8"))
    assert [name for name in names if not list(ROOT.glob(name.rstrip("/")))] == []


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_keys_in_the_page_exist(page):
    """`section.key` in backquotes is a field of the configuration."""
    sections = {
        name: field.annotation.model_fields
        for name, field in Config.model_fields.items()
        if hasattr(field.annotation, "model_fields")
    }
    key = re.compile(rf"`({'|'.join(sections)})\.([a-z]\w+)(?=[`=: ])")
    text = page.read_text(encoding="utf-8")
    # In an error message; in an example; files; a method of the engine.
    others = ("optim.learning_rate", "schedule.final_ratio", "pipeline.cpp", "engine.train_step")
    found = [f"{section}.{name}" for section, name in key.findall(text)]
    missing = [
        name
        for name in found
        if name.partition(".")[2] not in sections[name.partition(".")[0]]
        and name not in others
        and not name.endswith((".html", ".py", ".yaml", ".safetensors"))
    ]
    assert missing == []


# What pages quote


def messages() -> Iterator[str]:
    """Yield the string constants of the package, with NUL where a value is inserted."""
    for path in sorted((ROOT / "cxr_vit").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (
                    part.value if isinstance(part, ast.Constant) else "\0" for part in node.values
                )
                yield "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield re.sub(r"%[sdg.\d]+", "\0", node.value)


def quoted_messages() -> List[str]:
    """Return the messages in the first column of the tables in docs/troubleshooting.md."""
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    tables = page.partition("## No error, but")[0]
    return re.findall(r"^\| `(.+?)`(?: \(\w+\))? \|", tables, flags=re.MULTILINE)


def is_message(quoted: str, known: List[str]) -> bool:
    """Whether a message has the parts of a quoted one, with something for each `...`."""
    parts = [part for part in re.split(r"\.\.\.(?!\.)", quoted) if part]
    pattern = re.compile(r"[^\n]*?\0[^\n]*?".join(map(re.escape, parts)))
    return any(pattern.search(message) for message in known)


def test_messages_of_the_troubleshooting_page_exist():
    quoted, known = quoted_messages(), list(messages())
    assert len(quoted) > 40
    assert [text for text in quoted if not is_message(text, known)] == []


def test_a_message_that_is_not_in_the_code_is_found():
    assert not is_message("no such message: ...", ["no message: \0"])
    assert is_message("run.dir=... exists", ["run.dir=\0 exists and is not empty."])


def numbers(text: str) -> Set[float]:
    return {
        float(number.replace(",", ""))
        for number in re.findall(r"(?<![\w.-])\d[\d,]*(?:\.\d+)?(?![\w.])", text)
    }


def values(node: object) -> Set[float]:
    """Return all numbers of a JSON value, also those inside its texts."""
    if isinstance(node, dict):
        return values([*node, *node.values()])
    if isinstance(node, list):
        return set().union(*map(values, node))
    if isinstance(node, str):
        return numbers(node) | numbers(node.replace("=", " "))
    return {float(node)} if isinstance(node, (int, float)) else set()


BENCHMARKS = re.split(r"^## ", (DOCS / "benchmarks.md").read_text(encoding="utf-8"), flags=re.M)[1:]


@pytest.mark.parametrize("section", BENCHMARKS, ids=lambda section: section.splitlines()[0])
def test_quoted_numbers_are_those_of_the_results(section):
    (path,) = re.findall(r"Results: `(benchmarks/results/\w+\.json)`", section)
    results = json.loads((ROOT / path).read_text(encoding="utf-8"))
    assert {"command", "machine", "python", "versions", "measured", "results"} <= set(results)
    prose = re.sub(r"```.*?```|\]\([^)]*\)|`[^`]*`|\d+ / M", " ", section, flags=re.DOTALL)
    prose = re.sub(r"torch(vision)? [\d.]+|transformers [\d.]+|Python [\d.]+\d|fp\d+", " ", prose)
    spelled = {0.0, 1.0, 2.0, 3.0}  # "seeds 0, 1 and 2", "(M + 3)"
    assert numbers(prose) - spelled - values(results) == set()
    (command,) = re.findall(r"```bash\n(.*?)(?: +#.*)?\n```", section)
    assert command == results["command"]


def test_every_result_is_quoted():
    named = re.findall(r"Results: `(.*)`", "\n".join(BENCHMARKS))
    files = (ROOT / "benchmarks" / "results").glob("*.json")
    assert sorted(named) == sorted(page_name(path) for path in files)


def test_readme_quotes_the_demo():
    """The quoted run is that of run.seed=0."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (score,) = re.findall(r"^macro AUROC (0\.\d+) \(14 of 14 findings\)$", readme, flags=re.M)
    demo = json.loads((ROOT / "benchmarks" / "results" / "demo.json").read_text())
    assert round(float(score), 3) == demo["results"]["test_auroc_macro"]["run.seed=0"]
