"""Communication between the processes of a run that torchrun started."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
import uuid
from datetime import timedelta
from functools import lru_cache
from typing import Any, Callable, Counter, Dict, Iterator, List, Optional, Sequence, Tuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from cxr_vit.engines.processes import Launch
from cxr_vit.errors import ProcessLost

T = TypeVar("T")

#: Time for all processes to start, seconds.
_START_S = 300.0
#: Time to wait for another process's error report before this process prints its own, seconds.
_REPORT_S = 10.0
#: Time for the store to answer, seconds.
_ANSWER_S = 3.0
#: Time for the other processes to answer a roll call, seconds.
_ROLL_CALL_S = 3.0
#: Interval at which a process looks for a roll call, seconds.
_ROLL_CALL_INTERVAL_S = 0.5
#: Time for gloo's threads to free the tensors of the last exchange, seconds.
_FREE_S = 0.3
#: Interval between two queries of the store, seconds.
_POLL_S = 0.05

_ROLL_CALL = "roll call"

#: Types of the tensors that processes send each other, by name.
_DTYPES = {
    str(dtype): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}

#: Messages of gloo, NCCL and the store where a process does not answer, and where it has ended.
_TIMEOUT = re.compile(r"[Tt]imed out|[Tt]imeout")
_BROKEN = re.compile(r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|remote process exited")


@lru_cache(maxsize=None)
def coordinator(launch: Launch) -> Coordinator:
    """Return this process's `Coordinator`; all callers share one."""
    return Coordinator(launch)


class Coordinator:
    """Key-value store that all processes of a run share; opened by the first use.

    It is torch's store. With torchrun the agent holds it, so it outlives the processes. Without
    other processes the methods do nothing or act locally. All processes must call the methods that
    take a name with the same names in the same order.
    """

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self._lock = threading.Lock()
        self._connection: Any = None
        self._start = ""
        self._store: Any = None
        self._uses: Counter[str] = Counter()

    def open(self) -> Any:
        """Return torch's store with the keys of this start; ProcessLost if not all start."""
        with self._lock:  # two threads would agree on two names
            if self._store is None:
                if self._connection is None:
                    self._connection = _connect()  # kept: with torch 2.0 it may be the store itself
                self._start = _agree_on_name(self._connection, self.launch)
                self._store = PrefixStore(self._start, self._connection)
            return self._store

    def connect_again(self) -> Any:
        """Return the same store over a separate connection, for use in a thread."""
        self.open()
        return PrefixStore(self._start, _connect())

    def wait_for_key(self, key: str) -> None:
        """Wait until a key is set; ProcessLost if another process reports an error meanwhile."""
        store = self.open()
        while not _has_key(store, key):
            if self.has_error():
                raise ProcessLost("another process failed; see the output of its host.")
            time.sleep(_POLL_S)

    def load_across_restarts(self, key: str) -> Optional[str]:
        """Return a value that is kept when torchrun restarts the processes; None if not set."""
        store = self._restart_store()
        return str(store.get(key).decode()) if _has_key(store, key) else None

    def save_across_restarts(self, key: str, value: str) -> None:
        """Set a value that is kept when torchrun restarts the processes."""
        _set_key(self._restart_store(), key, value)

    def _restart_store(self) -> Any:
        store = self.open()
        while isinstance(store, PrefixStore):
            store = store.underlying_store
        return PrefixStore("cxr_vit/launch", store)

    def call_once(self, name: str, function: Callable[[], Any]) -> Any:
        """Call a function in the main process only; return its JSON-able result in all."""
        if not self.launch.is_connected:
            return function()
        key = f"made/{self.unique(name)}"
        if self.launch.is_main:
            value = function()
            _set_key(self.open(), key, json.dumps(value))
            return value
        self.wait_for_key(key)
        return json.loads(self.open().get(key))

    @contextlib.contextmanager
    def main_first(self, name: str) -> Iterator[None]:
        """Run the body in the main process before the others begin it.

        They then find the files that it writes, and only the main process reports progress.
        """
        key = f"done/{self.unique(name)}"
        if self.launch.is_connected and not self.launch.is_main:
            self.wait_for_key(key)
        yield
        if self.launch.is_connected and self.launch.is_main:
            _set_key(self.open(), key)

    def differences(self, name: str, facts: Dict[str, Any]) -> List[str]:
        """Return the JSON-able facts that differ from those of the main process, as words."""
        main: Dict[str, Any] = self.call_once(name, lambda: facts)
        return [
            f"{fact}={value} here, {main.get(fact)} there"
            for fact, value in facts.items()
            if main.get(fact) != value
        ]

    def unique(self, name: str) -> str:
        """Return a new key for each use of a name: keys of earlier uses stay in the store."""
        self._uses[name] += 1
        return f"{name} {self._uses[name]}"

    def wait_for_all_to_finish(self) -> None:
        """Wait until all processes are done; the main process ends last.

        It writes the run and may hold the store, and torchrun terminates the others as soon as one
        process ends with a status other than 0.
        """
        if not self.launch.is_connected:
            return
        if self.launch.is_main:
            _set_key(self.open(), "written")
            for rank in range(1, self.launch.world_size):
                self.wait_for_key(f"leaves/{rank}")
        else:
            self.wait_for_key("written")
            _set_key(self.open(), f"leaves/{self.launch.rank}")

    def has_error(self) -> bool:
        """Whether a process has claimed the error report."""
        return bool(self.open().add("speakers", 0) > 0)

    def claim_error_report(self) -> bool:
        """Whether this process is the first to fail and so prints its error.

        The others fail because of it: they wait here until it has printed.
        """
        if not self.launch.is_connected:
            return True

        def is_first() -> bool:
            return bool(self.open().add("speakers", 1) == 1)

        def wait_for_report() -> bool:
            self.open().wait(["spoken"], timedelta(seconds=_REPORT_S))
            return False

        # Without a store each process prints: twice is better than never.
        return _with_timeout(is_first, True, _REPORT_S) or _with_timeout(
            wait_for_report, True, _REPORT_S
        )

    def finish_error_report(self) -> None:
        """Let the other processes end after the error is printed."""
        if self.launch.is_connected:
            _with_timeout(lambda: self.open().set("spoken", ""), None, _ANSWER_S)


