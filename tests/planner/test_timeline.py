"""The schedules, compared with a discrete-event simulation of the same rules."""

import heapq
import itertools
from collections import defaultdict

import pytest

from cxr_vit.planner.timeline import (
    StageTime,
    in_flight,
    num_cycles,
    num_pipeline_stages,
    simulate,
)

EVEN = [StageTime(1.0, 1.0, 2.0)] * 4
UNEVEN = [
    StageTime(1.0, 0.0, 2.0, 0.1),
    StageTime(1.5, 1.5, 2.5, 0.2),
    StageTime(0.5, 0.5, 1.5, 0.3),
]


def discrete_events(schedule, times, micro_batches):
    """Simulate the update event by event: (stage, kind, micro-batch) -> (begin, end).

    A stage takes the next piece of work that its rule allows as soon as it is free and its input
    was delivered. In lockstep deliveries are made when a cycle ends, and a cycle ends when all work
    that began in it is done.
    """
    if schedule == "lockstep":
        return lockstep_events(times, micro_batches)
    return Processes(schedule, times, micro_batches).run()


class Processes:
    """Stages that wait for their neighbours only."""

    def __init__(self, schedule, times, micro_batches):
        self.times, self.micro_batches = times, micro_batches
        self.last = len(times) - 1
        self.limits = [
            micro_batches if schedule == "gpipe" else self.last + 1 - stage
            for stage in range(len(times))
        ]
        self.forward_first = schedule == "gpipe"
        self.begun = [{"forward": 0, "backward": 0} for _ in times]
        self.done = set()
        self.busy = [False] * len(times)
        self.events = []
        self.order = itertools.count()
        self.spans = {}

    def run(self):
        self.begin_what_can(0.0)
        while self.events:
            now = self.events[0][0]
            while self.events and self.events[0][0] == now:
                _, _, stage, work = heapq.heappop(self.events)
                self.done.add((stage, *work))
                self.busy[stage] = False
            self.begin_what_can(now)
        return self.spans

    def begin_what_can(self, now):
        for stage, time in enumerate(self.times):
            work = None if self.busy[stage] else self.next_work(stage)
            if work is None:
                continue
            kind = work[0]
            self.begun[stage][kind] += 1
            self.busy[stage] = True
            length = time.forward_s
            if kind == "backward":
                length = time.recompute_s + time.backward_s
            self.spans[(stage, *work)] = (now, now + length)
            heapq.heappush(self.events, (now + length, next(self.order), stage, work))

    def next_work(self, stage):
        forwards, backwards = self.begun[stage]["forward"], self.begun[stage]["backward"]
        has_room = forwards - backwards < self.limits[stage] or self.forward_first
        if forwards < self.micro_batches and has_room:
            ready = stage == 0 or (stage - 1, "forward", forwards) in self.done
            return ("forward", forwards) if ready else None
        if backwards < self.micro_batches:
            ready = stage == self.last or (stage + 1, "backward", backwards) in self.done
            return ("backward", backwards) if ready else None
        return None


def lockstep_events(times, micro_batches):
    """Deliver at the end of each cycle, which is as long as the work of the slowest stage."""
    last = len(times) - 1
    length = max(sum(time[:3]) for time in times)
    delivered = {("forward", 0): list(range(micro_batches))}
    spans, now, left = {}, 0.0, micro_batches
    while left:
        arriving = defaultdict(list)
        for stage, time in enumerate(times):
            begin = now
            queue = delivered.get(("forward", stage), [])
            if queue:
                micro_batch = queue.pop(0)
                spans[stage, "forward", micro_batch] = (begin, begin + time.forward_s)
                begin += time.forward_s
                # The last stage starts backward in the same cycle.
                target = ("forward", stage + 1) if stage < last else ("backward", stage)
                (arriving if stage < last else delivered).setdefault(target, []).append(micro_batch)
            queue = delivered.get(("backward", stage), [])
            if queue:
                micro_batch = queue.pop(0)
                end = begin + time.recompute_s + time.backward_s
                spans[stage, "backward", micro_batch] = (begin, end)
                if stage:
                    arriving["backward", stage - 1].append(micro_batch)
                else:
                    left -= 1
        for target, micro_batches_there in arriving.items():
            delivered.setdefault(target, []).extend(micro_batches_there)
        now += length
    return spans


def laid_out(timeline):
    """Return the planner's spans; recomputation is part of the backward pass."""
    spans = {}
    for slot in timeline.slots:
        if slot.kind == "update":
            continue
        kind = "forward" if slot.kind == "forward" else "backward"
        key = (slot.stage, kind, slot.micro_batch)
        begin, end = spans.get(key, (slot.start_s, slot.end_s))
        spans[key] = (min(begin, slot.start_s), max(end, slot.end_s))
    return spans


@pytest.mark.parametrize("micro_batches", [1, 4, 7, 16])
@pytest.mark.parametrize("times", [EVEN, UNEVEN, EVEN[:1]], ids=["even", "uneven", "alone"])
@pytest.mark.parametrize("schedule", ["lockstep", "1f1b", "gpipe"])
def test_work_is_scheduled_as_in_the_simulation(schedule, times, micro_batches):
    timeline = simulate(schedule, times, micro_batches)
    expected = discrete_events(schedule, times, micro_batches)
    assert len(expected) == 2 * len(times) * micro_batches
    found = laid_out(timeline)
    assert found.keys() == expected.keys()
    for work, span in expected.items():
        assert found[work] == pytest.approx(span), work


