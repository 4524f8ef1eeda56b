"""PopART's cache of compiled graphs: a folder a configuration, and whether it was hit.

Many graphs of many configurations in one folder are slow to look through, and nobody knows which to
delete.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    Optional,
    Set,
    Tuple,
    Type,
)

from torch import Tensor, nn
from torch.nn import functional as F

from cxr_vit.config.plans import BatchPlan
from cxr_vit.config.schema import Config
from cxr_vit.errors import CxrVitError, DeviceError, EngineUnavailable
from cxr_vit.model.loss import multi_label_loss
from cxr_vit.model.stages import StagedViT

if TYPE_CHECKING:
    import poptorch

__all__ = [
    "ExecutableCache",
    "InferenceGraph",
    "IpuGraphs",
    "TrainingGraph",
    "cast_weights_to_input",
    "explained",
    "graph_shape",
    "placed_on_ipus",
]


#: What the device can be given later, or never sees.
_VARIES = {
    "optim": {"lr", "weight_decay", "decay_all", "beta1", "beta2", "eps", "momentum"},
    "engine": {"name", "device", "executable_cache", "loader_mode", "ipu_version"},
}


def graph_shape(config: Config, model: StagedViT) -> Dict[str, Any]:
    """Return what the compiled graphs follow from."""
    shape: Dict[str, Any] = {
        name: getattr(config, name).model_dump(exclude=_VARIES.get(name))
        for name in ("pipeline", "optim", "engine")
    }
    shape["batch"] = asdict(BatchPlan.from_section(config.batch))
    shape["parameters"] = {
        name: list(parameter.shape) for name, parameter in model.hub_parameters()
    }
    shape["image_size"] = config.data.image_size
    shape["hidden_act"] = model.config.hidden_act
    shape["dropout"] = config.model.dropout
    return shape


class ExecutableCache:
    """The folder of one configuration's graphs.

    Parameters
    ----------
    root
        Folder of all; None for no cache.
    shape
        What the graphs follow from; JSON-able.
    """

    def __init__(self, root: Optional[str], shape: Mapping[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode()).hexdigest()
        self.path: Optional[Path] = None if root is None else Path(root) / key[:12]
        self._before: Set[str] = set()
        self._written: Set[str] = set()

    def note(self) -> None:
        """Remember what is there before a compilation."""
        self._before = self._files()

    def outcome(self) -> str:
        """Say what the compilation since `note` did with the cache."""
        if self.path is None:
            return "not cached: engine.executable_cache=null"
        new = self._files() - self._before
        self._written |= new
        if new:
            return f"cache miss, now in {self.path}"
        found = self._before - self._written
        return f"cache hit in {self.path}" if found else f"nothing cached in {self.path}"

    @property
    def is_empty(self) -> bool:
        """Whether no graph is there."""
        return not self._files()

    def _files(self) -> Set[str]:
        """Return the graphs that are there (PopART calls them <hash>.popef)."""
        return set() if self.path is None else {path.name for path in self.path.glob("*.popef")}


_ADVICE: Tuple[Tuple[str, Type[CxrVitError], str], ...] = (
    (
        r"Failed to acquire",
        EngineUnavailable,
        "Another process holds the IPUs, or the partition has fewer: see `gc-monitor`. Wait with"
        " POPTORCH_WAIT_FOR_IPU=1, lower batch.replicas, or use fewer stages.",
    ),
    (
        r"out of memory|Memory allocation error|OutOfMemory",
        DeviceError,
        "The graph does not fit an IPU. Try, in this order: batch.micro_batch_size=1,"
        " pipeline.recompute=every_layer, fewer layers on the fullest stage,"
        " pipeline.available_memory_proportion=0.2, optim.first_moment=fp16,"
        " engine.optimizer_state_on_chip=false, more stages. engine.profile_dir=<folder> shows"
        " where the memory went.",
    ),
    (
        r"Unsupported ops found",
        DeviceError,
        "This transformers has an operation PopTorch cannot compile. Install the pins:"
        " pip install -r requirements-sdk34.txt",
    ),
    (
        r"tracked gradient tensors|AutomaticLossScal",
        DeviceError,
        "Automatic loss scaling does not fit this graph. Set optim.loss_scaling=1024, say.",
    ),
    (
        r"Unknown [\w /]*option",
        DeviceError,
        "An entry of engine.popart_options is not known to this SDK. Leave it out.",
    ),
)

_REST = (
    "If it comes again, run with POPTORCH_LOG_LEVEL=DEBUG and see docs/ipu.md; the last checkpoint"
    " is untouched (--resume)."
)


def explained(error: Exception, doing: str) -> CxrVitError:
    """Return the error as one of ours: what was being done, PopTorch's words, what to do.

    Parameters
    ----------
    error
        `poptorch.Error`.
    doing
        E.g. ``"compiling the training graph"``.
    """
    text = str(error).strip()
    for pattern, kind, advice in _ADVICE:
        if re.search(pattern, text, flags=re.IGNORECASE):
            return kind(f"{doing}: PopTorch says: {text}\n{advice}")
    return DeviceError(f"{doing}: PopTorch says: {text}\n{_REST}")


def _like(value: Tensor, weight: Optional[Tensor]) -> Optional[Tensor]:
    return None if weight is None else weight.to(value.dtype)


class CastingLinear(nn.Linear):
    """A linear layer in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        return F.linear(input, self.weight.to(input.dtype), _like(input, self.bias))


