"""The batch arithmetic, said once (design.md section 3). Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import List

from cxr_vit.config.schema import BatchSection

__all__ = ["BatchPlan"]


@dataclass(frozen=True)
class BatchPlan:
    """How many samples a forward pass, a weight update and a host call take."""

    micro_batch_size: int
    gradient_accumulation: int
    replicas: int
    device_iterations: int
    eval_micro_batch_size: int
    eval_device_iterations: int

    @classmethod
    def from_section(cls, batch: BatchSection) -> BatchPlan:
        """Derive the accumulation from the global batch where that is given instead."""
        accumulation = batch.gradient_accumulation
        if accumulation is None:
            assert batch.global_batch_size is not None
            accumulation = batch.global_batch_size // (batch.micro_batch_size * batch.replicas)
        return cls(
            micro_batch_size=batch.micro_batch_size,
            gradient_accumulation=accumulation,
            replicas=batch.replicas,
            device_iterations=batch.device_iterations,
            eval_micro_batch_size=batch.eval_micro_batch_size,
            eval_device_iterations=batch.eval_device_iterations,
        )

    @property
    def global_batch_size(self) -> int:
        """Samples per weight update."""
        return self.micro_batch_size * self.gradient_accumulation * self.replicas

    @property
    def host_batch_size(self) -> int:
        """Samples per host call in training: what the loader yields."""
        return self.global_batch_size * self.device_iterations

    @property
    def eval_host_batch_size(self) -> int:
        """Samples per host call in evaluation."""
        return self.eval_micro_batch_size * self.replicas * self.eval_device_iterations

    def describe(self) -> List[str]:
        """Write the arithmetic out with its numbers."""
        return [
            f"global batch    {self.global_batch_size} samples per weight update"
            f" = {self.micro_batch_size} micro-batch x {self.gradient_accumulation} accumulation"
            f" x {self.replicas} replicas",
            f"host batch      {self.host_batch_size} samples per host call"
            f" = {self.global_batch_size} global batch"
            f" x {self.device_iterations} device iterations",
            f"evaluation      {self.eval_host_batch_size} samples per host call"
            f" = {self.eval_micro_batch_size} micro-batch x {self.replicas} replicas"
            f" x {self.eval_device_iterations} device iterations",
        ]
