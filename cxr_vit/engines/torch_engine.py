"""Training on torch's devices: the updates of all torch engines, and the data-parallel engine."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from abc import abstractmethod
from dataclasses import replace
from typing import Any, ContextManager, Dict, Iterable, List, Mapping, Optional, Set, Tuple, Union

import numpy as np
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from cxr_vit.config.plans import BatchPlan
from cxr_vit.config.schema import Config
from cxr_vit.data.dataset import Batch, ChestXrayDataset, collate
from cxr_vit.data.sampler import EvaluationSampler, ReplicaSampler, TrainingSampler
from cxr_vit.engines.allocator import keep_freed_memory
from cxr_vit.engines.base import (
    Engine,
    EngineState,
    StageRange,
    StepOutput,
    check_batch,
    process_peak_gib,
)
from cxr_vit.engines.compiled import compile_stages, explaining_compile_errors
from cxr_vit.engines.devices import DeviceChoice
from cxr_vit.engines.optim import (
    NO_STATE,
    SkipOnDevice,
    can_skip_on_device,
    check_kind,
    check_trained,
    counts_on_device,
    laid_out_as,
    torch_slots,
)
from cxr_vit.engines.process_group import ProcessGroup
from cxr_vit.engines.workers import with_user_errors
from cxr_vit.model.drop_path import DropPath
from cxr_vit.model.module import ViTModule
from cxr_vit.model.optim import explaining_missing_rate, freeze_others, learning_rate_ratios

logger = logging.getLogger(__name__)

Sampler = Union[TrainingSampler, EvaluationSampler]


class TorchEngineBase(Engine):
    """Everything but the forward and backward pass: data, updates, mixed precision, state.

    Parameters
    ----------
    module
        Set up; its model and buffers are moved to the device.
    own_replicas
        The replicas that this process computes or takes part in.
    scaler
        Loss scaler, disabled unless the precision is fp16.
    compile_size
        Samples of the pass that `compile` makes.
    """

    name = "torch"
    _idle_loader: Optional[DataLoader[Any]] = None  # of the last evaluation

    def __init__(
        self,
        module: ViTModule,
        config: Config,
        batch: BatchPlan,
        device: DeviceChoice,
        group: ProcessGroup,
        *,
        own_replicas: range,
        scaler: Any,
        compile_size: int,
    ) -> None:
        super().__init__(module, batch)
        self.local_batch = replace(batch, replicas=len(own_replicas))
        self.own_replicas = own_replicas
        self.is_main = group.rank == 0
        self.group = group
        self.device = device.device
        self.device_choice = device
        if device.device.type == "cpu":
            keep_freed_memory()
        self.reads_images = True  # whether this process needs the pixels
        self.num_stages = 1  # that are computed separately
        module.to_device(self.device)
        self.loss_device = self.device
        plan = module.model.plan
        kept = plan.kept_outputs(config.pipeline.recompute, on_ipus=False)
        self.model = module.model.recompute(kept)
        self.compiles = config.engine.compile
        self.undo_compiling = compile_stages(self.model, self.compiles, group.is_connected)
        self._can_score = False  # without compiling first
        self.max_grad_norm = config.optim.max_grad_norm or float("inf")
        with explaining_missing_rate(config):
            self.optimizer = module.configure_optimizers()
        self.num_classes = len(module.names)
        self.lr_ratios = learning_rate_ratios(self.optimizer, config.peak_lr)
        freeze_others(self.model, self.optimizer)
        #: State that the optimizer's constructor made, as Adagrad's does.
        self._first_slots = {
            name: _cpu_copies(self.optimizer.state[parameter])
            for name, parameter in self.model.hub_parameters()
            if parameter in self.optimizer.state
        }
        self.optimizer_kind = f"torch.{type(self.optimizer).__name__}"
        self.scaler = scaler
        self.compile_size = compile_size
        self.seed = config.run.seed
        depth = sum(plan.layers_per_stage)
        self.drop_path = DropPath(config.model.drop_path, depth, self.seed)
        self.stops_at_nonfinite = config.train.on_nonfinite == "stop"
        can_skip = _is_late(self.device) and can_skip_on_device(self.optimizer)
        skip = SkipOnDevice(self.optimizer, sticks=self.stops_at_nonfinite)
        waits = group.any(scaler.is_enabled() or not can_skip)  # all make the same updates
        self.skip = None if waits else skip
        self.num_workers = config.data.num_workers
        self.worker_timeout_s = config.data.worker_timeout_s
        self.updates = 0
        if device.precision == "fp32":
            # Otherwise cuDNN computes the patch embedding in TF32, with 10 bits of mantissa.
            torch.backends.cudnn.allow_tf32 = False

    @property
    def arithmetic(self) -> str:
        """The precision, and how the model is compiled, in words."""
        compiled = "" if self.compiles == "off" else f" with engine.compile={self.compiles}"
        return self.device_choice.precision + compiled

    def facts(self) -> Dict[str, Any]:
        """Return what `describe` tells as fields."""
        return {
            "name": self.name,
            "device": self.device_choice.name,
            "precision": self.device_choice.precision,
            "processes": self.group.size,
            "replicas": self.batch.replicas,
            "stages": self.num_stages,
        }

    def loader(
        self, dataset: ChestXrayDataset, sampler: Sampler, *, training: bool
    ) -> Iterable[Batch]:
        """Return the host batches; the last one of an evaluation is padded."""
        if not training:
            return self._scoring_batches(dataset, sampler)
        loader = self._make_loader(dataset, sampler, training=True)
        return with_user_errors(loader, self.watch, training=True)

    def _scoring_batches(self, dataset: ChestXrayDataset, sampler: Sampler) -> Iterable[Batch]:
        """Yield the batches; after the last one keep the processes for the next pass like it.

        After a pass that ends early they end with it.
        """
        loader, self._idle_loader = self._idle_loader, None
        if loader is None or not _reads(loader, dataset, sampler):
            loader = None  # its processes end before others start
            loader = self._make_loader(dataset, sampler, training=False)
        yield from with_user_errors(loader, self.watch, training=False)
        self._idle_loader = loader if loader.persistent_workers else None

    def _make_loader(
        self, dataset: ChestXrayDataset, sampler: Sampler, *, training: bool
    ) -> DataLoader[Any]:
        batch = self.batch
        draws = ReplicaSampler(
            sampler,
            host_batch_size=None if training else batch.eval_host_batch_size,
            micro_batch_size=batch.micro_batch_size if training else batch.eval_micro_batch_size,
            replicas=batch.replicas,
            own=self.own_replicas,
        )
        workers = self.num_workers if self.reads_images else 0
        return DataLoader(
            dataset if self.reads_images else dataset.without_images(),
            batch_sampler=draws,
            num_workers=workers,
            timeout=(self.worker_timeout_s or 0) if workers else 0,
            collate_fn=collate,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=self.watch.start(dataset, training=training, workers=workers),
            persistent_workers=workers > 0 and not training,
        )

    def compile(self, example: Batch) -> float:
        """Run one forward and backward pass without an update, which compiles and connects.

        One process on a CPU that compiles nothing has nothing to prepare, and makes no pass.
        """
        check_batch(example, self.local_batch.global_batch_size)
        self.model.check_layers(with_factors=self.drop_path.rate > 0)
        is_ready = self.compiles == "off" and self.device.type == "cpu"
        if is_ready and not self.group.is_connected:
            return 0.0
        start = time.perf_counter()
        size = self.compile_size
        self.module.train()
        images, labels = self.to_device(example.images[:size], example.labels[:size])
        with explaining_compile_errors(self.compiles):  # those of the backward pass
            self.forward_backward(images, labels, self._paths(example.indices[:size]))
        self.optimizer.zero_grad(set_to_none=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter() - start

    def prepare_scoring(self, dataset: ChestXrayDataset) -> float:
        """Score images of zeros, once, which compiles the forward pass."""
        if self.compiles == "off" or self._can_score:
            return 0.0
        self.model.check_layers(with_factors=False)
        self._can_score = True
        size = self.batch.eval_micro_batch_size * self.batch.eval_device_iterations
        zeros = Batch.zeros(size, image_size=dataset.image_size, num_classes=self.num_classes)
        start = time.perf_counter()
        self.predict(zeros)
        seconds = time.perf_counter() - start
        if self.is_main:
            logger.info("compiled for evaluation in %.1f s", seconds)
        return seconds

    def train_step(self, batch: Batch, *, lr: float) -> StepOutput:
        """Make the weight updates of one host batch."""
        size = self.local_batch.global_batch_size
        check_batch(batch, size)
        self.module.train()
        for group, ratio in zip(self.optimizer.param_groups, self.lr_ratios):
            group["lr"] = lr * ratio
        images, labels = self.to_device(batch.images, batch.labels)
        paths = self._paths(batch.indices)
        if self.skip:
            self.skip.begin()
        losses: List[Tensor] = []
        norms: List[Tensor] = []
        for start in range(0, len(labels), size):
            update = slice(start, start + size)
            self._seed_dropout()
            own = None if paths is None else paths[update]
            with self.casting_once():
                losses.append(self.forward_backward(images[update], labels[update], own))
            with self.group.waiting_for("the gradients of all processes"):
                self.scaler.unscale_(self.optimizer)
            norms.append(self._update(self.clip_gradients()))
            self.optimizer.zero_grad(set_to_none=True)
            self.updates += 1
            if self.stops_at_nonfinite and not self.skip and not torch.isfinite(norms[-1]):
                left = len(labels) // size - len(losses)  # are not made
                losses += [torch.full_like(losses[0], math.nan)] * left
                norms += [torch.full_like(norms[0], math.nan)] * left
                break
        numbers, copied = self._to_host(torch.stack([*losses, *norms]).float())
        shares, norm = numbers.split(len(losses))
        num_samples = len(losses) * self.batch.global_batch_size
        return StepOutput(self.group.sum(shares), norm, num_samples, copied)

    def _update(self, norm: Tensor) -> Tensor:
        """Make the update, given the norm of its gradient; return the norm to report.

        A gradient that is not finite is left out: its NaN would spread over all weights.
        """
        if self.skip:
            self.skip.add(norm)
            self.optimizer.step()
            return norm
        is_finite = bool(torch.isfinite(norm))  # waits for the device
        if is_finite or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # the scaler itself leaves out what overflows
            # Below 1 it is not the scale that makes a gradient overflow.
            if not is_finite and self.scaler.get_scale() >= 1:
                norm = torch.zeros_like(norm)
            self.scaler.update()
        return norm

    def _to_host(self, numbers: Tensor) -> Tuple[Tensor, Any]:
        """Copy to the host, and return the event of the copy if nobody has waited for it.

        Several processes wait: they sum their losses on the host.
        """
        if not self.skip or self.device.type != "cuda" or self.group.is_connected:
            return numbers.cpu(), None
        host = torch.empty(numbers.shape, pin_memory=True).copy_(numbers, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self.device))
        return host, copied

    @abstractmethod
    def forward_backward(self, images: Tensor, labels: Tensor, paths: Optional[Tensor]) -> Tensor:
        """Accumulate the gradients of this process's part of one global batch.

        `paths` are the images' factors of drop path, if it is on.

        Returns
        -------
        Tensor
            This process's share of the batch's mean loss, a scalar on the device. The sum over
            the processes is the mean.
        """

    @abstractmethod
    def clip_gradients(self) -> Tensor:
        """Clip the gradients to `max_grad_norm`; return their norm before, on the device."""

    def _seed_dropout(self) -> None:
        """Make dropout a function of the update, so that a resumed run repeats it without state.

        Each process has its own seed: it computes other samples or other layers.
        """
        seeds = (self.seed, self.updates, self.group.rank)
        torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))

    def _paths(self, rows: Tensor) -> Optional[Tensor]:
        paths = self.drop_path.factors(self.updates, rows, self.local_batch.global_batch_size)
        if paths is None:
            return None
        if self.device.type == "cuda":
            paths = paths.pin_memory()  # CUDA may wait for a copy of other memory
        return self.to_device(paths)[0]

    def autocast(self) -> ContextManager[Any]:
        """Return the context of a forward pass."""
        if self.device_choice.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.device_choice.dtype)

    def casting_once(self) -> ContextManager[Any]:
        """Return a context around several passes in which `autocast` casts each weight once.

        torch drops the cast weights where the outermost context ends: it must end before the
        optimizer changes the weights.
        """
        if self.device_choice.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, enabled=False)

    def to_device(self, *tensors: Tensor) -> Tuple[Tensor, ...]:
        """Copy to the device without waiting."""
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)

    def any_process(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return self.group.any(flag)

    def activation_ranges(self, images: Tensor) -> List[StageRange]:
        """Score the images in host batches, and observe the stages."""
        size, num_stages = self.local_batch.eval_host_batch_size, self.model.plan.num_stages
        ranges = torch.zeros(num_stages, 3, dtype=torch.float64)
        seen: Set[int] = set()

        def observe(stage: int, output: Tensor) -> None:
            finite = output[torch.isfinite(output)].double().cpu()
            low, high, bad = ranges[stage] if stage in seen else (math.inf, -math.inf, 0)
            if len(finite):
                low, high = min(low, finite.min()), max(high, finite.max())
            ranges[stage] = torch.tensor([low, high, bad + output.numel() - len(finite)])
            seen.add(stage)

        with contextlib.ExitStack() as stack:
            for index in range(num_stages):
                hook = self.model.stage(index).register_forward_hook(
                    lambda stage, inputs, output, index=index: observe(
                        index, stage.computed(output)
                    )
                )
                stack.callback(hook.remove)
            for start in range(0, len(images), size):
                rows = (start + torch.arange(size)) % len(images)
                self.predict(Batch(images[rows], torch.zeros(size, self.num_classes), rows))
        if self.own_replicas[0] > 0:  # the others have other stages, or other images
            ranges.zero_()
        found = self.group.sum(ranges, "the ranges of the other stages").tolist()
        return [StageRange(i, low, high, int(bad)) for i, (low, high, bad) in enumerate(found)]

    def state_dict(self) -> EngineState:
        """Return copies of the weights, optimizer slots and counters of this process."""
        slots = {
            name: _cpu_copies(self.optimizer.state[parameter])
            for name, parameter in self.model.hub_parameters()
            if parameter in self.optimizer.state
        }
        if any(slots.values()) or self.updates:
            for name, parameter in self.model.hub_parameters():
                if parameter.requires_grad and not slots.get(name):
                    slots[name] = {NO_STATE: torch.zeros(())}
        scalars = {"updates": float(self.updates), **self.scaler.state_dict()}
        return EngineState(self.model.weights(), slots, self.optimizer_kind, scalars)

    def load_state_dict(self, state: EngineState) -> None:
        """Load weights, optimizer slots and counters."""
        check_kind(state.optimizer_kind, self.optimizer_kind)
        self.model.load_weights(state.weights)
        self.optimizer.state.clear()
        counted = counts_on_device(self.optimizer)
        check_trained(state.optimizer, self.model.hub_parameters())
        for name, parameter in self.model.hub_parameters():
            slots = torch_slots(state.optimizer.get(name, {})) or self._first_slots.get(name)
            if slots and parameter.requires_grad:
                device = self.device if id(parameter) in counted else "cpu"
                self.optimizer.state[parameter] = {
                    slot: value.to(device, copy=True)
                    if slot == "step"
                    else laid_out_as(parameter, value)
                    for slot, value in slots.items()
                }
        self.updates = int(state.scalars.get("updates", 0))
        scaler = {key: state.scalars.get(key) for key in self.scaler.state_dict()}
        if None not in scaler.values():  # else it is of an engine without such a scaler
            self.scaler.load_state_dict(scaler)

    def device_stats(self) -> Dict[str, float]:
        """Return the peak memory of the GPU, or of this process on a CPU."""
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**30
        else:
            peak = process_peak_gib()
        return {"perf/peak_memory_gib": peak}

    def close(self) -> None:
        """End kept loader processes, leave the model uncompiled, and close the process group."""
        self._idle_loader = None
        self.undo_compiling()
        self.group.close(failed=self.failed)


class TorchEngine(TorchEngineBase):
    """Train and score the whole model on one device per process; processes share the replicas."""

    def __init__(
        self,
        module: ViTModule,
        config: Config,
        batch: BatchPlan,
        device: DeviceChoice,
        group: ProcessGroup,
    ) -> None:
        super().__init__(
            module,
            config,
            batch,
            device,
            group,
            own_replicas=group.launch.own(batch.replicas),
            scaler=_grad_scaler(device),
            compile_size=batch.micro_batch_size,
        )
        self._parallel: Any = self.model
        if group.is_connected:
            self._parallel = DistributedDataParallel(self.model, gradient_as_bucket_view=True)

    def describe(self) -> str:
        """Return a line about the device, the precision and the reason for both."""
        choice, count = self.device_choice, self.group.size
        processes = f" in {count} processes" if count > 1 else ""
        return (
            f"torch engine on {choice.name}{processes} in {self.arithmetic} ({choice.reason};"
            " choose with engine.device=cpu|cuda and engine.precision=fp32|bf16|fp16)"
        )

    def forward_backward(self, images: Tensor, labels: Tensor, paths: Optional[Tensor]) -> Tensor:
        """Accumulate the gradients micro-batch by micro-batch; exchange them with the last one."""
        total = torch.zeros((), device=self.device)
        size = self.batch.micro_batch_size
        starts = range(0, len(images), size)
        with self.group.waiting_for("the gradients of the other replicas"):
            for start in starts:
                part = slice(start, start + size)
                exchanges = start == starts[-1] or not self.group.is_connected
                with contextlib.nullcontext() if exchanges else self._parallel.no_sync():
                    own = None if paths is None else paths[part]
                    loss = self._loss(images[part], labels[part], own)
                    self.scaler.scale(loss / len(starts)).backward()
                total += loss.detach()
        return total / (len(starts) * self.group.size)

    def _loss(self, images: Tensor, labels: Tensor, paths: Optional[Tensor]) -> Tensor:
        with self.autocast():
            logits = self._parallel(images, paths)
        return self.module.loss(logits.float(), labels)

    def clip_gradients(self) -> Tensor:
        """Clip the gradients, which are the same in all processes."""
        weights = list(self.model.parameters())
        if math.isinf(self.max_grad_norm) and hasattr(torch.nn.utils, "get_total_norm"):
            gradients = [weight.grad for weight in weights if weight.grad is not None]
            return torch.nn.utils.get_total_norm(gradients)
        return torch.nn.utils.clip_grad_norm_(weights, self.max_grad_norm)

    def predict(self, batch: Batch) -> Tensor:
        """Return the logits of a host batch, computed micro-batch by micro-batch."""
        size = self.batch.eval_micro_batch_size
        check_batch(batch, size)
        self.module.eval()
        (images,) = self.to_device(batch.images)
        # autocast would cast each weight again and again in inference mode.
        with torch.no_grad(), self.autocast():
            logits = [self.model(part) for part in images.split(size)]
        return torch.cat(logits).float().cpu()

    def gather(self, *parts: Tensor) -> Tuple[Tensor, ...]:
        """Concatenate the rows of all processes."""
        return self.group.concatenate(parts)


def _reads(loader: DataLoader[Any], dataset: ChestXrayDataset, sampler: Sampler) -> bool:
    """Whether a loader reads this data set in this order."""
    own: Any = loader.batch_sampler
    return loader.dataset is dataset and vars(own.sampler) == vars(sampler)


def _is_late(device: torch.device) -> bool:
    """Whether the host runs ahead of the device."""
    return device.type != "cpu"


def _cpu_copies(slots: Mapping[str, Any]) -> Dict[str, Tensor]:
    return {
        slot: torch.as_tensor(value).detach().cpu().clone()
        for slot, value in slots.items()
        if value is not None  # torch 2.0's SGD without momentum
    }


def _grad_scaler(device: DeviceChoice) -> Any:
    enabled = device.precision == "fp16"
    if hasattr(torch.amp, "GradScaler"):
        return torch.amp.GradScaler(device.device.type, enabled=enabled)
    return torch.cuda.amp.GradScaler(enabled=enabled)
