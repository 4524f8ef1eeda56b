"""torch's pipeline stage, holding only the activations that are in flight."""

from __future__ import annotations

import time
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.pipelining import (
    PipelineStage,
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleLoopedBFS,
)
from torch.nn.parallel import DistributedDataParallel

from cxr_vit.config.schema import Config
from cxr_vit.data.dataset import Batch
from cxr_vit.engines.base import EngineState
from cxr_vit.engines.devices import Placement
from cxr_vit.engines.process_group import Processes
from cxr_vit.engines.torch_engine import TorchBase
from cxr_vit.model.stages import Stage, StagedViT

__all__ = ["AutocastStage", "LeanStage", "PipelineEngine"]


class AutocastStage(nn.Module):
    """A stage whose forward pass runs in mixed precision, as the uncut model's does.

    Hidden states leave it in fp32, which is what the next one was told to receive: torch would not
    notice another dtype.

    Parameters
    ----------
    stage
        The stage; shared, not copied.
    autocast
        Makes the context of a forward pass.
    """

    def __init__(self, stage: Stage, autocast: Callable[[], Any]) -> None:
        super().__init__()
        self.stage = stage
        self.autocast = autocast

    def forward(self, value: Tensor) -> Tensor:
        """Run the stage on pixels or hidden states."""
        with self.autocast():
            output: Tensor = self.stage(value)
        return output if self.stage.has_head else output.float()


class LeanStage(PipelineStage):
    """A pipeline stage that knows what it waits for, and keeps no buffer it has no use for.

    torch allocates a buffer for the input and one for the gradient of *every* micro-batch of an
    update and keeps them from update to update, which makes the memory of 1F1B grow with their
    number. Here a buffer is there from the moment its receive is posted until it was used. In
    between a tensor without memory (`meta`) holds its place.

    `awaited` lists the receives that were posted and not used yet, oldest first, in words, and
    `offered` says what was last sent.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.awaited: Dict[Tuple[str, int], str] = {}
        self.offered = ""

    def _prepare_forward_infra(self, *arguments: Any, **named: Any) -> Any:
        result = super()._prepare_forward_infra(*arguments, **named)
        _empty(info for infos in self.args_recv_info.values() for info in infos)
        return result

    def _prepare_backward_infra(self, *arguments: Any, **named: Any) -> Any:
        result = super()._prepare_backward_infra(*arguments, **named)
        _empty(info for infos in self.grad_recv_info.values() for info in infos)
        return result

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        """Make room for the input of a micro-batch and return its receives."""
        self._fill(self.args_recv_info[fwd_chunk_id])
        operations = super().get_fwd_recv_ops(fwd_chunk_id)
        if operations:
            words = f"stage {self.stage_index - 1}'s output for micro-batch {fwd_chunk_id}"
            self.awaited["forward", fwd_chunk_id] = words
        return operations

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **named: Any) -> Any:
        """Run a micro-batch forward; what holds its input from now on is the backward pass."""
        self.awaited.pop(("forward", fwd_chunk_id), None)
        output = super().forward_one_chunk(fwd_chunk_id, *arguments, **named)
        _empty(self.args_recv_info[fwd_chunk_id])
        return output

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        """Make room for the gradient of a micro-batch and return its receives."""
        if self.has_backward and not self.is_last:
            self._fill(self.grad_recv_info[bwd_chunk_id])
        operations = super().get_bwd_recv_ops(bwd_chunk_id)
        if operations:
            words = f"stage {self.stage_index + 1}'s gradient for micro-batch {bwd_chunk_id}"
            self.awaited["backward", bwd_chunk_id] = words
        return operations

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **named: Any) -> Any:
        """Run a micro-batch backward, after which its gradient is done with."""
        self.awaited.pop(("backward", bwd_chunk_id), None)
        result = super().backward_one_chunk(bwd_chunk_id, *arguments, **named)
        if named.get("loss") is not None:
            named["loss"].detach_()  # the schedule keeps it, and its graph the stage's input
        if self.has_backward:
            _empty(self.grad_recv_info[bwd_chunk_id])
        return result

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> Any:
        """Return the sends of a micro-batch's output."""
        operations = super().get_fwd_send_ops(fwd_chunk_id)
        if operations:
            self.offered = f"stage {self.stage_index + 1} to take micro-batch {fwd_chunk_id}"
        return operations

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> Any:
        """Return the sends of a micro-batch's gradient."""
        operations = super().get_bwd_send_ops(bwd_chunk_id)
        if operations:
            words = f"stage {self.stage_index - 1} to take the gradient of"
            self.offered = f"{words} micro-batch {bwd_chunk_id}"
        return operations

    def _fill(self, infos: Iterable[Any]) -> None:
        for info in infos:
            if _is_received(info):
                place = info.buffer
                info.buffer = torch.empty_like(place, device=self.device)
                info.buffer.requires_grad_(place.requires_grad)


