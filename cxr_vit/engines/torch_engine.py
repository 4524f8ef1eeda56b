"""The stages in order on the CPU or one CUDA GPU; under torchrun, data parallel over processes.

Replicas that share a process take their turns: the mean over all micro-batches is the same wherever
they are computed.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from cxr_vit.config.schema import Config
from cxr_vit.data.dataset import Batch
from cxr_vit.engines.precision import Placement
from cxr_vit.engines.processes import Processes
from cxr_vit.engines.torch_base import TorchBase
from cxr_vit.model.stages import StagedViT

__all__ = ["TorchEngine"]


class TorchEngine(TorchBase):
    """Train and score on one torch device a process.

    Parameters
    ----------
    model
        The staged model; moved to the device.
    config
        The configuration.
    placement
        Device and arithmetic.
    processes
        The processes of the run; they share the replicas out.
    """

    def __init__(
        self, model: StagedViT, config: Config, placement: Placement, processes: Processes
    ) -> None:
        own = processes.own(config.batch.replicas)
        super().__init__(model, config, placement, processes, own)
        self._scaler = _grad_scaler(placement)
        self._synchronised: Any = self.model
        if processes.is_connected:
            self._synchronised = DistributedDataParallel(self.model, gradient_as_bucket_view=True)

    def describe(self) -> str:
        """Say in a line what computes, in which arithmetic, and why."""
        device = self.placement.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        count = self.processes.size
        processes = f" in {count} processes" if count > 1 else ""
        return (
            f"torch engine on {name}{processes} in {self.placement.precision}"
            f" ({self.placement.reason}; choose with engine.device=cpu|cuda and"
            " engine.precision=fp32|bf16|fp16)"
        )

    def _compile(self, example: Batch) -> float:
        """Run one forward and backward pass without an update, so that allocations are done."""
        start = time.perf_counter()
        size = self.batch.micro_batch_size
        self.model.train()
        images, labels = self._to_device(example.images[:size], example.labels[:size])
        with self.processes.waiting("the other replicas' first pass"):
            self._forward_loss(images, labels).backward()
        self.optimizer.zero_grad(set_to_none=True)
        self._synchronise()
        return time.perf_counter() - start

    def _accumulate(self, images: Tensor, labels: Tensor) -> Tensor:
        total = torch.zeros((), device=self.placement.device)
        size = self.batch.micro_batch_size
        starts = range(0, len(images), size)
        with self.processes.waiting("the gradients of the other replicas"):
            for start in starts:
                with self._no_exchange() if start != starts[-1] else contextlib.nullcontext():
                    loss = self._forward_loss(
                        images[start : start + size], labels[start : start + size]
                    )
                    self._scaler.scale(loss / len(starts)).backward()
                total += loss.detach()
        return total / (len(starts) * self.processes.size)

    def _no_exchange(self) -> Any:
        """Return a context in which gradients are only added up here."""
        if self.processes.is_connected:
            return self._synchronised.no_sync()
        return contextlib.nullcontext()

    def _clip(self) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)

    def _forward_loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with self._autocast():
            logits = self._synchronised(images)
        return self._loss(logits, labels)

    def _predict(self, batch: Batch) -> Tensor:
        self.model.eval()
        images = batch.images.to(self.placement.device, non_blocking=True)
        with torch.inference_mode(), self._autocast():
            logits = [self.model(part) for part in images.split(self.batch.eval_micro_batch_size)]
        return torch.cat(logits).float().cpu()


def _grad_scaler(placement: Placement) -> Any:
    """Return a loss scaler, which does nothing unless the arithmetic is fp16."""
    enabled = placement.precision == "fp16"
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(placement.device.type, enabled=enabled)
    return torch.cuda.amp.GradScaler(enabled=enabled)
