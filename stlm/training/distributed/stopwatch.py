"""Where the time of a step goes: every moment of it belongs to one phase, so that the phases add up to the step.

A phase inside another one takes its time from that: what the ranks send each other while a gradient is computed counts
as communication and not as backward. What is in no phase is "other".

On a GPU the program runs ahead of the device, and its own clock would only show how fast it hands out work. There each
change of phase leaves an event in the device's queue, which is read a step later, when the step has long been done: no
step waits for it. Work on another stream than the step's own goes on beside it and takes nobody's time; what counts
as communication is how long the step waits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.autograd.profiler import record_function

OTHER = "other"
PHASES = ("data", "forward", "backward", "optimizer", "communication", OTHER)


class HostClock:
    """The clock of the process, for devices that are done with what they were told when the call returns."""

    def now(self) -> Any:
        return time.perf_counter()

    def seconds(self, begin: Any, end: Any) -> float:
        return end - begin

    def passes(self) -> bool:
        """Whether what is done now takes time of the step."""
        return True


class CudaClock(HostClock):
    """Events in the queue of the stream that is current when the clock is made."""

    def __init__(self) -> None:
        self._stream = torch.cuda.current_stream()

    def now(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(self._stream)
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def passes(self) -> bool:
        return torch.cuda.current_stream() == self._stream


class Stopwatch:
    """Measures steps; outside of one, phases cost next to nothing and are not counted."""

    def __init__(self) -> None:
        self.annotates = False  # phases appear in what torch's profiler records
        self._clock = HostClock()
        self._phase: str | None = None  # None: between two steps
        self._since: Any = None
        self._spans: list[tuple[str, Any, Any]] = []  # of the newest step: phase, begin, end
        self._seconds = dict.fromkeys(PHASES, 0.0)  # of the steps before it

    def use(self, device: torch.device) -> None:
        """Measure on `device` from the next step on, and forget what was measured."""
        self._clock = CudaClock() if device.type == "cuda" else HostClock()
        self._spans, self._seconds = [], dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Inside is a step."""
        before, self._spans = self._spans, []
        self._phase, self._since = OTHER, self._clock.now()
        try:
            yield
        finally:
            self._change(None)
            self._add(before)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside is work of the phase `name`, one of PHASES."""
        outer = self._phase
        if outer is None or not self._clock.passes():
            yield
            return
        self._change(name)
        try:
            with record_function(name) if self.annotates else nullcontext():
                yield
        finally:
            self._change(outer)

    def read(self) -> dict[str, float]:
        """Seconds of each phase since the last reading."""
        self._add(self._spans)
        self._spans = []
        seconds, self._seconds = self._seconds, dict.fromkeys(PHASES, 0.0)
        return seconds

    def _change(self, phase: str | None) -> None:
        now = self._clock.now()
        assert self._phase is not None
        self._spans.append((self._phase, self._since, now))
        self._phase, self._since = phase, now

    def _add(self, spans: list[tuple[str, Any, Any]]) -> None:
        for phase, begin, end in spans:
            self._seconds[phase] += self._clock.seconds(begin, end)


STOPWATCH = Stopwatch()  # of this process
