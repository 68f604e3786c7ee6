"""Energy consumed by steps, from the machine's counters: RAPL for processors, NVML for GPUs.

The counters of processors, and of memory where they exist, include the work of all other processes; the first rank of
each node reads them. A rank on a GPU reads that GPU's counter. The rest of the machine is not included.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import torch

from data_pipeline.extras import how_to_install

POWERCAP = Path("/sys/class/powercap")
COUNTED = ("package-", "dram")  # names of RAPL's domains; cores are part of a package, and "psys" is more than both


class Rapl:
    """RAPL counter in microjoules. It wraps to 0 at the end of its range, about every quarter of an hour under load."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._before = int(self._file.read_text())

    def joules(self) -> float:
        """Return the joules since the last call, which must be less than one range ago."""
        now = int(self._file.read_text())
        taken = now - self._before
        self._before = now
        return (taken if taken >= 0 else taken + self._range) / 1e6


class Nvml:
    """NVML's counter of one GPU, in millijoules."""

    def __init__(self, device: torch.device) -> None:
        pynvml = importlib.import_module("pynvml")  # from nvidia-ml-py; may be missing
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        self._read = pynvml.nvmlDeviceGetTotalEnergyConsumption
        self._before = self._read(self._handle)

    def joules(self) -> float:
        """Return the joules since the last call."""
        now = self._read(self._handle)
        taken, self._before = now - self._before, now
        return taken / 1e3


class Energy:
    """The counters that this rank reads. `missing` lists the reasons why expected ones are absent.

    `first_of_node`: this rank reads the counters of the processors.
    """

    def __init__(self, device: torch.device, first_of_node: bool, powercap: Path | None = None) -> None:
        self._counters: list[Any] = []
        self.missing: list[str] = []
        if first_of_node:
            self._find_rapl(powercap or POWERCAP)
        if device.type == "cuda":
            try:
                self._counters.append(Nvml(device))
            except ImportError:
                self.missing.append(f"of GPUs: {how_to_install('nvidia-ml-py')}")
            except Exception as error:  # NVML's errors, which have no importable base here
                self.missing.append(f"of GPUs: {error}")

    def _find_rapl(self, powercap: Path) -> None:
        domains = {
            folder: folder / "name" for folder in sorted(powercap.glob("intel-rapl:*"))
        }  # AMD's have this name too
        counted = [at for at, name in domains.items() if name.is_file() and name.read_text().startswith(COUNTED)]
        try:
            self._counters += [Rapl(folder) for folder in counted]
        except (OSError, ValueError) as error:
            where = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
            self.missing.append(f"of processors: {where}")
        if not counted:
            self.missing.append(f"of processors: {powercap} has none")

    @property
    def measures(self) -> bool:
        """True if there is any counter."""
        return bool(self._counters)

    def joules(self) -> float:
        """Return the joules since the last call, summed over the counters."""
        return sum(counter.joules() for counter in self._counters)
