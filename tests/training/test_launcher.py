"""A run ends with its parent: launchers that are killed, terminals that are closed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import RANK_VARIABLES, ROOT, listening, read_metrics, wait_for_step

from stlm.training.distributed.ranks import free_port

LONG = ("--set", "training.max_steps=100000", "training.save_every_steps=100000")


def test_terminating_the_deepspeed_command_stops_the_run(data_dir, config_file, tmp_path):
    """The launcher exits at once without its ranks; they save, and no process remains."""
    run_dir = tmp_path / "run"
    command = [
        f"{sys.prefix}/bin/deepspeed", "--num_accelerators", "2", "--master_port", str(free_port()),
        ROOT / "scripts/pretrain.py", "--config", config_file, "--data", data_dir, "--run", run_dir, *LONG,
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    with open(tmp_path / "output", "w") as output:
        front = subprocess.Popen(
            command, env=environment | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}, stdout=output, stderr=output,
            start_new_session=True,
        )  # fmt: skip
    try:
        wait_for_step(run_dir, 5, [front])
        assert len(processes_of(run_dir)) == 4  # the command, launch.py, two ranks
        addresses = [address for pid in pids_of(run_dir) for address in listening(pid)]
        assert addresses and all(address.is_loopback for address in addresses)
        front.terminate()
        assert front.wait(timeout=30) == -signal.SIGTERM
        deadline = time.monotonic() + 60
        while processes_of(run_dir):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    except BaseException:
        os.killpg(front.pid, signal.SIGKILL)
        print((tmp_path / "output").read_text())
        raise
    step = read_metrics(run_dir)[-1]["step"]
    reason = "(the end of its launcher|a request to another rank)"  # the other rank may have noticed it first
    assert re.search(f"stopped by {reason} at step {step} after saving", (run_dir / "train.log").read_text())
    assert (run_dir / f"checkpoints/step_{step:08d}/COMPLETE").is_file()


def processes_of(run_dir: Path) -> list[str]:
    """Return the processes that have the run's folder in their command line."""
    command = ["ps", "-ww", "-eo", "pid,args"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in lines if str(run_dir) in line]


def pids_of(run_dir: Path) -> list[int]:
    return [int(line.split()[0]) for line in processes_of(run_dir)]


@pytest.mark.parametrize(("parent", "expected"), [("torchrun", "gone"), ("mpirun", "gone"), ("my_script", "there")])
def test_only_launchers_are_watched(tmp_path, parent, expected):
    """A shell or script that started a run may have exited on purpose."""
    child = tmp_path / "child.py"
    child.write_text(
        f"import os, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n"
        "from stlm.training.distributed.signals import Launcher\n"
        "launcher, above = Launcher(), os.getppid()\n"
        "print('there' if not launcher.is_gone() else 'gone', flush=True)\n"
        "while os.getppid() == above: time.sleep(0.01)\n"
        "print('gone' if launcher.is_gone() else 'there', flush=True)\n"
    )
    script = tmp_path / parent
    script.write_text(f"import subprocess\nsubprocess.run([{sys.executable!r}, {str(child)!r}])\n")
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "there\n"
    process.kill()
    assert process.stdout.readline() == f"{expected}\n"
    process.wait()


def test_closing_the_terminal_stops_a_run(pretrain, tmp_path):
    """SIGHUP stops a run after saving, but not under nohup."""
    run_dir = tmp_path / "run"
    (process,) = pretrain.start(run_dir, *LONG)
    wait_for_step(run_dir, 5, [process])
    process.send_signal(signal.SIGHUP)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 3, errors
    assert "stopped by SIGHUP at step" in output

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # children inherit it
    try:
        (process,) = pretrain.start(tmp_path / "nohup", "--set", "training.max_steps=60")
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    wait_for_step(tmp_path / "nohup", 2, [process])
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
