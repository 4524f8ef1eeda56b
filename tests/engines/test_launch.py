"""Which process this is, as torchrun and poprun say it."""

import pytest

from cxr_vit.engines.processes import Launch

VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
)


@pytest.fixture(autouse=True)
def started_by_hand(monkeypatch):
    for variable in VARIABLES:
        monkeypatch.delenv(variable, raising=False)


def set_all(monkeypatch, **values):
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_a_process_started_by_hand_is_the_only_one():
    launch = Launch.from_environment()
    assert launch == Launch()
    assert launch.is_main and not launch.is_connected


def test_torchruns_processes_are_connected(monkeypatch):
    set_all(monkeypatch, RANK=5, WORLD_SIZE=8, LOCAL_RANK=1)
    launch = Launch.from_environment()
    assert launch == Launch(rank=5, world_size=8, local_rank=1, by_torchrun=True)
    assert launch.is_connected and not launch.is_main


def test_one_process_of_torchrun_has_nobody_to_connect_to(monkeypatch):
    set_all(monkeypatch, RANK=0, WORLD_SIZE=1, LOCAL_RANK=0)
    launch = Launch.from_environment()
    assert launch.is_main and not launch.is_connected


def test_a_rank_without_a_world_is_somebody_elses_variable(monkeypatch):
    set_all(monkeypatch, RANK=3)
    assert Launch.from_environment() == Launch()


@pytest.mark.parametrize(("rank", "is_main"), [(0, True), (1, False), (3, False)])
def test_popruns_processes_are_connected_by_popdist(monkeypatch, rank, is_main):
    set_all(monkeypatch, OMPI_COMM_WORLD_RANK=rank, OMPI_COMM_WORLD_SIZE=4)
    launch = Launch.from_environment()
    assert launch.is_main == is_main
    assert launch.world_size == 4 and not launch.is_connected
