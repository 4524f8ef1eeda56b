"""The two PopTorch graphs: compiling them, passing the IPUs between them, PopTorch's errors."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterator,
    List,
    Optional,
    Sequence,
    Set,
    Tuple,
    Type,
)

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cxr_vit.config.plans import BatchPlan
from cxr_vit.config.schema import Config
from cxr_vit.errors import CxrVitError, DeviceError, EngineUnavailable
from cxr_vit.model.module import ViTModule
from cxr_vit.model.stages import StagedViT
from cxr_vit.model.vit import LayerScale

if TYPE_CHECKING:
    import poptorch


logger = logging.getLogger(__name__)

#: Pattern in PopTorch's message, class of the error to raise, advice.
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
        " the memory use.",
    ),
    (
        r"Unsupported ops found",
        DeviceError,
        "This transformers has an operation that PopTorch cannot compile. Install the pins:"
        " pip install -r requirements-sdk34.txt",
    ),
    (
        r"tracked gradient tensors|AutomaticLossScal",
        DeviceError,
        "Automatic loss scaling does not fit this graph. Set for example optim.loss_scaling=1024.",
    ),
    (
        r"Unknown [\w /]*option",
        DeviceError,
        "This SDK does not know an entry of engine.poptorch_options. Leave it out.",
    ),
)
#: `poptorch.RecoverableError.recovery_action` -> what it asks for.
_RECOVERY = {
    "IPU_RESET": "Reset the IPUs (gc-reset), or start again, which loads their memory again.",
    "LINK_RESET": "Reset the IPU-Links (a system without a Pod).",
    "PARTITION_RESET": "Reset the partition: vipu reset partition <name>.",
    "FULL_RESET": "Power cycle the system.",
}
_UNRECOVERABLE = (
    "The error is unrecoverable and likely to persist: have the system analysed and repaired."
)
_THEN_RESUME = "The last checkpoint is intact: go on from it with --resume."
_OTHER_ADVICE = (
    "If it occurs again, run with POPTORCH_LOG_LEVEL=DEBUG and see docs/ipu.md; the last checkpoint"
    " is intact (--resume)."
)


def explained(error: Exception, doing: str) -> CxrVitError:
    """Convert a `poptorch.Error` to a user-facing one with advice; `doing` is what failed."""
    import poptorch

    text = str(error).strip()
    if isinstance(error, poptorch.RecoverableError):
        action = error.recovery_action
        advice = f"Recovery action {action}. {_RECOVERY.get(action, '')}".strip()
        return DeviceError(f"{doing}: PopTorch says: {text}\n{advice} {_THEN_RESUME}")
    if isinstance(error, poptorch.UnrecoverableError):
        return DeviceError(f"{doing}: PopTorch says: {text}\n{_UNRECOVERABLE} {_THEN_RESUME}")
    for pattern, kind, advice in _ADVICE:
        if re.search(pattern, text, flags=re.IGNORECASE):
            return kind(f"{doing}: PopTorch says: {text}\n{advice}")
    return DeviceError(f"{doing}: PopTorch says: {text}\n{_OTHER_ADVICE}")


def guarded(doing: str, call: Callable[..., Any], *arguments: Any) -> Any:
    """Call PopTorch; raise its errors as DeviceError, or EngineUnavailable without IPUs."""
    import poptorch

    try:
        return call(*arguments)
    except poptorch.Error as error:
        raise explained(error, doing) from error


#: Settings that a compiled graph does not depend on.
_NOT_COMPILED = {
    # Every weight has a rate and a weight decay of its own on the device, whatever the groups are.
    "optim": {
        "lr",
        "base_lr",
        "layer_decay",
        "head_lr_scale",
        "weight_decay",
        "decay_all",
        "beta1",
        "beta2",
        "eps",
        "momentum",
        "nesterov",  # below
    },
    "engine": {
        "name",
        "device",
        "compile",
        "executable_cache",
        "ipu_version",
        "loader_buffer_size",
        "loader_early_preload",
        "loader_mode",
        "poptorch_options",
        "rebatched_worker_size",
        "timeout_s",
    },
}
#: The same of `engine.poptorch_options`: devices and messages.
_NOT_COMPILED_OPTIONS = {
    "connectionType",
    "maxRepeatLogs",
    "showCompilationProgressBar",
    "useIpuId",
}


def graph_shape(config: Config, batch: BatchPlan, model: StagedViT) -> Dict[str, Any]:
    """Return everything that the compiled graphs depend on, JSON-able."""
    shape: Dict[str, Any] = {
        name: getattr(config, name).model_dump(exclude=_NOT_COMPILED.get(name))
        for name in ("pipeline", "optim", "engine")
    }
    if config.pipeline.recompute is None:
        shape["pipeline"]["recompute"] = "every_layer"
    shape["poptorch_options"] = {
        scope: {name: options[name] for name in options if name not in _NOT_COMPILED_OPTIONS}
        for scope, options in config.engine.poptorch_options.items()
    }
    shape["batch"] = asdict(batch)
    shape["parameters"] = {
        name: list(parameter.shape) for name, parameter in model.hub_parameters()
    }
    frozen = [name for name, weight in model.hub_parameters() if not weight.requires_grad]
    if frozen:
        shape["frozen"] = frozen
    if config.optim.nesterov:
        shape["nesterov"] = True
    shape["image_size"] = config.data.image_size
    if config.model.drop_path:  # the graph then has a third input
        shape["drop_path"] = True
    if config.data.has_unknown:  # the loss then has a mask
        shape["has_unknown"] = True
    if config.loss.name != "bce":
        shape["loss"] = [config.loss.model_dump(), getattr(model.config, "positive_weight", None)]
    if hasattr(model.config, "pooling"):  # another than Hugging Face's
        shape["pooling"] = model.config.pooling
    mean, std = model.normalisation.of_channels(model.config.num_channels)
    if {*mean, *std} != {0.5}:  # constants, whose values PopART does not compare (ir.cpp, append)
        shape["normalisation"] = [mean, std]
    for name in ("hidden_act", "hidden_dropout_prob", "attention_probs_dropout_prob"):
        shape[name] = getattr(model.config, name)
    shape["layer_norm_eps"] = model.config.layer_norm_eps
    return shape


class ExecutableCache:
    """PopART's cache of compiled graphs, in one folder per configuration.

    A single folder for all would be slow to search, and nobody would know which files to delete.
    `root` is the parent of these folders, or None for no cache; `shape` is from `graph_shape`.
    """

    def __init__(self, root: Optional[str], shape: Dict[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode()).hexdigest()
        self.path: Optional[Path] = None if root is None else Path(root) / key[:12]
        self._written: Set[str] = set()

    def files(self) -> Set[str]:
        """Return the names of the graphs in the cache."""
        return set() if self.path is None else {path.name for path in self.path.glob("*.popef")}

    def outcome(self, before: Set[str]) -> str:
        """Return as text whether a compilation hit the cache; `before` are the files before it."""
        if self.path is None:
            return "not cached: engine.executable_cache=null"
        new = self.files() - before
        self._written |= new
        if new:
            return f"cache miss, now in {self.path}"
        found = before - self._written
        return f"cache hit in {self.path}" if found else f"nothing cached in {self.path}"


def _like(value: Tensor, weight: Optional[Tensor]) -> Optional[Tensor]:
    return None if weight is None else weight.to(value.dtype)


class CastingLinear(nn.Linear):
    """A linear layer that computes in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[..., in]`` to ``[..., out]``."""
        return F.linear(input, self.weight.to(input.dtype), _like(input, self.bias))


class CastingConv2d(nn.Conv2d):
    """A convolution that computes in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[B, in, H, W]`` to ``[B, out, h, w]``."""
        return self._conv_forward(input, self.weight.to(input.dtype), _like(input, self.bias))


class CastingLayerNorm(nn.LayerNorm):
    """A layer norm that computes in the dtype of its input."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``[..., width]``."""
        weight, bias = _like(input, self.weight), _like(input, self.bias)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class CastingLayerScale(LayerScale):
    """A LayerScale that computes in the dtype of its input."""

    def forward(self, hidden_state: Tensor) -> Tensor:
        """Scale each channel of ``[..., width]``."""
        (scale,) = self.parameters()
        return hidden_state * scale.to(hidden_state.dtype)


