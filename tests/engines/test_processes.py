import sys
from types import SimpleNamespace

import pytest

from cxr_vit.engines.processes import Launch
from cxr_vit.errors import EngineUnavailable

VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def set_variables(monkeypatch):
    def set_all(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, str(value))

    return set_all


def test_without_launcher_there_is_one_process():
    launch = Launch.from_environment()
    assert launch == Launch()
    assert launch.is_main and not launch.has_others and not launch.is_connected


def test_torchrun_connects_processes(set_variables):
    set_variables(RANK=5, WORLD_SIZE=8, LOCAL_RANK=1, LOCAL_WORLD_SIZE=4)
    launch = Launch.from_environment()
    assert launch == Launch(5, 8, local_rank=1, local_world_size=4, launcher="torchrun")
    assert launch.is_connected and launch.has_others and not launch.is_main
    assert launch.local_replicas is None


def test_scheduler_may_set_no_local_world_size(set_variables):
    set_variables(RANK=0, WORLD_SIZE=2)
    launch = Launch.from_environment()
    assert (launch.local_rank, launch.local_world_size) == (0, None)
    assert launch.is_connected


def test_single_process_of_torchrun_is_not_connected(set_variables):
    set_variables(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0)
    launch = Launch.from_environment()
    assert launch.is_main and not launch.is_connected


def test_rank_without_world_size_is_ignored(set_variables):
    set_variables(RANK=3)
    assert Launch.from_environment() == Launch()


@pytest.mark.parametrize(("rank", "is_main"), [(0, True), (1, False), (3, False)])
def test_processes_of_poprun_are_not_connected_by_torch(set_variables, rank, is_main):
    set_variables(OMPI_COMM_WORLD_RANK=rank, OMPI_COMM_WORLD_SIZE=4)
    launch = Launch.from_environment()
    assert launch.is_main == is_main
    assert launch.world_size == 4 and launch.has_others and not launch.is_connected


def test_local_replicas_come_from_popdist(set_variables, monkeypatch):
    calls = []
    popdist = SimpleNamespace(
        isPopdistEnvSet=lambda: True,
        init=lambda: calls.append("init"),
        getNumLocalReplicas=lambda: 2,
        getInstanceIndex=lambda: 1,
        getNumInstances=lambda: 2,
    )
    monkeypatch.setitem(sys.modules, "popdist", popdist)
    with pytest.raises(EngineUnavailable, match=r"poprun started this process as 1 of 2"):
        assert Launch.from_environment().local_replicas
    set_variables(OMPI_COMM_WORLD_RANK=1, OMPI_COMM_WORLD_SIZE=2)
    assert Launch.from_environment().local_replicas == 2
    monkeypatch.setattr(popdist, "isPopdistEnvSet", lambda: False)
    assert Launch.from_environment().local_replicas is None, "mpirun without poprun"
    monkeypatch.setitem(sys.modules, "popdist", None)
    assert Launch.from_environment().local_replicas is None, "popdist is not installed"


def test_poprun_wins_over_a_scheduler_that_sets_a_rank(set_variables):
    set_variables(RANK=0, WORLD_SIZE=1, POPDIST_NUM_TOTAL_REPLICAS=4)
    set_variables(OMPI_COMM_WORLD_RANK=1, OMPI_COMM_WORLD_SIZE=2)
    assert Launch.from_environment() == Launch(1, 2, launcher="poprun")


def test_replicas_are_divided_evenly():
    assert Launch().own(3) == range(3)
    assert [Launch(rank, 2).own(4) for rank in range(2)] == [range(2), range(2, 4)]
