"""Which of a run's processes this is, as the launcher's environment variables say.

`torchrun` (or a scheduler that sets the same variables) starts the processes of the torch and
pipeline engines, `poprun` those of the poptorch engine. Imports no torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

__all__ = ["Launch"]


@dataclass(frozen=True)
class Launch:
    """The processes of a run, and this one among them.

    Attributes
    ----------
    rank, world_size
        Which process this is of how many, over all hosts.
    local_rank
        Which it is on its host.
    by_torchrun
        Whether torch can connect the processes; poprun's are connected by popdist.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    by_torchrun: bool = False

    @classmethod
    def from_environment(cls) -> Launch:
        """Read the variables of torchrun, else of poprun (mpirun); one process without either."""
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            return cls(
                rank=int(os.environ["RANK"]),
                world_size=int(os.environ["WORLD_SIZE"]),
                local_rank=int(os.environ.get("LOCAL_RANK", "0")),
                by_torchrun=True,
            )
        return cls(
            rank=int(os.environ.get("OMPI_COMM_WORLD_RANK", "0")),
            world_size=int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1")),
        )

    @property
    def is_main(self) -> bool:
        """Whether this process writes the run and speaks for all."""
        return self.rank == 0

    @property
    def has_others(self) -> bool:
        """Whether there are other processes, whoever connects them."""
        return self.world_size > 1

    @property
    def is_connected(self) -> bool:
        """Whether there are other processes that torch can reach."""
        return self.by_torchrun and self.world_size > 1