def _empty(infos: Iterable[Any]) -> None:
    for info in infos:
        if _is_received(info) and not info.buffer.is_meta:
            place = torch.empty_like(info.buffer, device="meta")
            info.buffer = place.requires_grad_(info.buffer.requires_grad)


def _is_received(info: Any) -> bool:
    """Whether another stage sends this: not so for the model's own input."""
    return isinstance(getattr(info, "buffer", None), Tensor)


_SCHEDULES = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}


class PipelineEngine(TorchBase):
    """Train and score with the stages on the processes of a replica.

    Stage `i` is on process ``i % n`` of the `n` of its replica, and only there are its weights and
    its optimizer's state.

    Parameters
    ----------
    model
        The staged model; the stages of other processes are let go of.
    config
        The configuration; `check_processes` must have passed.
    placement
        Device and arithmetic.
    processes
        The processes of the run.
    """

    def __init__(
        self, model: StagedViT, config: Config, placement: Placement, processes: Processes
    ) -> None:
        self.replicas = config.batch.replicas
        self.num_stages = model.plan.num_stages
        self.mesh = _make_mesh(processes, placement.device.type, self.replicas)
        per_replica = processes.size // self.replicas
        self.replica, position = divmod(processes.rank, per_replica)
        self.own_stages = range(position, self.num_stages, per_replica)
        processes.roles = _roles(self.num_stages, per_replica, self.replicas)
        own = range(self.replica, self.replica + 1)
        super().__init__(model.keep(self.own_stages), config, placement, processes, own)
        self.reads_images = 0 in self.own_stages
        self.has_head = self.num_stages - 1 in self.own_stages
        self._last = self.replica * per_replica + (self.num_stages - 1) % per_replica
        self._parameters = [parameter for _, parameter in self.model.hub_parameters()]
        # Alone in a world of its own it would not know of an overflow elsewhere.
        self._scaler = ShardedGradScaler(
            placement.device.type,
            enabled=placement.precision == "fp16",
            process_group=dist.group.WORLD,
        )
        self.schedule_name = config.pipeline.schedule
        self._losses: List[Tensor] = []
        self._modules: Dict[int, AutocastStage] = {
            index: AutocastStage(model.stage(index), self._autocast) for index in self.own_stages
        }
        self._training_stages = self._make_stages(self.batch.micro_batch_size, training=True)
        self._scoring_stages = self._make_stages(self.batch.eval_micro_batch_size, training=False)
        self._training: Any = self._make_training_schedule()
        self._scoring: Any = self._make_scoring_schedule()

    def describe(self) -> str:
        """Say in a line what computes, in which arithmetic, and why."""
        device = self.placement.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        several = len(self.own_stages)
        shared = f", {several} a process" if several > 1 else ""
        return (
            f"pipeline engine on {name} in {self.processes.size} processes ({self.replicas} x"
            f" {self.num_stages} stages{shared}, {self.schedule_name}) in"
            f" {self.placement.precision} ({self.placement.reason}; choose with"
            " pipeline.schedule=gpipe|1f1b|interleaved_1f1b, engine.device=cpu|cuda,"
            " engine.precision=fp32|bf16|fp16)"
        )

    # Stages and schedules

    def _make_stages(self, micro_batch_size: int, *, training: bool) -> List[Any]:
        """Wrap this process's stages for torch's schedules, with the shapes that pass by."""
        device = self.placement.device
        size, classes = self.model.config.image_size, self.model.config.num_labels
        pixels = torch.empty(micro_batch_size, 1, size, size, dtype=torch.uint8, device=device)
        hidden = torch.empty(micro_batch_size, *self.model.hidden_shape, device=device)
        hidden.requires_grad_(training)
        logits = torch.empty(micro_batch_size, classes, dtype=self.placement.dtype, device=device)
        stages: List[Any] = []
        for index, module in self._modules.items():
            parallel: Any = module
            if training and self.replicas > 1:
                parallel = DistributedDataParallel(
                    module,
                    process_group=self.mesh.get_group("replica"),
                    gradient_as_bucket_view=True,
                )
            stages.append(
                LeanStage(
                    parallel,
                    index,
                    self.num_stages,
                    device,
                    input_args=pixels if index == 0 else hidden,
                    output_args=logits if index == self.num_stages - 1 else hidden,
                    group=self.mesh.get_group("stage"),
                )
            )
        return stages

    def _make_training_schedule(self) -> Any:
        stages, count = self._training_stages, self.batch.gradient_accumulation
        if self.schedule_name == "interleaved_1f1b":
            return ScheduleInterleaved1F1B(stages, count, loss_fn=self._scaled_loss)
        return _SCHEDULES[self.schedule_name](stages[0], count, loss_fn=self._scaled_loss)

    def _make_scoring_schedule(self) -> Any:
        """Return a schedule without a loss: of GPipe and its like the forward half is left."""
        stages, count = self._scoring_stages, self.batch.eval_device_iterations
        if len(stages) > 1:
            return ScheduleLoopedBFS(stages, count)
        return ScheduleGPipe(stages[0], count)

    def _scaled_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = self._loss(logits, labels)
        self._losses.append(loss.detach())
        scaled: Tensor = self._scaler.scale(loss)
        return scaled

    # Computation

    def _compile(self, example: Batch) -> float:
        """Run a global batch forward and backward without an update; connections are made."""
        start = time.perf_counter()
        self.model.train()
        size = self.local_batch.global_batch_size
        images, labels = self._to_device(example.images[:size], example.labels[:size])
        self._accumulate(images, labels)
        self.optimizer.zero_grad(set_to_none=True)
        self._synchronise()
        return time.perf_counter() - start

    def _accumulate(self, images: Tensor, labels: Tensor) -> Tensor:
        self._losses.clear()
        # The last stage alone scales a loss; the others take part in what follows from it.
        self._scaler.scale(torch.zeros((), device=self.placement.device))
        inputs = (images,) if self.reads_images else ()
        with self.processes.waiting("its neighbours", lambda: _awaited(self._training_stages)):
            self._training.step(*inputs, target=labels if self.has_head else None)
        if not self._losses:
            return torch.zeros((), device=self.placement.device)
        return torch.stack(self._losses).mean() / self.replicas

    def _clip(self) -> Tensor:
        gradients = [weight.grad for weight in self._parameters if weight.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        # The replicas of a stage have the same gradient: its stages are all there is to add up.
        squares = norm.square()
        with self.processes.waiting("the gradient norms of the other stages"):
            dist.all_reduce(squares, group=self.mesh.get_group("stage"))
        norm = squares.sqrt()
        torch.nn.utils.clip_grads_with_norm_(self._parameters, self.max_grad_norm, norm)
        return norm

    def _predict(self, batch: Batch) -> Tensor:
        self.model.eval()
        inputs = tuple(self._to_device(batch.images)) if self.reads_images else ()
        with self.processes.waiting("its neighbours", lambda: _awaited(self._scoring_stages)):
            with torch.no_grad():
                output: Optional[Tensor] = self._scoring.step(*inputs)
            logits = torch.empty(batch.labels.shape) if output is None else output.float().cpu()
            dist.broadcast(logits, src=self._last, group=self.mesh.get_group("stage"))
        return logits

    def _gather(self, *parts: Tensor) -> Any:
        return self.processes.concatenate(parts, group=self.mesh.get_group("replica"))

    # State

    def state_dict(self) -> EngineState:
        """Return copies of all stages' state in the first process, of its own in every other."""
        own = super().state_dict()
        if self.replica > 0:
            return own
        every: Optional[List[Any]] = None
        if self.is_main:
            every = [None] * dist.get_world_size(self.mesh.get_group("stage"))
        with self.processes.waiting("the weights of the other stages"):
            dist.gather_object(
                (own.weights, own.optimizer), every, dst=0, group=self.mesh.get_group("stage")
            )
        for weights, slots in every or []:
            own.weights.update(weights)
            own.optimizer.update(slots)
        return own


def _make_mesh(processes: Processes, device: str, replicas: int) -> DeviceMesh:
    """Arrange the processes as replica x stage; neighbours in a pipeline have neighbouring ranks.

    (torch's init_device_mesh would make the groups without our timeout.)
    """
    ranks = torch.arange(processes.size).reshape(replicas, -1)
    with processes.waiting("the other processes to form the mesh"):
        groups = [processes.groups(ranks.T.tolist()), processes.groups(ranks.tolist())]
    return DeviceMesh.from_group(groups, device, mesh=ranks, mesh_dim_names=("replica", "stage"))


def _roles(num_stages: int, per_replica: int, replicas: int) -> List[str]:
    """Name what each process does."""
    roles = []
    for rank in range(per_replica * replicas):
        replica, position = divmod(rank, per_replica)
        stages = [str(stage) for stage in range(position, num_stages, per_replica)]
        of = f" of replica {replica}" if replicas > 1 else ""
        named = f"stage{'s' if len(stages) > 1 else ''} {' and '.join(stages)}"
        roles.append(f"{named}{of} (process {rank})")
    return roles


def _awaited(stages: List[Any]) -> str:
    """Say what was asked for first and has not come; if all came, what was last offered."""
    awaited = [words for stage in stages for words in stage.awaited.values()]
    return next(iter(awaited), stages[-1].offered)
