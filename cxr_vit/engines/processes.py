"""The processes that torchrun starts: their group, their exchange, and how they fail together.

torch.distributed does the work; here stand the names that the engines need of it. Runs on torch
2.0.1 too, where the torch engine is data parallel.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import time
from datetime import timedelta
from functools import lru_cache
from typing import Any, Callable, Iterator, List, Sequence, Tuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from cxr_vit.errors import ProcessLost
from cxr_vit.launch import Launch

__all__ = ["Processes", "call_once", "launch_store", "speaks_for_all", "spoken_for_all"]

#: What gloo, NCCL and the store say where a process is silent, and where it is gone.
_TIMEOUT = re.compile(r"[Tt]imed out|[Tt]imeout")
_BROKEN = re.compile(r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|remote process exited")
#: How long the others are asked for a sign of life before one is called lost, seconds.
_ROLL_CALL_S = 3.0
#: How long a silent process waits for the one that speaks, seconds.
_HEARING_S = 10.0
#: The first process may have all films to decode while the others wait.
_SHARED_WORK = timedelta(days=7)
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
        self.rank, self.size = (launch.rank, launch.world_size) if self.is_connected else (0, 1)
        self.timeout = timedelta(seconds=timeout_s)
        self.roles: List[str] = [f"process {rank}" for rank in range(self.size)]
        if not self.is_connected:
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with self.waiting("the other processes to begin"):
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                # A name of its own: of an earlier group in this process the addresses are stale.
                store=PrefixStore(f"engine{next(_count)}", _attempt_store()),
                rank=self.rank,
                world_size=self.size,
                timeout=self.timeout,
            )

    def own(self, count: int) -> range:
        """Return which of `count` things, dealt out evenly, are this process's."""
        share = count // self.size
        return range(self.rank * share, (self.rank + 1) * share)

    def groups(self, ranks: Sequence[Sequence[int]]) -> Any:
        """Make groups that share out the processes; return this process's."""
        every = [list(group) for group in ranks]
        group, _ = dist.new_subgroups_by_enumeration(every, timeout=self.timeout)
        return group

    def add_up(self, values: Tensor) -> Tensor:
        """Return the sum over all processes."""
        if self.is_connected:
            with self.waiting("all processes to add up their losses"):
                dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return bool(self.add_up(torch.tensor([float(flag)])) > 0)

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
        store = _attempt_store()
        silent = set(range(self.size)) - {self.rank}
        with contextlib.suppress(RuntimeError):  # the store may be gone with the first host
            store.set(f"alive/{self.rank}", "")
            deadline = time.monotonic() + _ROLL_CALL_S
            while silent and time.monotonic() < deadline and not _somebody_spoke(store):
                silent = {rank for rank in silent if not store.check([f"alive/{rank}"])}
                time.sleep(0.05)
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

    def close(self) -> None:
        """Leave the group."""
        if self.is_connected and dist.is_initialized():
            dist.destroy_process_group()


# What is said and done once for all processes. The store is a table that all of them reach; with
# torchrun it is the agent's, and outlives the processes.


@lru_cache(maxsize=None)
def _attempt_store() -> Any:
    """Return the table of the processes started together."""
    store, _, _ = next(iter(rendezvous("env://")))
    return PrefixStore("cxr_vit", store)


def launch_store() -> Any:
    """Return the table that torchrun keeps when it starts its processes anew."""
    store = _attempt_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return PrefixStore("cxr_vit/launch", store)


def call_once(name: str, make: Callable[[], Any]) -> Any:
    """Let the first process do something; return to all what came of it.

    Parameters
    ----------
    name
        Of the thing, once a start.
    make
        Returns something JSON can hold.
    """
    launch = Launch.from_environment()
    if not launch.is_connected:
        return make()
    store = _attempt_store()
    if launch.is_main:
        value = make()
        store.set(f"made/{name}", json.dumps(value))
        return value
    store.wait([f"made/{name}"], _SHARED_WORK)
    return json.loads(store.get(f"made/{name}"))


def speaks_for_all() -> bool:
    """Whether this process is the first that has an error to tell; the others wait until it did.

    Of several processes that fail, all but one fail because that one did.
    """
    if not Launch.from_environment().is_connected:
        return True
    try:
        store = _attempt_store()
        if store.add("speakers", 1) == 1:
            return True
        store.wait(["spoken"], timedelta(seconds=_HEARING_S))
    except RuntimeError:  # no table any more: rather twice than never
        return True
    return False


def spoken_for_all() -> None:
    """Let the others end, now that the error is told."""
    if Launch.from_environment().is_connected:
        with contextlib.suppress(RuntimeError):
            _attempt_store().set("spoken", "")


def _somebody_spoke(store: Any) -> bool:
    found: bool = store.check(["speakers"])
    return found