_CASTING: Dict[Type[nn.Module], Type[nn.Module]] = {
    nn.Linear: CastingLinear,
    nn.Conv2d: CastingConv2d,
    nn.LayerNorm: CastingLayerNorm,
    LayerScale: CastingLayerScale,
}
_PLAIN = {casting: plain for plain, casting in _CASTING.items()}


def cast_weights_to_input(model: nn.Module) -> None:
    """Make every layer cast its weights to the dtype of its input; the parameters are unchanged.

    PopTorch has no autocast. Its compiler casts the weights of convolutions and norms, not those
    of linear layers, and torch's type inference, which PopTorch asks first, promotes a linear layer
    to fp32 and refuses a convolution of mixed dtypes. Gradients flow back through the casts.
    """
    for module in model.modules():
        module.__class__ = _CASTING.get(type(module), type(module))


def set_compute_dtype(model: StagedViT, dtype: torch.dtype) -> None:
    """Compute in `dtype`; weights of another dtype are cast where they are used."""
    if any(parameter.dtype != dtype for parameter in model.parameters()):
        cast_weights_to_input(model)
    model.compute_in(dtype)


def compute_on_host(model: StagedViT) -> None:
    """Undo `set_compute_dtype`: torch computes in fp32."""
    for module in model.modules():
        module.__class__ = _PLAIN.get(type(module), type(module))
    model.compute_in(torch.float32)