class CastingConv2d(nn.Conv2d):
    """A convolution in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[B, in, H, W]`` to ``[B, out, h, w]``."""
        return self._conv_forward(input, self.weight.to(input.dtype), _like(input, self.bias))


class CastingLayerNorm(nn.LayerNorm):
    """A layer norm in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``[..., width]``."""
        weight, bias = _like(input, self.weight), _like(input, self.bias)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


_CASTING: Dict[Type[nn.Module], Type[nn.Module]] = {
    nn.Linear: CastingLinear,
    nn.Conv2d: CastingConv2d,
    nn.LayerNorm: CastingLayerNorm,
}


def cast_weights_to_input(model: nn.Module) -> None:
    """Let every layer of `model` cast its weights to the dtype of its input.

    Parameters and their names stay what they are.
    """
    for module in model.modules():
        module.__class__ = _CASTING.get(type(module), type(module))


logger = logging.getLogger(__name__)


class TrainingGraph(nn.Module):
    """Images and labels -> the loss alone, marked for the backward pass; logits stay there."""

    def __init__(self, model: StagedViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Map uint8 ``[B, 1, H, W]`` and float32 ``[B, C]`` to a float32 scalar."""
        import poptorch

        loss = multi_label_loss(self.model(images), labels)
        return poptorch.identity_loss(loss, reduction="none")


class InferenceGraph(nn.Module):
    """Images -> logits.

    A module of its own, not PopTorch's wrapped training model: that would send the weights a second
    time after every attach.
    """

    def __init__(self, model: StagedViT) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 ``[B, 1, H, W]`` to float32 ``[B, C]``."""
        return self.model(images).float()


@contextlib.contextmanager
def placed_on_ipus(model: StagedViT, keep: Iterable[int]) -> Iterator[None]:
    """Let every stage begin a block on its IPU while a graph is traced, and take that back.

    Parameters
    ----------
    model
        The staged model.
    keep
        Layers whose output is kept for the backward pass (`recomputationCheckpoint`).
    """
    import poptorch

    def checkpoint(layer: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (poptorch.recomputationCheckpoint(output[0]), *output[1:])
        return poptorch.recomputationCheckpoint(output)

    for index, stage in enumerate(model.stages):
        poptorch.BeginBlock(stage, user_id=f"stage{index}", ipu_id=index)
    hooks = [model.layers[index].register_forward_hook(checkpoint) for index in keep]
    try:
        yield
    finally:
        poptorch.removeBlocks(model)
        for hook in hooks:
            hook.remove()


class IpuGraphs:
    """Compiles the two graphs when first asked for, and hands the IPUs from one to the other.

    Parameters
    ----------
    model, eval_model
        The staged model as it is cut for training and for evaluation; they share their weights.
    optimizer
        PopTorch's, of the model's parameters.
    training_options, inference_options
        Complete: PopTorch freezes them.
    keep
        Layers whose output is kept for the backward pass.
    cache
        PopART's cache of compiled graphs.
    offline
        Only compile: there is no device to attach to.
    """

    def __init__(
        self,
        model: StagedViT,
        eval_model: StagedViT,
        optimizer: poptorch.optim.Optimizer,
        *,
        training_options: poptorch.Options,
        inference_options: poptorch.Options,
        keep: List[int],
        cache: ExecutableCache,
        offline: bool,
    ) -> None:
        self.model = model
        self.eval_model = eval_model
        self.optimizer = optimizer
        self.training_options = training_options
        self.inference_options = inference_options
        self.keep = keep
        self.cache = cache
        self.offline = offline
        #: The training graph once it is compiled.
        self.trained: Optional[poptorch.PoplarExecutor] = None
        self._scored: Optional[poptorch.PoplarExecutor] = None
        self._attached: Optional[poptorch.PoplarExecutor] = None

    def training(self, images: Tensor, labels: Tensor) -> poptorch.PoplarExecutor:
        """Return the training graph, attached; compile it for inputs of these shapes if need be."""
        import poptorch

        if self.trained is None:
            graph = TrainingGraph(self.model).train()
            executor = poptorch.trainingModel(graph, self.training_options, self.optimizer)
            self._compile("training", executor, self.model, self.keep, images, labels)
            self.trained = executor
        self._attach(self.trained)
        return self.trained

    def inference(self, images: Tensor) -> poptorch.PoplarExecutor:
        """Return the inference graph, attached; compile it for inputs of this shape if need be."""
        import poptorch

        if self._scored is None:
            graph = InferenceGraph(self.eval_model).eval()
            executor = poptorch.inferenceModel(graph, self.inference_options)
            self._compile("inference", executor, self.eval_model, [], images)
            self._scored = executor
        self._attach(self._scored)
        return self._scored

    def detach(self) -> None:
        """Take the IPUs from the graph that has them; its weights and states come to the host."""
        if self._attached is not None:
            self.guarded("detaching from the IPUs", self._attached.detachFromDevice)
            self._attached = None

    def guarded(self, doing: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """Call PopTorch; put its errors into words a person can act on.

        Raises
        ------
        DeviceError
            If PopTorch or the device gives up.
        EngineUnavailable
            If the IPUs cannot be had.
        """
        import poptorch

        try:
            return call(*arguments)
        except poptorch.Error as error:
            raise explained(error, doing) from error

    def close(self) -> None:
        """Give the IPUs back and make the model a plain one again."""
        for executor in (self._scored, self.trained):
            if executor is not None:
                try:
                    self.guarded("releasing the IPUs", executor.destroy)
                except CxrVitError as error:  # the run's own error is what matters
                    logger.warning("%s", error)
        self.trained = self._scored = self._attached = None

    def _compile(
        self,
        name: str,
        executor: poptorch.PoplarExecutor,
        model: StagedViT,
        keep: List[int],
        *inputs: Tensor,
    ) -> None:
        """Compile with PopTorch's progress bar; say how long it took and what the cache did."""
        self.detach()
        logger.info("compiling the %s graph for %d IPUs", name, model.plan.num_stages)
        start = time.perf_counter()
        self.cache.note()
        with placed_on_ipus(model, keep):
            self.guarded(f"compiling the {name} graph", executor.compile, *inputs)
        seconds = time.perf_counter() - start
        logger.info("%s graph: %.1f s, %s", name, seconds, self.cache.outcome())
        if not self.offline:
            self._attached = executor

    def _attach(self, executor: poptorch.PoplarExecutor) -> None:
        if self.offline or self._attached is executor:
            return
        self.detach()
        self.guarded("attaching to the IPUs", executor.attachToDevice)
        self._attached = executor
