"""Identification of a lost rank after a broken connection: one line on each machine instead of tracebacks.

Every rank sends the others its process number once. When a connection breaks, the remaining ranks check which processes
on their own machine have ended; for other machines they can only report that the connection broke.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist

from stlm.training.distributed.collectives import gather, shared_store
from stlm.training.distributed.stop_request import LostRank

_BROKEN = re.compile(
    r"connection (was likely )?(closed|reset|refused)|broken pipe|failed to (recv|send|connect)|remote process exited",
    re.IGNORECASE,
)
_WAIT_S = 5.0  # time for a process that has closed its connections to end
_KEY = "stlm/lost"

_everyone: list[dict[str, Any]] = []


def introduce() -> None:
    """Send all ranks the identity of this process. Every rank calls it."""
    _everyone[:] = gather(_identity())


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Turn an error caused by the loss of another rank into LostRank."""
    try:
        yield
    except RuntimeError as error:
        if (lost := _lost(error)) is None:
            raise
        raise lost from error


def _lost(error: RuntimeError) -> LostRank | None:
    if len(_everyone) < 2 or not _BROKEN.search(str(error)):
        return None
    rank = dist.get_rank()
    here = [other for other, known in enumerate(_everyone) if _machine(known) == _machine(_everyone[rank])]
    until = time.monotonic() + _WAIT_S
    while not (gone := [other for other in here if not _runs(_everyone[other])]) and time.monotonic() < until:
        time.sleep(0.05)
    hosts = sorted({known["host"] for known in _everyone if _machine(known) != _machine(_everyone[rank])})
    if gone:
        gone = _first_lost(gone)
        several = len(gone) > 1
        names = " and ".join(str(other) for other in gone)
        on = f" on {_everyone[rank]['host']}" if hosts else ""
        what = f"rank{'s' * several} {names}{on} {'are' if several else 'is'} gone"
    elif hosts:
        reason = str(error).partition("\n")[0]
        what = f"a rank on {' or '.join(hosts)} is gone, or cannot be reached any more ({reason})"
    else:
        return None  # all ranks run: the error has another cause
    lost = LostRank(f"{what}; the same command continues the run")
    if any(other < rank and other not in gone for other in here):
        lost.told_by_rank_zero = True  # type: ignore[attr-defined]
    return lost


def _first_lost(gone: list[int]) -> list[int]:
    """Return the ranks that were lost first; others of `gone` may have ended as a consequence."""
    own = " ".join(map(str, gone))
    with suppress(RuntimeError):  # rank 0, which hosts the store, is gone
        return [int(rank) for rank in shared_store().compare_set(_KEY, "", own).decode("ascii").split()] or gone
    return [0] if 0 in gone else gone


def _identity() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "namespace": _namespace(), "pid": pid, "started": _started(pid)}


def _machine(known: dict[str, Any]) -> tuple[str, str]:
    return known["host"], known["namespace"]


def _namespace() -> str:
    """Return the identity of this process namespace: process numbers of two containers do not compare."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _runs(known: dict[str, Any]) -> bool:
    return known["started"] is None or _started(known["pid"]) == known["started"]


def _started(pid: int) -> str | None:
    """Return the start time of a process, in the kernel's units; None if there is none, or it is a zombie."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    return None
