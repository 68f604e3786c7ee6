"""Worker processes that alternate: contenders make one step each, round after round, so that other load of the machine
affects all of them alike.

The program starts itself again with `--worker NAME`; that process calls `serve`.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

PREFIX = "@ "  # of a worker's lines for the parent

Figures = dict[str, float]  # "seconds", "cpu" (seconds of all threads), "mb" (peak of memory so far)


class Worker:
    """One process of a contender. `environment` is added to the variables of this process."""

    def __init__(self, name: str, environment: Mapping[str, str] | None = None) -> None:
        self.name = name
        self._process = subprocess.Popen(
            [sys.executable, *sys.argv, "--worker", name],
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | dict(environment or {}),
        )  # fmt: skip

    def wait_until_ready(self) -> None:
        """Wait until the worker serves."""
        self.answer()

    def do(self, action: str = "step") -> Figures:
        """Let the worker do something, and wait for it."""
        self.ask(action)
        return self.answer()

    def ask(self, action: str) -> None:
        """Let the worker do something; `answer` waits for it."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{action}\n")
        self._process.stdin.flush()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def answer(self) -> Figures:
        """Wait for the worker, and return its figures."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(PREFIX):
                figures: Figures = json.loads(line.removeprefix(PREFIX))
                return figures
        raise SystemExit(f"the worker {self.name} has ended with {self._process.wait()}")


def serve(actions: Mapping[str, Callable[[], Any]]) -> None:
    """Do what each line of the input names, and answer with its figures; ends with the input."""
    print(PREFIX + "{}", flush=True)
    for line in sys.stdin:
        started, worked = time.perf_counter(), time.process_time()
        actions[line.strip()]()
        figures = {
            "seconds": time.perf_counter() - started,
            "cpu": time.process_time() - worked,
            "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3,
        }
        print(PREFIX + json.dumps(figures), flush=True)


def alternate(workers: Iterable[Worker], rounds: int) -> dict[str, list[Figures]]:
    """Let all workers make `rounds` steps, one each, alternating; every round begins with another of them."""
    order = list(workers)
    answers: dict[str, list[Figures]] = {worker.name: [] for worker in order}
    for turn in range(rounds):
        first = turn % len(order)
        for worker in order[first:] + order[:first]:
            answers[worker.name].append(worker.do())
    return answers
