"""Coordinator with its processes as threads, over torch's in-memory store."""

import multiprocessing
import socket
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from cxr_vit.engines import process_group
from cxr_vit.engines.process_group import Coordinator, ProcessGroup, coordinator
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import ProcessLost

# torch.load's, of torch 2.0
pytestmark = pytest.mark.filterwarnings("ignore:TypedStorage:UserWarning")


@pytest.fixture
def in_all(monkeypatch):
    """Run a function of a Coordinator in two processes of one start; return both results."""
    shared = dist.HashStore()
    shared.set_timeout(timedelta(seconds=20))
    monkeypatch.setattr(process_group, "_connect", lambda: dist.PrefixStore("starts", shared))

    def run(function):
        stores = [Coordinator(Launch(rank, 2, launcher="torchrun")) for rank in range(2)]
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(function, stores))

    return run


def test_call_once_calls_in_the_main_process_and_returns_in_all(in_all):
    calls = []

    def both(store):
        def make():
            calls.append(store.launch.rank)
            return {"count": len(calls)}

        return [store.call_once("thing", make) for _ in range(2)]

    assert in_all(both) == [[{"count": 1}, {"count": 2}]] * 2
    assert calls == [0, 0]


def test_main_process_runs_first(in_all):
    order = []

    def visit(store):
        with store.main_first("data"):
            order.append(store.launch.rank)

    in_all(visit)
    assert order == [0, 1]


def test_differences_name_both_values(in_all):
    here, there = in_all(lambda store: store.differences("facts", {"a": 1, "b": store.launch.rank}))
    assert (here, there) == ([], ["b=1 here, 0 there"])


def test_restarted_processes_see_only_the_values_kept_across_restarts(in_all):
    def first_start(store):
        if store.launch.is_main:
            store.save_across_restarts("run", "runs/a")
        return store.call_once("thing", lambda: 1)

    assert in_all(first_start) == [1, 1]
    assert in_all(lambda store: store.load_across_restarts("run")) == ["runs/a"] * 2
    assert in_all(lambda store: store.load_across_restarts("absent")) == [None] * 2
    assert in_all(lambda store: store.call_once("thing", lambda: 2)) == [2, 2]


def test_only_one_process_reports_its_error(in_all):
    def fail(store):
        claimed = store.claim_error_report()
        if claimed:
            store.finish_error_report()
        return claimed

    assert sorted(in_all(fail)) == [False, True]


def test_wait_ends_when_another_process_fails(in_all):
    def wait(store):
        if store.launch.is_main:
            return store.claim_error_report()
        with pytest.raises(ProcessLost, match="another process failed"):
            store.wait_for_key("never set")
        return store.has_error()

    assert in_all(wait) == [True, True]


def test_main_process_finishes_last(in_all):
    order = []

    def finish(store):
        store.wait_for_all_to_finish()
        order.append(store.launch.rank)

    in_all(finish)
    assert sorted(order) == [0, 1]


def test_missing_process_is_named(monkeypatch):
    monkeypatch.setattr(process_group, "_connect", dist.HashStore)
    monkeypatch.setattr(process_group, "_START_S", 0.2)
    with pytest.raises(ProcessLost, match=r"processes \[1, 2\] of 3 did not start in 0\.2 s"):
        Coordinator(Launch(0, 3, launcher="torchrun")).open()


def test_unreachable_store_leaves_every_process_its_error(monkeypatch):
    def broken():
        raise RuntimeError("Connection refused")

    monkeypatch.setattr(process_group, "_connect", broken)
    store = Coordinator(Launch(1, 2, launcher="torchrun"))
    assert store.claim_error_report()
    store.finish_error_report()


def test_single_process_needs_no_store():
    store = coordinator(Launch())
    assert store is coordinator(Launch())
    assert store.call_once("thing", lambda: 3) == 3
    assert store.differences("facts", {"a": 1}) == []
    assert store.claim_error_report()
    with store.main_first("data"):
        pass
    store.wait_for_all_to_finish()
    store.finish_error_report()


