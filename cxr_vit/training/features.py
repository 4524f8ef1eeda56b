"""The input of the head of a frozen model, for every image of a split; computed once and kept."""

from __future__ import annotations

import hashlib
import json
import logging
from functools import cached_property
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor, nn
from transformers import PreTrainedModel

from cxr_vit.config import Config
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.dataset import ChestXrayDataset
from cxr_vit.data.image_source import cache_paths
from cxr_vit.engines.devices import choose_device
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import ConfigError, ModelError, NonFiniteLoss
from cxr_vit.evaluation.metrics import Scores
from cxr_vit.files import replacing
from cxr_vit.model.module import ViTModule
from cxr_vit.regular_files import read_bytes
from cxr_vit.training.callback import Callback
from cxr_vit.training.trainer import Trainer

logger = logging.getLogger(__name__)

_FORMAT = "1"
_NAME = "features"
#: Bytes of a file besides the features.
_HEADER = 2**20
#: Images that are hashed at a time.
_BLOCK = 4096
#: What changes the numbers of an IPU besides the precision.
_OF_IPU = {"precision", "weights", "partials", "eval_output", "poptorch_options"}
#: What the trunk is besides its weights; the rest of the section is of the head or of training.
_OF_TRUNK = {"hidden_act", "layer_norm_eps", "pooling"}
#: Keys of config.json that are of the head or of training.
_NOT_OF_TRUNK = {
    "id2label", "label2id", "problem_type", "initializer_range", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "drop_path_rate",
}  # fmt: skip


class Features(NamedTuple):
    """Of a split: features ``[N, F]`` and labels ``[N, C]``, float32, and the former's file."""

    values: Tensor
    labels: Tensor
    path: Optional[Path]
    was_kept: bool