class _Loss:
    """A module's loss. PopTorch copies the model it wraps, but must not copy the module's data."""

    def __init__(self, module: ViTModule) -> None:
        self.module = module

    def __deepcopy__(self, memo: Dict[int, Any]) -> _Loss:
        return self

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        return self.module.loss(logits, labels)


class TrainingGraph(nn.Module):
    """The model with its loss, which is marked for the backward pass; logits stay on the device."""

    def __init__(self, module: ViTModule) -> None:
        super().__init__()
        module.training = True  # what the loss may ask for; the model's mode is PopTorch's
        self.model = module.model
        self.loss = _Loss(module)

    def forward(self, images: Tensor, labels: Tensor, paths: Optional[Tensor] = None) -> Tensor:
        """Map uint8 ``[B, 1, H, W]`` and float32 ``[B, C]`` to a float32 scalar.

        With drop path there are also its factors, float32 ``[B, 2 * depth]``.
        """
        import poptorch

        loss = self.loss(self.model(images, paths).float(), labels)
        return poptorch.identity_loss(loss, reduction="none")


class InferenceGraph(nn.Module):
    """The model without its loss.

    PopTorch's wrapped training model would send the weights twice after every attach.
    """

    def __init__(self, model: StagedViT, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, images: Tensor) -> Tensor:
        """Map uint8 ``[B, 1, H, W]`` to logits ``[B, C]`` of `dtype`."""
        logits: Tensor = self.model(images).to(self.dtype)
        return logits


