"""Which rank is gone, when the others notice by a broken connection: one line, on each machine, in place of tracebacks.

Every rank tells the others once which process it is. Where a connection breaks, those who are left look which processes
of their machine have ended; of other machines they know no more than that.
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
_WAIT_S = 5.0  # for a process to end that has closed its connections
_KEY = "stlm/lost"

_everyone: list[dict[str, Any]] = []


def introduce() -> None:
    """Tell all ranks which process this is. Every rank calls it."""
    _everyone[:] = gather(_identity())


@contextmanager
def naming_lost_ranks() -> Iterator[None]:
    """Turn an error that the loss of another rank brought about into LostRank."""
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
        return None  # all are there: it is something else
    lost = LostRank(f"{what}; the same command continues the run")
    if any(other < rank and other not in gone for other in here):
        lost.told_by_rank_zero = True  # type: ignore[attr-defined]
    return lost


def _first_lost(gone: list[int]) -> list[int]:
    """Those that were lost first: others of them may have ended for their sake."""
    own = " ".join(map(str, gone))
    with suppress(RuntimeError):  # rank 0 is gone, which keeps the store
        return [int(rank) for rank in shared_store().compare_set(_KEY, "", own).decode("ascii").split()] or gone
    return [0] if 0 in gone else gone


def _identity() -> dict[str, Any]:
    pid = os.getpid()
    return {"host": socket.gethostname(), "namespace": _namespace(), "pid": pid, "started": _started(pid)}


def _machine(known: dict[str, Any]) -> tuple[str, str]:
    return known["host"], known["namespace"]


def _namespace() -> str:
    """Where process numbers mean the same: of two containers they do not."""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


def _runs(known: dict[str, Any]) -> bool:
    return known["started"] is None or _started(known["pid"]) == known["started"]


def _started(pid: int) -> str | None:
    """When a process was started, as its system tells it; None if there is none, or but its exit code."""
    with suppress(OSError):
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    return None
