"""The schedule of one weight update: which stage does what and when.

IPUs work in lockstep: a pipeline cycle ends for all of them when the slowest is done
(graphcore/popart, docs/notes/transforms/pipelining.md). Processes wait for their neighbours only.
"""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Sequence, Tuple


class StageTime(NamedTuple):
    """Seconds of one micro-batch on a stage, and of one weight update."""

    forward_s: float
    recompute_s: float
    backward_s: float
    update_s: float = 0.0

    @property
    def micro_batch_s(self) -> float:
        """Seconds of a micro-batch, forward and backward."""
        return self.forward_s + self.recompute_s + self.backward_s


class Slot(NamedTuple):
    """A piece of work: `kind` is forward, recompute, backward or update (`micro_batch` -1)."""

    stage: int
    kind: str
    micro_batch: int
    start_s: float
    end_s: float


class Timeline(NamedTuple):
    """One weight update, or a host call of evaluation, whose stages only have forward passes.

    `slots` are in no order, and `cycle_s` is 0 unless in lockstep.
    """

    schedule: str
    num_stages: int
    micro_batches: int
    slots: List[Slot]
    cycle_s: float
    is_training: bool = True

    @property
    def work_s(self) -> float:
        """When the last micro-batch is done and the weights can be updated."""
        if self.schedule == "lockstep":
            cycles = num_cycles(self.num_stages, self.micro_batches, self.is_training)
            return cycles * self.cycle_s
        return max(slot.end_s for slot in self.slots if slot.kind != "update")

    @property
    def end_s(self) -> float:
        """When the update is done."""
        return max(slot.end_s for slot in self.slots)


def num_pipeline_stages(num_ipus: int, is_training: bool = True) -> int:
    """Return PopART's pipeline stages: in training forward and backward, of the last IPU as one."""
    return 2 * num_ipus - 1 if is_training else num_ipus


def num_cycles(num_ipus: int, micro_batches: int, is_training: bool = True) -> int:
    """Return the pipeline cycles of some micro-batches: their number + stages - 1 (pipelining.md).

    They are those of a weight update, or in evaluation of a host call.
    """
    return micro_batches + num_pipeline_stages(num_ipus, is_training) - 1


def phases(pipeline_stages: int, micro_batches: int) -> Tuple[int, int, int]:
    """Return how many pipeline cycles fill, run steadily and drain; 0 steady if too few."""
    ends = pipeline_stages - 1
    return ends, max(0, micro_batches - ends), ends


def in_flight(schedule: str, stage: int, num_stages: int, micro_batches: int) -> int:
    """Return the most micro-batches that a stage holds at once.

    In lockstep 2 (N - i) - 1 (graphcore/popart, pipeline.cpp, getStashSize); in 1F1B N - i
    (Narayanan et al. 2019, PipeDream); in GPipe all of them.
    """
    deepest = {
        "lockstep": 2 * (num_stages - stage) - 1,
        "1f1b": num_stages - stage,
        "gpipe": micro_batches,
        "in_order": 1,
    }[schedule]
    return min(micro_batches, deepest)


def simulate(
    schedule: str, times: Sequence[StageTime], micro_batches: int, is_training: bool = True
) -> Timeline:
    """Lay out one weight update in time, from the times of each stage.

    `schedule` is ``"lockstep"``, a pipeline of IPUs; ``"1f1b"`` or ``"gpipe"``, a pipeline of
    processes with torch's schedules; or ``"in_order"``, one stage after the other. Without
    `is_training` the stages have forward passes only.
    """
    cycle_s = max(time.micro_batch_s for time in times) if schedule == "lockstep" else 0.0
    if schedule == "lockstep":
        slots = _lockstep(times, micro_batches, cycle_s)
    else:
        slots = _in_turn(schedule, times, micro_batches)
    if not is_training:
        slots = [slot for slot in slots if slot.kind == "forward"]
        return Timeline(schedule, len(times), micro_batches, slots, cycle_s, is_training)
    timeline = Timeline(schedule, len(times), micro_batches, slots, cycle_s)
    begin_s = timeline.work_s
    for stage, time in enumerate(times):
        slots.append(Slot(stage, "update", -1, begin_s, begin_s + time.update_s))
    return timeline


def _backward(stage: int, time: StageTime, micro_batch: int, start_s: float) -> List[Slot]:
    """Lay out the recomputation, if any, and the backward pass."""
    middle_s = start_s + time.recompute_s
    slots = [Slot(stage, "backward", micro_batch, middle_s, middle_s + time.backward_s)]
    if time.recompute_s:
        slots.insert(0, Slot(stage, "recompute", micro_batch, start_s, middle_s))
    return slots


def _lockstep(times: Sequence[StageTime], micro_batches: int, cycle_s: float) -> List[Slot]:
    slots = []
    last = len(times) - 1
    for cycle in range(num_cycles(len(times), micro_batches)):
        for stage, time in enumerate(times):
            now_s = cycle * cycle_s
            forward, backward = cycle - stage, cycle - (2 * last - stage)
            if 0 <= forward < micro_batches:
                slots.append(Slot(stage, "forward", forward, now_s, now_s + time.forward_s))
                now_s += time.forward_s
            if 0 <= backward < micro_batches:
                slots += _backward(stage, time, backward, now_s)
    return slots


def _order(schedule: str, stage: int, num_stages: int, micro_batches: int) -> List[Tuple[str, int]]:
    """List a stage's work in the order of its schedule: GPipe, 1F1B, or one at a time."""
    warm = in_flight(schedule, stage, num_stages, micro_batches)
    order = [("forward", micro_batch) for micro_batch in range(warm)]
    for micro_batch in range(micro_batches):
        order.append(("backward", micro_batch))
        if warm + micro_batch < micro_batches:
            order.append(("forward", warm + micro_batch))
    return order


def _in_turn(schedule: str, times: Sequence[StageTime], micro_batches: int) -> List[Slot]:
    """Start each piece of work when its stage is free and its neighbour has delivered."""
    stages = range(len(times))
    orders = [_order(schedule, stage, len(times), micro_batches) for stage in stages]
    done_s: Dict[Tuple[int, str, int], float] = {}
    free_s = [0.0] * len(times)
    position = [0] * len(times)
    slots: List[Slot] = []
    while any(position[stage] < len(orders[stage]) for stage in stages):
        for stage, time in enumerate(times):
            while position[stage] < len(orders[stage]):
                kind, micro_batch = orders[stage][position[stage]]
                neighbour = stage - 1 if kind == "forward" else stage + 1
                ready_s = 0.0
                if neighbour in stages:
                    if (neighbour, kind, micro_batch) not in done_s:
                        break
                    ready_s = done_s[neighbour, kind, micro_batch]
                start_s = max(free_s[stage], ready_s)
                if kind == "forward":
                    slots.append(Slot(stage, kind, micro_batch, start_s, start_s + time.forward_s))
                else:
                    slots += _backward(stage, time, micro_batch, start_s)
                free_s[stage] = done_s[stage, kind, micro_batch] = slots[-1].end_s
                position[stage] += 1
    return slots
