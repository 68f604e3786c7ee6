"""Background programs of a test: started in one folder, monitored while the test waits, and stopped at its end."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])  # where Debian keeps daemons


class Daemons:
    """Programs that run in the foreground of their own processes; their output goes to FOLDER/*.log."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes: dict[str, subprocess.Popen] = {}

    def start(self, program: str, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> None:
        name = f"{program}-{len(self._processes)}"
        path = shutil.which(program, path=PATH)
        assert path is not None
        with open(self.folder / f"{name}.log", "w") as log:
            self._processes[name] = subprocess.Popen(
                [path, *arguments], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def check(self) -> None:
        """Fail the test if a program has ended."""
        for name, process in self._processes.items():
            if process.poll() is not None:
                raise AssertionError(f"{name} ended with {process.returncode}\n{self.logs()}")

    def logs(self) -> str:
        """Return the last lines of each log."""
        return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))

    def stop(self) -> None:
        """Stop the programs in reverse order of their start."""
        for process in reversed(self._processes.values()):
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until(true: Callable[[], bool], what: str, daemons: Daemons, timeout_s: float = 60) -> None:
    """Return when the condition is true; fail the test after the time limit, or if a daemon ends."""
    deadline = time.monotonic() + timeout_s
    while not true():
        daemons.check()
        assert time.monotonic() < deadline, f"no {what} after {timeout_s:.0f} s\n{daemons.logs()}"
        time.sleep(0.1)


def need(package: str, *programs: str) -> None:
    """Skip where a program is missing: scripts/test.sh --all and run.sh install it where permitted."""
    missing = [program for program in programs if shutil.which(program, path=PATH) is None]
    if missing:
        pytest.skip(f"there is no {' and no '.join(missing)}; on Debian: apt-get install {package}")
