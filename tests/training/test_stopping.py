"""A run asked to stop within a validation or a task stops there, and resumes as an uninterrupted run would."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import pytest
from tiny_run import ROOT, build_trainer, read_metrics, spawn, train

from stlm.checkpoints import checkpoints_of
from stlm.errors import Stopped
from stlm.training.run.run_directory import is_finished

EVALS = ("evals.every_steps=4", "training.eval_every_steps=4", "training.save_every_steps=6")


def ask_in_validation(trainer, steps):
    """Send this process SIGTERM in the second forward of the validation of each of `steps`, once. Count forwards."""
    forward, counts = trainer.engine.forward, {}

    def counted(*inputs, **named):
        if not trainer.model.training:
            counts[trainer.step] = counts.get(trainer.step, 0) + 1
            if trainer.step in steps and counts[trainer.step] == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return forward(*inputs, **named)

    trainer.engine.forward = counted
    return counts


class Tasks:
    """Tasks that last until they are interrupted, at the given steps; at others they return the sum of the weights."""

    def __init__(self, long=()):
        self.long = long

    def __call__(self, step, weights):
        total = sum(float(tensor.sum()) for _, tensor in weights)
        if step in self.long:
            os.kill(os.getpid(), signal.SIGUSR1)
            until = time.monotonic() + 60
            while time.monotonic() < until:
                pass
            pytest.fail("a task was not interrupted")
        return {"sum": {"total": total}}, f"sum {total:.4f}"


def final_files(run_dir):
    (newest, *_) = checkpoints_of(run_dir)
    return {path.relative_to(newest): path.read_bytes() for path in newest.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data_dir, config_file):
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    train(build_trainer(config_file, data_dir, run_dir, *EVALS, evaluate=Tasks()))
    return run_dir


@pytest.mark.parametrize("stage", [0, 3])
def test_an_interrupted_validation_is_repeated_on_resume(make_trainer, tmp_path, whole, stage):
    """The stop comes at step 4, where no checkpoint is due, and at the last one, step 12."""
    for step in (4, 12):
        trainer = make_trainer(tmp_path / "run", *EVALS, evaluate=Tasks(), stage=stage)
        counts = ask_in_validation(trainer, {step})
        with pytest.raises(Stopped, match=f"stopped by SIGTERM at step {step} after saving"):
            train(trainer)
        assert counts[step] <= 4
        assert not is_finished(tmp_path / "run")
        state = json.loads((checkpoints_of(tmp_path / "run")[0] / "state.json").read_text())
        assert (state["step"], state["scheduled"], state["pending"]) == (step, False, ["validation", "checkpoint"])
        assert not any(record["step"] == step for record in read_metrics(tmp_path / "run", "validation"))
    train(make_trainer(tmp_path / "run", *EVALS, evaluate=Tasks(), stage=stage))
    assert is_finished(tmp_path / "run")
    if stage == 0:
        assert read_metrics(tmp_path / "run") == read_metrics(whole)
        assert final_files(tmp_path / "run") == final_files(whole)
        assert [path.name for path in checkpoints_of(tmp_path / "run")] == ["step_00000012", "step_00000006"]


def test_interrupted_tasks_are_repeated_on_resume(make_trainer, tmp_path, whole):
    for step in (4, 12):
        with pytest.raises(Stopped, match=f"stopped by SIGUSR1 at step {step} after saving"):
            train(make_trainer(tmp_path / "run", *EVALS, evaluate=Tasks({step})))
    train(make_trainer(tmp_path / "run", *EVALS, evaluate=Tasks()))
    assert read_metrics(tmp_path / "run") == read_metrics(whole)
    assert final_files(tmp_path / "run") == final_files(whole)


def test_a_run_that_is_killed_after_pending_work_records_it_once(make_trainer, tmp_path, whole):
    with pytest.raises(Stopped):
        train(make_trainer(tmp_path / "run", *EVALS, evaluate=Tasks({4})))
    train(make_trainer(tmp_path / "run", *EVALS, evaluate=Tasks()), until=5)  # and no checkpoint is made
    train(make_trainer(tmp_path / "run", *EVALS, evaluate=Tasks()))
    assert read_metrics(tmp_path / "run") == read_metrics(whole)


ASKED_IN_A_TASK = """
import os, signal, sys
sys.path.insert(0, {root!r})
from stlm.evals import likelihood
from stlm.commands import pretrain
from stlm.commands.program import leave, run

score = likelihood._score
def asked(model, batch):
    os.kill(os.getpid(), signal.SIGTERM)
    likelihood._score = score
    return score(model, batch)

if os.environ["RANK"] == "1":
    likelihood._score = asked
try:
    run(pretrain.main)
except SystemExit as ending:
    leave(ending.code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 3])
def test_a_stop_of_one_rank_in_a_task_stops_the_other(pretrain, data_dir, config_file, tmp_path, stage):
    """Rank 0 is scoring its own items, and learns of the stop there."""
    evals = ("--set", "evals.every_steps=4", "evals.tasks=bits_per_byte,minimal_pairs", "evals.items=500",
             "training.max_steps=5")  # fmt: skip
    pretrain(tmp_path / "whole", *evals, ranks=2, stage=stage)
    script = tmp_path / "asked.py"
    script.write_text(ASKED_IN_A_TASK.format(root=str(ROOT)))
    command = [
        sys.executable, str(script), "--ds_config", str(ROOT / f"ds_configs/zero{stage}.json"), "--config",
        str(config_file), "--data", str(data_dir), "--run", str(tmp_path / "run"), *evals,
    ]  # fmt: skip
    processes = spawn(command, 2)
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [3, 3], outputs
    assert "stopped by a request to another rank at step 4 after saving" in outputs[0]
    assert "step 4/5  bits_per_byte" not in outputs[0]
    pretrain(tmp_path / "run", *evals, ranks=2, stage=stage)
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")
