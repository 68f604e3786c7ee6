"""Is the launcher still there? One that is killed may leave its ranks behind, training for nobody.

The `deepspeed` command dies of SIGTERM at once; its second process, launch.py, which is the parent of the ranks, lives
on with them. torchrun and mpirun pass SIGTERM on, but leave their ranks when they are killed by SIGKILL. So a rank
remembers the processes above it that belong to its launcher, and looks now and then whether they still are above it.
"""

from __future__ import annotations

import os
from pathlib import Path

# Those that start ranks, by the name of the program, of the Python script, or of the module.
_COMMANDS = {"deepspeed", "torchrun", "mpirun", "mpiexec", "orterun", "orted"}
_MODULES = {"deepspeed.launcher.runner", "deepspeed.launcher.launch", "torch.distributed.run"}
_NODE_LAUNCHER = "deepspeed.launcher.launch"  # one on each node, started by `deepspeed` itself or by ssh
_INIT = 1  # becomes the parent of those whose parent is gone


class Launcher:
    """What started this process; found when this is made, so make it early."""

    def __init__(self) -> None:
        above: list[int] = []
        names: set[str] = set()
        pid = os.getppid()
        while names_here := _launchers_in(pid):
            above.append(pid)
            names = names_here
            pid = _parent_of(pid)
        if _NODE_LAUNCHER in names:  # whatever started it is part of the launch as well
            above.append(pid)
        self._above = above
        self._gone = _NODE_LAUNCHER in names and pid == _INIT  # already

    def is_gone(self) -> bool:
        """Whether a process of the launcher has ended, so that this one should. Costs microseconds."""
        if self._above and not self._gone:
            pids = [os.getppid()]
            pids += [_parent_of(pid) for pid in self._above[:-1]]
            self._gone = pids != self._above
        return self._gone


def _launchers_in(pid: int) -> set[str]:
    """The names of launchers in the command line of a process; empty where it is none, or no longer there."""
    words = _read(pid, "cmdline").split("\0")
    return {os.path.basename(word) for word in words[:2]} & _COMMANDS | set(words[:5]) & _MODULES


def _parent_of(pid: int) -> int:
    """The parent of a process; 0 if there is no such process."""
    after_name = _read(pid, "stat").rpartition(")")[2].split()  # state, parent, …
    return int(after_name[1]) if after_name else 0


def _read(pid: int, file: str) -> str:
    try:
        return Path(f"/proc/{pid}/{file}").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
