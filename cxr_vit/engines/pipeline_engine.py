"""Pipeline parallelism over processes with torch.distributed.pipelining."""

from __future__ import annotations

import math
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

from cxr_vit.config.plans import BatchPlan
from cxr_vit.config.schema import Config
from cxr_vit.data.dataset import Batch
from cxr_vit.engines.base import EngineState, check_batch
from cxr_vit.engines.devices import DeviceChoice
from cxr_vit.engines.process_group import ProcessGroup
from cxr_vit.engines.torch_engine import TorchEngineBase
from cxr_vit.model.module import ViTModule
from cxr_vit.model.stages import Stage


class AutocastStage(nn.Module):
    """A stage with its forward pass under `autocast`, as in the uncut model.

    Hidden states leave it in fp32, the dtype declared for the next stage: torch does not check it.
    """

    def __init__(self, stage: Stage, autocast: Callable[[], Any]) -> None:
        super().__init__()
        self.stage = stage
        self.autocast = autocast

    def forward(self, value: Tensor, paths: Optional[Tensor] = None) -> Tensor:
        """Run the stage on pixels or hidden states."""
        with self.autocast():
            output: Tensor = self.stage(value, paths)
        return output if self.stage.has_head else output.float()


class LeanStage(PipelineStage):
    """A pipeline stage that holds receive buffers only while they are in use.

    torch allocates buffers for the input and the gradient of *every* micro-batch of an update and
    keeps them, so the memory of 1F1B grows with the number of micro-batches. Here a buffer exists
    from the posting of its receive until it is used; otherwise a `meta` tensor replaces it.

    Attributes
    ----------
    awaited
        Descriptions of the receives that were posted and not used yet, oldest first.
    last_send
        Description of the last send.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.awaited: Dict[Tuple[str, int], str] = {}
        self.last_send = ""

    def _prepare_forward_infra(self, *arguments: Any, **named: Any) -> Any:
        result = super()._prepare_forward_infra(*arguments, **named)
        _free(info for infos in self.args_recv_info.values() for info in infos)
        return result

    def _prepare_backward_infra(self, *arguments: Any, **named: Any) -> Any:
        result = super()._prepare_backward_infra(*arguments, **named)
        _free(info for infos in self.grad_recv_info.values() for info in infos)
        return result

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        """Allocate the input of a micro-batch and return its receives."""
        self._allocate(self.args_recv_info[fwd_chunk_id])
        operations = super().get_fwd_recv_ops(fwd_chunk_id)
        if operations:
            words = f"stage {self.stage_index - 1}'s output for micro-batch {fwd_chunk_id}"
            self.awaited["forward", fwd_chunk_id] = words
        return operations

    def forward_one_chunk(self, fwd_chunk_id: int, *arguments: Any, **named: Any) -> Any:
        """Run a micro-batch forward; from now on only autograd's graph holds its input."""
        self.awaited.pop(("forward", fwd_chunk_id), None)
        output = super().forward_one_chunk(fwd_chunk_id, *arguments, **named)
        _free(self.args_recv_info[fwd_chunk_id])
        return output

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        """Allocate the gradient of a micro-batch and return its receives."""
        if self.has_backward and not self.is_last:
            self._allocate(self.grad_recv_info[bwd_chunk_id])
        operations = super().get_bwd_recv_ops(bwd_chunk_id)
        if operations:
            words = f"stage {self.stage_index + 1}'s gradient for micro-batch {bwd_chunk_id}"
            self.awaited["backward", bwd_chunk_id] = words
        return operations

    def backward_one_chunk(self, bwd_chunk_id: int, *arguments: Any, **named: Any) -> Any:
        """Run a micro-batch backward and free its gradient."""
        self.awaited.pop(("backward", bwd_chunk_id), None)
        result = super().backward_one_chunk(bwd_chunk_id, *arguments, **named)
        if named.get("loss") is not None:
            named["loss"].detach_()  # the schedule keeps it, and its graph holds the stage's input
        if self.has_backward:
            _free(self.grad_recv_info[bwd_chunk_id])
        return result

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> Any:
        """Return the sends of a micro-batch's output."""
        operations = super().get_fwd_send_ops(fwd_chunk_id)
        if operations:
            self.last_send = f"stage {self.stage_index + 1} to take micro-batch {fwd_chunk_id}"
        return operations

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> Any:
        """Return the sends of a micro-batch's gradient."""
        operations = super().get_bwd_send_ops(bwd_chunk_id)
        if operations:
            words = f"stage {self.stage_index - 1} to take the gradient of"
            self.last_send = f"{words} micro-batch {bwd_chunk_id}"
        return operations

    def _allocate(self, infos: Iterable[Any]) -> None:
        for info in infos:
            if _is_received(info):
                empty = torch.empty_like(info.buffer, device=self.device)
                info.buffer = empty.requires_grad_(info.buffer.requires_grad)


def _free(infos: Iterable[Any]) -> None:
    for info in infos:
        if _is_received(info) and not info.buffer.is_meta:
            empty = torch.empty_like(info.buffer, device="meta")
            info.buffer = empty.requires_grad_(info.buffer.requires_grad)


