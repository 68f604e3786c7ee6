"""Start ranks in a fraction of a second, as forks of a process that has already imported everything.

That process is called torchrun, and forks a launcher for each run, which forks the ranks: to them it all looks as if a
real launcher had started them, and its death is noticed like the death of one. Run as a script, this file is it.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2] if (Path(__file__).parents[2] / "stlm").is_dir() else Path(os.environ["STLM_ROOT"])
FAULTS = ROOT / "tests" / "faults"
# The modules that a rank imports, and those that its libraries import on first use.
IMPORTED = (
    "stlm.commands.pretrain", "data_pipeline.loading.loaders", "stlm.stlm", "stlm.training.trainer",
    "stlm.training.optim.optimizers",
    "deepspeed.runtime.zero.stage3", "deepspeed.runtime.zero.stage_1_and_2", "torch.utils.tensorboard",
    "deepspeed.runtime.zero.muon.original_muon",  # compiles a function, and so imports torch's compiler: 2 s
)  # fmt: skip
STOPPED = "stopped"  # stands for the exit code of a rank that was killed because it hung


class Launchpad:
    """The process that forks; it lives from construction to `close`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        script = folder / "torchrun"
        shutil.copy(__file__, script)
        drop = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
        environment = {name: value for name, value in os.environ.items() if name not in drop}
        environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "STLM_ROOT": str(ROOT)}
        self._process = subprocess.Popen(
            [sys.executable, script], env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._read()  # ready

    def run(self, arguments: list[str], ranks: int, fault: str | None = None, timeout_s: float = 120) -> Run:
        """Run pretrain.py with `arguments` on `ranks` ranks to its end. `fault` names a function of injections.py."""
        run = self.start(arguments, ranks, fault)
        run.wait(timeout_s)
        return run

    def start(self, arguments: list[str], ranks: int, fault: str | None = None) -> Run:
        """Start such a run without waiting for it."""
        folder = Path(tempfile.mkdtemp(dir=self._folder))
        job = {"arguments": arguments, "ranks": ranks, "fault": fault, "folder": str(folder)}
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        self._read()
        return Run(folder, ranks)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline(), "the launchpad has ended"


class Run:
    """Ranks that were started together."""

    def __init__(self, folder: Path, ranks: int) -> None:
        self._folder = folder
        self._ranks = ranks

    def wait(self, timeout_s: float) -> None:
        """Return when all ranks have ended, whether their launcher has seen it or is gone itself."""
        deadline = time.monotonic() + timeout_s
        while any(map(is_running, self.pids())):
            if time.monotonic() > deadline:
                for pid in filter(is_running, self.pids()):
                    os.kill(pid, signal.SIGKILL)
                raise AssertionError(f"the ranks have not ended in {timeout_s:.0f} s\n{self.output()}")
            time.sleep(0.02)

    def pids(self) -> list[int]:
        """Return the process ids of the ranks and of their launcher."""
        return json.loads((self._folder / "pids").read_text())

    def codes(self) -> list[Any] | None:
        """Return the exit code of each rank; None if the launcher did not live to see them."""
        path = self._folder / "codes"
        return json.loads(path.read_text()) if path.exists() else None

    def output(self) -> str:
        return "".join((self._folder / f"rank{rank}").read_text() for rank in range(self._ranks))


def is_running(pid: int) -> bool:
    """Return whether a process runs and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---------------------------------------------------------------------- inside the process that forks


def serve() -> None:
    """Import everything, then fork a launcher for each line of input."""
    sys.path[:0] = [str(ROOT), str(FAULTS)]
    for name in IMPORTED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # finished launchers are reaped by the kernel
    print("ready", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if os.fork() == 0:
            launch(job)
        while not Path(job["folder"], "pids").exists():
            time.sleep(0.005)
        print("started", flush=True)


def launch(job: dict[str, Any]) -> None:
    """Run a launcher: fork the ranks, wait for them, write their exit codes."""
    from stlm.training.distributed.ranks import free_port

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setsid()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    folder, ranks = Path(job["folder"]), job["ranks"]
    if ranks > 1:
        os.environ |= {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            train(rank, job)
        pids.append(pid)
    (folder / "writing").write_text(json.dumps([*pids, os.getpid()]))
    os.replace(folder / "writing", folder / "pids")

    codes: dict[int, Any] = {}
    while len(codes) < ranks:
        pid, status = os.waitpid(-1, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            codes[pid] = STOPPED
        elif codes.get(pid) != STOPPED:
            codes[pid] = os.waitstatus_to_exitcode(status)
    for pid, code in codes.items():
        if code == STOPPED:
            os.kill(pid, signal.SIGKILL)
    (folder / "writing").write_text(json.dumps([codes[pid] for pid in pids]))
    os.replace(folder / "writing", folder / "codes")
    os._exit(0)


def train(rank: int, job: dict[str, Any]) -> None:
    """Run a rank: scripts/pretrain.py, unchanged, with a fault in it."""
    output = os.open(Path(job["folder"], f"rank{rank}"), os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if job["ranks"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    import injections

    from stlm.commands import pretrain
    from stlm.commands.program import leave, run

    sys.argv = [str(ROOT / "scripts/pretrain.py"), *job["arguments"]]
    sys.modules["__main__"].__file__ = sys.argv[0]
    if job["fault"] is not None:
        injections.FAULTS[job["fault"]](rank)
    try:
        run(pretrain.main)
    except SystemExit as ending:
        leave(ending.code)
    except BaseException:
        import traceback

        traceback.print_exc()
        leave(1)


if __name__ == "__main__":
    serve()
