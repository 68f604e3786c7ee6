"""Identification of a lost rank after a broken connection: one line on each machine instead of tracebacks.

Every rank sends the others its process number once. When a connection breaks, the remaining ranks check which processes
on their own machine have ended; for other machines they can only report that the connection broke.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed import Store

_BROKEN = re.compile(
    r"connection (was likely )?(closed|reset|refused)|broken pipe|failed to (recv|send|connect)|remote process exited",
    re.IGNORECASE,
)
_WAIT_S = 5.0  # time for a process that has closed its connections to end
_KEY = "lost"  # of the store


def describe_process() -> dict[str, Any]:
    """Return the identity of this process."""
    pid = os.getpid()
    return {"host": socket.gethostname(), "namespace": _namespace(), "pid": pid, "started": _started(pid)}


def find_lost_ranks(
    error: RuntimeError, processes: Sequence[dict[str, Any]], rank: int, store: Store | None
) -> tuple[str, int] | None:
    """Return a message about the ranks whose loss caused `error`, and the rank of this machine that reports it.

    Returns None where the error has another cause. `processes`: those of all ranks; `rank`: this one.
    """
    if len(processes) < 2 or not _BROKEN.search(str(error)):
        return None
    own = processes[rank]
    here = [other for other, process in enumerate(processes) if _machine(process) == _machine(own)]
    until = time.monotonic() + _WAIT_S
    while not (gone := [other for other in here if not _runs(processes[other])]) and time.monotonic() < until:
        time.sleep(0.05)
    hosts = sorted({process["host"] for process in processes if _machine(process) != _machine(own)})
    if gone:
        gone = _first_lost(gone, store)
        several = len(gone) > 1
        names = " and ".join(str(other) for other in gone)
        on = f" on {own['host']}" if hosts else ""
        what = f"rank{'s' * several} {names}{on} {'are' if several else 'is'} gone"
    elif hosts:
        reason = str(error).partition("\n")[0]
        what = f"a rank on {' or '.join(hosts)} is gone, or cannot be reached any more ({reason})"
    else:
        return None  # all ranks run: the error has another cause
    reporter = min(other for other in here if other not in gone or other == rank)
    return f"{what}; rerun the command to resume the run", reporter


def _first_lost(gone: list[int], store: Store | None) -> list[int]:
    """Return the ranks that were lost first; others of `gone` may have ended as a consequence."""
    assert store is not None
    own = " ".join(map(str, gone))
    with suppress(RuntimeError):  # rank 0, which hosts the store, is gone
        return [int(rank) for rank in store.compare_set(_KEY, "", own).decode("ascii").split()] or gone
    return [0] if 0 in gone else gone


def _machine(process: dict[str, Any]) -> tuple[str, str]:
    return process["host"], process["namespace"]


def _namespace() -> str:
    """Return the identity of this process namespace: process numbers of two containers do not compare."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _runs(process: dict[str, Any]) -> bool:
    return process["started"] is None or _started(process["pid"]) == process["started"]


def _started(pid: int) -> str | None:
    """Return the start time of a process, in the kernel's units; None if there is none, or it is a zombie."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    return None