def _is_received(info: Any) -> bool:
    """Whether another stage sends this; false for the input of the model."""
    return isinstance(getattr(info, "buffer", None), Tensor)


def _as_fused_kernels_read(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    """Convert ShardedGradScaler's `found_inf`, ``[1]``, the number of processes that found one.

    torch's fused kernels refuse the shape, and leave an update out at exactly 1.
    """
    found = vars(optimizer).get("found_inf")
    if found is not None:
        vars(optimizer)["found_inf"] = found.reshape(()).clamp(max=1)


class PipelineEngine(TorchEngineBase):
    """Train and score with the stages of a replica on several processes.

    Stage `i` is on process ``i % n`` of the `n` of its replica. Only that process holds its
    weights and its optimizer state. `check_processes` must have passed.
    """

    name = "pipeline"

    def __init__(
        self,
        module: ViTModule,
        config: Config,
        batch: BatchPlan,
        device: DeviceChoice,
        group: ProcessGroup,
    ) -> None:
        num_stages, replicas = module.model.plan.num_stages, batch.replicas
        per_replica = group.size // replicas
        replica, position = divmod(group.rank, per_replica)
        own_stages = range(position, num_stages, per_replica)
        group.roles = _roles(num_stages, per_replica, replicas)
        mesh = _make_mesh(group, device.device.type, replicas)
        module.model.keep(own_stages)
        super().__init__(
            module,
            config,
            batch,
            device,
            group,
            own_replicas=range(replica, replica + 1),
            # A scaler per process would not see an overflow in another one.
            scaler=ShardedGradScaler(
                device.device.type,
                enabled=device.precision == "fp16",
                process_group=dist.group.WORLD,
            ),
            compile_size=batch.micro_batch_size * batch.gradient_accumulation,
        )
        self.optimizer.register_step_pre_hook(_as_fused_kernels_read)
        self.num_stages = num_stages
        self.replica = replica
        self.own_stages = own_stages
        self.reads_images = 0 in own_stages
        self.has_head = num_stages - 1 in own_stages
        self.schedule_name = config.pipeline.schedule
        self._stage_group = mesh.get_group("stage")
        self._replica_group = mesh.get_group("replica")
        self._head_rank = replica * per_replica + (num_stages - 1) % per_replica
        self._parameters = [parameter for _, parameter in self.model.hub_parameters()]
        self._losses: List[Tensor] = []
        modules = {
            index: AutocastStage(self.model.stage(index), self.autocast) for index in own_stages
        }
        self._training_stages = self._make_stages(modules, batch.micro_batch_size, training=True)
        self._scoring_stages = self._make_stages(
            modules, batch.eval_micro_batch_size, training=False
        )
        self._training: Any = self._make_training_schedule()
        self._scoring: Any = self._make_scoring_schedule()

    def describe(self) -> str:
        """Return a line about the device, the precision and the reason for both."""
        count = len(self.own_stages)
        shared = f", {count} per process" if count > 1 else ""
        return (
            f"pipeline engine on {self.device_choice.name} in {self.group.size} processes"
            f" ({self.batch.replicas} x {self.num_stages} stages{shared}, {self.schedule_name}) in"
            f" {self.arithmetic} ({self.device_choice.reason}; choose with"
            " pipeline.schedule=gpipe|1f1b|interleaved_1f1b, engine.device=cpu|cuda,"
            " engine.precision=fp32|bf16|fp16)"
        )

    def _make_stages(
        self, modules: Dict[int, AutocastStage], micro_batch_size: int, *, training: bool
    ) -> List[Any]:
        """Wrap this process's stages for torch's schedules, with the shapes between them."""
        size, classes = self.model.config.image_size, self.model.config.num_labels
        pixels = torch.empty(micro_batch_size, 1, size, size, dtype=torch.uint8, device=self.device)
        hidden = torch.empty(micro_batch_size, *self.model.hidden_shape, device=self.device)
        hidden.requires_grad_(training)
        logits = torch.empty(
            micro_batch_size, classes, dtype=self.device_choice.dtype, device=self.device
        )
        stages: List[Any] = []
        for index, module in modules.items():
            parallel: Any = module
            is_trained = any(parameter.requires_grad for parameter in module.parameters())
            if training and is_trained and self.batch.replicas > 1:
                parallel = DistributedDataParallel(
                    module, process_group=self._replica_group, gradient_as_bucket_view=True
                )
            stages.append(
                LeanStage(
                    parallel,
                    index,
                    self.num_stages,
                    self.device,
                    input_args=pixels if index == 0 else hidden,
                    output_args=logits if index == self.num_stages - 1 else hidden,
                    group=self._stage_group,
                )
            )
        return stages

    def _make_training_schedule(self) -> Any:
        stages, count = self._training_stages, self.batch.gradient_accumulation
        if self.schedule_name == "interleaved_1f1b":
            return ScheduleInterleaved1F1B(stages, count, loss_fn=self._scaled_loss)
        schedule = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}[self.schedule_name]
        return schedule(stages[0], count, loss_fn=self._scaled_loss)

    def _make_scoring_schedule(self) -> Any:
        """Return a schedule without a loss, which leaves only the forward half of GPipe."""
        stages, count = self._scoring_stages, self.batch.eval_device_iterations
        if len(stages) > 1:
            return ScheduleLoopedBFS(stages, count)
        return ScheduleGPipe(stages[0], count)

    def _scaled_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        loss = self.module.loss(logits.float(), labels)
        self._losses.append(loss.detach())
        scaled: Tensor = self.scaler.scale(loss)
        return scaled

    def forward_backward(self, images: Tensor, labels: Tensor, paths: Optional[Tensor]) -> Tensor:
        """Run the schedule over the micro-batches of this replica."""
        self._losses.clear()
        # Only the last stage scales a loss; the first call of `scale` prepares the scaler.
        self.scaler.scale(torch.zeros((), device=self.device))
        inputs = (images,) if self.reads_images else ()
        target = labels if self.has_head else None
        named = {} if paths is None else {"paths": paths}  # which every stage gets
        with self.group.waiting_for("its neighbours", lambda: _awaited(self._training_stages)):
            self._training.step(*inputs, target=target, **named)
        if not self._losses:
            return torch.zeros((), device=self.device)
        return torch.stack(self._losses).mean() / self.batch.replicas

    def clip_gradients(self) -> Tensor:
        """Clip by the norm over all stages; the replicas of a stage have the same gradients."""
        gradients = [weight.grad for weight in self._parameters if weight.grad is not None]
        # Without gradients, as where all is frozen, torch's norm is on the CPU.
        squares = torch.nn.utils.get_total_norm(gradients).square().to(self.device)
        with self.group.waiting_for("the gradient norms of the other stages"):
            dist.all_reduce(squares, group=self._stage_group)
        norm = squares.sqrt()
        if not math.isinf(self.max_grad_norm):
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.max_grad_norm, norm)
        return norm

    def predict(self, batch: Batch) -> Tensor:
        """Return the logits of a host batch, which the last stage sends to the others."""
        check_batch(batch, self.batch.eval_micro_batch_size)
        self.module.eval()
        inputs = self.to_device(batch.images) if self.reads_images else ()
        with self.group.waiting_for("its neighbours", lambda: _awaited(self._scoring_stages)):
            with torch.no_grad(), self.casting_once():
                output: Optional[Tensor] = self._scoring.step(*inputs)
            size = (len(batch.labels), self.num_classes)
            logits = torch.empty(size) if output is None else output.float().cpu()
            dist.broadcast(logits, src=self._head_rank, group=self._stage_group)
        return logits

    def gather(self, *parts: Tensor) -> Tuple[Tensor, ...]:
        """Concatenate the rows of all replicas."""
        return self.group.concatenate(parts, group=self._replica_group)

    def state_dict(self) -> EngineState:
        """Return the state of all stages in the main process, of the own stages elsewhere."""
        own = super().state_dict()
        if self.replica > 0:
            return own
        # A slot is named `<slot>/<weight>`, a weight `/<weight>`.
        flat = {f"/{name}": weight for name, weight in own.weights.items()}
        for name, slots in own.optimizer.items():
            flat.update({f"{slot}/{name}": value for slot, value in slots.items()})
        with self.group.waiting_for("the weights of the other stages"):
            gathered = self.group.gather(flat, self._stage_group)
        for part in gathered[1:]:
            for key, value in part.items():
                slot, _, name = key.partition("/")
                if slot:
                    own.optimizer.setdefault(name, {})[slot] = value
                else:
                    own.weights[name] = value
        return own


