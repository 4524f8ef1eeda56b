"""Rank and size of a run, from the environment variables of its launcher."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Optional

from cxr_vit.errors import EngineUnavailable


@dataclass(frozen=True)
class Launch:
    """Rank of this process among the processes of a run; by default it is the only one.

    Attributes
    ----------
    rank, world_size
        Over all hosts.
    local_rank, local_world_size
        On this host; `local_world_size` is None where the launcher does not set it.
    launcher
        ``"torchrun"`` (or a scheduler that sets the same variables), ``"poprun"`` (or another
        caller of mpirun), or empty.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: Optional[int] = None
    launcher: str = ""

    @classmethod
    def from_environment(cls) -> Launch:
        """Read the variables of torchrun, else those of Open MPI, which poprun starts."""
        variables = os.environ
        by_poprun = any(name.startswith("POPDIST_") for name in variables)
        if "RANK" in variables and "WORLD_SIZE" in variables and not by_poprun:
            local = variables.get("LOCAL_WORLD_SIZE")
            return cls(
                rank=int(variables["RANK"]),
                world_size=int(variables["WORLD_SIZE"]),
                local_rank=int(variables.get("LOCAL_RANK", "0")),
                local_world_size=None if local is None else int(local),
                launcher="torchrun",
            )
        if "OMPI_COMM_WORLD_SIZE" in variables:
            return cls(
                rank=int(variables.get("OMPI_COMM_WORLD_RANK", "0")),
                world_size=int(variables["OMPI_COMM_WORLD_SIZE"]),
                launcher="poprun",
            )
        return cls()

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run and prints for all."""
        return self.rank == 0

    @property
    def has_others(self) -> bool:
        """Whether there are other processes, however they are connected."""
        return self.world_size > 1

    @property
    def is_connected(self) -> bool:
        """Whether there are other processes that torch.distributed can reach."""
        return self.launcher == "torchrun" and self.world_size > 1

    @property
    def local_replicas(self) -> Optional[int]:
        """Replicas that poprun assigns to this process; None where poprun did not start it."""
        try:
            import popdist
        except ImportError:
            return None
        if not popdist.isPopdistEnvSet():
            return None
        _init_popdist()
        index, count = popdist.getInstanceIndex(), popdist.getNumInstances()
        if (index, count) != (self.rank, self.world_size):
            raise EngineUnavailable(
                f"poprun started this process as {index} of {count}, but Open MPI's variables say"
                f" {self.rank} of {self.world_size}. Start the processes with poprun alone."
            )
        replicas: int = popdist.getNumLocalReplicas()
        return replicas

    def own(self, replicas: int) -> range:
        """Return the replicas of this process if they are divided evenly over all processes."""
        share = replicas // self.world_size
        return range(self.rank * share, (self.rank + 1) * share)


@lru_cache(maxsize=None)
def _init_popdist() -> None:
    import popdist

    popdist.init()
