"""The records of a run are written or an error is raised; a closed standard output does not stop the run."""

from __future__ import annotations

import os
import resource
import sys

import pytest

from stlm.errors import CheckpointError
from stlm.training.metrics.monitor import Monitor


@pytest.fixture
def monitor(tmp_path):
    monitor = Monitor(tmp_path)
    monitor.open(1)
    yield monitor
    monitor.close()


def test_a_full_disk_is_reported_once(monitor):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))
    try:
        with pytest.raises(CheckpointError, match=r"cannot write .*metrics\.jsonl: the file would exceed the size"):
            monitor.record({"step": 1, "split": "train"})
        monitor.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_closed_pipe_does_not_stop_the_log(monitor, tmp_path, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    pipe = os.fdopen(write, "w")
    monkeypatch.setattr(sys, "stdout", pipe)
    monitor.say("one")
    monitor.say("two")
    assert [line[20:] for line in (tmp_path / "train.log").read_text().splitlines()] == ["one", "two"]
    with pytest.raises(BrokenPipeError):
        pipe.close()