def _connect() -> Any:
    store, _, _ = next(iter(rendezvous("env://")))
    return PrefixStore("cxr_vit/starts", store)


def _agree_on_name(store: Any, launch: Launch) -> str:
    """Agree on a name for this start of the processes.

    torchrun keeps the store when it restarts the processes, and each host counts its own restarts
    (TORCHELASTIC_RESTART_COUNT), so old and new keys look the same. Each process therefore
    sends the main process a random word, and the main process answers until all have the name.
    """
    if not launch.is_main:
        word = uuid.uuid4().hex
        _set_key(store, f"asked by {launch.rank}", word)
        store.wait([f"answer to {word}"], timedelta(seconds=_START_S))
        name: str = store.get(f"answer to {word}").decode()
        _set_key(store, f"{name} is known to {launch.rank}")
        return name
    name = uuid.uuid4().hex
    missing = set(range(1, launch.world_size))
    deadline = time.monotonic() + _START_S
    while missing and time.monotonic() < deadline:
        for rank in missing:
            if _has_key(store, f"asked by {rank}"):
                store.set(f"answer to {store.get(f'asked by {rank}').decode()}", name)
        missing = {rank for rank in missing if not _has_key(store, f"{name} is known to {rank}")}
        time.sleep(_POLL_S)
    if missing:
        raise ProcessLost(
            f"processes {sorted(missing)} of {launch.world_size} did not start in {_START_S:g} s."
        )
    return name


def _set_key(store: Any, key: str, value: str = "") -> None:
    store.set(key, value)
    store.add(f"{key} is there", 1)


def _has_key(store: Any, key: str) -> bool:
    return bool(store.add(f"{key} is there", 0) > 0)  # torch 2.0 has no `check`


