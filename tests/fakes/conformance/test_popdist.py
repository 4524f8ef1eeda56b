"""The stand-in for popdist."""

from __future__ import annotations

from typing import Any, Tuple

import pytest

from .models import INPUTS, Net


def test_popdist_reads_the_environment_of_poprun(
    fake: Tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    poptorch, _ = fake
    import popdist

    assert not popdist.isPopdistEnvSet()
    monkeypatch.setenv("POPDIST_NUM_TOTAL_REPLICAS", "8")
    monkeypatch.setenv("POPDIST_NUM_LOCAL_REPLICAS", "2")
    monkeypatch.setenv("POPDIST_REPLICA_INDEX_OFFSET", "6")
    import popdist.poptorch

    assert popdist.isPopdistEnvSet()
    popdist.init()
    assert (popdist.getInstanceIndex(), popdist.getNumInstances()) == (3, 4)
    assert (popdist.getNumLocalReplicas(), popdist.getNumTotalReplicas()) == (2, 8)
    options = popdist.poptorch.Options(ipus_per_replica=2)
    assert isinstance(options, poptorch.Options)
    assert options.clone().replication_factor == 2
    assert (options.Distributed.processId, options.Distributed.numProcesses) == (3, 4)
    for name, call in (
        ("useIpuId", lambda: options.useIpuId(1)),
        ("replicationFactor", lambda: options.replicationFactor(1)),
        ("Distributed.disable", options.Distributed.disable),
        ("Distributed.setEnvVarNames", lambda: options.Distributed.setEnvVarNames("A", "B")),
        ("Distributed.configureProcessId", lambda: options.Distributed.configureProcessId(1)),
    ):
        with pytest.raises(RuntimeError, match=rf"Cannot call `{name}` with popdist\.poptorch"):
            call()
    executor = poptorch.inferenceModel(Net(poptorch), options.deviceIterations(2))
    assert executor(INPUTS).shape == (24, 3)
