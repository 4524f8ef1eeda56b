"""The processes that `poprun` starts: which replicas are this one's, and what all have together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Optional, Tuple

from torch import Tensor

from cxr_vit.config.ipu_rules import eval_layers
from cxr_vit.config.schema import Config
from cxr_vit.errors import ConfigError

__all__ = ["Instances"]


@dataclass(frozen=True)
class Instances:
    """How many processes there are, and which of them this is.

    `local_replicas` is None without `poprun`: all replicas are this process's.
    """

    index: int = 0
    count: int = 1
    local_replicas: Optional[int] = None

    @classmethod
    def from_environment(cls) -> Instances:
        """Ask popdist, where `poprun` set it up."""
        try:
            import popdist
        except ImportError:
            return cls()
        if not popdist.isPopdistEnvSet():
            return cls()
        _init_popdist()
        return cls(
            popdist.getInstanceIndex(), popdist.getNumInstances(), popdist.getNumLocalReplicas()
        )

    def own(self, replicas: int) -> range:
        """Return which of all replicas are this process's."""
        local = replicas if self.local_replicas is None else self.local_replicas
        return range(self.index * local, (self.index + 1) * local)

    def check(self, config: Config) -> None:
        """Hold the configuration against what poprun was told.

        Raises
        ------
        ConfigError
            If they do not fit.
        """
        if self.local_replicas is None:
            return
        if self.local_replicas * self.count != config.batch.replicas:
            raise ConfigError(
                f"batch.replicas={config.batch.replicas}, but poprun started {self.count} instances"
                f" x {self.local_replicas} replicas. Give the same number to both: poprun"
                f" --num-replicas {config.batch.replicas}."
            )
        stages, eval_stages = config.pipeline.layers_per_stage, eval_layers(config)
        if len(stages) != len(eval_stages):
            raise ConfigError(
                f"pipeline.eval_layers_per_stage={eval_stages} takes {len(eval_stages)} IPUs a"
                f" replica, training {len(stages)}; poprun gives every replica one number of them."
                " Cut both into as many stages."
            )
        if self.local_replicas == 1 and config.engine.replicated_tensor_sharding:
            raise ConfigError(
                "engine.replicated_tensor_sharding=true shares among the replicas of a process, and"
                f" each of the {self.count} has one. Set it to false, or start fewer: poprun"
                f" --num-instances {max(1, self.count // 2)}."
            )

    def gather(self, *parts: Tensor) -> Tuple[Tensor, ...]:
        """Put the processes' rows one after another; they may have unequal numbers of them."""
        if self.count == 1:
            return parts
        import horovod.torch as horovod

        horovod.init()
        return tuple(horovod.allgather(part) for part in parts)

    def mean(self, losses: Tensor) -> Tensor:
        """Average over the processes, which have as many micro-batches each."""
        (every,) = self.gather(losses.unsqueeze(0))
        return every.mean(dim=0)


@lru_cache(maxsize=None)
def _init_popdist() -> None:
    import popdist

    popdist.init()
