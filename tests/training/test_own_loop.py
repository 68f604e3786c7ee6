"""Training loops without `trainer.steps()`: micro-steps from 0, their own intervals, resuming, and the end."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys

import pytest
from tiny_run import CONFIG, ROOT, build_trainer, read_metrics, spawn, train, wait_for_step

from stlm.checkpoints import checkpoints_of, step_of
from stlm.training.run.checkpoint import check_checkpoint

README = (ROOT / "README.md").read_text(encoding="utf-8")
(BLOCK,) = (
    block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "range(max_iterations)" in block
)


def run_loop(trainer, steps, log_interval=1, eval_interval=6, save_interval=6):
    """Run README's loop; return the values of train_step and val_step."""
    losses, scores = [], []
    for step in range(steps):
        losses.append(trainer.train_step(step))
        if step % log_interval == 0:
            trainer.log(step, losses[-1])
        if step % eval_interval == 0:
            scores.append(trainer.val_step())
            trainer.log(step, scores[-1], split="val")
        if step % save_interval == 0:
            trainer.save_checkpoint(step)
    return losses, scores


@pytest.mark.parametrize(("micro_batch_size", "stage"), [("null", 0), ("2", 0), ("2", 2)])
def test_losses_equal_those_of_the_native_loop(make_trainer, tmp_path, micro_batch_size, stage):
    settings = f"training.micro_batch_size={micro_batch_size}"
    expected = train(make_trainer(tmp_path / "native", settings, stage=stage))
    trainer = make_trainer(tmp_path / "own", settings, stage=stage)
    parts = trainer.grad_accum_steps
    assert parts == (1 if micro_batch_size == "null" else 4)
    losses, scores = run_loop(trainer, 12 * parts + 2, log_interval=parts, eval_interval=5)  # two steps beyond the end
    assert losses[parts - 1 : 12 * parts : parts] == expected
    assert all(math.isnan(loss) for loss in losses[: parts - 1]) and losses[-1] == expected[-1]
    trainer.close()
    native, own = (read_metrics(tmp_path / name, "train") for name in ("native", "own"))
    assert own == native and len(own) == 12
    validations = read_metrics(tmp_path / "own", "validation")
    assert [record["bits_per_byte"] for record in validations[:-1]] == [score for score in scores if score == score]
    updates = [(step + 1) // parts for step in range(0, 12 * parts, 5)]
    assert [record["step"] for record in validations] == [*updates, 12]
    last = checkpoints_of(tmp_path / "own")[0]  # README's intervals miss the last update
    assert step_of(last) == 12 and check_checkpoint(last) is None


def test_intervals_are_those_of_the_loop_and_nothing_is_recorded_twice(make_trainer, tmp_path):
    trainer = make_trainer(tmp_path / "run", "training.log_every_steps=5", "training.eval_every_steps=100")
    for step in range(4):
        loss = trainer.train_step(step)
        trainer.log(step, loss)
        trainer.log(step, loss)
        trainer.log(step, 1.5, split="probe")
    trainer.log(3, trainer.val_step(), split="val")
    assert trainer.val_step() == trainer.progress.validation_bits_per_byte
    with pytest.raises(ValueError, match="the next step is 4, got 6"):
        trainer.train_step(6)
    trainer.close()
    records = read_metrics(tmp_path / "run")
    assert [(record["step"], record["split"]) for record in records] == [
        *((step, split) for step in (1, 2, 3, 4) for split in ("train", "probe")), (4, "validation"),
    ]  # fmt: skip
    assert records[1]["loss"] == 1.5


def test_steps_of_an_earlier_job_do_nothing(config_file, data_dir, tmp_path):
    """A dropped trainer completes its checkpoint and releases its folder."""

    def new_trainer(name):
        return build_trainer(config_file, data_dir, tmp_path / name, "training.micro_batch_size=4")

    run_loop(new_trainer("whole"), 24)
    trainer = new_trainer("parts")
    run_loop(trainer, 19)  # the last checkpoint is that of micro-step 18, after update 9
    del trainer
    assert [step_of(path) for path in checkpoints_of(tmp_path / "parts")] == [9, 6]
    trainer = new_trainer("parts")
    losses, scores = run_loop(trainer, 24)
    assert all(math.isnan(loss) for loss in losses[:19]) and all(math.isnan(score) for score in scores[:3])
    del trainer
    whole, parts = ([r for r in read_metrics(tmp_path / name) if r["step"] > 9] for name in ("whole", "parts"))
    assert parts == whole != []
    assert [r for r in read_metrics(tmp_path / "parts") if r["split"] == "train"] == read_metrics(
        tmp_path / "whole", "train"
    )


def test_the_loop_in_readme(data_dir, tmp_path):
    """SIGTERM saves and exits with 3; the rerun resumes, and ends with complete checkpoints and no lock."""
    (tmp_path / "mine.yaml").write_text(f"data: {{dir: {data_dir}}}\n{CONFIG}")
    slower = "import time; time.sleep(0.2)\n    train_loss = trainer.train_step(step)"
    program = BLOCK.replace('"runs/loop"', f'"{tmp_path}/run"').replace('"mine.yaml"', f'"{tmp_path}/mine.yaml"')
    (process,) = spawn(
        [sys.executable, "-c", program.replace("train_loss = trainer.train_step(step)", slower)], ranks=1
    )
    wait_for_step(tmp_path / "run", 4, [process])
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 3 and "after saving; the same command continues it" in out and not err, (out, err)
    saved = step_of(checkpoints_of(tmp_path / "run")[0])
    assert 4 <= saved < 20

    for program_ in (program, program):  # the second finds nothing to do
        done = subprocess.run([sys.executable, "-c", program_], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["split"] == "train"] == list(range(1, 21))
    newest = checkpoints_of(tmp_path / "run")[0]
    assert step_of(newest) == 20 and check_checkpoint(newest) is None
