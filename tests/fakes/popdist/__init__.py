"""A stand-in for Graphcore's popdist: the environment of poprun, without collectives."""

from __future__ import annotations

import os

_initialised = False


def isPopdistEnvSet() -> bool:
    """Return whether poprun started this process."""
    return "POPDIST_NUM_TOTAL_REPLICAS" in os.environ


def init() -> None:
    global _initialised
    if not isPopdistEnvSet():
        raise RuntimeError("popdist.init(): the environment of poprun is not set")
    _initialised = True


def getNumTotalReplicas() -> int:
    return int(os.environ.get("POPDIST_NUM_TOTAL_REPLICAS", "1"))


def getNumLocalReplicas() -> int:
    return int(os.environ.get("POPDIST_NUM_LOCAL_REPLICAS", "1"))


def getReplicaIndexOffset() -> int:
    return int(os.environ.get("POPDIST_REPLICA_INDEX_OFFSET", "0"))


def getNumInstances() -> int:
    return getNumTotalReplicas() // getNumLocalReplicas()


def getInstanceIndex() -> int:
    return getReplicaIndexOffset() // getNumLocalReplicas()
