"""popdist.poptorch.Options: the options of poptorch, with replicas and processes from poprun."""

from __future__ import annotations

from typing import Any, NoReturn

import popdist
import poptorch
from poptorch.option_groups import DistributedOptions
from poptorch.option_values import OptionValues


def _refuse(name: str) -> NoReturn:
    raise RuntimeError(f"Cannot call `{name}` with popdist.poptorch.Options")


class _Distributed(DistributedOptions):
    def __init__(self) -> None:
        # Not the parent's constructor, which calls the methods that are refused here.
        OptionValues.__init__(
            self,
            num_distributed_processes=popdist.getNumInstances(),
            distributed_process_id=popdist.getInstanceIndex(),
            ipuof_configs={},
        )

    def disable(self) -> NoReturn:
        _refuse("Distributed.disable")

    def setEnvVarNames(self, *names: Any) -> NoReturn:
        _refuse("Distributed.setEnvVarNames")

    def configureProcessId(self, *ids: Any) -> NoReturn:
        _refuse("Distributed.configureProcessId")


class Options(poptorch.Options):
    """The options of one instance; the number of replicas is fixed by poprun.

    Parameters
    ----------
    ipus_per_replica
        As on the command line of poprun.
    """

    def __init__(self, ipus_per_replica: int = 1) -> None:
        super().__init__()
        self.__dict__["_ipus_per_replica"] = ipus_per_replica
        self.__dict__["_distributed"] = _Distributed()
        self.set(replication_factor=popdist.getNumLocalReplicas())

    def replicationFactor(self, replication_factor: int) -> NoReturn:
        _refuse("replicationFactor")

    def useIpuId(self, ipu_id: int) -> NoReturn:
        _refuse("useIpuId")
