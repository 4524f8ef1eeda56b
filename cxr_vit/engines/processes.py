"""The processes that torchrun starts: their group, what they exchange, and who of them is lost.

torch.distributed does the work; here stand the names that the engines need of it. Runs on torch
2.0.1 too, where the torch engine is data parallel.
"""

from __future__ import annotations

import contextlib
import itertools
import re
import threading
import time
from datetime import timedelta
from typing import Any, Callable, Iterator, List, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore

from cxr_vit.engines.shared_store import (
    another_connection,
    holds,
    if_answered,
    put,
    somebody_spoke,
    start_store,
    wait_for,
)
from cxr_vit.errors import ProcessLost
from cxr_vit.launch import Launch

__all__ = ["Processes"]

#: What gloo, NCCL and the store say where a process is silent, and where it is gone.
_TIMEOUT = re.compile(r"[Tt]imed out|[Tt]imeout")
_BROKEN = re.compile(r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|remote process exited")
#: How long the others are asked for a sign of life before one is called lost, seconds.
_ROLL_CALL_S = 3.0
#: How often a process looks whether it is asked for one, seconds.
_LOOKS_EVERY_S = 0.5
#: How long the threads of a group may take to let go of what was exchanged last, seconds.
_LETS_GO_S = 0.3
_ROLL_CALL = "roll call"
_count = itertools.count()


class Processes:
    """The processes of a run, as one of them sees them; alone, all methods are trivial.

    Parameters
    ----------
    device
        What tensors are exchanged on: `cpu` by gloo, `cuda` by NCCL and gloo.
    timeout_s
        How long to wait for another process, seconds.

    Attributes
    ----------
    rank, size
        Which process this is of how many.
    roles
        What to call each process in a message.
    """

    def __init__(self, device: torch.device, timeout_s: float) -> None:
        launch = Launch.from_environment()
        self.is_connected = launch.is_connected
        self.uses_nccl = device.type == "cuda"
        self.rank, self.size = (launch.rank, launch.world_size) if self.is_connected else (0, 1)
        self.timeout = timedelta(seconds=timeout_s)
        self._leaves = threading.Event()
        self._answering = threading.Thread(target=self._answer, daemon=True)
        self.roles: List[str] = [f"process {rank}" for rank in range(self.size)]
        if not self.is_connected:
            return
        if self.uses_nccl:
            torch.cuda.set_device(device)
        self._answering.start()
        name = f"engine{next(_count)}"  # of an earlier group in this process addresses are stale
        put(start_store(), f"{name}/begins/{self.rank}")
        for rank in range(self.size):
            wait_for(f"{name}/begins/{rank}")
        with self.waiting("the other processes to begin"):
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if self.uses_nccl else "gloo",
                store=PrefixStore(name, start_store()),
                rank=self.rank,
                world_size=self.size,
                timeout=self.timeout,
            )

    def _answer(self) -> None:
        """Answer a roll call, in a thread: this process may itself be waiting for another."""
        with contextlib.suppress(RuntimeError, ProcessLost):  # the table is gone
            store = another_connection()
            while not self._leaves.wait(_LOOKS_EVERY_S):
                if holds(store, _ROLL_CALL):
                    put(store, f"alive/{self.rank}")
                    return

    def own(self, count: int) -> range:
        """Return which of `count` things, dealt out evenly, are this process's."""
        share = count // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def groups(self, ranks: Sequence[Sequence[int]]) -> Any:
        """Make groups that share out the processes; return this process's."""
        every = [list(group) for group in ranks]
        group, _ = dist.new_subgroups_by_enumeration(every, timeout=self.timeout)
        return group

    def add_up(self, values: Tensor, what: str = "the losses of all processes") -> Tensor:
        """Return the sum over all processes."""
        if self.is_connected:
            with self.waiting(what):
                dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return bool(self.add_up(torch.tensor([float(flag)]), "the end of everyone's step") > 0)

    def concatenate(self, parts: Tuple[Tensor, ...], group: Any = None) -> Tuple[Tensor, ...]:
        """Put the rows of the processes of a group one after another, on the CPU."""
        if not self.is_connected:
            return parts
        every: List[Any] = [None] * dist.get_world_size(group)
        with self.waiting("the scores of the other replicas"):
            dist.all_gather_object(every, parts, group=group)
        return tuple(torch.cat(column) for column in zip(*every))

    @contextlib.contextmanager
    def waiting(self, what: str, detail: Callable[[], str] = str) -> Iterator[None]:
        """Turn an error of the connection into a message that names who is missing.

        Parameters
        ----------
        what
            What is waited for, in words.
        detail
            Says more, where more is known when it fails.

        Raises
        ------
        ProcessLost
            If another process ended or did not answer in time.
        """
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            if not self.is_connected or not (_TIMEOUT.search(text) or _BROKEN.search(text)):
                raise
            in_time = not _TIMEOUT.search(text)
            raise ProcessLost(self._who_is_missing(detail() or what, in_time)) from error

    def _who_is_missing(self, what: str, in_time: bool) -> str:
        """Ask all processes for a sign of life; those that give none are the cause."""
        silent = set(range(self.size)) - {self.rank}

        def call_the_roll() -> None:
            store = start_store()
            put(store, _ROLL_CALL)
            deadline = time.monotonic() + _ROLL_CALL_S
            while silent and time.monotonic() < deadline and not somebody_spoke():
                silent.difference_update(r for r in list(silent) if holds(store, f"alive/{r}"))
                time.sleep(0.05)

        if_answered(call_the_roll, None, 2 * _ROLL_CALL_S)
        lost = ", ".join(self.roles[rank] for rank in sorted(silent)) or "none of them"
        if in_time:
            return (
                f"{self.roles[self.rank]} lost the connection while it waited for {what}. No sign"
                f" of life from: {lost}. Was it killed, or its host out of memory? Go on from the"
                " last checkpoint with --resume (torchrun --max-restarts does so by itself)."
            )
        return (
            f"{self.roles[self.rank]} waited longer than engine.timeout_s="
            f"{self.timeout.total_seconds():g} for {what}. No sign of life from: {lost}. Raise"
            " engine.timeout_s if that was at work, and go on with --resume."
        )

    def close(self, *, failed: bool = False) -> None:
        """Leave the group; after a failure NCCL's is left to the process's end, lest it waits."""
        if self._answering.is_alive():
            self._leaves.set()
            self._answering.join(_LOOKS_EVERY_S)  # it may be asking a table out of reach
        if self.is_connected and dist.is_initialized() and not (failed and self.uses_nccl):
            # A thread of gloo frees the last tensor, for which it needs the interpreter; torch 2.0
            # holds the interpreter while it waits for that thread to end, and would for ever.
            time.sleep(_LETS_GO_S)
            dist.destroy_process_group()
