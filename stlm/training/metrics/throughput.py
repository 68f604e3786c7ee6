"""Speed, time by phase, utilization, memory and energy of a run: the part "timing" of its records.

Every figure is for all ranks together.
"""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from data_pipeline.plurals import number_of
from stlm.training.distributed.connection import Distributed
from stlm.training.distributed.stopwatch import PHASES
from stlm.training.metrics.energy import Energy
from stlm.training.metrics.mfu import PASSES, count_flops, measure_peak, readable_flops


class Throughput:
    """Measurements of steps on `device` in `precision`, and first of the device's peak. Every rank makes one.

    `learns_whole`: no weight is frozen. Otherwise the cost of a gradient is unknown, and MFU is not reported.
    """

    def __init__(self, device: torch.device, precision: str, learns_whole: bool, distributed: Distributed) -> None:
        self._distributed = distributed
        self._device = device
        self._learns_whole = learns_whole
        self.peak = measure_peak(device, precision)  # of this rank
        self._forward_flops: float | None = None  # of one micro-batch; not counted yet
        self._forwards = self._steps = self._all_steps = 0
        self._bytes = self._joules = 0.0
        self._started = time.perf_counter()
        distributed.stopwatch.use(device)
        self._energy = Energy(device, first_of_node=distributed.ranks.local_rank == 0)
        everyone = distributed.of_every_rank([self.peak.flops, self._energy.measures])
        peaks = [peak for peak, _ in everyone]
        self._has_energy = any(measures for _, measures in everyone)
        ranks = f"{number_of(len(peaks), 'rank')} together" if len(peaks) > 1 else "1 rank"
        threads = torch.get_num_threads()
        on = "GPU" if device.type == "cuda" else f"{threads} thread{'s' * (threads > 1)}"
        self.summary = (
            f"peak: {readable_flops(math.fsum(peaks))} of {ranks}, measured on products of {self.peak.size} × "
            f"{self.peak.size} in {precision} ({on}{' each' * (len(peaks) > 1)})"
            + ("" if learns_whole else "; no MFU, for parts of the model are frozen")
            + "".join(f"; no energy {missing}" for missing in self._energy.missing)
        )

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure one step, made inside this context."""
        self._energy.joules()  # discards the energy between steps
        with self._distributed.stopwatch.step():
            yield
        self._joules += self._energy.joules()
        self._steps += 1
        self._all_steps += 1
        if self._all_steps == 1:  # slower than others, so left out of the estimate
            self._started = time.perf_counter()

    @property
    def has_counted(self) -> bool:
        """True once the FLOPs of a forward pass are known."""
        return self._forward_flops is not None

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count the forward pass of one micro-batch inside this context; the first pass also counts FLOPs."""
        self._forwards += 1
        if self.has_counted:
            yield
            return
        with count_flops() as counter:
            yield
        self._forward_flops = float(counter.get_total_flops())

    def add(self, bytes: float) -> None:
        """Add the bytes that all ranks read in a step."""
        self._bytes += bytes

    def read(self) -> dict[str, Any]:
        """Return the figures of the steps since the last reading, without the time between steps. All ranks call it."""
        phases = self._distributed.stopwatch.read()
        flops = PASSES * (self._forward_flops or 0.0) * self._forwards
        own = [*phases.values(), flops, self.peak.flops, *peak_memory(self._device), self._joules]
        everyone = [
            dict(zip((*PHASES, *EXTRA), values, strict=True)) for values in self._distributed.of_every_rank(own)
        ]
        figures = self._figures(everyone)
        self._forwards = self._steps = 0
        self._bytes = self._joules = 0.0
        return figures

    def _figures(self, everyone: list[dict[str, float]]) -> dict[str, Any]:
        seconds = [math.fsum(rank[phase] for phase in PHASES) for rank in everyone]
        mean = math.fsum(seconds) / len(everyone)
        per_step = len(everyone) * self._steps
        figures: dict[str, Any] = {
            "bytes_per_second": self._bytes / mean,
            "seconds_per_step": mean / self._steps,
            "phases": {phase: math.fsum(rank[phase] for rank in everyone) / per_step for phase in PHASES},
        }
        if self._learns_whole:
            possible = math.fsum(rank["peak"] * taken for rank, taken in zip(everyone, seconds, strict=True))
            flops = math.fsum(rank["flops"] for rank in everyone)
            figures |= {"flops_per_second": flops / mean, "mfu": flops / possible}
        if len(everyone) > 1:
            busy = [taken - rank["communication"] for rank, taken in zip(everyone, seconds, strict=True)]
            slowest = busy.index(max(busy))
            figures["slowest_rank"] = {"rank": slowest, "seconds_per_step": busy[slowest] / self._steps}
        figures["memory_bytes"] = int(max(rank["memory"] for rank in everyone))
        if self._device.type == "cuda":
            figures["cuda_memory_bytes"] = int(max(rank["cuda_memory"] for rank in everyone))
        if self._has_energy:
            joules = math.fsum(rank["joules"] for rank in everyone)
            figures["joules_per_step"] = joules / self._steps
            if self._bytes:
                figures["joules_per_megabyte"] = joules / self._bytes * 1e6
        return figures

    def left(self, steps: int) -> float:
        """Estimate the seconds that `steps` more steps take, including validations and checkpoints; nan if unknown."""
        if self._all_steps < 2:
            return math.nan
        return steps * (time.perf_counter() - self._started) / (self._all_steps - 1)


EXTRA = ("flops", "peak", "memory", "cuda_memory", "joules")  # values of a rank in addition to its phases


def peak_memory(device: torch.device) -> tuple[float, float]:
    """Return this process's peak memory so far, in bytes: in RAM, and in tensors on the GPU."""
    cuda = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return float(_peak_resident()), float(cuda)


def _peak_resident() -> int:
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage begins with the peak of the parent process
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024
