"""What the processes of a run say and do once for all, over a table that every one of them reaches.

The table is torch's store. With torchrun it is the agent's, and outlives the processes.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import threading
import time
import uuid
from datetime import timedelta
from functools import lru_cache
from typing import Any, Callable, Counter, Dict, Iterator, List, Sequence, Tuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from cxr_vit.engines.processes import Launch
from cxr_vit.errors import ProcessLost

__all__ = [
    "Processes",
    "another_connection",
    "call_once",
    "holds",
    "if_answered",
    "launch_store",
    "leave_last",
    "main_first",
    "put",
    "same_everywhere",
    "somebody_spoke",
    "speaks_for_all",
    "spoken_for_all",
    "start_store",
    "wait_for",
]


#: How long all processes of a start may take to begin, seconds.
_BEGIN_S = 300.0

#: How long one process waits to hear from the others before it speaks for itself, seconds.
_HEARING_S = 10.0

#: How long the table may take to answer, seconds.
_ANSWER_S = 3.0

_T = TypeVar("_T")

_opening = threading.Lock()

_uses: Counter[str] = Counter()


def start_store() -> Any:
    """Return the table of the processes started together.

    Raises
    ------
    ProcessLost
        If some of them do not begin.
    """
    with _opening:  # two threads would name the start twice
        return _open_start_store()


def another_connection() -> Any:
    """Return the start's table over a connection of its own, for a thread."""
    start_store()
    return PrefixStore(_start_name(), _connect())


@lru_cache(maxsize=None)
def _open_start_store() -> Any:
    return PrefixStore(_start_name(), _table())


@lru_cache(maxsize=None)
def _start_name() -> str:
    return _name_the_start(_table())


@lru_cache(maxsize=None)
def _table() -> Any:
    """Return the first connection: with torch 2.0 the table itself, which goes with it."""
    return _connect()


def _connect() -> Any:
    store, _, _ = next(iter(rendezvous("env://")))
    return PrefixStore("cxr_vit/starts", store)


def _name_the_start(store: Any) -> str:
    """Agree on a name with the processes started together, and with no earlier ones.

    torchrun keeps its table when it starts the processes anew, and each host counts the starts for
    itself (TORCHELASTIC_RESTART_COUNT): what was left there cannot be told from what is new. So
    each process asks the first one with a word of its own, and that one answers until all know.
    """
    launch = Launch.from_environment()
    if not launch.is_main:
        word = uuid.uuid4().hex
        put(store, f"asked by {launch.rank}", word)
        store.wait([f"answer to {word}"], timedelta(seconds=_BEGIN_S))
        name: str = store.get(f"answer to {word}").decode()
        put(store, f"{name} is known to {launch.rank}")
        return name
    name = uuid.uuid4().hex
    missing = set(range(1, launch.world_size))
    deadline = time.monotonic() + _BEGIN_S
    while missing and time.monotonic() < deadline:
        for rank in missing:
            if holds(store, f"asked by {rank}"):
                store.set(f"answer to {store.get(f'asked by {rank}').decode()}", name)
        missing = {r for r in missing if not holds(store, f"{name} is known to {r}")}
        time.sleep(0.05)
    if missing:
        raise ProcessLost(
            f"processes {sorted(missing)} of {launch.world_size} have not begun in {_BEGIN_S:g} s."
        )
    return name


def put(store: Any, key: str, value: str = "") -> None:
    """Enter something in a table, so that it can be asked for without waiting."""
    store.set(key, value)
    store.add(f"{key} is there", 1)


def holds(store: Any, key: str) -> bool:
    """Whether a table has an entry that was `put`; torch 2.0 has no `check`."""
    return bool(store.add(f"{key} is there", 0) > 0)


def wait_for(key: str) -> None:
    """Wait for an entry of the start's table, however long it takes.

    Raises
    ------
    ProcessLost
        If a process has failed meanwhile.
    """
    store = start_store()
    while not holds(store, key):
        if somebody_spoke():
            raise ProcessLost("another process failed; its host's output says why.")
        time.sleep(0.05)


