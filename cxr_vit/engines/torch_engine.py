"""One process on the CPU or one CUDA GPU: the stages in order, plain torch.

Replicas take their turns: the mean over all micro-batches is the same wherever they are computed.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any, ContextManager, Dict, Iterable, Iterator, List, Union

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from cxr_vit.config.batching import BatchPlan
from cxr_vit.config.schema import OptimSection
from cxr_vit.data.dataset import Batch, ChestXrayDataset, PaddedCollate
from cxr_vit.data.sampler import EvaluationSampler, TrainingSampler
from cxr_vit.engines.base import Engine, EngineState, StepOutput
from cxr_vit.engines.host import in_one_line, leave_the_process_group, process_peak_gib
from cxr_vit.engines.optim import build_optimizer
from cxr_vit.engines.optimizer_state import check_kind, torch_slots
from cxr_vit.engines.precision import Placement
from cxr_vit.errors import CheckpointError
from cxr_vit.model.loss import multi_label_loss
from cxr_vit.model.stages import StagedViT

__all__ = ["TorchEngine"]

_GIB = 2**30


class TorchEngine(Engine):
    """Train and score on one torch device.

    Parameters
    ----------
    model
        The staged model; moved to the device.
    batch
        The batch arithmetic.
    optim
        The `optim` section.
    placement
        Device and arithmetic.
    seed
        Seed of dropout: each update's is a pure function of (seed, update).
    num_workers
        Loader processes.
    """

    def __init__(
        self,
        model: StagedViT,
        batch: BatchPlan,
        optim: OptimSection,
        placement: Placement,
        *,
        seed: int,
        num_workers: int,
    ) -> None:
        super().__init__(batch)
        self.placement = placement
        self.model = model.to(placement.device)
        self.max_grad_norm = float("inf") if optim.max_grad_norm is None else optim.max_grad_norm
        self.optimizer = build_optimizer(self.model.hub_parameters(), optim)
        self.optimizer_kind = f"torch.{type(self.optimizer).__name__}"
        if placement.precision == "fp32":
            # Else cuDNN runs the patch embedding in TF32, with 10 bits of mantissa.
            torch.backends.cudnn.allow_tf32 = False
        self.seed = seed
        self.num_workers = num_workers
        self.updates = 0
        self._scaler = _grad_scaler(placement)

    def describe(self) -> str:
        """Say in a line what computes, in which arithmetic, and why."""
        device = self.placement.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        return (
            f"torch engine on {name} in {self.placement.precision} ({self.placement.reason};"
            " choose with engine.device=cpu|cuda and engine.precision=fp32|bf16|fp16)"
        )

    def loader(
        self,
        dataset: ChestXrayDataset,
        sampler: Union[TrainingSampler, EvaluationSampler],
        *,
        training: bool,
    ) -> Iterable[Batch]:
        """Return the host batches, the last one of an evaluation filled up with padding."""
        batch_size = None if training else self.batch.eval_host_batch_size
        loader: DataLoader[Any] = DataLoader(
            dataset,
            batch_sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=PaddedCollate(batch_size),
            pin_memory=self.placement.device.type == "cuda",
            worker_init_fn=leave_the_process_group,
        )
        return in_one_line(loader)

    def _compile(self, example: Batch) -> float:
        """Run one forward and backward pass without an update, so that allocations are done."""
        start = time.perf_counter()
        size = self.batch.micro_batch_size
        self.model.train()
        images, labels = self._to_device(example.images[:size], example.labels[:size])
        self._loss(images, labels).backward()
        self.optimizer.zero_grad(set_to_none=True)
        self._synchronise()
        return time.perf_counter() - start

    def _train_step(self, batch: Batch, lr: float) -> StepOutput:
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        images, labels = self._to_device(batch.images, batch.labels)
        global_batch = self.batch.global_batch_size
        losses: List[Tensor] = []
        norms: List[Tensor] = []
        for start in range(0, len(images), global_batch):
            update = slice(start, start + global_batch)
            losses.append(self._accumulate(images[update], labels[update]))
            norms.append(self._update())
        # The one synchronisation of a host call.
        both = torch.stack([*losses, *norms]).float().cpu()
        return StepOutput(both[: len(losses)], both[len(losses) :], len(images))

    def _accumulate(self, images: Tensor, labels: Tensor) -> Tensor:
        """Add up the gradients of one global batch; return its mean loss, still on the device."""
        _seed_dropout(self.seed, self.updates)
        total = torch.zeros((), device=self.placement.device)
        size = self.batch.micro_batch_size
        num_micro_batches = self.batch.gradient_accumulation * self.batch.replicas
        for start in range(0, len(images), size):
            loss = self._loss(images[start : start + size], labels[start : start + size])
            self._scaler.scale(loss / num_micro_batches).backward()
            total += loss.detach()
        return total / num_micro_batches

    def _update(self) -> Tensor:
        """Clip, step, clear; return the gradient norm before clipping, still on the device.

        It is 0 for an update that the loss scaler skips, as fp16 now and then overflows.
        """
        self._scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        if self._scaler.is_enabled():
            norm = torch.where(torch.isfinite(norm), norm, torch.zeros_like(norm))
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return norm

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with self._autocast():
            logits = self.model(images)
        return multi_label_loss(logits, labels)

    def _predict(self, batch: Batch) -> Tensor:
        self.model.eval()
        images = batch.images.to(self.placement.device, non_blocking=True)
        with torch.inference_mode(), self._autocast():
            logits = [self.model(part) for part in images.split(self.batch.eval_micro_batch_size)]
        return torch.cat(logits).float().cpu()

    def _autocast(self) -> ContextManager[Any]:
        if self.placement.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.placement.device.type, dtype=self.placement.dtype)

    def _to_device(self, *tensors: Tensor) -> Iterator[Tensor]:
        return (tensor.to(self.placement.device, non_blocking=True) for tensor in tensors)

    def _synchronise(self) -> None:
        if self.placement.device.type == "cuda":
            torch.cuda.synchronize(self.placement.device)

    def state_dict(self) -> EngineState:
        """Return copies of weights, optimizer slots and counters, on the CPU."""
        slots = {
            name: {
                slot: torch.as_tensor(value).detach().cpu().clone()
                for slot, value in self.optimizer.state[parameter].items()
            }
            for name, parameter in self.model.hub_parameters()
            if parameter in self.optimizer.state
        }
        scalars = {"updates": float(self.updates), **self._scaler.state_dict()}
        return EngineState(self.model.weights(), slots, self.optimizer_kind, scalars)

    def load_state_dict(self, state: EngineState) -> None:
        """Take up weights, optimizer slots and counters."""
        check_kind(state.optimizer_kind, self.optimizer_kind)
        self.model.load_weights(state.weights)
        self.optimizer.state.clear()
        for name, parameter in self.model.hub_parameters():
            if state.optimizer and name not in state.optimizer:
                raise CheckpointError(f"the checkpoint lacks the optimizer state of {name}.")
            if name in state.optimizer:
                self.optimizer.state[parameter] = {
                    # AdamW keeps its step count on the CPU, whatever the parameter's device.
                    slot: value.clone() if slot == "step" else value.to(parameter, copy=True)
                    for slot, value in torch_slots(state.optimizer[name]).items()
                }
        self.updates = int(state.scalars.get("updates", 0))
        scaler = {key: state.scalars.get(key) for key in self._scaler.state_dict()}
        if None not in scaler.values():  # else from an engine that had no such scaler
            self._scaler.load_state_dict(scaler)

    def device_stats(self) -> Dict[str, float]:
        """Return the peak memory: the device's on a GPU, the process's on a CPU."""
        if self.placement.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.placement.device) / _GIB
        else:
            peak = process_peak_gib()
        return {"perf/peak_memory_gib": peak}


def _grad_scaler(placement: Placement) -> Any:
    """Return a loss scaler, which does nothing unless the arithmetic is fp16."""
    enabled = placement.precision == "fp16"
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(placement.device.type, enabled=enabled)
    return torch.cuda.amp.GradScaler(enabled=enabled)


def _seed_dropout(seed: int, update: int) -> None:
    """Make dropout a pure function of the update, so that a resumed run repeats it unsaved."""
    torch.manual_seed(int(np.random.SeedSequence((seed, update)).generate_state(1)[0]))
