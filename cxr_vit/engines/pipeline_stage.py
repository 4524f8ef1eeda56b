"""torch's pipeline stage, holding only the activations that are in flight."""

from __future__ import annotations

from typing import Any, Callable, Dict, Iterable, Tuple

import torch
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage

from cxr_vit.model.stages import Stage

__all__ = ["AutocastStage", "LeanStage"]


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
