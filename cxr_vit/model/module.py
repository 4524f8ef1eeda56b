"""ViTModule: what belongs to the model of a run, for subclasses to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Dict, List, Optional, Type, TypeVar, Union

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from cxr_vit.checkpoint_files import STATE, WEIGHTS, checkpoint_of, config_of, verify_checkpoint
from cxr_vit.config import Config, StagePlan, load_config
from cxr_vit.data.datamodule import ChestXrayDataModule
from cxr_vit.data.label_names import label_names
from cxr_vit.errors import CheckpointError, ConfigError, ModelError
from cxr_vit.evaluation.metrics import Scores, flat_scores
from cxr_vit.model.loss import multi_label_loss, positive_weight
from cxr_vit.model.normalisation import Normalisation
from cxr_vit.model.optim import build_optimizer, parameter_groups
from cxr_vit.model.schedule import LearningRate
from cxr_vit.model.source import read_config, read_preprocessor
from cxr_vit.model.stages import StagedViT
from cxr_vit.model.vit import build_vit, check_source, loading

#: Methods of a LightningModule that have no counterpart -> what to override instead.
_NOT_CALLED = {
    "forward": "The engines call the stages; override configure_model to change the model.",
    "training_step": "Override loss(logits, labels).",
    "validation_step": "Override compute_metrics(logits, labels).",
    "test_step": "Override compute_metrics(logits, labels).",
    "predict_step": "Use the result of Trainer.predict.",
    "optimizer_step": "The update is compiled for IPUs; override configure_optimizers.",
    "lr_scheduler_step": "Override learning_rate(step, total_steps).",
    "configure_gradient_clipping": "Set optim.max_grad_norm.",
    "configure_callbacks": "Give them to the Trainer.",
    "train_dataloader": "Data belong to the ChestXrayDataModule.",
    "val_dataloader": "Data belong to the ChestXrayDataModule.",
}

ModuleType = TypeVar("ModuleType", bound="ViTModule")


class ViTModule(nn.Module):
    """The model of a run with its loss, parameter groups, optimizer, schedule and metrics.

    Subclass it and override `configure_model`, `loss`, `parameter_groups`, `configure_optimizers`,
    `learning_rate` or `compute_metrics`. The subclass works on all engines. Buffers of the module
    move to the device. Trained parameters must be part of the model; put new ones into its head.

    Parameters
    ----------
    data
        Gives the prevalence for `model.head_bias` and `loss.name=weighted_bce`; not needed to score
        a checkpoint.
    checkpoint
        Folder of a checkpoint whose weights to load instead of those of `model.name`.

    Attributes
    ----------
    model
        The model, cut into stages; there once `setup` has been called.
    names
        Labels in the order of the logits.
    for_ipu
        Whether `setup` builds the model for IPUs.

    Raises
    ------
    ModelError
        If the weights are not there or of another kind of model. Only config.json and
        preprocessor_config.json are read.
    CheckpointError
        If they are those of a damaged checkpoint.
    """

    model: StagedViT

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        hooks = {name: "Hooks belong to a Callback." for name in vars(cls) if name[:3] == "on_"}
        for name, instead in {**hooks, **_NOT_CALLED}.items():
            if name in vars(cls):
                raise ModelError(f"{cls.__name__}.{name} is never called. {instead}")

    def __init__(
        self,
        config: Config,
        data: Optional[ChestXrayDataModule] = None,
        *,
        checkpoint: Optional[Union[str, Path]] = None,
    ) -> None:
        super().__init__()
        if checkpoint is not None:  # `model.name` may be gone
            config = config.changed(model={"name": str(checkpoint)})
        if checkpoint is not None or (Path(config.model.name) / STATE).is_file():
            verify_checkpoint(Path(config.model.name), needs_optimizer=False)
        self.config = config
        self.data = data
        self.for_ipu = False
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        layers = config.pipeline.layers_per_stage
        labels = check_source(
            config.model,
            image_size=config.data.image_size,
            layers_per_stage=layers,
            may_resize=checkpoint is None,
        )
        self.normalisation = Normalisation.from_config(config)
        # A checkpoint knows which labels a pattern matched: scoring it needs no table of its own.
        is_known = checkpoint is not None and isinstance(config.data.labels, str)
        self.names: List[str] = (labels if is_known else None) or label_names(config.data)
        if checkpoint is not None and labels != self.names:
            raise ModelError(
                f"{checkpoint} has the labels {labels}; this configuration has {self.names}. Use"
                " the configuration the checkpoint was trained with (data.labels,"
                " data.include_no_finding)."
            )

    @classmethod
    def load_from_checkpoint(
        cls: Type[ModuleType],
        checkpoint: Union[str, Path],
        data: Optional[ChestXrayDataModule] = None,
        config: Optional[Config] = None,
    ) -> ModuleType:
        """Return a module with the weights of a checkpoint.

        `checkpoint` is its folder, or the folder of a run, then its `best`. Without `config` the
        module has the configuration of the run.

        Raises CheckpointError if there is no checkpoint.
        """
        folder = checkpoint_of(Path(checkpoint))
        if config is None:
            verify_checkpoint(folder, needs_optimizer=False)
            config = load_config(config_of(folder))
        return cls(config, data, checkpoint=folder)

    def setup(self, *, for_ipu: bool = False) -> None:
        """Build the model. The trainer calls it; call it to look at `model` before a run.

        A second call does nothing. Raises ModelError if the weights do not fit, or if the model
        was built for another kind of device.
        """
        if "model" in self._modules:
            if for_ipu != self.for_ipu:
                kind = "IPUs" if self.for_ipu else "torch devices"
                raise ModelError(f"this module was set up for {kind}. Make a new one.")
            return
        self.for_ipu = for_ipu
        config = self.config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.run.seed)  # for parameters that an override creates
            vit = self.configure_model()
        self.model = StagedViT(
            vit,
            StagePlan.from_list(config.pipeline.layers_per_stage),
            **self.normalisation._asdict(),
            resample=config.data.resample,
            read_size=config.data.read_size,
        )
        self._set_positive_weight()
        if self.checkpoint is not None:
            self.load_weights(self.checkpoint)
        self._refuse_unsaved_state()
        self._check_loss()

    def _set_positive_weight(self) -> None:
        """Set what `weighted_bce` needs, and record it in the model's config.json.

        A checkpoint has that of its training images, whatever the images it scores.
        """
        if self.config.loss.name != "weighted_bce":
            return
        saved = None
        if self.checkpoint is not None:
            with loading(str(self.checkpoint)):
                saved = read_config(self.checkpoint).positive_weight
        if saved is not None and len(saved) == len(self.names):
            weight = torch.tensor(saved)
        elif self.data is not None:
            weight = positive_weight(self.data.prevalence(), self.config.loss)
        else:
            raise ModelError(
                "loss.name=weighted_bce needs the training images, for the weights of their"
                " positives: make the module with its data, ViTModule(config, data), or set"
                " loss.name."
            )
        self.register_buffer("_positive_weight", weight, persistent=False)
        self.model.config.positive_weight = weight.tolist()

    def _check_loss(self) -> None:
        """Raise ModelError if the loss of two samples is no scalar."""
        labels = torch.zeros(2, len(self.names))
        with torch.no_grad():
            loss = self.loss(torch.zeros_like(labels), labels)
        if not isinstance(loss, Tensor) or loss.dim() > 0:
            what = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else loss
            raise ModelError(
                f"{type(self).__name__}.loss returned {what}. Return a scalar: the mean over the"
                " samples."
            )

    def load_weights(self, checkpoint: Path) -> None:
        """Load the weights of a checkpoint.

        Raises CheckpointError if they are damaged, of another model, or trained on images that were
        normalised differently. With the module's own `checkpoint`, its configuration counts.
        """
        verify_checkpoint(checkpoint, needs_optimizer=False)
        if checkpoint != self.checkpoint:
            self._check_normalisation(checkpoint)
        try:
            weights = load_file(str(checkpoint / WEIGHTS))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{checkpoint}: {error}. Use another checkpoint.") from error
        self.model.load_weights(weights)

    def _check_normalisation(self, checkpoint: Path) -> None:
        with loading(str(checkpoint)):
            saved = read_preprocessor(checkpoint)
        for key, own in self.model.normalised().items():
            found = saved and (saved.mean if key == "image_mean" else saved.std)
            if found and list(found) != own:
                raise CheckpointError(
                    f"{checkpoint} was trained with {key}={list(found)}, and this module has {own}."
                    f" Set model.{key}, or make the module with ViTModule.load_from_checkpoint."
                )

    def _refuse_unsaved_state(self) -> None:
        """Raise ModelError for state that a checkpoint would not hold."""
        others = [name for name, _ in self.named_parameters() if not name.startswith("model.")]
        if others:
            raise ModelError(
                f"{type(self).__name__} has parameters outside its model: {', '.join(others)}."
                " They would be neither trained nor saved. Put them into the head in"
                " configure_model, or use register_buffer for constants."
            )
        persistent = self.model.persistent_buffers()
        buffers = [name for name in persistent if name.startswith("classifier.")]
        if buffers:
            raise ModelError(
                f"{type(self).__name__} has persistent buffers in its head: {', '.join(buffers)}."
                " Checkpoints hold parameters only, and the running statistics of a batch norm"
                " would differ between replicas. Use nn.LayerNorm in place of a batch norm, and"
                " register_buffer(..., persistent=False) for constants."
            )

    def to_device(self, device: torch.device) -> None:
        """Move the stages of this process and all buffers to a device, in place."""
        self.model.to_device(device)
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else buffer.to(device)
        for name, child in self.named_children():
            if name != "model":
                child.to(device)

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 ``[B, 1, H, W]`` to logits ``[B, C]``."""
        logits: Tensor = self.model(images)
        return logits

    def configure_model(self) -> PreTrainedModel:
        """Build the undivided model, in fp32: `ViTForImageClassification`, DeiT's or DINOv2's.

        An override may replace its `classifier` by any module that maps ``[B, in_features]`` of the
        present one to ``[B, C]``. What it takes is said by `model.pooling`.
        """
        config = self.config
        prevalence = None if self.data is None else self.data.prevalence()
        if prevalence is not None and config.loss.name == "weighted_bce":
            # The constant prediction with the least loss is that of the weighted labels.
            positive = prevalence * positive_weight(prevalence, config.loss).double().numpy()
            prevalence = positive / (positive + 1.0 - prevalence)
        return build_vit(
            config.model,
            names=self.names,
            image_size=config.data.image_size,
            layers_per_stage=config.pipeline.layers_per_stage,
            seed=config.run.seed,
            prevalence=prevalence,
            for_ipu=self.for_ipu,
        )

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a micro-batch, a scalar, from float32 ``[B, C]`` on the device.

        It must be a mean over the samples: an update uses the mean over its micro-batches. PopTorch
        compiles the function once, so it may not depend on values in Python. Labels are 0, 1, or
        -1 for unknown if `config.data.has_unknown`.
        """
        return multi_label_loss(
            logits,
            labels,
            self.config.loss,
            has_unknown=self.config.data.has_unknown,
            positive_weight=self._buffers.get("_positive_weight"),
        )

    def parameter_groups(self) -> List[Dict[str, Any]]:
        """Return the parameters in groups, as torch's optimizers take them.

        The parameters are those of this process's stages (`model.hub_parameters`); those in no
        group are frozen. A group's own ``"lr"`` keeps its ratio to `config.peak_lr`.
        """
        depth = self.model.config.num_hidden_layers
        return parameter_groups(self.model.hub_parameters(), self.config, depth=depth)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the optimizer. For IPUs (`for_ipu`) an override must return one of poptorch.optim.

        Raises ConfigError if torch has no optimizer named `optim.name`, or nothing is trained.
        """
        groups = self.parameter_groups()
        if not groups and not any(weight.is_meta for weight in self.model.parameters()):
            raise ConfigError(
                f"{type(self).__name__}.parameter_groups returned no group: nothing is trained."
            )
        return build_optimizer(groups, self.config.optim, lr=self.config.peak_lr)

    def learning_rate(self, step: int, total_steps: int) -> float:
        """Return the learning rate of update `step`, counted from 0: a function of the step."""
        return LearningRate.from_config(self.config, total_steps).at(step)

    def compute_metrics(self, logits: Tensor, labels: Tensor) -> Scores:
        """Return the metrics of a whole split by name, from float32 ``[N, C]`` on the CPU.

        Labels are 0, 1, or -1 for unknown: an override has to leave these entries out.
        """
        return flat_scores(logits, labels, self.names)
