"""The times of the steps, and when the host waits for a device that computes them."""

from __future__ import annotations

import time
from typing import Iterable, Iterator, Optional, Tuple

from cxr_vit.data.dataset import Batch
from cxr_vit.engines.base import StepOutput


class Pace:
    """Lets the host be one step ahead of the device, and measures the steps.

    An engine that waits for its device leaves nothing to do here. One that does not has only begun
    a step where it returns. Then the host waits for the step before, so that the device always has
    work. A step that is read at once counts until its end, and the next one from its beginning:
    what is between them, such as a validation, does not count.
    """

    def __init__(self) -> None:
        self._last: Optional[StepOutput] = None
        self._end: Optional[float] = None  # of the step before, if the device went on
        self._start = self._wait_s = 0.0

    def start(self, wait_s: float) -> None:
        """Begin a step, for whose batch the host waited `wait_s`, and the device may have not."""
        is_busy = self._last is not None and not self._last.is_done
        self._wait_s = 0.0 if is_busy else wait_s
        self._start = time.perf_counter()

    def end(self, output: StepOutput, *, reads: bool) -> Tuple[float, float]:
        """Wait for the step before, with `reads` also for this one; return TrainOutputs' times.

        The first is `wait_s`, the second `seconds`.
        """
        if self._last is not None:
            self._last.wait()
        if reads:
            output.wait()
        now = time.perf_counter()
        start = self._start if self._end is None else self._end + self._wait_s
        self._last, self._end = (output, now) if not output.is_read else (None, None)
        return self._wait_s, now - start


def timed(batches: Iterable[Batch]) -> Iterator[Tuple[Batch, float]]:
    """Yield each batch with the seconds spent waiting for it."""
    start = time.perf_counter()
    for batch in batches:
        yield batch, time.perf_counter() - start
        start = time.perf_counter()
