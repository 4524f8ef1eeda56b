"""Command lines: arguments, output, exit status and imports, mostly in real processes."""

import re
import subprocess
import sys
from pathlib import Path
from typing import List, NamedTuple, Set

import pytest

from cxr_vit import __version__, cli
from cxr_vit.cli import COMMANDS, evaluate_arguments, main, program, run, train_arguments
from cxr_vit.config import load_config
from cxr_vit.config.schema import SECTIONS
from cxr_vit.errors import ConfigError, DataError

ROOT = Path(__file__).parents[1]
#: Libraries that are slow to import.
HEAVY = {"torch", "torchvision", "transformers", "pandas", "torchmetrics", "matplotlib", "sklearn"}


class Result(NamedTuple):
    """Status and output of a process, and the top-level packages it imported."""

    status: int
    out: str
    err: str
    imported: Set[str]


def command(*words: str, cwd: Path = ROOT) -> Result:
    process = subprocess.run(
        [sys.executable, "-X", "importtime", *words],
        cwd=str(cwd),
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    imported: Set[str] = set()
    err: List[str] = []
    for line in process.stderr.split("\n"):
        match = re.match(r"import time:.*\| +(\S+)$", line)
        if match:
            imported.add(match.group(1).split(".")[0])
        elif not line.startswith("import time:"):
            err.append(line)
    return Result(process.returncode, process.stdout, "\n".join(err), imported)


@pytest.fixture(scope="module")
def train_help() -> Result:
    return command("train.py", "--help")


@pytest.fixture(scope="module")
def pod4_check() -> Result:
    return command("-m", "cxr_vit", "check", "--config", "configs/vit_pod4.yaml")


def test_imports_are_detected():
    # otherwise the tests of heavy imports would always pass
    assert "pandas" in command("-c", "import pandas").imported


# train.py --help


def test_help_exits_with_status_0(train_help):
    assert (train_help.status, train_help.err) == (0, "")


def test_help_imports_nothing_heavy(train_help):
    assert train_help.imported & HEAVY == set()
    assert "pydantic" in train_help.imported


@pytest.mark.parametrize("section", SECTIONS)
def test_help_lists_every_field_with_its_description(train_help, section):
    lines = train_help.out.split("\n")
    assert any(line.startswith(f"{section}: ") for line in lines)
    for key, field in SECTIONS[section].model_fields.items():
        here = [
            index for index, line in enumerate(lines) if line.startswith(f"  {section}.{key}  (")
        ]
        assert len(here) == 1
        assert lines[here[0] + 1].strip() == field.description


def test_help_says_which_files_go_behind_others(train_help):
    assert "data/* and recipes/pod4 go behind one of the others" in " ".join(train_help.out.split())


def test_help_lists_ranges_and_defaults(train_help):
    assert "  train.log_every_steps  (integer >= 1; default 50)\n" in train_help.out
    assert "  schedule.warmup_ratio  (number >= 0, <= 1 or null; default 0.0)\n" in train_help.out


# Errors in the configuration


@pytest.fixture(scope="module")
def misspelt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("misspelt")
    text = "run: {name: a}\noptim:\n  learning_rate: 0.1\ntrain: {epochs: 0}\n"
    (folder / "my.yaml").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def misspelt_training(misspelt: Path) -> Result:
    return command(str(ROOT / "train.py"), "--config", "my.yaml", "run.sed=3", cwd=misspelt)


def test_misspelt_key_exits_with_status_2(misspelt_training):
    assert misspelt_training.status == 2


def test_misspelt_key_names_the_line_and_the_nearest_key(misspelt_training):
    assert (
        "ConfigError: my.yaml:3: unknown key 'optim.learning_rate'. Did you mean 'optim.lr'?"
        in misspelt_training.err
    )


def test_every_error_is_printed_on_its_own_line(misspelt_training):
    lines = misspelt_training.err.strip().split("\n")
    assert len(lines) == 3
    assert all(line.startswith("ConfigError: ") for line in lines)
    assert any("my.yaml:4: train.epochs=" in line for line in lines)
    assert any("command line: unknown key 'run.sed'" in line for line in lines)


def test_misspelt_key_prints_no_traceback(misspelt_training):
    assert "Traceback" not in misspelt_training.err
    assert misspelt_training.out == ""


def test_misspelt_key_writes_no_file(misspelt, misspelt_training):
    assert misspelt_training.status == 2
    assert [path.name for path in misspelt.iterdir()] == ["my.yaml"]


def test_misspelt_key_imports_nothing_heavy(misspelt_training):
    assert misspelt_training.imported & HEAVY == set()


def test_missing_config_exits_without_traceback(tmp_path):
    result = command(str(ROOT / "train.py"), "--config", "absent.yaml", cwd=tmp_path)
    assert result.status == 2
    assert result.err.startswith("ConfigError: absent.yaml: ")
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_resume_exits_without_traceback(tmp_path):
    result = command(str(ROOT / "train.py"), "--resume", cwd=tmp_path)
    assert result.status == 2
    assert result.err.startswith("CheckpointError: nothing to resume")
    assert result.imported & HEAVY == set()
    assert list(tmp_path.iterdir()) == []


# python -m cxr_vit


def test_check_exits_with_status_0(pod4_check):
    assert (pod4_check.status, pod4_check.err) == (0, "")


def test_check_imports_nothing_heavy(pod4_check):
    assert pod4_check.imported & HEAVY == set()


def test_check_prints_the_resolved_config(pod4_check):
    assert "name: google/vit-base-patch16-224-in21k" in pod4_check.out
    assert "base_lr: 0.001" in pod4_check.out
    # a default that the file does not give
    assert "early_stopping_patience: null" in pod4_check.out
    assert "${" not in pod4_check.out


def test_check_prints_the_batch_arithmetic(pod4_check):
    assert "= 1 micro-batch x 128 accumulation x 1 replicas" in pod4_check.out
    assert re.search(r"global batch +128 samples per weight update", pod4_check.out)
    assert re.search(r"host batch +128 samples per host call", pod4_check.out)


def test_check_prints_the_rate_that_a_rate_for_256_images_is(capsys, repository):
    arguments = ["check", "--config", str(repository / "configs" / "vit_demo.yaml")]
    assert main([*arguments, "optim.base_lr=1e-3", "batch={global_batch_size: 64}"]) == 0
    expected = "\npeak rate       0.00025 = optim.base_lr=0.001 x 64 / 256 samples\n"
    assert expected in capsys.readouterr().out


def test_check_prints_the_device_allocation(pod4_check):
    found = re.findall(r"^(Embedding|Encoder +\d+|Head) +--> stage (\d)$", pod4_check.out, re.M)
    expected = [("Embedding", "0")]
    expected += [(f"Encoder {layer}", str(layer // 3)) for layer in range(12)]
    expected += [("Head", "3")]
    assert found == expected


def test_check_of_a_broken_rule_exits_with_status_2():
    words = ["check", "--config", "configs/vit_pod4.yaml", "pipeline.layers_per_stage=[3, 3, 3, 2]"]
    result = command("-m", "cxr_vit", *words)
    assert result.status == 2
    assert "ConfigError: pipeline.layers_per_stage=[3, 3, 3, 2] places 11 layers" in result.err
    assert "Traceback" not in result.err


@pytest.fixture(scope="module")
def unknown_command() -> Result:
    return command("-m", "cxr_vit", "prepair")


def test_unknown_command_prints_the_usage(unknown_command):
    assert unknown_command.status == 2
    assert "usage: python -m cxr_vit COMMAND" in unknown_command.err
    assert "Traceback" not in unknown_command.err
    assert unknown_command.imported & HEAVY == set()


def test_unknown_command_suggests_the_nearest(unknown_command):
    assert "unknown command 'prepair'. Did you mean 'prepare'?" in unknown_command.err


def test_no_command_prints_the_usage(capsys):
    assert main([]) == 2
    assert "usage: python -m cxr_vit COMMAND" in capsys.readouterr().err


def test_help_lists_the_commands(capsys):
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {name} " in out for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_lists_its_options(name, capsys):
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: {program(name)} ")
    without = {
        *("sample", "evaluate", "import-ipu-config", "convert-weights", "summarize", "compare"),
        *("export", "localize", "predict", "selftest"),
    }
    assert ("--config FILE" in out) == (name not in without)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command_imports_nothing_heavy(name):
    result = command("-m", "cxr_vit", name, "--help")
    assert (result.status, result.err) == (0, "")
    assert result.imported & HEAVY == set()


# Errors


@pytest.mark.parametrize("error", [DataError("first line\nsecond line"), OSError("no space left")])
def test_user_facing_error_is_printed_without_traceback(error, monkeypatch, capsys):
    def fail(argv):
        raise error

    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(SystemExit) as ended:
        run(fail)
    assert ended.value.code == 2
    name = type(error).__name__
    assert capsys.readouterr().err.splitlines() == [
        f"{name}: {line}" for line in str(error).split("\n")
    ]


def test_error_gives_no_orders_to_the_terminal(monkeypatch, capsys):
    def fail(argv):
        raise DataError("tensor \x1b]0;owned\x07\x9b2J\r\u202eé\tnot read\nsecond line")

    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(SystemExit):
        run(fail)
    assert capsys.readouterr().err == (
        "DataError: tensor \\x1b]0;owned\\x07\\x9b2J\\r\\u202eé\\tnot read\n"
        "DataError: second line\n"
    )


def test_other_error_keeps_its_traceback(monkeypatch):
    def fail(argv):
        raise RuntimeError("a bug")

    monkeypatch.setattr("sys.argv", ["train.py"])
    with pytest.raises(RuntimeError, match="a bug"):
        run(fail)


# evaluate.py


def test_missing_checkpoint_exits_without_traceback(tmp_path):
    result = command(str(ROOT / "evaluate.py"), "--checkpoint", "runs/a", cwd=tmp_path)
    assert result.status == 2
    assert result.err.startswith("CheckpointError: runs/a is not a checkpoint")
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []
    assert result.imported & HEAVY == set()


# Parsing of the command line


def test_several_files_and_overrides_after_config():
    arguments = train_arguments(["--config", "a.yaml", "b.yaml", "optim.lr=1", "run.seed=2"])
    assert arguments.files == [Path("a.yaml"), Path("b.yaml")]
    assert arguments.overrides == ["optim.lr=1", "run.seed=2"]


def test_config_can_be_given_twice():
    arguments = train_arguments(["--config", "a.yaml", "--config", "b.yaml"])
    assert arguments.files == [Path("a.yaml"), Path("b.yaml")]


def test_overrides_before_config():
    arguments = train_arguments(["optim.lr=1", "--config", "a.yaml"])
    assert (arguments.files, arguments.overrides) == ([Path("a.yaml")], ["optim.lr=1"])


def test_overrides_before_and_after_an_option():
    arguments = train_arguments(["optim.lr=1", "--resume", "runs/a", "run.seed=2"])
    assert arguments.overrides == ["optim.lr=1", "run.seed=2"]


def test_evaluate_overrides_before_and_after_an_option():
    arguments = evaluate_arguments(["data.root=a", "--checkpoint", "b", "data.num_workers=1"])
    assert arguments.overrides == ["data.root=a", "data.num_workers=1"]


def test_file_with_an_equal_sign_in_its_name_is_a_file(tmp_path):
    file = tmp_path / "lr=1.yaml"
    file.write_text("", encoding="utf-8")
    arguments = train_arguments(["--config", str(file), "optim.lr=1"])
    assert (arguments.files, arguments.overrides) == ([file], ["optim.lr=1"])


@pytest.mark.parametrize(
    ("words", "resume"),
    [(["optim.lr=1"], None), (["--resume"], ""), (["--resume", "runs/a"], "runs/a")],
)
def test_resume_names_a_run_or_the_newest(words, resume):
    assert train_arguments(words).resume == resume


def test_override_after_resume_is_not_a_run():
    arguments = train_arguments(["--resume", "train.epochs=5"])
    assert (arguments.resume, arguments.overrides) == ("", ["train.epochs=5"])


def test_options_are_not_abbreviated():
    with pytest.raises(ConfigError, match=r"unrecognized arguments: --conf\. .* '--config'"):
        train_arguments(["--conf", "a.yaml"])


def test_evaluate_needs_a_checkpoint():
    with pytest.raises(ConfigError, match="required: --checkpoint"):
        evaluate_arguments([])


def test_evaluate_takes_split_out_and_overrides():
    words = ["--checkpoint", "a", "--split", "val", "--out", "b", "data.root=c"]
    assert evaluate_arguments(words) == (
        *([Path("a")], "val", Path("b"), ["data.root=c"], [], []),
        None,
    )


def test_overrides_of_the_data_are_those_of_another_data_set():
    given = ["engine.device=cpu", "data={format: nih}", "--checkpoint", "a"]
    words = [*given, "--data", "b.yaml", "c.yaml", "data.root=d", "--out", "e"]
    files = [Path("b.yaml"), Path("c.yaml")]
    of_data = ["data={format: nih}", "data.root=d"]
    assert evaluate_arguments(words)[2:6] == (Path("e"), ["engine.device=cpu"], files, of_data)


# Mistakes on the command line: one line that says what to write


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["--optim.lr=1e-3"], "--optim.lr is no option. Write optim.lr=1e-3, without dashes."),
        (["--optim.lr", "1e-3"], "--optim.lr is no option. Write optim.lr=1e-3, without dashes."),
        (["-optim.lr=1e-3"], "-optim.lr is no option. Write optim.lr=1e-3, without dashes."),
        (["--optim.weight-decay", "0"], "Write optim.weight_decay=0, without dashes."),
        (["--lr", "1e-3"], "--lr is no option. Write optim.lr=1e-3, without dashes."),
        (["--name=a"], "Write run.name=a or model.name=a or loss.name=a or "),
        (["--optim.lr", "run.seed=1"], "Write optim.lr=value, without dashes."),
        (["--data.split", "--resume"], "Write data.split=value, without dashes."),
        (["--loggers=[csv]"], "Write loggers=[csv], without dashes."),
        (["--resumee"], "unrecognized arguments: --resumee. Did you mean '--resume'?"),
        (["vit_demo.yaml"], "vit_demo.yaml: a configuration file is given as --config vit_demo.y"),
        ([], "no configuration. Give one, e.g. python train.py --config vit_demo, or --resume"),
    ],
)
def test_mistake_of_train_is_answered_with_what_to_write(words, advice):
    with pytest.raises(ConfigError) as caught:
        train_arguments(words)
    assert advice in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_misspelt_override_is_reported():
    with pytest.raises(ConfigError) as caught:
        train_arguments(["--optim.lr=1", "--train.epochs", "2"])
    assert str(caught.value).splitlines() == [
        "--optim.lr is no option. Write optim.lr=1, without dashes.",
        "--train.epochs is no option. Write train.epochs=2, without dashes.",
    ]


def test_option_with_the_name_of_a_field_stays_an_option():
    with pytest.raises(DataError, match="sample"):  # --seed is also run.seed
        main(["sample", "--out", str(ROOT / "tests"), "--seed", "1", "--images", "60"])


def test_mistakes_exit_with_status_2_and_one_line():
    result = command("train.py", "--optim.lr", "1e-3", "--config", "configs/vit_demo.yaml")
    assert (result.status, result.out, len(result.err.splitlines())) == (2, "", 1)
    assert result.imported & HEAVY == set()


def test_run_given_without_checkpoint_option():
    with pytest.raises(ConfigError, match=r"a run is given as --checkpoint runs/a"):
        evaluate_arguments(["runs/a"])


@pytest.mark.parametrize(
    ("word", "advice"),
    [
        ("vit_dmo", " Did you mean 'vit_demo'? The package has vit_demo, "),
        ("configs/vit_dmo.yaml", " Did you mean 'vit_demo'? The package has vit_demo, "),
        ("mine.yaml", " Did you mean 'mime.yaml'? The package has vit_demo, "),
        ("nothing_like_it", "nothing_like_it: there is no such file. The package has vit_demo, "),
        ("optim.lr", "optim.lr: there is no such file. An override is written optim.lr=value."),
    ],
)
def test_unknown_configuration_lists_near_ones(word, advice, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mime.yaml").touch()
    with pytest.raises(ConfigError) as caught:
        load_config([word])
    assert advice in str(caught.value)


@pytest.mark.parametrize("word", ["vit_demo", "vit_demo.yaml", "configs/vit_demo.yaml"])
def test_configuration_of_the_package_is_found_by_name(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config(word) == load_config(ROOT / "configs" / "vit_demo.yaml")


def test_folder_of_that_name_is_no_configuration(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("vit_demo").mkdir()
    assert load_config("vit_demo").run.name == "vit_demo"


@pytest.mark.parametrize("name", ["prepare", "data-report"])
def test_data_commands_miss_the_data_before_slow_imports(name):
    result = command("-m", "cxr_vit", name, "data.root=/absent")
    assert (result.status, "data.root=/absent is not a folder" in result.err) == (2, True)
    assert not {"torch", "pandas"} & result.imported


@pytest.mark.parametrize("word", ["vit_demo", "vit_demo.yaml"])
def test_own_file_wins_over_the_package(word, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("vit_demo.yaml").write_text("run: {name: mine}\n", encoding="utf-8")
    assert load_config(word).run.name == "mine"


# The program's name


@pytest.mark.parametrize(
    ("started", "advised"),
    [
        ("train.py", "python train.py"),
        ("/usr/bin/cxr-vit", "cxr-vit train"),
        ("cxr_vit/__main__.py", "python train.py"),
    ],
)
def test_advice_names_the_program_as_it_was_started(started, advised, monkeypatch):
    monkeypatch.setattr("sys.argv", [started])
    assert program("train") == advised


def test_scripts_are_not_advised_where_there_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["cxr_vit/__main__.py"])
    monkeypatch.setattr(cli, "__file__", str(tmp_path / "cxr_vit" / "cli.py"))
    assert program("train") == "python -m cxr_vit train"


def test_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"cxr-vit {__version__}\n"


# IPUs


def test_check_reports_that_poptorch_would_refuse_nothing(pod4_check):
    assert "torchrun --nproc-per-node 4 train.py ... engine.name=pipeline" in pod4_check.out
    assert "on IPUs      nothing here that PopTorch would refuse" in pod4_check.out


def test_check_reports_what_poptorch_would_refuse():
    words = ["check", "--config", "configs/vit_pod4.yaml", "batch.gradient_accumulation=4"]
    result = command("-m", "cxr_vit", *words)
    assert result.status == 0  # legal on a GPU
    assert "refused:\n  batch.gradient_accumulation=4 is less than the 7" in result.out
    result = command("-m", "cxr_vit", *words, "engine.name=poptorch")
    assert result.status == 2
    assert "ConfigError: batch.gradient_accumulation=4 is less than the 7" in result.err


def test_compile_only_refuses_resume():
    result = command("train.py", "--compile-only", "--resume")
    assert result.status == 2
    assert "--compile-only makes no run" in result.err


def test_warnings_give_no_orders_to_the_terminal(repository):
    code = (
        "import logging\nfrom cxr_vit import cli\n"
        "cli.run(lambda words: logging.getLogger('cxr_vit.x').warning('a\\x1b]0;b\\x07\\nc') or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=str(repository), stderr=subprocess.PIPE, check=True
    )
    assert done.stderr == b"WARNING: a\\x1b]0;b\\x07\nc\n"