def _with_timeout(query: Callable[[], T], default: T, seconds: float) -> T:
    """Query the store; return `default` on RuntimeError or after `seconds`.

    If the store's host is gone, torch itself would block forever.
    """
    answers = [default]

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(query())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return answers[-1]


def _concatenate(part: Tensor, group: Any) -> Tensor:
    counts = [torch.zeros(1, dtype=torch.int64) for _ in range(dist.get_world_size(group))]
    dist.all_gather(counts, torch.tensor([len(part)]), group=group)
    # Only tensors of one shape can be gathered.
    longest = max(int(count) for count in counts)
    padded = part.new_zeros(longest, *part.shape[1:])
    padded[: len(part)] = part
    gathered = [torch.empty_like(padded) for _ in counts]
    if padded.numel():  # torch 2.0 divides by the size
        dist.all_gather([_bytes(rows) for rows in gathered], _bytes(padded), group=group)
    return torch.cat([rows[: int(count)] for rows, count in zip(gathered, counts)])


def _bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a contiguous tensor, which they share; of another one those of a copy."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _receive(tensor: Tensor, rank: int, group: Any) -> Tensor:
    dist.recv(_bytes(tensor), rank, group)
    return tensor


class ProcessGroup:
    """torch's process group for one engine; without other processes the methods are trivial.

    Tensors are exchanged on `device`: `cpu` with gloo, `cuda` with NCCL and gloo.

    Attributes
    ----------
    launch
        Launch of the processes that torch connects; of this one alone where there are no others.
    roles
        Name of each process in messages.
    """

    def __init__(self, launch: Launch, device: torch.device, timeout_s: float) -> None:
        self.is_connected = launch.is_connected
        self.launch = launch if self.is_connected else Launch()
        self.rank, self.size = self.launch.rank, self.launch.world_size
        self.uses_nccl = device.type == "cuda"
        self.timeout = timedelta(seconds=timeout_s)
        self.roles: List[str] = [f"process {rank}" for rank in range(self.size)]
        self._store = coordinator(launch)
        self._closed = threading.Event()
        self._answering = threading.Thread(target=self._answer_roll_call, daemon=True)
        if not self.is_connected:
            return
        if self.uses_nccl:
            torch.cuda.set_device(device)
        self._answering.start()
        # Addresses of an earlier group of this process are stale.
        name, store = self._store.unique("engine"), self._store.open()
        _set_key(store, f"{name}/begins/{self.rank}")
        for rank in range(self.size):
            self._store.wait_for_key(f"{name}/begins/{rank}")
        with self.waiting_for("the other processes to begin"):
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if self.uses_nccl else "gloo",
                store=PrefixStore(name, store),
                rank=self.rank,
                world_size=self.size,
                timeout=self.timeout,
            )

    def new_group(self, ranks: Sequence[Sequence[int]]) -> Any:
        """Divide the processes into groups; return the group of this process."""
        lists = [list(group) for group in ranks]
        group, _ = dist.new_subgroups_by_enumeration(lists, timeout=self.timeout)
        return group

    def sum(self, values: Tensor, what: str = "the losses of all processes") -> Tensor:
        """Return the sum over all processes, computed in place."""
        if self.is_connected:
            with self.waiting_for(what):
                dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if not self.is_connected:
            return flag
        return bool(self.sum(torch.tensor([float(flag)]), "the end of everyone's step") > 0)

    def concatenate(self, parts: Tuple[Tensor, ...], group: Any = None) -> Tuple[Tensor, ...]:
        """Concatenate the rows of all processes of a group, on the CPU.

        The processes may have different numbers of rows.
        """
        if not self.is_connected:
            return parts
        with self.waiting_for("the scores of the other replicas"):
            return tuple(_concatenate(part, group) for part in parts)

    def gather(self, tensors: Dict[str, Tensor], group: Any) -> List[Dict[str, Tensor]]:
        """Return the tensors of each process of a group in its first one; an empty list elsewhere.

        One tensor at a time is on its way, so that only the first process holds all of them.
        """
        ranks = dist.get_process_group_ranks(group)
        if self.rank != ranks[0]:
            form = [(name, str(value.dtype), list(value.shape)) for name, value in tensors.items()]
            words = torch.frombuffer(bytearray(json.dumps(form).encode()), dtype=torch.uint8)
            for part in (torch.tensor([len(words)]), words, *tensors.values()):
                dist.send(_bytes(part), ranks[0], group)
            return []
        gathered = [tensors]
        for rank in ranks[1:]:
            length = _receive(torch.empty(1, dtype=torch.int64), rank, group)
            words = _receive(torch.empty(int(length), dtype=torch.uint8), rank, group)
            gathered.append(
                {
                    name: _receive(torch.empty(shape, dtype=_DTYPES[dtype]), rank, group)
                    for name, dtype, shape in json.loads(bytes(words.tolist()))
                }
            )
        return gathered

    @contextlib.contextmanager
    def waiting_for(self, what: str, detail: Callable[[], str] = str) -> Iterator[None]:
        """Turn a connection error into a message that names the missing process.

        Parameters
        ----------
        what
            Words for what this process waits for.
        detail
            Called on failure; returns more exact words, or an empty string.

        Raises
        ------
        ProcessLost
            If another process ended or did not answer in time.
        """
        try:
            yield
        except RuntimeError as error:
            text = str(error)
            timed_out = bool(_TIMEOUT.search(text))
            if not (self.is_connected and (timed_out or _BROKEN.search(text))):
                raise
            raise ProcessLost(self._loss_message(detail() or what, timed_out)) from error

    def _loss_message(self, what: str, timed_out: bool) -> str:
        missing = (
            ", ".join(self.roles[rank] for rank in self._find_silent_ranks()) or "none of them"
        )
        if timed_out:
            return (
                f"{self.roles[self.rank]} waited longer than engine.timeout_s="
                f"{self.timeout.total_seconds():g} for {what}. No sign of life from: {missing}."
                " Raise engine.timeout_s if that process was working, and resume with --resume."
            )
        return (
            f"{self.roles[self.rank]} lost the connection while it waited for {what}. No sign"
            f" of life from: {missing}. Was it killed, or its host out of memory? Resume from the"
            " last checkpoint with --resume (torchrun --max-restarts does so automatically)."
        )

    def _find_silent_ranks(self) -> List[int]:
        """Ask all processes for a sign of life; return the ranks that give none."""
        silent = set(range(self.size)) - {self.rank}

        def call() -> None:
            store = self._store.open()
            _set_key(store, _ROLL_CALL)
            deadline = time.monotonic() + _ROLL_CALL_S
            while silent and time.monotonic() < deadline and not self._store.has_error():
                silent.difference_update(r for r in list(silent) if _has_key(store, f"alive/{r}"))
                time.sleep(_POLL_S)

        _with_timeout(call, None, 2 * _ROLL_CALL_S)
        return sorted(silent)

    def _answer_roll_call(self) -> None:
        """Run in a thread: the main thread may be waiting for another process."""
        with contextlib.suppress(RuntimeError, ProcessLost):  # the store is gone
            store = self._store.connect_again()
            while not self._closed.wait(_ROLL_CALL_INTERVAL_S):
                if _has_key(store, _ROLL_CALL):
                    _set_key(store, f"alive/{self.rank}")
                    return

    def close(self, *, failed: bool = False) -> None:
        """Leave the group. After a failure NCCL's group is kept so that shutdown does not block."""
        if self._answering.is_alive():
            self._closed.set()
            self._answering.join(_ROLL_CALL_INTERVAL_S)  # the store may be out of reach
        if self.is_connected and dist.is_initialized() and not (failed and self.uses_nccl):
            # A thread of gloo needs the interpreter to free the last tensor. torch 2.0 holds the
            # interpreter while it waits for that thread to end, which would block forever.
            time.sleep(_FREE_S)
            dist.destroy_process_group()