@pytest.mark.parametrize("schedule", ["lockstep", "1f1b", "gpipe"])
def test_micro_batches_in_flight_are_those_of_the_simulation(schedule):
    spans = discrete_events(schedule, EVEN, 16)
    for stage in range(4):
        changes = []
        for micro_batch in range(16):
            changes.append((spans[stage, "forward", micro_batch][0], 1))
            changes.append((spans[stage, "backward", micro_batch][1], -1))
        held, most = 0, 0
        for _, change in sorted(changes):
            held += change
            most = max(most, held)
        assert most == in_flight(schedule, stage, 4, 16)


def test_four_ipus_make_seven_pipeline_stages():
    # 2 N - 1 (graphcore/poptorch, Compiler.cpp:675)
    assert [num_pipeline_stages(ipus) for ipus in (1, 2, 4, 8)] == [1, 3, 7, 15]


def test_stash_depths():
    # 2 (N - i) - 1 (graphcore/popart, pipeline.cpp, getStashSize; docs/ipu.md, section 3)
    assert [in_flight("lockstep", stage, 4, 128) for stage in range(4)] == [7, 5, 3, 1]
    assert [in_flight("1f1b", stage, 4, 128) for stage in range(4)] == [4, 3, 2, 1]
    assert [in_flight("gpipe", stage, 4, 128) for stage in range(4)] == [128] * 4


@pytest.mark.parametrize(
    ("accumulation", "used"), [(7, 0.54), (16, 0.73), (30, 0.83), (64, 0.91), (128, 0.955)]
)
def test_utilisation_of_four_ipus(accumulation, used):
    # accumulation / (accumulation + 2 N - 2) (graphcore/popart, pipelining.md)
    assert num_cycles(4, accumulation) == accumulation + 6
    at_work = accumulation * 4.0 / simulate("lockstep", EVEN, accumulation).work_s
    assert at_work == pytest.approx(used, abs=0.006)
    assert at_work == pytest.approx(accumulation / (accumulation + 6))


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe"])
@pytest.mark.parametrize("micro_batches", [4, 8, 32])
def test_even_processes_take_the_ideal_time(schedule, micro_batches):
    timeline = simulate(schedule, EVEN, micro_batches)
    assert timeline.work_s == pytest.approx((micro_batches + 3) * 4.0)


def test_stages_in_order_neither_overlap_nor_wait():
    timeline = simulate("in_order", UNEVEN, 5)
    work = sorted((s.start_s, s.end_s) for s in timeline.slots if s.kind != "update")
    for (_, end), (begin, _) in zip(work, work[1:]):
        assert begin == pytest.approx(end)


def test_weights_are_updated_after_the_last_micro_batch():
    for schedule in ("lockstep", "1f1b", "gpipe", "in_order"):
        timeline = simulate(schedule, UNEVEN, 8)
        updates = [slot for slot in timeline.slots if slot.kind == "update"]
        assert [slot.stage for slot in updates] == [0, 1, 2]
        assert {slot.start_s for slot in updates} == {timeline.work_s}
        assert timeline.end_s == pytest.approx(timeline.work_s + 0.3)


def forward_events(times, micro_batches):
    """Deliver at the end of each cycle; (stage, micro-batch) -> (begin, end), and the end of all.

    A cycle is as long as the slowest stage, also while the pipeline fills and drains.
    """
    length, now, spans = max(time.forward_s for time in times), 0.0, {}
    queues = [list(range(micro_batches)), *([] for _ in times[1:]), []]
    while len(queues[-1]) < micro_batches:
        arriving = []
        for stage, time in enumerate(times):
            if queues[stage]:
                micro_batch = queues[stage].pop(0)
                spans[stage, micro_batch] = (now, now + time.forward_s)
                arriving.append((stage + 1, micro_batch))
        for stage, micro_batch in arriving:
            queues[stage].append(micro_batch)
        now += length
    return spans, now


@pytest.mark.parametrize("micro_batches", [4, 7, 32])
@pytest.mark.parametrize("times", [EVEN, UNEVEN, EVEN[:1]], ids=["even", "uneven", "alone"])
def test_evaluation_is_scheduled_as_in_the_simulation(times, micro_batches):
    forward = [StageTime(time.forward_s, 0.0, 0.0) for time in times]
    timeline = simulate("lockstep", forward, micro_batches, is_training=False)
    spans, end_s = forward_events(forward, micro_batches)
    found = {(slot.stage, slot.micro_batch): (slot.start_s, slot.end_s) for slot in timeline.slots}
    assert {slot.kind for slot in timeline.slots} == {"forward"}
    assert found.keys() == spans.keys()
    assert all(found[work] == pytest.approx(span) for work, span in spans.items())
    assert timeline.work_s == pytest.approx(end_s)
    assert num_cycles(len(times), micro_batches, False) == micro_batches + len(times) - 1


def test_sharded_evaluation_runs_one_stage_at_a_time():
    forward = [StageTime(time.forward_s, 0.0, 0.0) for time in UNEVEN]
    timeline = simulate("in_order", forward, 5, is_training=False)
    assert len(timeline.slots) == 5 * len(UNEVEN)
    assert timeline.work_s == pytest.approx(5 * sum(time.forward_s for time in UNEVEN))
