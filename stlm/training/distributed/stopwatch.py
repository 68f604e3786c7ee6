"""Time of a step by phase. Every moment belongs to exactly one phase, so the phases add up to the step.

The time of a nested phase is not counted in the outer one: communication during the backward pass counts as
communication only. Time outside of all phases is "other".

On a GPU the host runs ahead of the device, so the host's clock would measure only how fast work is launched. There each
change of phase records an event in the stream, which is read one step later without making any step wait. Work on other
streams overlaps with the step and is not counted; communication counts only while the step waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.autograd.profiler import record_function

OTHER = "other"
PHASES = ("data", "forward", "backward", "optimizer", "communication", OTHER)

COLLECTIVES = (
    "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_reduce", "all_reduce_coalesced",
    "all_to_all", "all_to_all_single", "barrier", "broadcast", "reduce", "reduce_scatter", "reduce_scatter_tensor",
)  # fmt: skip


class HostClock:
    """Clock of the process, for devices that execute work synchronously."""

    def now(self) -> Any:
        return time.perf_counter()

    def seconds(self, begin: Any, end: Any) -> float:
        return end - begin

    def passes(self) -> bool:
        """True if the current work takes time of the step."""
        return True


class CudaClock(HostClock):
    """Clock of events in the stream that is current when the clock is made."""

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
    """Stopwatch of steps and their phases. Outside of a step, phases cost next to nothing and are not counted."""

    def __init__(self) -> None:
        self.annotates = False  # whether phases appear in the trace of torch's profiler
        self._clock = HostClock()
        self._phase: str | None = None  # None: between two steps
        self._since: Any = None
        self._spans: list[tuple[str, Any, Any]] = []  # of the newest step: phase, begin, end
        self._seconds = dict.fromkeys(PHASES, 0.0)  # of the steps before it

    def use(self, device: torch.device) -> None:
        """Measure on `device` from the next step on, and discard earlier measurements."""
        self._clock = CudaClock() if device.type == "cuda" else HostClock()
        self._spans, self._seconds = [], dict.fromkeys(PHASES, 0.0)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure a step, made inside this context."""
        before, self._spans = self._spans, []
        self._phase, self._since = OTHER, self._clock.now()
        try:
            yield
        finally:
            self._change(None)
            self._add(before)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time inside this context as the phase `name`, one of PHASES."""
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

    def time_collectives(self, backend: Any) -> None:
        """Count the time of all collectives of `backend`, whose methods are torch's, as communication.

        Only the newest stopwatch of a backend counts them.
        """
        for name in COLLECTIVES:
            setattr(backend, name, self.timed(partial(getattr(type(backend), name), backend)))

    def timed(self, collective: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap a collective so that its time counts as communication, and for an asynchronous one that of `wait`."""

        def call(*arguments: Any, **options: Any) -> Any:
            with self.phase("communication"):
                work = collective(*arguments, **options)
            return work if work is None else _TimedWork(work, self)

        return call

    def read(self) -> dict[str, float]:
        """Return the seconds of each phase since the last reading."""
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


class _TimedWork:
    """Handle of an asynchronous collective. Waiting for it counts as communication."""

    def __init__(self, work: Any, stopwatch: Stopwatch) -> None:
        self._work = work
        self._stopwatch = stopwatch

    def wait(self, *arguments: Any) -> Any:
        with self._stopwatch.phase("communication"):
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