class FeatureModule(ViTModule):
    """The model without its head: it returns what the head gets.

    Attributes
    ----------
    width
        Features of an image; there once `setup` has been called.
    """

    width: int

    def __init__(self, config: Config) -> None:
        # Nothing is trained here, but an engine's optimizer needs a parameter.
        super().__init__(config.changed(model={"freeze": "none"}))

    def configure_model(self) -> PreTrainedModel:
        """Build the model and take its head away. ModelError unless it is one linear layer."""
        vit = super().configure_model()
        head = vit.get_submodule("classifier")
        if not isinstance(head, nn.Linear):
            raise ModelError(
                f"{self.config.model.name}: its head is {type(head).__name__}, and a linear probe"
                " replaces one linear layer. Use weights with such a head, or without one."
            )
        self.width = head.in_features
        vit.add_module("classifier", nn.Identity())
        return vit

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return 0: features have no loss."""
        return logits.new_zeros(())

    def compute_metrics(self, logits: Tensor, labels: Tensor) -> Scores:
        """Return no scores."""
        return {}


class FeatureReader:
    """Scores splits with the model up to its head, or reads what an earlier probe kept.

    The files are beside the cache of the images, named after a hash of all that they depend on:
    the weights, the pixels, the normalisation and the precision. With `data.cache=off` nothing is
    kept. Raises ConfigError if the engine returns logits only or reads no images, or there are
    several processes.

    Attributes
    ----------
    recorder
        What the engine that computed features says of itself.
    """

    def __init__(self, config: Config, data: ChestXrayDataModule) -> None:
        if Launch.from_environment().has_others or config.engine.name == "pipeline":
            raise ConfigError(
                "a linear probe runs in one process, and not on the pipeline engine, whose stages"
                " exchange logits. Start it without torchrun or poprun, with engine.name=torch."
            )
        if config.engine.synthetic_data:
            raise ConfigError(
                "engine.synthetic_data=true: the features would not be those of the images. Leave"
                " it out."
            )
        self.recorder = _EngineRecorder()
        # Features are of the center: those of several views have no mean of probabilities.
        self.module = FeatureModule(config.changed(evaluation={"views": "center"}))
        self.trainer = Trainer(self.module.config, callbacks=[self.recorder], loggers=[])
        self.data = data
        self.for_ipu = self.trainer.choice.is_ipu

    def read(self, split: str) -> Features:
        """Return the features of a split in its order. Raises DataError if it has no images."""
        self.trainer.setup_data(self.data)
        self.module.setup(for_ipu=self.for_ipu)
        dataset = self.data.dataset(split)
        path = self._path(split, dataset)
        kept = None if path is None else _load(path, [len(dataset), self.module.width])
        if kept is not None:
            return Features(kept, dataset.labels, path, was_kept=True)
        self.trainer.test(self.module, self.data, split=split)
        values = self.trainer.test_outputs.logits
        if not bool(values.isfinite().all()):
            raise NonFiniteLoss(
                f"features of {split} images are not finite: the weights of"
                f" model.name={self.module.config.model.name} are damaged, or engine.precision is"
                " too low. Try engine.precision=fp32."
            )
        if path is not None:
            _save(path, values)
        return Features(values, dataset.labels, path, was_kept=False)

    def _path(self, split: str, dataset: ChestXrayDataset) -> Optional[Path]:
        """Return the file for the features of a split, None if they are not kept."""
        data = self.data.data
        if data.cache == "off":
            return None
        digest = hashlib.sha256()
        for part in self._of_model:
            digest.update(part)
        digest.update("\n".join(dataset.image_names).encode("utf-8", "surrogateescape"))
        for start in range(0, len(dataset), _BLOCK):
            rows = range(start, min(start + _BLOCK, len(dataset)))
            digest.update(dataset.read_images(rows).tobytes())
        folder = cache_paths(data).pixels.parent
        return folder / f"features_{split}_{digest.hexdigest()[:32]}.safetensors"

    @cached_property
    def _of_model(self) -> List[bytes]:
        """What the features depend on besides the images."""
        module, engine, saved = self.module, self.module.config.engine, self.module.model.config
        if self.for_ipu:
            numbers: Any = engine.model_dump(include=_OF_IPU)
        else:  # what `auto` is depends on the machine, and the cache may be another's
            device = choose_device(engine, Launch.from_environment())
            numbers = [device.device.type, device.precision]
        facts = {
            "format": _FORMAT,
            "engine": [self.trainer.choice.name, numbers],
            "config": {k: v for k, v in saved.to_diff_dict().items() if k not in _NOT_OF_TRUNK},
            "model": module.config.model.model_dump(include=_OF_TRUNK),
            **module.model.normalised(),
        }
        weights = hashlib.sha256()
        for name, weight in sorted(module.model.weights().items()):
            weights.update(name.encode())
            weights.update(weight.contiguous().numpy().tobytes())
        return [json.dumps(facts, sort_keys=True, default=str).encode(), weights.digest()]


class _EngineRecorder(Callback):
    """Notes what the engine says of itself."""

    description = "kept features"

    def __init__(self) -> None:
        self.facts: Dict[str, Any] = {}

    def setup(self, trainer: Any, module: ViTModule, stage: str) -> None:
        """Note it once the engine is there."""
        self.description, self.facts = trainer.engine.describe(), trainer.engine.facts()


def _save(path: Path, values: Tensor) -> None:
    """Keep features; without room for them the probe goes on."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_bytes(to_bytes({_NAME: values.contiguous()}))
    except (OSError, SafetensorError) as error:
        logger.warning("the features are not kept: %s: %s", path, error)


def _load(path: Path, shape: List[int]) -> Optional[Tensor]:
    """Return kept features; None if there are none, or they are damaged."""
    try:
        content = read_bytes(path, limit=4 * shape[0] * shape[1] + _HEADER)
        values: Tensor = from_bytes(content)[_NAME]
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError) as error:
        logger.warning("computing the features again: %s: %s", path, error)
        return None
    if list(values.shape) != shape or values.dtype != torch.float32 or not values.isfinite().all():
        logger.warning("computing the features again: %s holds others", path)
        return None
    return values
