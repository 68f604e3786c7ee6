"""Detection of a launcher that has ended and left its ranks behind.

The `deepspeed` command ends at once on SIGTERM, but its second process, launch.py, the parent of the ranks, lives on
with them. torchrun and mpirun pass SIGTERM on, but leave their ranks behind when killed by SIGKILL. So a rank stores
which of its ancestor processes belong to the launcher, and checks from time to time that they are still its ancestors.
"""

from __future__ import annotations

import os
from pathlib import Path

# Launchers, by the name of the program, the Python script, or the module.
_COMMANDS = {"deepspeed", "torchrun", "mpirun", "mpiexec", "orterun", "orted"}
_MODULES = {"deepspeed.launcher.runner", "deepspeed.launcher.launch", "torch.distributed.run"}
_NODE_LAUNCHER = "deepspeed.launcher.launch"  # one on each node, started by `deepspeed` itself or by ssh
_INIT = 1  # becomes the parent of orphaned processes


class Launcher:
    """The launcher of this process, found at construction; construct it early."""

    def __init__(self) -> None:
        above: list[int] = []
        names: set[str] = set()
        pid = os.getppid()
        while names_here := _launchers_in(pid):
            above.append(pid)
            names = names_here
            pid = _parent_of(pid)
        if _NODE_LAUNCHER in names:  # its parent is part of the launcher too
            above.append(pid)
        self._above = above
        self._gone = _NODE_LAUNCHER in names and pid == _INIT  # already

    def is_gone(self) -> bool:
        """Return True if a process of the launcher has ended, so that this process should too. Takes microseconds."""
        if self._above and not self._gone:
            pids = [os.getppid()]
            pids += [_parent_of(pid) for pid in self._above[:-1]]
            self._gone = pids != self._above
        return self._gone


def _launchers_in(pid: int) -> set[str]:
    """Return the names of launchers in the command line of a process; empty where it is none, or has ended."""
    words = _read(pid, "cmdline").split("\0")
    return {os.path.basename(word) for word in words[:2]} & _COMMANDS | set(words[:5]) & _MODULES


def _parent_of(pid: int) -> int:
    """Return the parent of a process; 0 if there is no such process."""
    after_name = _read(pid, "stat").rpartition(")")[2].split()  # state, parent, …
    return int(after_name[1]) if after_name else 0


def _read(pid: int, file: str) -> str:
    try:
        return Path(f"/proc/{pid}/{file}").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
