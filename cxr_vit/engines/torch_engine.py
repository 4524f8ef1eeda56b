"""What the engines on torch's own devices share: data, updates, mixed precision, state."""

from __future__ import annotations

import contextlib
import time
from abc import abstractmethod
from dataclasses import replace
from typing import Any, ContextManager, Dict, Iterable, Iterator, List, Tuple, Union

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from cxr_vit.config.plans import BatchPlan
from cxr_vit.config.schema import Config
from cxr_vit.data.dataset import Batch, ChestXrayDataset, collate
from cxr_vit.data.sampler import EvaluationSampler, ReplicaSampler, TrainingSampler
from cxr_vit.engines.base import (
    Engine,
    EngineState,
    StepOutput,
    in_one_line,
    leave_the_process_group,
    process_peak_gib,
)
from cxr_vit.engines.devices import Placement
from cxr_vit.engines.ipu.optimizer import check_kind, torch_slots
from cxr_vit.engines.optim import build_optimizer
from cxr_vit.engines.process_group import Processes
from cxr_vit.errors import CheckpointError
from cxr_vit.model.loss import multi_label_loss
from cxr_vit.model.stages import StagedViT

__all__ = ["TorchBase", "TorchEngine"]


_GIB = 2**30


class TorchBase(Engine):
    """An engine that computes with torch in this process, alone or beside others.

    Parameters
    ----------
    model
        The staged model; what it holds is moved to the device.
    config
        The configuration.
    placement
        Device and arithmetic.
    processes
        The processes of the run.
    own
        Which replicas this process computes, or takes part in.

    Attributes
    ----------
    reads_images
        Whether this process needs their pixels.
    """

    def __init__(
        self,
        model: StagedViT,
        config: Config,
        placement: Placement,
        processes: Processes,
        own: range,
    ) -> None:
        super().__init__(BatchPlan.from_section(config.batch))
        self.placement = placement
        self.processes = processes
        self.own = own
        self.local_batch = replace(self.batch, replicas=len(own))
        self.is_main = processes.rank == 0
        self.reads_images = True
        self.model = model.place(placement.device)
        norm = config.optim.max_grad_norm
        self.max_grad_norm = float("inf") if norm is None else norm
        self.optimizer = build_optimizer(self.model.hub_parameters(), config.optim)
        self.optimizer_kind = f"torch.{type(self.optimizer).__name__}"
        if placement.precision == "fp32":
            # Else cuDNN runs the patch embedding in TF32, with 10 bits of mantissa.
            torch.backends.cudnn.allow_tf32 = False
        self.seed = config.run.seed
        self.num_workers = config.data.num_workers
        self.updates = 0
        self._scaler: Any

    def agree(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self.processes.any(flag) if self.processes.is_connected else flag

    def loader(
        self,
        dataset: ChestXrayDataset,
        sampler: Union[TrainingSampler, EvaluationSampler],
        *,
        training: bool,
    ) -> Iterable[Batch]:
        """Return the host batches, the last one of an evaluation filled up with padding."""
        batch = self.batch
        draws = ReplicaSampler(
            sampler,
            host_batch_size=None if training else batch.eval_host_batch_size,
            micro_batch_size=batch.micro_batch_size if training else batch.eval_micro_batch_size,
            replicas=batch.replicas,
            own=self.own,
        )
        loader: DataLoader[Any] = DataLoader(
            dataset if self.reads_images else dataset.without_images(),
            batch_sampler=draws,
            num_workers=self.num_workers if self.reads_images else 0,
            collate_fn=collate,
            pin_memory=self.placement.device.type == "cuda",
            worker_init_fn=leave_the_process_group,
        )
        return in_one_line(loader)

    def _train_step(self, batch: Batch, lr: float) -> StepOutput:
        self.model.train()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        images, labels = self._to_device(batch.images, batch.labels)
        size = self.local_batch.global_batch_size
        losses: List[Tensor] = []
        norms: List[Tensor] = []
        for start in range(0, len(labels), size):
            update = slice(start, start + size)
            self._seed_dropout()
            losses.append(self._accumulate(images[update], labels[update]))
            norms.append(self._update())
        # The one synchronisation of a host call.
        both = torch.stack([*losses, *norms]).float().cpu()
        shares, norm = both.split(len(losses))
        num_samples = len(losses) * self.batch.global_batch_size
        return StepOutput(self.processes.add_up(shares), norm, num_samples)

    @abstractmethod
    def _accumulate(self, images: Tensor, labels: Tensor) -> Tensor:
        """Add up the gradients of one global batch, or of this process's part of it.

        Returns
        -------
        Tensor
            This process's share of the batch's mean loss, a scalar still on the device: the sum
            over the processes is the mean.
        """

    @abstractmethod
    def _clip(self) -> Tensor:
        """Clip the gradient to `max_grad_norm`; return its norm before, still on the device."""

    def _update(self) -> Tensor:
        """Clip, step, clear; return the gradient norm before clipping, still on the device.

        It is 0 for an update that the loss scaler skips, as fp16 now and then overflows.
        """
        with self.processes.waiting("the gradients of all processes"):
            self._scaler.unscale_(self.optimizer)
        norm = self._clip()
        if self._scaler.is_enabled():
            norm = torch.where(torch.isfinite(norm), norm, torch.zeros_like(norm))
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.updates += 1
        return norm

    def _seed_dropout(self) -> None:
        """Make dropout a pure function of the update, so that a resumed run repeats it unsaved.

        Each process has its own, as each computes other samples or other layers.
        """
        seeds = (self.seed, self.updates, self.processes.rank)
        torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return multi_label_loss(logits, labels)

    def _autocast(self) -> ContextManager[Any]:
        if self.placement.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.placement.device.type, dtype=self.placement.dtype)

    def _to_device(self, *tensors: Tensor) -> Iterator[Tensor]:
        return (tensor.to(self.placement.device, non_blocking=True) for tensor in tensors)

    def _synchronise(self) -> None:
        if self.placement.device.type == "cuda":
            torch.cuda.synchronize(self.placement.device)

    def _gather(self, *parts: Tensor) -> Tuple[Tensor, ...]:
        return self.processes.concatenate(parts)

    def state_dict(self) -> EngineState:
        """Return copies of weights, optimizer slots and counters held here, on the CPU."""
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

    def close(self) -> None:
        """Leave the other processes."""
        self.processes.close(failed=self.failed)


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
