"""Callbacks and loggers of a user's own, named in the configuration."""

import json
import sys
from pathlib import Path

import pytest

from cxr_vit import Callback, ChestXrayDataModule, EarlyStopping, Trainer, ViTModule
from cxr_vit.checkpoint_files import read_state, sha256, state_text
from cxr_vit.commands import evaluate
from cxr_vit.errors import ConfigError
from cxr_vit.training.loggers import CsvLogger

MODULE = '''
import cxr_vit

class Count(cxr_vit.Callback):
    """Counts host batches from a number on."""

    def __init__(self, start, *, step=1):
        self.count, self.step = start, step

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.count += self.step

class Lines(cxr_vit.Logger):
    """Writes the tags of every event."""

    def __init__(self, file="tags.txt"):
        self.file = file

    def setup(self, folder, first_step):
        self.path = folder / self.file

    def log_metrics(self, metrics, step):
        with self.path.open("a") as file:
            file.write(f"{step} {sorted(metrics)}\\n")

def function():
    raise AssertionError("called")
'''


@pytest.fixture
def extension(tmp_path, monkeypatch):
    """Make the module `my_extension` importable."""
    folder = tmp_path / "code"
    folder.mkdir()
    (folder / "my_extension.py").write_text(MODULE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    yield folder
    sys.modules.pop("my_extension", None)


def fitted(config, **given):
    trainer, data = Trainer(config, **given), ChestXrayDataModule(config)
    trainer.fit(ViTModule(config, data), data)
    return trainer


@pytest.fixture
def named(make_config, tmp_path):
    """Return a function that trains with overrides for a step."""
    return lambda *overrides: fitted(
        make_config("train.steps=1", f"run.dir={tmp_path / 'named'}", *overrides)
    )


def test_callback_and_logger_of_the_configuration_are_used(
    make_config, tmp_path, extension, monkeypatch, capsys
):
    run = tmp_path / "run"
    config = make_config(
        "callbacks=[{class: my_extension.Count, args: {start: 10, step: 2}}]",
        "loggers=[jsonl, {class: my_extension.Lines}]",
        "train.steps=2",
        f"run.dir={run}",
    )
    trainer = fitted(config)
    said = "importing what the configuration names: my_extension.Count, my_extension.Lines\n"
    assert said in capsys.readouterr().out
    (count,) = [one for one in trainer.callbacks if type(one).__name__ == "Count"]
    assert count.count == 14
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = (run / "tags.txt").read_text().splitlines()
    assert [int(line.split()[0]) for line in lines] == steps

    # Scoring the run needs neither class.
    sys.modules.pop("my_extension")
    monkeypatch.delitem(sys.modules, "my_extension", raising=False)
    (extension / "my_extension.py").unlink()
    assert "my_extension.Count" in (run / "config.yaml").read_text()
    assert evaluate.main(["--checkpoint", str(run), "--out", str(tmp_path / "report")]) == 0
    assert "my_extension" not in sys.modules


def test_scoring_imports_nothing_that_a_configuration_names(make_config, extension, tmp_path):
    run = tmp_path / "run"
    fitted(make_config("train.steps=1", f"run.dir={run}"))
    evil = extension / "evil.py"
    evil.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf-8")
    config = make_config("callbacks=[{class: evil.Callback}]", "loggers=[{class: evil.Logger}]")
    best = run / "checkpoints" / "best"
    for folder in (run, best):
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        text = text.replace("callbacks: []", "callbacks: [{class: evil.Callback}]")
        (folder / "config.yaml").write_text(text, encoding="utf-8")
    state = {**read_state(best), "sha256": {**read_state(best)["sha256"]}}
    state["sha256"]["config.yaml"] = sha256(best / "config.yaml")
    del state["digest"]
    (best / "trainer_state.json").write_text(state_text(state), encoding="utf-8")
    trainer, data = Trainer(config), ChestXrayDataModule(config)
    module = ViTModule(config, data)
    trainer.validate(module, data, run)
    trainer.test(module, data, run)
    trainer.predict(module, next(Path(config.data.root).glob("**/*.png")), run)
    assert evaluate.main(["--checkpoint", str(best), "--out", str(tmp_path / "report")]) == 0
    assert not (tmp_path / "ran").exists()
    assert "evil" not in sys.modules


def test_callbacks_given_in_python_come_after_those_of_the_configuration(
    make_config, extension, tmp_path
):
    overrides = ["train.steps=1", f"run.dir={tmp_path / 'run'}"]
    config = make_config("callbacks=[{class: my_extension.Count, args: {start: 0}}]", *overrides)
    own = Callback()
    *_, configured, last = fitted(config, callbacks=[own]).callbacks
    assert type(configured).__name__ == "Count"
    assert last is own


def test_configured_early_stopping_replaces_the_built_in_one(named):
    text = "callbacks=[{class: cxr_vit.EarlyStopping, args: {patience: 9, monitor: val/loss}}]"
    found = [one for one in named(text).callbacks if isinstance(one, EarlyStopping)]
    assert [(one.patience, one.monitor) for one in found] == [(9, "val/loss")]


def test_class_of_the_package_can_be_a_logger(named):
    (logger,) = named("loggers=[{class: cxr_vit.CsvLogger}]").loggers
    assert isinstance(logger, CsvLogger)


def test_loggers_given_in_python_replace_those_of_the_configuration(make_config):
    config = make_config("loggers=[{class: no_such_package.Logger}]")
    assert Trainer(config, loggers=[]).loggers == []


@pytest.mark.parametrize("key", ["callbacks", "loggers"])
@pytest.mark.parametrize(
    ("item", "message"),
    [
        ("{class: no_such_package.Mine}", r"cannot import no_such_package .* PYTHONPATH"),
        ("{class: my_extension.Cuont}", r"my_extension has no Cuont\. Did you mean 'Count'\?"),
        ("{class: my_extension.function}", r"is not a subclass of cxr_vit\.(Callback|Logger)\."),
        ("{class: subprocess.Popen, args: {args: [touch, FILE]}}", r"Popen is not a subclass of"),
    ],
)
def test_class_that_cannot_be_used_is_refused(make_config, extension, tmp_path, key, item, message):
    file = tmp_path / "touched"
    config = make_config(f"{key}=[{item.replace('FILE', str(file))}]")
    with pytest.raises(ConfigError, match=f"^{key}: .*{message}"):
        fitted(config)
    assert not file.exists()


@pytest.mark.parametrize(
    ("key", "item", "message"),
    [
        ("callbacks", "{class: my_extension.Lines}", r"is not a subclass of cxr_vit\.Callback"),
        ("loggers", "{class: my_extension.Count}", r"is not a subclass of cxr_vit\.Logger"),
        (
            "callbacks",
            "{class: my_extension.Count}",
            r"missing a required argument: 'start'\. Its arguments are \(start, \*, step=1\)",
        ),
        (
            "callbacks",
            "{class: my_extension.Count, args: {start: 1, stop: 2}}",
            r"Count: got an unexpected keyword argument 'stop'\. Its arguments are",
        ),
        (
            "loggers",
            "{class: my_extension.Lines, args: {path: a}}",
            r"got an unexpected keyword argument 'path'\. Its arguments are \(file='tags\.txt'\)",
        ),
    ],
)
def test_wrong_kind_and_wrong_arguments_are_refused(named, extension, key, item, message):
    with pytest.raises(ConfigError, match=message):
        named(f"{key}=[{item}]")


@pytest.mark.parametrize(
    "item", ["callbacks", "[Count]", "[{class: Count}]", "[{class: a.B, arguments: {}}]", "[1]"]
)
def test_other_notations_are_refused_with_the_right_one(make_config, item):
    with pytest.raises(ConfigError, match=r"callbacks.*\{class: package\.Name, args:"):
        make_config(f"callbacks={item}")


def test_mistakes_are_reported_before_the_data_are_touched(make_config, tmp_path, extension):
    root = tmp_path / "absent"
    config = make_config("callbacks=[{class: my_extension.Count}]", f"data.root={root}")
    with pytest.raises(ConfigError, match="required argument"):
        fitted(config)
    assert not root.exists()
