"""A predictor of a checkpoint, on any engine."""

from __future__ import annotations

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping, NamedTuple, Optional

import numpy as np
from torch import Tensor

from cxr_vit import Trainer, ViTModule
from cxr_vit.checkpoint_files import WEIGHTS
from cxr_vit.commands.callbacks import DescribeEngine
from cxr_vit.commands.fitted_points import points_of_checkpoint
from cxr_vit.config import Config
from cxr_vit.data.cache import CacheSettings
from cxr_vit.data.dataset import ChestXrayDataset, dataset_of_pixels
from cxr_vit.data.spawn import usable_cores
from cxr_vit.engines.process_group import coordinator
from cxr_vit.evaluation.metrics import refuse_nonfinite
from cxr_vit.prediction.predictor import Facts, Predictor

#: Images of a chunk, and bytes of their pixels: few, as their rows are written together.
_CHUNK_IMAGES, _CHUNK_BYTES = 256, 2**26


class CheckpointPredictor(Predictor):
    """A checkpoint on an open engine."""

    def __init__(
        self, facts: Facts, predict: Callable[[ChestXrayDataset], Tensor], host_batch: int
    ) -> None:
        self.facts, self._predict = facts, predict
        images = min(_CHUNK_IMAGES, _CHUNK_BYTES // facts.settings.image_size**2)
        self.chunk = host_batch * max(1, images // host_batch)

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        """Score images; all processes call it with the same ones."""
        size, labels = self.facts.image_size, self.facts.labels
        dataset = dataset_of_pixels(images, num_classes=len(labels), image_size=size)
        scores = self._predict(dataset)
        refuse_nonfinite(scores)
        probabilities: np.ndarray = scores.numpy()
        return probabilities


class Opened(NamedTuple):
    """A predictor, and how its process works with others.

    Attributes
    ----------
    module
        The model of a checkpoint; None for an exported one.
    workers
        Processes that decode; None for one on each core.
    is_main
        Whether this process writes.
    is_alone
        Whether it is the only one.
    once
        Calls a function in the main process and returns its JSON-able result in all.
    any_process
        Whether the flag is set in any process.
    """

    predictor: Predictor
    module: Optional[ViTModule] = None
    workers: Optional[int] = None
    is_main: bool = True
    is_alone: bool = True
    once: Callable[[str, Callable[[], Any]], Any] = lambda name, function: function()
    any_process: Callable[[bool], bool] = bool


@contextlib.contextmanager
def open_checkpoint(checkpoint: Path, state: Mapping[str, Any], config: Config) -> Iterator[Opened]:
    """Open a checkpoint on the engine of the configuration."""
    # The images come from memory: another process would be slower than this one.
    trainer = Trainer(config.changed(data={"num_workers": 0}), callbacks=[DescribeEngine()])
    module = ViTModule.load_from_checkpoint(checkpoint, config=trainer.config)
    points = points_of_checkpoint(checkpoint, state, config, module.names)
    settings = CacheSettings.of(config.data)
    with trainer.predicting(module) as predict:
        identity = {
            "weights_sha256": state["sha256"][WEIGHTS],
            "labels": module.names,
            "image_size": config.data.image_size,
            "reading": asdict(settings),
            "views": config.evaluation.views,
            "engine": trainer.engine.facts()["name"],
            "precision": trainer.engine.facts()["precision"],
            "points": None if points is None else points.model_dump(),
        }
        facts = Facts(module.names, settings, config.data.image_size, points, identity)
        batch = trainer.engine.batch.eval_host_batch_size
        cores = max(1, usable_cores() // (trainer.launch.local_world_size or 1))
        yield Opened(
            CheckpointPredictor(facts, predict, batch),
            module,
            config.data.cache_workers or cores,
            trainer.is_global_zero,
            not trainer.launch.has_others,
            coordinator(trainer.launch).call_once,
            trainer.engine.any_process,
        )
