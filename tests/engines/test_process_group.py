"""Coordinator with its processes as threads, over torch's in-memory store."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from cxr_vit.engines import process_group
from cxr_vit.engines.process_group import Coordinator, ProcessGroup, coordinator
from cxr_vit.engines.processes import Launch
from cxr_vit.errors import ProcessLost


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
