"""The commands, examples and links of README, CONTRIBUTING and docs/ are valid."""

import re
import shlex
import textwrap
from pathlib import Path
from typing import Iterator, List, Tuple

import pytest
import yaml

from cxr_vit.cli import COMMANDS, evaluate_arguments, main, train_arguments
from cxr_vit.config import check, load_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
#: What may precede `python` or `make`: a prompt, variables, a launcher.
PREFIX = re.compile(
    r"^(\$ )?([A-Z_]+=\S+ )*((poprun|torchrun) .*?(?=python |train\.py|evaluate\.py))?"
)


def blocks(language: str) -> Iterator[Tuple[Path, str]]:
    """Yield page and text of every code block of a language."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for block in re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL):
            yield page, textwrap.dedent(block)


def commands() -> Iterator[str]:
    """Yield the commands of the shell blocks, beginning with `python` or `make`."""
    for _, block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            command = PREFIX.sub("", line).replace(".venv/bin/python", "python")
            if command.startswith(("train.py", "evaluate.py")):  # after torchrun
                command = f"python {command}"
            if command.startswith(("python ", "make ")):
                yield command


ALL = list(commands())


def words_of(script: str) -> List[List[str]]:
    """Return the words after `python <script>` of each command that runs it."""
    found = [shlex.split(command, comments=True) for command in ALL]
    start = ["python", *script.split()]
    unique = {
        tuple(words[len(start) :])
        for words in found
        if words[: len(start)] == start and "--help" not in words
    }
    return sorted(map(list, unique))


def test_readme_begins_with_two_commands():
    assert any(command.startswith("make demo") for command in ALL)
    assert any(command.startswith("make test") for command in ALL)
    assert len(words_of("train.py")) > 10


@pytest.mark.parametrize("words", words_of("train.py"), ids=" ".join)
def test_train_command_is_a_valid_configuration(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = train_arguments(words)
    files = [file for file in arguments.files if "<name>" not in str(file)]
    assert len(files) == len(arguments.files) or words[1].startswith("runs/<name>/")
    check(load_config(files, arguments.overrides))


@pytest.mark.parametrize("words", words_of("evaluate.py"), ids=" ".join)
def test_evaluate_command_parses(words):
    arguments = evaluate_arguments(words)
    check(load_config([], arguments.overrides))


@pytest.mark.parametrize("words", words_of("-m cxr_vit"), ids=" ".join)
def test_module_command_exists(words):
    assert words[0] in COMMANDS


@pytest.mark.parametrize(
    "words",
    [words for words in words_of("-m cxr_vit plan") if "--calibrate" not in words],
    ids=" ".join,
)
def test_plan_command_runs(words, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    assert main(["plan", *words]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 10


PLANS = [
    (page.name, *found)
    for page in PAGES
    for found in re.findall(
        r"```\n\$ python -m cxr_vit (plan .*)\n((?:.*\n)+?)```", page.read_text(encoding="utf-8")
    )
]


@pytest.mark.parametrize(("page", "command", "quoted"), PLANS)
def test_quoted_plan_is_the_real_output(page, command, quoted, monkeypatch, capsys):
    """Every quoted line but `...` is in the real output, in this order."""
    monkeypatch.chdir(ROOT)
    assert main(command.split()) == 0
    printed = iter(capsys.readouterr().out.splitlines())
    lines = [line for line in quoted.splitlines() if line != "..."]
    assert len(lines) > 10
    assert [line for line in lines if line not in printed] == []


def test_readme_quotes_a_plan():
    assert "README.md" in [page for page, _, _ in PLANS]


def test_scripts_and_modules_exist():
    missing = []
    for command in ALL:
        words = shlex.split(command, comments=True)
        if words[:2] == ["python", "-m"] and words[2].startswith(("benchmarks.", "docs.")):
            path = f"{words[2].replace('.', '/')}.py"
        elif words[0] == "python" and words[1].endswith(".py"):
            path = words[1]
        else:
            continue
        missing += [] if (ROOT / path).is_file() else [command]
    assert missing == []


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {command.split()[1] for command in ALL if command.startswith("make ")}
    for path in (ROOT / ".ci" / "run", ROOT / ".github" / "workflows" / "ci.yml"):
        named |= set(
            re.findall(r"^(?:\s*- run:)?\s*make ([\w-]+)$", path.read_text(), re.MULTILINE)
        )
    assert {"demo", "lint", "test", "test-sdk34"} <= named <= targets


def test_workflow_runs_the_parts_of_the_ci_script():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    steps = {step["run"] for job in jobs.values() for step in job["steps"] if "run" in step}
    assert steps == set(re.findall(r"make [\w-]+", script))


@pytest.mark.parametrize("text", [text for _, text in blocks("yaml")])
def test_yaml_example_loads(text, tmp_path):
    (tmp_path / "example.yaml").write_text(text)
    check(load_config([tmp_path / "example.yaml"]))


@pytest.mark.parametrize("text", [text for _, text in blocks("python")])
def test_python_example_compiles(text):
    compile(text, "example", "exec")


def test_callback_example_defines_a_callback():
    from cxr_vit.training.trainer import Callback

    (text,) = (text for _, text in blocks("python") if "(Callback)" in text)
    names = {}
    exec(text, names)
    hooks = [name for name in vars(names["TimeLimit"]) if name.startswith("on_")]
    assert hooks and all(hasattr(Callback, name) for name in hooks)
    names["TimeLimit"](1.5).on_fit_start(None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    text = page.read_text(encoding="utf-8")
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


def test_paths_in_the_pages_exist():
    """A path in backquotes that begins with one of our folders names a file that is there."""
    path = re.compile(r"`((?:cxr_vit|tests|configs|benchmarks|docs)/(?!notes/)[\w./*-]+)`")
    missing = [
        f"{page.name}: {name}"
        for page in PAGES
        for name in path.findall(page.read_text(encoding="utf-8"))
        if not list(ROOT.glob(name.rstrip("/")))
    ]
    assert missing == []