@contextlib.contextmanager
def placed_on_ipus(model: StagedViT, kept: Sequence[nn.Module]) -> Iterator[None]:
    """Within the context, make stage i begin the block on IPU i and keep outputs of modules."""
    import poptorch

    def checkpoint(layer: nn.Module, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (poptorch.recomputationCheckpoint(output[0]), *output[1:])
        return poptorch.recomputationCheckpoint(output)

    for index, stage in enumerate(model.stages):
        poptorch.BeginBlock(stage, user_id=f"stage{index}", ipu_id=index)
    hooks = [module.register_forward_hook(checkpoint) for module in kept]
    try:
        yield
    finally:
        poptorch.removeBlocks(model)
        for hook in hooks:
            hook.remove()


@dataclass
class IpuGraphs:
    """The training and the inference graph; each is compiled at its first use.

    Only one of them can hold the IPUs at a time. Attaching one sends weights, optimizer state and
    random state to the IPUs; detaching it copies them to the host.

    Attributes
    ----------
    module, eval_model
        The module with its model cut for training, and the model cut for evaluation; the weights
        are shared.
    kept
        Modules whose output is kept for the backward pass.
    eval_output
        Dtype of the logits that evaluation returns.
    offline
        Compile only, without attaching to IPUs.
    training_executor, inference_executor
        The graphs once they are compiled.
    """

    module: ViTModule
    eval_model: StagedViT
    optimizer: poptorch.optim.Optimizer
    training_options: poptorch.Options
    inference_options: poptorch.Options
    kept: Sequence[nn.Module]
    eval_output: torch.dtype
    cache: ExecutableCache
    offline: bool
    training_executor: Optional[poptorch.PoplarExecutor] = field(default=None, init=False)
    inference_executor: Optional[poptorch.PoplarExecutor] = field(default=None, init=False)
    _attached: Optional[poptorch.PoplarExecutor] = field(default=None, init=False)
    _rng_state: Optional[List[int]] = field(default=None, init=False)

    def training(self, *inputs: Tensor) -> poptorch.PoplarExecutor:
        """Return the attached training graph; compile it first for inputs of these shapes."""
        import poptorch

        if self.training_executor is None:
            graph = TrainingGraph(self.module).train()
            executor = poptorch.trainingModel(graph, self.training_options, self.optimizer)
            self._compile("training", executor, self.module.model, *inputs)
            self.training_executor = executor
            self.rng_state = self._rng_state
        self._attach(self.training_executor)
        return self.training_executor

    def inference(self, images: Tensor) -> poptorch.PoplarExecutor:
        """Return the attached inference graph; compile it first for inputs of this shape."""
        import poptorch

        if self.inference_executor is None:
            graph = InferenceGraph(self.eval_model, self.eval_output).eval()
            executor = poptorch.inferenceModel(graph, self.inference_options)
            self._compile("inference", executor, self.eval_model, images)
            self.inference_executor = executor
        self._attach(self.inference_executor)
        return self.inference_executor

    @property
    def rng_state(self) -> Optional[List[int]]:
        """State of the random generators of the training graph; None before its compilation."""
        if self.training_executor is not None:
            self._rng_state = self.training_executor.rng_state
        return self._rng_state

    @rng_state.setter
    def rng_state(self, state: Optional[List[int]]) -> None:
        """Set the state, at once or after compilation; None keeps the present one."""
        self._rng_state = state
        if self.training_executor is not None and state is not None:
            self.training_executor.rng_state = state

    def _compile(
        self,
        name: str,
        executor: poptorch.PoplarExecutor,
        model: StagedViT,
        *inputs: Tensor,
    ) -> None:
        self.detach()
        is_training = name == "training"
        options = self.training_options if is_training else self.inference_options
        replicas, stages = options.replication_factor, model.plan.num_stages
        logger.info(
            "compiling the %s graph for %d IPUs (%d x %d stages)",
            *(name, replicas * stages, replicas, stages),
        )
        before = self.cache.files()
        start = time.perf_counter()
        with placed_on_ipus(model, self.kept if is_training else []):
            guarded(f"compiling the {name} graph", executor.compile, *inputs)
        seconds = time.perf_counter() - start
        logger.info("%s graph: %.1f s, %s", name, seconds, self.cache.outcome(before))
        # With poptorch.ConnectionType.OnDemand a compiled graph is not attached yet.
        if not self.offline and executor.isAttachedToDevice():
            self._attached = executor

    def _attach(self, executor: poptorch.PoplarExecutor) -> None:
        if self.offline or self._attached is executor:
            return
        self.detach()
        guarded("attaching to the IPUs", executor.attachToDevice)
        self._attached = executor

    def detach(self) -> None:
        """Detach the attached graph from the IPUs."""
        if self._attached is not None:
            guarded("detaching from the IPUs", self._attached.detachFromDevice)
            self._attached = None

    def close(self) -> None:
        """Release the IPUs and unwrap the model."""
        for executor in (self.inference_executor, self.training_executor):
            if executor is not None:
                try:
                    guarded("releasing the IPUs", executor.destroy)
                except CxrVitError as error:  # must not hide the error of the run
                    logger.warning("%s", error)
        self.training_executor = self.inference_executor = self._attached = None
