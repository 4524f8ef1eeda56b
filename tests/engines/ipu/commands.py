"""Run train.py and evaluate.py in this process and return their results."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import pytest
from torch import Tensor

from conftest import module_of
from cxr_vit.config import BatchPlan, Config, load_config
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.engines.base import Engine
from cxr_vit.engines.choice import EngineChoice, build_engine
from cxr_vit.engines.ipu.engine import PopTorchEngine
from cxr_vit.engines.processes import Launch
from cxr_vit.engines.torch_engine import TorchEngine

ROOT = Path(__file__).resolve().parents[3]

#: configs/vit_demo_ipu.yaml with small images, Hugging Face's head, no flips and the smallest
#: accumulation for four stages.
SMALL = (
    "model.pooling=class",
    "augment.horizontal_flip=0",
    "optim.lr=1e-3",
    "data.image_size=32",
    "data.val_fraction=0.2",
    "batch.micro_batch_size=1",
    "batch.gradient_accumulation=7",
    "batch.device_iterations=1",
    "batch.eval_micro_batch_size=1",
    "train.steps=4",
    "train.log_every_steps=1",
    "train.eval_every_steps=100",
    "train.checkpoint_every_steps=100",
    "train.keep_last=9",
    "engine.executable_cache=null",
    "loggers=[jsonl]",
)
TORCH = ("engine.name=torch", "engine.device=cpu")
IPU = ("engine.name=poptorch", "engine.device=auto")


class Run(NamedTuple):
    """A run of train.py: its folder, and the results of its engine."""

    path: Path
    status: int
    losses: List[float]
    logits: List[Tensor]

    @property
    def events(self) -> List[Dict[str, Any]]:
        """Events of metrics.jsonl."""
        lines = (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]

    @property
    def logged(self) -> List[float]:
        """Losses of metrics.jsonl."""
        return [event["train/loss"] for event in self.events if "train/loss" in event]

    @property
    def scores(self) -> List[Dict[str, Any]]:
        """Validations of metrics.jsonl."""
        return [event for event in self.events if "val/loss" in event]

    def checkpoint(self, name: str = "last") -> Path:
        return self.path / "checkpoints" / name


class Commands:
    """Runs the commands, each in its own folder."""

    def __init__(self, data: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.data, self.folder = data, folder
        self.file = ROOT / "configs" / "vit_demo_ipu.yaml"
        self._running: Optional[Run] = None
        self._watch(monkeypatch)

    def _watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Record the loss of every update and the logits of every scored split."""
        predict = Engine.predict_dataset

        def watched(step: Any) -> Any:
            def train_step(engine: Engine, *arguments: Any, **settings: Any) -> Any:
                output = step(engine, *arguments, **settings)
                if self._running:
                    self._running.losses.extend(output.losses.tolist())
                return output

            return train_step

        def predict_dataset(engine: Engine, *arguments: Any, **named: Any) -> Any:
            logits, labels = predict(engine, *arguments, **named)
            if self._running:
                self._running.logits.append(logits)
            return logits, labels

        for kind in (PopTorchEngine, TorchEngine):
            monkeypatch.setattr(kind, "train_step", watched(kind.train_step))
        monkeypatch.setattr(Engine, "predict_dataset", predict_dataset)

    def overrides(self, *more: str) -> List[str]:
        """Return the overrides of the small configuration, and more."""
        return [*SMALL, f"data.root={self.data}", *more]

    def train(self, *more: str, folder: Optional[str] = None) -> Run:
        path = self.folder / (folder or f"run{len(list(self.folder.glob('*')))}")
        arguments = ["--config", str(self.file), *self.overrides(*more), f"run.dir={path}"]
        return self._main(path, arguments)

    def resume(self, path: Path, *more: str) -> Run:
        return self._main(path, ["--resume", str(path), *more])

    def resume_at(self, run: Run, step: int, *more: str) -> Run:
        """Resume a copy of a run from an earlier step, as if it had been killed after it."""
        path = self.folder / f"{run.path.name}_from_{step}_{len(list(self.folder.glob('*')))}"
        shutil.copytree(str(run.path), str(path), symlinks=True)
        for checkpoint in (path / "checkpoints").glob("step_*"):
            if int(checkpoint.name[5:]) > step:
                shutil.rmtree(str(checkpoint))
        return self.resume(path, *more)

    def _main(self, path: Path, arguments: List[str]) -> Run:
        from cxr_vit.commands import train

        self._running = run = Run(path, -1, [], [])
        try:
            return run._replace(status=train.main(arguments))
        finally:
            self._running = None

    def evaluate(self, checkpoint: Path, *more: str) -> List[List[float]]:
        """Return the probabilities of predictions.csv, row by row."""
        from cxr_vit.commands import evaluate

        out = self.folder / f"report{len(list(self.folder.glob('*')))}"
        assert evaluate.main(["--checkpoint", str(checkpoint), "--out", str(out), *more]) == 0
        with (out / "predictions.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        return [[float(row[name]) for name in row if name.endswith("probability")] for row in rows]

    def config(self, *more: str) -> Config:
        return load_config([self.file], self.overrides(*more))


def make_engine(config: Config, *, offline: bool = False) -> PopTorchEngine:
    """Build the IPU engine like train.py, for any `engine.name`."""
    data = ChestXrayDataModule(config)
    module = module_of(config, data, for_ipu=True)
    batch, launch = BatchPlan.from_section(config.batch), Launch.from_environment()
    choice = EngineChoice("poptorch", "a test")
    engine = build_engine(config, module, choice, batch, launch, offline=offline)
    assert isinstance(engine, PopTorchEngine)
    return engine


def compiled(inspection: Any) -> List[Any]:
    """Return the executables so far, inference first."""
    return [call.args[0] for call in inspection.log().calls("compiled")]


def messages(caplog: pytest.LogCaptureFixture) -> List[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.name.startswith("cxr_vit") and record.levelno >= logging.INFO
    ]