def _make_mesh(group: ProcessGroup, device: str, replicas: int) -> DeviceMesh:
    """Arrange the processes as replica x stage; neighbours in a pipeline have neighbouring ranks.

    torch's init_device_mesh would create the groups without our timeout.
    """
    ranks = torch.arange(group.size).reshape(replicas, -1)
    with group.waiting_for("the other processes to form the mesh"):
        groups = [group.new_group(ranks.T.tolist()), group.new_group(ranks.tolist())]
    return DeviceMesh.from_group(groups, device, mesh=ranks, mesh_dim_names=("replica", "stage"))


def _roles(num_stages: int, per_replica: int, replicas: int) -> List[str]:
    """Return each process's name in messages."""
    roles = []
    for rank in range(per_replica * replicas):
        replica, position = divmod(rank, per_replica)
        stages = [str(stage) for stage in range(position, num_stages, per_replica)]
        of = f" of replica {replica}" if replicas > 1 else ""
        named = f"stage{'s' if len(stages) > 1 else ''} {' and '.join(stages)}"
        roles.append(f"{named}{of} (process {rank})")
    return roles


def _awaited(stages: List[Any]) -> str:
    """Return the oldest receive that is not done; if all are, the last send."""
    awaited = [words for stage in stages for words in stage.awaited.values()]
    return next(iter(awaited), stages[-1].last_send)
