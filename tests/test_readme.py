"""The README's commands are true: they parse, and the files they name are there."""

import re
import shlex
from pathlib import Path

import pytest

from cxr_vit.cli import evaluate_arguments, train_arguments
from cxr_vit.config import check, load_config

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(?:bash|console)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    re.sub(
        r"^torchrun .*?(?=train|evaluate)",
        "python ",
        re.sub(r"^(\$ |poprun .*?(?=python ))", "", line),
    )
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    if line.startswith(("$ ", "make ", "python ", "poprun ", "torchrun "))
]
YAML = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)


def words_of(script):
    """The words after `python <first word of the script>` of each command that begins with it."""
    return [
        shlex.split(command, comments=True)[2:]
        for command in COMMANDS
        if command.startswith(f"python {script}") and "--help" not in command
    ]


def test_the_readme_has_the_two_commands():
    assert any(command.startswith("make demo") for command in COMMANDS)
    assert any(command.startswith("make test") for command in COMMANDS)


@pytest.mark.parametrize("words", words_of("train.py"), ids=" ".join)
def test_every_train_command_is_a_valid_configuration(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    arguments = train_arguments(words)
    files = [file for file in arguments.files if "<name>" not in str(file)]
    assert len(files) == len(arguments.files) or words[1].startswith("runs/<name>/")
    check(load_config(files, arguments.overrides))


@pytest.mark.parametrize("words", words_of("evaluate.py"), ids=" ".join)
def test_every_evaluate_command_parses(words):
    arguments = evaluate_arguments(words)
    check(load_config([], arguments.overrides))


def test_every_make_target_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {command.split()[1] for command in COMMANDS if command.startswith("make ")}
    assert named <= targets


def test_every_module_command_exists():
    from cxr_vit.cli import COMMANDS

    named = {words[0] for words in words_of("-m cxr_vit") for words in [words[1:]]}
    assert named <= set(COMMANDS)


@pytest.mark.parametrize(
    "words",
    [words for words in words_of("-m cxr_vit plan") if "--calibrate" not in words],
    ids=" ".join,
)
def test_every_plan_can_be_made(words, monkeypatch, tmp_path, capsys):
    from cxr_vit.cli import main

    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    assert main(["plan", *words[2:]]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 10


@pytest.mark.parametrize("text", YAML)
def test_every_yaml_example_loads(text, tmp_path):
    (tmp_path / "example.yaml").write_text(text)
    check(load_config([tmp_path / "example.yaml"]))


def test_every_linked_file_exists():
    links = re.findall(r"\]\(([^)#]+?)\)", README)
    local = [link for link in links if not link.startswith("http")]
    assert local
    assert [link for link in local if not (ROOT / link).exists()] == []
