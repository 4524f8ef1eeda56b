"""AsynchronousDataAccessor: a ring of buffers that are filled ahead of time and reused.

PopTorch fills them in another process. Here it happens in the same process, with a copy of the
loader and of its random generator, so that objects which cannot be sent to a process fail here
too.
"""

from __future__ import annotations

import collections
import copy
import math
import pickle
from typing import Any, Deque, Iterator, List, Optional

import torch

from .enums import SharingStrategy
from .errors import python_error

_END = -1


class AsynchronousDataAccessor:
    """Iterates over buffers: each is overwritten once the next one is requested."""

    def __init__(
        self,
        dataset: Any,
        buffer_size: int = 3,
        miss_sleep_time_in_ms: float = 0.1,
        load_indefinitely: bool = True,
        early_preload: bool = False,
        sharing_strategy: SharingStrategy = SharingStrategy.ForkServer,
        rebatched_size: Optional[int] = None,
    ) -> None:
        self._source: Any = None
        if getattr(dataset, "_accessor", None) is not None:
            raise python_error(
                "The DataLoader already uses an AsynchronousDataAccessor internally."
            )
        if rebatched_size is not None:
            assert rebatched_size > 1, "rebatched_size must be None or greater than 1"
        self.rebatched_size = rebatched_size
        self._drop_last = getattr(dataset, "rebatched_drop_last", True)
        self._buffer_size = buffer_size
        self._indefinitely = load_indefinitely
        self._forked = sharing_strategy == SharingStrategy.Fork
        self._source = _transfer(dataset, self._forked)
        # A forked process has the parent's generator, any other one a seed of its own.
        seeded = torch.Generator()
        seeded.seed()
        self._random = torch.get_rng_state() if self._forked else seeded.get_state()
        self._iterator: Optional[Iterator[Any]] = None
        self._keys: Optional[List[str]] = None
        self._single = False
        self._make_buffers()
        self._held: Optional[int] = None
        self._used = False

    def _make_buffers(self) -> None:
        self._start()
        first = self._pull()
        if first is None:
            raise python_error("The Dataset is empty")
        try:
            tensors = self._flat(first)
        except AssertionError as error:
            raise python_error(
                "AsynchronousDataAccessor worker thread failed to start (Check above for details)"
            ) from error
        self._buffers = [
            [_room(tensor, self.rebatched_size) for tensor in tensors]
            for _ in range(self._buffer_size)
        ]
        self._free: Deque[int] = collections.deque(range(self._buffer_size))
        self._ready: Deque[Any] = collections.deque()
        self._first: Any = first

    def _start(self) -> None:
        with _Random(self):
            batches = iter(self._source)
        self._iterator = batches if self.rebatched_size is None else self._rebatched(batches)

    def _pull(self) -> Any:
        assert self._iterator is not None
        with _Random(self):
            return next(self._iterator, None)

    def _rebatched(self, chunks: Iterator[Any]) -> Iterator[List[torch.Tensor]]:
        size = self.rebatched_size or 1
        waiting: List[torch.Tensor] = []
        for chunk in chunks:
            parts = self._flat(chunk)
            waiting = [torch.cat(pair) for pair in zip(waiting, parts)] if waiting else parts
            while waiting and len(waiting[0]) >= size:
                yield [tensor[:size] for tensor in waiting]
                waiting = [tensor[size:] for tensor in waiting]
        if waiting and len(waiting[0]) and not self._drop_last:
            yield waiting

    def _flat(self, data: Any) -> List[torch.Tensor]:
        if isinstance(data, torch.Tensor):
            self._single = True
            return [data]
        if isinstance(data, dict):
            self._keys = self._keys or list(data)
            assert len(data) == len(self._keys)
            data = [data[key] for key in self._keys]
        for index, tensor in enumerate(data):
            assert isinstance(tensor, torch.Tensor), (
                f"Tensor at index {index} is not a torch tensor ({type(tensor)})."
                " AsynchronousDataAccessor expects data to be organised as a flat 1D container of"
                " tensors."
            )
        return list(data)

    def _fill(self) -> None:
        """Fill every free buffer, after the end of the data with those of the next round."""
        while self._free and self._iterator is not None:
            data, self._first = (self._pull(), None) if self._first is None else (self._first, None)
            if data is not None:
                tensors = (
                    data if isinstance(data, list) and self.rebatched_size else self._flat(data)
                )
                number = self._free.popleft()
                for buffer, tensor in zip(self._buffers[number], tensors):
                    buffer[: len(tensor)].copy_(tensor) if buffer.dim() else buffer.copy_(tensor)
                self._ready.append((number, [_rows(tensor) for tensor in tensors]))
            elif _END in self._ready:
                return  # The second end waits until the first one is consumed.
            else:
                self._ready.append(_END)
                self._iterator = None
                if self._indefinitely:
                    self._start()

    def __iter__(self) -> AsynchronousDataAccessor:
        assert self._source is not None
        if self._used:
            # in the middle of the data: start again
            self._release()
            self._ready.clear()
            self._free = collections.deque(range(self._buffer_size))
            self._start()
        elif self._iterator is None:
            self._start()
        self._used = False
        return self

    def __next__(self) -> Any:
        assert self._source is not None
        self._release()
        self._fill()
        entry = self._ready.popleft() if self._ready else _END
        if entry == _END:
            self._used = False
            self._fill()
            raise StopIteration
        self._used = True
        self._held, rows = entry
        buffers = self._buffers[self._held]
        data = [b if n is None or n == len(b) else b[:n] for b, n in zip(buffers, rows)]
        if self._single:
            return data[0]
        return dict(zip(self._keys, data)) if self._keys else data

    def _release(self) -> None:
        if self._held is not None:
            self._free.append(self._held)
            self._held = None

    def __len__(self) -> int:
        length = len(self._source)
        if self.rebatched_size:
            length = length * self._source.batch_size // self.rebatched_size
        return length

    def terminate(self) -> None:
        self._source = None
        self._iterator = None


class _Random:
    """Use the other process's random generator instead of this one's."""

    def __init__(self, accessor: AsynchronousDataAccessor) -> None:
        self._accessor = accessor

    def __enter__(self) -> None:
        self._host = torch.get_rng_state()
        torch.set_rng_state(self._accessor._random)

    def __exit__(self, *exception: object) -> None:
        self._accessor._random = torch.get_rng_state()
        torch.set_rng_state(self._host)


def _transfer(dataset: Any, forked: bool) -> Any:
    """Return the other process's copy of `dataset`, pickled unless the process is forked."""
    if forked:
        return copy.deepcopy(dataset)
    return pickle.loads(pickle.dumps(dataset))


def _room(tensor: torch.Tensor, size: Optional[int]) -> torch.Tensor:
    if size is None or tensor.dim() == 0 or len(tensor) == size:
        return tensor.clone().contiguous()
    repeats = [math.ceil(size / len(tensor)), *[1] * (tensor.dim() - 1)]
    return tensor.repeat(repeats)[:size].clone()


def _rows(tensor: torch.Tensor) -> Optional[int]:
    return len(tensor) if tensor.dim() else None