def launch_store() -> Any:
    """Return the table that torchrun keeps when it starts its processes anew."""
    store = start_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return PrefixStore("cxr_vit/launch", store)


def call_once(name: str, make: Callable[[], Any]) -> Any:
    """Let the first process do something; return to all what came of it.

    Parameters
    ----------
    name
        Of the thing; all processes do things of a name in the same order.
    make
        Returns something JSON can hold.
    """
    launch = Launch.from_environment()
    if not launch.is_connected:
        return make()
    store, name = start_store(), _nth(name)
    if launch.is_main:
        value = make()
        put(store, f"made/{name}", json.dumps(value))
        return value
    wait_for(f"made/{name}")
    return json.loads(store.get(f"made/{name}"))


def _nth(name: str) -> str:
    """Return another name at each use of one: what an earlier use left stays in the table."""
    _uses[name] += 1
    return f"{name} {_uses[name]}"


@contextlib.contextmanager
def main_first(name: str) -> Iterator[None]:
    """Let the first process be done with something before the others begin it.

    What it leaves in files they then find, and it alone says what takes long.

    Parameters
    ----------
    name
        Of the thing; all processes do things of a name in the same order.
    """
    launch, name = Launch.from_environment(), _nth(name)
    if launch.is_connected and not launch.is_main:
        wait_for(f"done/{name}")
    yield
    if launch.is_connected and launch.is_main:
        put(start_store(), f"done/{name}")


def same_everywhere(name: str, facts: Dict[str, Any]) -> List[str]:
    """Compare what this process found with what the first one found.

    Parameters
    ----------
    name
        As in `call_once`.
    facts
        JSON-able.

    Returns
    -------
    list of str
        What differs, each as ``"<fact>=<here> here, <there> there"``.
    """
    first: Dict[str, Any] = call_once(name, lambda: facts)
    return [
        f"{fact}={value} here, {first.get(fact)} there"
        for fact, value in facts.items()
        if first.get(fact) != value
    ]


def leave_last() -> None:
    """Let all processes come to their end, the first one last: it writes, and may keep the table.

    torchrun ends the others as soon as one leaves with another status than 0.
    """
    launch = Launch.from_environment()
    if not launch.is_connected:
        return
    if launch.is_main:
        put(start_store(), "written")
        for rank in range(1, launch.world_size):
            wait_for(f"leaves/{rank}")
    else:
        wait_for("written")
        put(start_store(), f"leaves/{launch.rank}")


def speaks_for_all() -> bool:
    """Whether this process is the first that has an error to tell; the others wait until it did.

    Of several processes that fail, all but one fail because that one did.
    """
    if not Launch.from_environment().is_connected:
        return True

    def is_first() -> bool:
        return bool(start_store().add("speakers", 1) == 1)

    def hear() -> bool:
        start_store().wait(["spoken"], timedelta(seconds=_HEARING_S))
        return False

    # Without a table rather twice than never.
    if if_answered(is_first, True, _HEARING_S):
        return True
    return if_answered(hear, True, _HEARING_S)


def spoken_for_all() -> None:
    """Let the others end, now that the error is told."""
    if Launch.from_environment().is_connected:
        if_answered(lambda: start_store().set("spoken", ""), None, _ANSWER_S)


def if_answered(ask: Callable[[], _T], otherwise: _T, seconds: float) -> _T:
    """Ask the table, which may be gone with the first host: torch would wait for it for ever.

    Parameters
    ----------
    ask
        Asks it; a RuntimeError counts as no answer.
    otherwise
        What is returned without an answer.
    seconds
        How long to wait for one.
    """
    answers = [otherwise]

    def listen() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(ask())

    thread = threading.Thread(target=listen, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[-1]


def somebody_spoke() -> bool:
    """Whether a process has an error to tell."""
    return bool(start_store().add("speakers", 0) > 0)


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
