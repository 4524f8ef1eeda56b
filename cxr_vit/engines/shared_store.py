"""What the processes of a run say and do once for all, over a table that every one of them reaches.

The table is torch's store. With torchrun it is the agent's, and outlives the processes.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
import uuid
from datetime import timedelta
from functools import lru_cache
from typing import Any, Callable, Counter, Dict, Iterator, List, TypeVar

from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from cxr_vit.errors import ProcessLost
from cxr_vit.launch import Launch

__all__ = [
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
