"""Extended or changed runs: their directory, output, rows read, and records."""

from __future__ import annotations

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from tiny_run import build_trainer, read_metrics, train

from data_pipeline.loading.prepared_data import PreparedData
from stlm.checkpoints import checkpoints_of
from stlm.config import load_run_config
from stlm.errors import ConfigError, Stopped
from stlm.training.deepspeed.state_transfer import full_state
from stlm.training.loaders import batch_sizes_of, build_loaders
from stlm.training.run.checkpoint import read_progress, read_state
from stlm.training.run.run_directory import choose_run_directory, why_not_extended


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir, config_file):
    """Make a finished run of 6 steps."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train(build_trainer(config_file, data_dir, run_dir, "training.max_steps=6"))
    return run_dir


@pytest.fixture
def started(finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    return run_dir


def chosen(runs, config_file, data_dir, *overrides, allow_change=False, resume="auto", fingerprint=None):
    config = load_run_config(config_file, overrides)
    fingerprint = fingerprint or PreparedData.open(data_dir).fingerprint
    path, note = choose_run_directory(
        "tiny", resume, runs, lambda run: why_not_extended(run, config, fingerprint, allow_change)
    )
    return path.name, note


def test_a_finished_run_is_extended_by_a_larger_limit(tmp_path, finished, config_file, data_dir):
    """Only the newest run is extended, and only if nothing else differs; the same command begins a new run."""
    runs = tmp_path / "runs"
    shutil.copytree(finished, runs / "tiny")

    def choose(*overrides, **options):
        return chosen(runs, config_file, data_dir, *overrides, **options)

    same, more = "training.max_steps=6", "training.max_steps=9"
    again = f"{runs}/tiny is finished at step 6; to extend it, raise training.max_steps; starting a new run"
    assert choose(same) == ("tiny-2", again)
    assert choose("training.max_steps=5")[0] == "tiny-2"
    assert choose(more) == ("tiny", f"{runs}/tiny is finished; this command extends it")
    assert choose(more, "training.keep_last=9")[0] == "tiny"
    lower_rate = (more, "training.learning_rate=1e-3")
    name, note = choose(*lower_rate)
    assert name == "tiny-2" and "with different settings: training.learning_rate; starting a new run" in note
    assert choose(*lower_rate, allow_change=True)[0] == "tiny"
    assert choose(more, "seed=2", allow_change=True)[0] == "tiny-2"
    name, note = choose(more, fingerprint="0" * 64)
    assert name == "tiny-2" and "on different data" in note
    assert choose(more, resume="never")[0] == "tiny-2"
    assert choose(more, "training.limits.bytes=100")[0] == "tiny-2"  # more steps, but not more text

    shutil.copytree(finished, runs / "tiny-2")
    assert choose(same)[0] == "tiny-3" and choose(more)[0] == "tiny-2" and choose(more, resume="must")[0] == "tiny-2"
    train(build_trainer(config_file, data_dir, runs / "tiny-2", more))
    assert choose(more)[0] == "tiny-3"  # the same command again does not extend an older run
    assert choose(same)[0] == "tiny-3"


@pytest.mark.parametrize("limit", ["ids", "bytes"])
def test_a_limit_that_is_raised_extends_a_run(tmp_path, config_file, data_dir, limit):
    runs, key = tmp_path / "runs", f"training.limits.{limit}"
    train(build_trainer(config_file, data_dir, runs / "tiny", f"{key}=1000"))
    name, note = chosen(runs, config_file, data_dir, f"{key}=1000")
    assert name == "tiny-2" and f"; to extend it, raise {key}; starting a new run" in note
    assert chosen(runs, config_file, data_dir, f"{key}=2000")[0] == "tiny"
    assert chosen(runs, config_file, data_dir)[0] == "tiny"


def test_a_resumed_run_prints_its_checkpoint_and_the_new_end_of_its_schedule(make_trainer, started, data_dir, capsys):
    train(make_trainer(started, "training.max_steps=9"))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"run: {started}, continuing from {started}/checkpoints/step_00000006, of 9 steps"
    assert printed[1].startswith(f"data: {data_dir}: ") and printed[2].startswith("model: byte → transformer → linear,")
    assert "changed: training.max_steps from 6 to 9" in printed
    rates = {record["step"]: record["learning_rate"] for record in read_metrics(started, "train")}
    assert (
        f"the schedule (cosine) now ends at step 9; the learning rate of step 7 is {rates[7]:.2e}, that of step 6 was "
        f"{rates[6]:.2e}" in printed
    )
    assert rates[7] > rates[6] and [*rates] == [*range(1, 10)]
    starts = json.loads((started / "environment.json").read_text())["starts"]
    assert "changed" not in starts[0] and starts[1]["changed"] == {"training.max_steps": [6, 9]}


def test_limits_are_printed_and_cannot_be_lowered_below_the_progress(make_trainer, tmp_path, capsys):
    few, run_dir = ("training.limits.ids=600", "training.limits.wall_time_s=500"), tmp_path / "run"
    train(make_trainer(run_dir, *few))
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"run: {run_dir}, a new run of 12 steps or 600 ids or 500 s of training"
    seen = read_progress(checkpoints_of(run_dir)[0])["ids_seen"]
    saved = (run_dir / "config.yaml").read_text()
    for lower in ("training.limits.ids=1", "training.limits.bytes=1", "training.limits.wall_time_s=1e-9"):
        with pytest.raises(ConfigError, match=rf"{lower.split('=')[0]}: got 1\S*, but \S+ has already (seen|trained)"):
            make_trainer(run_dir, *few, lower)
    assert (run_dir / "config.yaml").read_text() == saved
    train(make_trainer(run_dir, *few, f"training.limits.ids={seen}", "training.limits.bytes=900000"))
    printed = capsys.readouterr().out.splitlines()
    assert "changed: training.limits.bytes from null to 900000" in printed
    ends = f"step 12 or {seen} ids or 900,000 bytes or 500 s of training"
    assert f"the schedule (cosine) now ends at {ends}, where this run is" in printed


def test_init_from_is_refused_for_a_run_with_weights_of_its_own(make_trainer, started):
    with pytest.raises(ConfigError, match=r"training\.init_from: got 'runs/other', which has no effect"):
        make_trainer(started, "training.max_steps=9", "training.init_from=runs/other")


ASKED = ("training.max_steps=12", "training.learning_rate=1e-3", "training.schedule=constant", "training.batch_size=16")


def test_changes_are_refused_unless_requested(make_trainer, started):
    with pytest.raises(ConfigError) as caught:
        make_trainer(started, *ASKED, "model.width=64")
    message = str(caught.value)
    assert "training.batch_size: was 8, now 16" in message
    assert (
        "--allow-change, which keeps weights and moments, also: training.batch_size, training.learning_rate" in message
    )
    with pytest.raises(ConfigError) as caught:
        make_trainer(started, *ASKED, "model.width=64", "seed=3", allow_change=True)
    message = str(caught.value)
    assert "model.width" in message and "seed" in message and "batch_size: was" not in message


def test_changes_on_request_keep_the_moments_and_the_order(make_trainer, started, data_dir, config_file):
    """No row is repeated or skipped, the change is recorded, and an interrupted run gives the same."""
    before = read_state(checkpoints_of(started)[0])
    trainer = make_trainer(started, *ASKED, allow_change=True)
    held = full_state(trainer.engine)
    assert held.updates == before.updates == 6
    for key in ("exp_avg", "exp_avg_sq"):
        assert all(torch.equal(tensor, held.moments[key][name]) for name, tensor in before.moments[key].items())
    copy = started.with_name("copy")
    with pytest.raises(Stopped):
        for step in trainer.steps():
            trainer.log(step, trainer.train_step(step))
            if step == 8:
                os.kill(os.getpid(), signal.SIGTERM)
    shutil.copytree(started, copy)
    train(make_trainer(started, *ASKED))  # the settings now belong to the run
    progress = read_progress(checkpoints_of(started)[0])
    assert progress["batch_sizes"] == [[0, 8], [6, 16]] and progress["sequences_seen"] == 6 * 8 + 6 * 16
    (record,) = read_metrics(started, "changes")
    assert (record["step"], record["was"]["training.batch_size"], record["now"]["training.batch_size"]) == (6, 8, 16)
    assert load_run_config(started).training.batch_size == 16
    records = read_metrics(started, "train")
    assert {record["learning_rate"] for record in records if record["step"] > 6} == {1e-3}
    assert records[-1]["epoch"] == pytest.approx(records[5]["epoch"] * (6 * 8 + 6 * 16) / (6 * 8))

    train(make_trainer(copy, *ASKED, "training.batch_size=4", allow_change=True))  # the same once more, after step 8
    assert read_progress(checkpoints_of(copy)[0])["batch_sizes"] == [[0, 8], [6, 16], [8, 4]]
    config = load_run_config(config_file)
    plain = build_loaders(config, PreparedData.open(data_dir)).train
    loaders = build_loaders(load_run_config(copy), PreparedData.open(data_dir)).train
    loaders.batch_sizes = [[0, 8], [6, 16], [8, 4]]
    rows = [loaders.rows(step, 0, loaders.batch_size(step)).ids for step in range(1, 11)]
    expected = [plain.rows(step, 0, 8).ids for step in range(1, 12)]
    assert [len(each) for each in rows] == [8] * 6 + [16] * 2 + [4] * 2
    assert np.array_equal(np.concatenate(rows), np.concatenate(expected))


@pytest.mark.slow
def test_two_ranks_apply_the_same_change_as_one(pretrain, started, tmp_path):
    """The ZeRO stage changes at the same time."""
    shutil.copytree(started, tmp_path / "two")
    change = ("--allow-change", "--set", *ASKED)
    output = pretrain(started, *change)
    pretrain(tmp_path / "two", *change, ranks=2, stage=2)
    losses = [[record["loss"] for record in read_metrics(run, "train")] for run in (started, tmp_path / "two")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5) and len(losses[0]) == 12
    assert output.count("changed: training.batch_size from 8 to 16") == 1


def test_older_checkpoints_have_one_batch_size():
    assert batch_sizes_of({}, 8) == [[0, 8]]
    assert batch_sizes_of({"step": 6, "sequences_seen": 48}, 8) == [[0, 8]]
    assert batch_sizes_of({"step": 6, "sequences_seen": 48}, 16) == [[0, 8], [6, 16]]
    assert batch_sizes_of({"step": 6, "batch_sizes": [[0, 8], [6, 4]]}, 16) == [[0, 8], [6, 16]]
