"""The training and the inference graph, and which of them holds the IPUs.

Both cannot: one is detached before the other is compiled or attached. PopTorch brings weights,
optimizer state and random generator to the host when it detaches, and sends them when it attaches.
"""

from __future__ import annotations

import contextlib
import logging
import time
from typing import TYPE_CHECKING, Any, Callable, Iterable, Iterator, List, Optional

from torch import Tensor, nn

from cxr_vit.engines.executable_cache import ExecutableCache
from cxr_vit.engines.poptorch_errors import explained
from cxr_vit.errors import CxrVitError
from cxr_vit.model.loss import multi_label_loss
from cxr_vit.model.stages import StagedViT

if TYPE_CHECKING:
    import poptorch

__all__ = ["InferenceGraph", "IpuGraphs", "TrainingGraph", "placed_on_ipus"]

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
