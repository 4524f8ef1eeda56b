"""A linear probe: from the features of the frozen model to a run's folder with the best head."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any, Dict, List, Sequence

import torch
from rich.console import Console
from rich.table import Table

from cxr_vit import ChestXrayDataModule, Trainer, ViTModule
from cxr_vit.config import Config
from cxr_vit.data.text_files import check_data_root
from cxr_vit.engines.base import EngineState
from cxr_vit.errors import ConfigError, DataError
from cxr_vit.evaluation.probe import Head, Scored, fit_heads, score_heads
from cxr_vit.files import write_text
from cxr_vit.training.checkpoint import CheckpointStore
from cxr_vit.training.extensions import all_loggers
from cxr_vit.training.features import FeatureReader, Features
from cxr_vit.training.run_folder import RunFolder
from cxr_vit.training.saving import collect_state

_NOT_USED = "a probe does not use the sections augment, optim, schedule and train"
_model_log = logging.getLogger("cxr_vit.model")


def run_probe(config: Config) -> Path:
    """Fit the heads, print their scores, and return the folder of the run with the best one."""
    if config.callbacks:
        raise ConfigError("callbacks: a linear probe has none. Leave them out.")
    if config.loss.name != "bce":
        raise ConfigError(
            f"loss.name={config.loss.name}: a linear probe is logistic regression, its loss is bce."
            " Leave it out."
        )
    if config.model.freeze not in ("none", "trunk"):
        raise ConfigError(
            f"model.freeze={config.model.freeze}: a linear probe freezes the whole trunk. Leave it"
            " out."
        )
    config = config.changed(model={"freeze": "trunk"})
    check_data_root(config.data)
    RunFolder.refuse_existing(config.run)
    started = time.perf_counter()
    data = ChestXrayDataModule(config)
    reader = FeatureReader(config, data)
    train, val = reader.read("train"), reader.read("val")
    print(data.describe(), _describe(train, val), _NOT_USED, sep="\n", flush=True)
    read = time.perf_counter()
    settings = config.probe
    decays = sorted(set(settings.weight_decays))
    fits = fit_heads(train.values, train.labels, weight_decays=decays, steps=settings.steps)
    scored = score_heads(fits, val.values, val.labels, data.names)
    best = _best(scored)
    fitted = time.perf_counter()
    seconds = {"features": round(read - started, 1), "heads": round(fitted - read, 1)}
    _print_table(scored, best, Console())
    folder = _save_run(config, data, reader, scored, best, seconds)
    print(f"features {seconds['features']:.1f} s, {len(fits)} heads {seconds['heads']:.1f} s")
    return folder


def _describe(train: Features, val: Features) -> str:
    count, width = train.values.shape
    origin = "computed and not kept (data.cache=off)"
    if train.path is not None:
        origin = f"{'kept' if train.was_kept else 'computed and kept'} in {train.path.parent}"
    return f"{width} features of {count} training and {len(val.values)} validation images, {origin}"


def _best(scored: Sequence[Scored]) -> Scored:
    """Return the head with the best macro AUROC, of equal ones that of the largest decay."""
    defined = [head for head in scored if head.auroc is not None]
    if not defined:
        raise DataError(
            "no finding has both positive and negative validation images, so no head can be chosen."
            " Set another data.val_fraction or another split."
        )
    return max(defined, key=lambda head: (head.auroc, head.fit.weight_decay))


def _print_table(scored: Sequence[Scored], best: Scored, console: Console) -> None:
    table = Table(title="linear probe, scored on the validation images")
    for heading in ("weight decay", "macro AUROC", "steps", ""):
        table.add_column(heading, justify="right")
    for head in scored:
        auroc = "-" if head.auroc is None else f"{head.auroc:.4f}"
        note = "best" if head is best else ""
        if not head.fit.has_converged:
            note = f"{note} not converged".strip()
        table.add_row(f"{head.fit.weight_decay:g}", auroc, str(head.fit.steps), note)
    console.print(table)
    if best.fit.weight_decay in (scored[0].fit.weight_decay, scored[-1].fit.weight_decay):
        console.print(
            "the best one is at an end of probe.weight_decays: a wider list may be better"
        )


def _save_run(
    config: Config,
    data: ChestXrayDataModule,
    reader: FeatureReader,
    scored: Sequence[Scored],
    best: Scored,
    seconds: Dict[str, float],
) -> Path:
    """Write a run's folder whose only checkpoint, `best` and `last`, has the best head."""
    trainer = Trainer(config)
    trainer.setup_data(data)
    trainer.module = module = _module_with(best.fit.head, config, data, for_ipu=reader.for_ipu)
    trainer.saver.best_score, trainer.saver.best_step = best.auroc, 0
    run = RunFolder.create(config.run)
    with run.locked():
        run.refuse_saved()
        run.write_config(config)
        recorder = reader.recorder
        run.write_environment(recorder.description, recorder.facts, data.fingerprint())
        run.write_skipped(data.skipped)
        write_text(run.path / "heads.json", json.dumps(_facts(scored, best, seconds), indent=2))
        for log in all_loggers(config, None):
            log.setup(run.path, 0)
            log.log_hyperparams(config.flat())
            log.log_metrics({f"val/{tag}": value for tag, value in best.scores.items()}, 0)
            log.finalize("success")
        store = CheckpointStore(run.checkpoints, writes=True)
        files = {**module.model.hub_files(), run.config.name: run.config_text(config)}
        state = EngineState(module.model.weights())
        path = store.save(0, state, files=files, trainer_state=collect_state(trainer))
        store.link("best", path)
    return run.path


def _module_with(
    head: Head, config: Config, data: ChestXrayDataModule, *, for_ipu: bool
) -> ViTModule:
    level = _model_log.level
    _model_log.setLevel(logging.WARNING)  # the features' module has said it all
    try:
        module = ViTModule(config, data)
        module.setup(for_ipu=for_ipu)
    finally:
        _model_log.setLevel(level)
    own = dict(module.model.hub_parameters())
    with torch.no_grad():
        own["classifier.weight"].copy_(head.weight)
        own["classifier.bias"].copy_(head.bias)
    return module


def _facts(scored: Sequence[Scored], best: Scored, seconds: Dict[str, float]) -> Dict[str, Any]:
    """Return what heads.json holds."""
    heads: List[Dict[str, Any]] = [
        {
            "weight_decay": head.fit.weight_decay,
            "val_auroc_macro": head.auroc,
            "steps": head.fit.steps,
            "largest_gradient": head.fit.gradient,
        }
        for head in scored
    ]
    return {"weight_decay": best.fit.weight_decay, "heads": heads, "seconds": seconds}