@pytest.mark.parametrize("launch", [Launch(), Launch(2, 4, launcher="poprun")])
def test_group_without_connected_processes_is_trivial(launch):
    group = ProcessGroup(launch, torch.device("cpu"), timeout_s=1)
    rows = torch.arange(3)
    assert (group.rank, group.size, group.launch.own(2)) == (0, 1, range(2))
    assert torch.equal(group.sum(rows), rows)
    assert group.any(True) and not group.any(False)
    assert group.concatenate((rows,)) == (rows,)
    with pytest.raises(RuntimeError, match="timed out"), group.waiting_for("nobody"):
        raise RuntimeError("timed out")
    group.close()


# Real processes, on gloo


needs_subgroups = pytest.mark.skipif(
    torch.__version__.startswith("2.0."), reason="torch 2.0 makes groups of GPUs only"
)


@pytest.fixture
def in_processes(tmp_path, monkeypatch):
    """Run a function of a ProcessGroup in four processes; return its results."""

    def run(function):
        with socket.socket() as bound:
            bound.bind(("127.0.0.1", 0))
            port = bound.getsockname()[1]

        def child(rank):
            launch = Launch(rank, 4, launcher="torchrun")
            variables = {"RANK": rank, "WORLD_SIZE": 4, "MASTER_PORT": port}
            for name, value in {**variables, "MASTER_ADDR": "127.0.0.1"}.items():
                monkeypatch.setenv(name, str(value))
            group = ProcessGroup(launch, torch.device("cpu"), timeout_s=60)
            torch.save(function(group), tmp_path / str(rank))
            coordinator(launch).wait_for_all_to_finish()
            group.close()

        context = multiprocessing.get_context("fork")
        children = [context.Process(target=child, args=(rank,)) for rank in range(4)]
        for process in children:
            process.start()
        for process in children:
            process.join(120)
        assert [process.exitcode for process in children] == [0] * 4
        return [torch.load(tmp_path / str(rank), weights_only=True) for rank in range(4)]

    return run


def test_rows_of_all_processes_are_concatenated_in_order(in_processes):
    def rows(group):
        count = group.rank + 1
        scores = torch.full((count, 3), float(group.rank), dtype=torch.bfloat16)
        flags = torch.tensor([True, False, True, True])[:count]
        return group.concatenate((scores, flags, torch.empty(0, 2)))

    flags = [flag for count in (1, 2, 3, 4) for flag in [True, False, True, True][:count]]
    for found in in_processes(rows):
        assert found[0].dtype == torch.bfloat16
        assert found[0].tolist() == [[float(rank)] * 3 for rank in (0, 1, 1, 2, 2, 2, 3, 3, 3, 3)]
        assert found[1].tolist() == flags
        assert found[2].shape == (0, 2)


def pair_of(group):
    return group.new_group([[0, 1], [2, 3]])


@needs_subgroups
def test_rows_of_a_group_are_concatenated(in_processes):
    results = in_processes(
        lambda group: group.concatenate((torch.tensor([group.rank]),), pair_of(group))
    )
    assert [result[0].tolist() for result in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]


@needs_subgroups
def test_first_process_gathers_the_tensors_of_its_group(in_processes):
    def tensors(rank):
        made = torch.Generator().manual_seed(rank)
        every = {
            str(dtype): torch.randn(rank + 1, 3, generator=made).to(dtype)
            for dtype in process_group._DTYPES.values()
        }
        more = {"step": torch.tensor(float(rank)), "none": torch.empty(0, 4)}
        return {
            **every,
            **more,
            "transposed": torch.randn(2, 3, generator=made).T,
            f"{rank}/": every["torch.bool"],
        }

    results = in_processes(lambda group: group.gather(tensors(group.rank), pair_of(group)))
    assert [len(result) for result in results] == [2, 0, 2, 0]
    for first in (0, 2):
        for rank, found in enumerate(results[first], first):
            expected = tensors(rank)
            assert list(found) == list(expected)
            for name, value in expected.items():
                assert found[name].dtype == value.dtype, name
                assert torch.equal(found[name], value), name
