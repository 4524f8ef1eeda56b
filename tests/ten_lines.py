"""The ten lines of the documentation, with a callback, a logger and a module of a user's own.

[torchrun --nproc-per-node 4] tests/ten_lines.py FOLDER ENGINES SECTION.KEY=VALUE ...

ENGINES is JSON: name -> overrides. For each, process r writes FOLDER/<name>/<r>.json, what it saw.
It then trains again, and process 2 alone asks for a stop. tests/test_api.py runs the same functions
in its own process.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch.nn import functional as F

import cxr_vit

HOOKS = (
    "setup", "teardown", "on_fit_start", "on_fit_end", "on_train_start", "on_train_end",
    "on_train_epoch_start", "on_train_epoch_end", "on_train_batch_start", "on_train_batch_end",
    "on_validation_start", "on_validation_end", "on_test_start", "on_test_end",
    "on_save_checkpoint", "on_load_checkpoint", "on_exception",
)  # fmt: skip


class Recorder(cxr_vit.Callback):
    """Records every hook with its arguments and the step; counts steps over resumes.

    With `stop_at`, it asks for a stop after that step.
    """

    def __init__(self, stop_at: Optional[int] = None) -> None:
        self.stop_at = stop_at
        self.calls: List[Tuple[str, int, Tuple[Any, ...]]] = []
        self.count = 0

    def state_dict(self) -> Dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        self.count = state_dict["count"]

    def record(self, hook: str, trainer: Any, module: Any, *arguments: Any) -> None:
        assert isinstance(trainer, cxr_vit.Trainer)
        assert isinstance(module, WeightedFocalViT)
        self.calls.append((hook, trainer.global_step, arguments))
        if hook == "setup":
            self.count = 0  # a resumed run's state comes later
        elif hook == "on_train_batch_end":
            self.count += arguments[0].step - arguments[0].first_step
            if self.stop_at == arguments[0].step:
                trainer.should_stop = True
        elif hook == "on_save_checkpoint":
            arguments[0]["note of mine"] = {"step": trainer.global_step}

    @property
    def hooks(self) -> List[str]:
        """Names of the hooks, in order; that of a stage has it in brackets."""
        return [
            f"{hook}({arguments[0]})" if hook in ("setup", "teardown") else hook
            for hook, _, arguments in self.calls
        ]

    def of(self, name: str) -> List[Tuple[int, Tuple[Any, ...]]]:
        """Return the step and the arguments of each call of a hook."""
        return [(step, arguments) for hook, step, arguments in self.calls if hook == name]

    @property
    def losses(self) -> List[float]:
        outputs = [arguments[0] for _, arguments in self.of("on_train_batch_end")]
        return [loss for output in outputs for loss in output.losses.tolist()]


def _recording(hook: str) -> Any:
    def method(self: Recorder, trainer: Any, module: Any, *arguments: Any) -> None:
        self.record(hook, trainer, module, *arguments)

    return method


for _hook in HOOKS:
    setattr(Recorder, _hook, _recording(_hook))


class ListLogger(cxr_vit.Logger):
    """Keeps all calls."""

    def __init__(self) -> None:
        self.calls: List[Tuple[Any, ...]] = []

    def setup(self, folder: Path, first_step: int) -> None:
        self.calls.append(("setup", folder, first_step, (folder / "config.yaml").is_file()))

    def log_hyperparams(self, params: Any) -> None:
        self.calls.append(("log_hyperparams", dict(params)))

    def log_metrics(self, metrics: Any, step: int) -> None:
        self.calls.append(("log_metrics", dict(metrics), step))

    def log_figures(self, figures: Any, step: int) -> None:
        self.calls.append(("log_figures", list(figures), step))

    def finalize(self, status: str) -> None:
        self.calls.append(("finalize", status))


class WeightedFocalViT(cxr_vit.ViTModule):
    """Focal loss (Lin et al., 2017), with positives weighted by their rarity."""

    positive_weight: torch.Tensor

    def __init__(self, config: Any, data: Any = None, **options: Any) -> None:
        super().__init__(config, data, **options)
        weight = torch.ones(len(self.names))
        if data is not None:
            prevalence = torch.from_numpy(data.prevalence()).float()
            weight = ((1 - prevalence) / prevalence).clamp(max=5)
        self.register_buffer("positive_weight", weight)

    def loss(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        crossentropy = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        wrong = (torch.sigmoid(logits) - labels).abs()
        weight = 1 + labels * (self.positive_weight - 1)
        return (weight * wrong * wrong * crossentropy).mean()


class HeadOnly(WeightedFocalViT):
    """Trains the head alone; in a process without it there is no group."""

    def parameter_groups(self) -> List[Dict[str, Any]]:
        return [
            {"params": [parameter]}
            for name, parameter in self.model.hub_parameters()
            if name.startswith("classifier")
        ]


def head_only(overrides: Sequence[str], folder: Path) -> List[float]:
    """Train the head alone; return the losses."""
    own = [*overrides, f"run.dir={folder}"]
    if "engine.name=pipeline" in overrides:  # two stages, each computed by two processes
        own += ["pipeline.layers_per_stage=[2, 2]", "batch.replicas=2"]
        own += ["batch.gradient_accumulation=2"]
    config = cxr_vit.load_config("vit_demo", overrides=own)
    data, callback = cxr_vit.ChestXrayDataModule(config), Recorder()
    trainer = cxr_vit.Trainer(config, callbacks=[callback], loggers=[])
    trainer.fit(HeadOnly(config, data), data)
    return callback.losses


class Result:
    """What the ten lines gave."""

    def __init__(self, overrides: Sequence[str], stop_at: Optional[int] = None) -> None:
        self.callback, self.logger = Recorder(stop_at), ListLogger()
        self.config = cxr_vit.load_config("vit_demo", overrides=overrides)
        self.data = cxr_vit.ChestXrayDataModule(self.config)
        self.module = WeightedFocalViT(self.config, self.data)
        self.trainer = cxr_vit.Trainer(
            self.config, callbacks=[self.callback], loggers=[self.logger]
        )

    def run(self, images: Sequence[Path]) -> Result:
        """Train and score."""
        self.trainer.fit(self.module, self.data)
        self.validated = self.trainer.validate(self.module, self.data)
        self.tested = self.trainer.test(self.module, self.data)
        self.predicted = self.trainer.predict(self.module, images)
        return self


def main() -> None:
    folder, engines, overrides = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
    for name, own in engines.items():
        run_engine(folder / name, [*overrides, *own])


def run_engine(folder: Path, overrides: Sequence[str]) -> None:
    """Train and score on one engine."""
    (root,) = (word.partition("=")[2] for word in overrides if word.startswith("data.root="))
    names = (Path(root) / "test_list.txt").read_text(encoding="utf-8").split()
    images = [Path(root) / "images" / name for name in names]
    result = Result([*overrides, f"run.dir={folder / 'run'}"]).run(images)
    rank = result.trainer.launch.rank
    stopped = Result([*overrides, f"run.dir={folder / 'stopped'}"], 2 if rank == 2 else None)
    stopped.trainer.fit(stopped.module, stopped.data)
    saw = {
        "hooks": result.callback.hooks,
        "losses": result.callback.losses,
        "validated": result.validated,
        "tested": result.tested,
        "predicted": result.predicted.tolist(),
        "logged": len(result.logger.calls),
        "stopped": [stopped.trainer.global_step, stopped.trainer.stop_reason],
        "interrupted": stopped.trainer.interrupted,
        "is_global_zero": result.trainer.is_global_zero,
        "head only": head_only(overrides, folder / "head"),
    }
    (folder / f"{rank}.json").write_text(json.dumps(saw), encoding="utf-8")


if __name__ == "__main__":
    main()
