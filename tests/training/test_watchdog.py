"""Ranks that hang end and print their stacks; slow ranks do not."""

from __future__ import annotations

import signal
import time

import pytest
from tiny_run import wait_for_step
from torch.distributed import HashStore

from stlm.training.distributed import watchdog
from stlm.training.distributed.watchdog import BEATS, Watchdog

LONG = ("--set", "training.max_steps=100000", "training.save_every_steps=100000", "training.hang_timeout_s=4")


@pytest.fixture
def ended(monkeypatch):
    """Record the exit codes of processes, which continue to run."""
    codes: list[int] = []
    monkeypatch.setattr(watchdog.os, "_exit", codes.append)
    return codes


def test_only_what_stands_still_is_ended(tmp_path, ended):
    store, dog = HashStore(), Watchdog()
    dog.start(tmp_path / "stacks", 3, 0.4, store)
    for _ in range(3):
        with dog.watching("a step"):
            time.sleep(0.2)
            dog.renew()  # as by every forward of a long validation
            time.sleep(0.3)
    time.sleep(0.6)  # between two steps, as where a notebook waits for its reader
    with dog.watching("a step"), dog.busy():  # rank 0 writes to a slow disk, and sends beats
        time.sleep(0.9)
    assert ended == [] and store.add(BEATS, 0) > 3
    with dog.watching("a step"):
        while not ended:
            time.sleep(0.05)
    dog.stop()
    assert ended[0] == 1
    text = (tmp_path / "stacks/rank_3.txt").read_text()
    assert "a step made no progress for 0.4 s (training.hang_timeout_s)" in text
    assert "test_only_what_stands_still_is_ended" in text and "_watch" in text


def test_writing_the_stacks_of_one_rank_requests_those_of_others(tmp_path, ended):
    dog = Watchdog()
    dog.start(tmp_path / "stacks", 0, 100.0, HashStore())
    dog.tick_s = 0.01
    dog.start(tmp_path / "stacks", 0, 0.1, HashStore())  # which ends the first one
    (tmp_path / "stacks").mkdir()
    while not ended:
        time.sleep(0.01)
    dog.stop()
    assert "another rank hangs" in (tmp_path / "stacks/rank_0.txt").read_text()


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_ends_the_others(pretrain, tmp_path, stopped):
    """A stopped rank resembles a hung node: rank 0 hosts the store through which the others would learn of it."""
    run_dir = tmp_path / "run"
    processes = pretrain.start(run_dir, *LONG, ranks=2, stage=2)
    wait_for_step(run_dir, 5, processes)
    processes[stopped].send_signal(signal.SIGSTOP)
    try:
        _, errors = processes[1 - stopped].communicate(timeout=60)
        assert processes[1 - stopped].returncode == 1, errors
        (stacks,) = run_dir.glob("stacks/*/rank_*.txt")
        assert stacks.name == f"rank_{1 - stopped}.txt"
        assert f"stacks in {stacks}" in errors
        assert "scripts/pretrain.py" in stacks.read_text()
    finally:
        processes[stopped].kill()
        processes[stopped].communicate()
