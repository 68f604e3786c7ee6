"""Checkpoints: a resumed run equals an uninterrupted one in every direction; damage and full disks are reported."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
import shutil
import subprocess
import threading

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from tiny_run import build_trainer, read_metrics, train

from data_pipeline.tokenizers import build_tokenizer
from stlm.checkpoints import checkpoints_of, newest_checkpoint
from stlm.config import load_run_config
from stlm.errors import CheckpointError, ConfigError
from stlm.stlm import STLM
from stlm.training.run import checkpoint
from stlm.training.run.checkpoint import read_state, write_checkpoint
from stlm.training.run.run_directory import choose_run_directory, is_finished
from stlm.training.run.state import State


@pytest.fixture(scope="module")
def finished(tmp_path_factory, data_dir, config_file):
    """Make an uninterrupted run of 12 steps."""
    run_dir = tmp_path_factory.mktemp("finished") / "run"
    train(build_trainer(config_file, data_dir, run_dir))
    return run_dir


@pytest.fixture
def stopped(finished, tmp_path):
    """Make a copy of that run as if killed while it logged step 9, in the middle of a line."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "checkpoints/step_00000012")
    lines = (finished / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:10]) + lines[10][:20])
    return run_dir


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_resumed_run_equals_an_uninterrupted_one(make_trainer, tmp_path, stage):
    """Equal digit for digit at the same settings: losses, norms, validation, and the final weights and moments."""
    for name in ("whole", "halves"):
        trainer = make_trainer(tmp_path / name, stage=stage)
        train(trainer, until=6 if name == "halves" else None)
    train(make_trainer(tmp_path / "halves", stage=stage, resume="must"))
    assert read_metrics(tmp_path / "halves") == read_metrics(tmp_path / "whole")
    whole, halves = (tmp_path / name / "checkpoints/step_00000012" for name in ("whole", "halves"))
    for file in ("model/model.safetensors", "optimizer.safetensors", "state.json", "COMPLETE"):
        assert (whole / file).read_bytes() == (halves / file).read_bytes()


@pytest.mark.parametrize("stages", [(0, 2, 3), (3, 1, 0), (2, 0, 1)])
def test_the_stage_may_change_at_any_resume(make_trainer, tmp_path, finished, stages):
    """The micro-batch may change as well; weights, moments and Adam's step count all arrive."""
    save = "training.save_every_steps=4"
    for stage, until, micro in zip(stages, (4, 8, None), ("null", "2", "4"), strict=True):
        train(make_trainer(tmp_path / "run", save, f"training.micro_batch_size={micro}", stage=stage), until)
    found, expected = read_metrics(tmp_path / "run"), read_metrics(finished)
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    for key in ("loss", "bits_per_byte"):
        assert [record[key] for record in found] == pytest.approx([record[key] for record in expected], abs=1e-6)
    state, other = (read_state(run / "checkpoints/step_00000012") for run in (tmp_path / "run", finished))
    assert state.updates == other.updates == 12
    for name, tensor in other.parameters.items():
        assert torch.allclose(tensor, state.parameters[name], atol=1e-5)
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.allclose(other.moments[key][name], state.moments[key][name], atol=1e-6, rtol=1e-3)


def test_records_logged_after_the_checkpoint_are_removed(make_trainer, finished, stopped):
    train(make_trainer(stopped))
    assert read_metrics(stopped) == read_metrics(finished)


def test_a_checkpoint_is_portable_and_complete(finished):
    path = finished / "checkpoints/step_00000012"
    files = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    recorded = json.loads((path / "COMPLETE").read_text())["files"]
    assert sorted([*recorded, "COMPLETE"]) == files
    state = json.loads((path / "state.json").read_text())
    assert (state["step"], state["updates"], state["sequences_seen"]) == (12, 12, 96)
    weights, moments = load_file(path / "model/model.safetensors"), load_file(path / "optimizer.safetensors")
    assert {tensor.dtype for tensor in [*weights.values(), *moments.values()]} == {torch.float32}
    assert sorted(moments) == sorted(f"{key}/{name}" for key in ("exp_avg", "exp_avg_sq") for name in weights)
    assert STLM.load(finished).config == load_run_config(finished).model


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer/tokenizer.json"])
def test_a_changed_model_is_not_loaded_silently(finished, tmp_path, name):
    shutil.copytree(finished, tmp_path / "run")
    path = tmp_path / "run/checkpoints/step_00000012/model" / name
    contents = bytearray(path.read_bytes())
    contents[-2] ^= 1
    path.write_bytes(contents)
    with pytest.raises(CheckpointError, match=f"step_00000012 is damaged: model/{name} has changed: its sha256"):
        STLM.load(tmp_path / "run")
    STLM.load(tmp_path / "run/checkpoints/step_00000006")


def test_large_optimizers_are_split_by_size(tmp_path, config_file):
    config = load_run_config(config_file).model
    tokenizer = build_tokenizer("byte")
    parameters = {name: p.detach() for name, p in STLM.from_config(config, tokenizer).named_parameters()}
    moments = {key: {name: torch.rand_like(p) for name, p in parameters.items()} for key in ("exp_avg", "exp_avg_sq")}
    path = tmp_path / "step_00000003"
    write_checkpoint(path, config, tokenizer, State(parameters, moments, 3), {"step": 3}, part_bytes=20_000)
    parts = sorted(file.name for file in path.glob("optimizer-*"))
    assert len(parts) > 3
    assert parts[1] == f"optimizer-00002-of-{len(parts):05d}.safetensors"
    found = read_state(path)
    assert found.updates == 3
    for key, named in moments.items():
        for name, tensor in named.items():
            assert torch.equal(found.moments[key][name], tensor)


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        ("flip", "optimizer.safetensors has changed: its sha256"),
        ("cut", r"model.safetensors has [\d,]+ bytes instead of [\d,]+"),
        ("lose", "state.json is missing"),
        ("undo", "it has no COMPLETE file"),
        ("blank", "its COMPLETE file cannot be read"),
    ],
)
def test_a_damaged_checkpoint_is_reported_and_skipped(make_trainer, finished, tmp_path, harm, problem, capfd):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    newest = run_dir / "checkpoints/step_00000012"
    damage(newest, harm)
    with pytest.raises(CheckpointError, match=f"step_00000012 is damaged: .*{problem}"):
        make_trainer(run_dir, resume="must")
    train(make_trainer(run_dir))
    told = capfd.readouterr().out
    assert "step_00000012 is damaged" in told
    assert "continuing from" in told and "step_00000006" in told
    assert read_metrics(run_dir) == read_metrics(finished)
    names = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert names == ["damaged_step_00000012", "step_00000006", "step_00000012"]


def damage(path, harm):
    optimizer = path / "optimizer.safetensors"
    if harm == "flip":
        contents = bytearray(optimizer.read_bytes())
        contents[-5] ^= 1
        optimizer.write_bytes(contents)
    elif harm == "cut":
        model = path / "model/model.safetensors"
        model.write_bytes(model.read_bytes()[:-100])
    elif harm == "lose":
        (path / "state.json").unlink()
    elif harm == "undo":
        (path / "COMPLETE").unlink()
    else:
        (path / "COMPLETE").write_text("")


def test_a_run_resumes_with_its_own_settings(make_trainer, stopped):
    with pytest.raises(ConfigError) as caught:
        make_trainer(stopped, "training.learning_rate=1e-3", "model.width=64", "training.max_steps=20")
    message = str(caught.value)
    assert "training.learning_rate: was 0.003, now 0.001" in message
    assert "model.width: was 32, now 64" in message
    assert "training.max_steps: was" not in message
    assert "Settings that may change: data.dir, data.mixture, data.verify, training." in message
    assert "training.max_steps, training.micro_batch_size" in message
    with pytest.raises(ConfigError, match="already at step 6"):
        make_trainer(stopped, "training.max_steps=5")
    trainer = make_trainer(stopped, "training.keep_last=1", "training.micro_batch_size=4")
    train(trainer)
    assert [path.name for path in checkpoints_of(stopped)] == ["step_00000012"]
    assert load_run_config(stopped).training.keep_last == 1


def test_a_run_resumes_with_its_own_data(make_trainer, stopped):
    state = stopped / "checkpoints/step_00000006/state.json"
    complete = state.with_name("COMPLETE")
    text = state.read_text()
    fingerprint = json.loads(text)["data_fingerprint"]
    state.write_text(text.replace(fingerprint, "0" * 64))
    sums = json.loads(complete.read_text())
    sums["files"]["state.json"]["sha256"] = hashlib.sha256(state.read_bytes()).hexdigest()
    complete.write_text(json.dumps(sums))
    with pytest.raises(CheckpointError, match=f"data with the fingerprint 000000000000, .*{fingerprint[:12]}"):
        make_trainer(stopped)


def test_a_checkpoint_of_another_shape_is_refused(make_trainer, finished, stopped):
    """The checkpoint's own config reveals it if that of the run is missing, before anything is written."""
    (stopped / "config.yaml").unlink()
    for settings in (("model.width=64",), ("model.embedder={kind: byte_patch}", "model.head={kind: byte_patch}")):
        with pytest.raises(CheckpointError, match=r"step_00000006 holds a model with different settings: model\."):
            make_trainer(stopped, *settings)
    assert not (stopped / "config.yaml").exists()
    trainer = make_trainer(stopped, "training.max_steps=6")
    wider = dataclasses.replace(trainer.config, model=dataclasses.replace(trainer.config.model, width=64))
    trainer._saver._config = wider
    with pytest.raises(CheckpointError, match=r"different settings: model\.width"):
        trainer.load_checkpoint(finished / "checkpoints/step_00000012")


def test_copies_of_checkpoints_are_no_checkpoints(make_trainer, finished, stopped):
    """A run neither resumes from copies nor counts them among the checkpoints to keep."""
    checkpoints = stopped / "checkpoints"
    for name in ("step_00000006 (copy)", "step_best"):
        shutil.copytree(checkpoints / "step_00000006", checkpoints / name)
    (checkpoints / "step_00000099").write_text("a file")
    train(make_trainer(stopped))
    assert read_metrics(stopped) == read_metrics(finished)
    assert sorted(path.name for path in checkpoints.iterdir()) == [
        "step_00000006", "step_00000006 (copy)", "step_00000012", "step_00000099", "step_best",
    ]  # fmt: skip
    assert newest_checkpoint(stopped) == checkpoints / "step_00000012"
    assert is_finished(stopped)


def test_resume_auto_never_and_must(make_trainer, finished, tmp_path):
    with pytest.raises(CheckpointError, match="has no checkpoint to resume from"):
        make_trainer(tmp_path / "new", resume="must")
    assert not (tmp_path / "new").exists()
    with pytest.raises(CheckpointError, match="already holds a run"):
        make_trainer(finished, resume="never")
    with pytest.raises(ConfigError, match="expected one of auto, never, must"):
        make_trainer(tmp_path / "new", resume="always")
    assert list(make_trainer(finished).steps()) == []


def test_one_job_at_a_time(make_trainer, tmp_path):
    first = make_trainer(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"run is in use by process \d+ on "):
        make_trainer(tmp_path / "run")
    first.close()
    make_trainer(tmp_path / "run")


@pytest.mark.parametrize("where", ["before writing", "while writing", "within a file"])
def test_a_full_disk_is_reported_and_leaves_the_run_intact(make_trainer, tmp_path, monkeypatch, finished, where):
    """The run ends with the reason at the next step, and resumes when there is space."""
    save = "training.save_every_steps=4"
    train(make_trainer(tmp_path / "run", save), until=4)
    before = {file: file.read_bytes() for file in (tmp_path / "run/checkpoints").rglob("*") if file.is_file()}

    trainer = make_trainer(tmp_path / "run", save)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    usage = shutil.disk_usage

    def fill(*_):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=500_000))

    def fail(*_):
        fill()
        raise SafetensorError("I/O error")

    if where != "within a file":
        fill() if where == "before writing" else monkeypatch.setattr(checkpoint, "save_file", fail)
        reason = r"needs [\d.]+ MB, but only 0.5 MB are free"
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        reason = r"cannot save .*step_00000008"
    try:
        with pytest.raises(CheckpointError, match=reason):
            train(trainer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        monkeypatch.undo()
    after = {file: file.read_bytes() for file in (tmp_path / "run/checkpoints").rglob("*") if file.is_file()}
    assert after == before

    train(make_trainer(tmp_path / "run", save))
    assert read_metrics(tmp_path / "run") == read_metrics(finished)


def test_checkpoints_are_written_during_the_next_steps(make_trainer, tmp_path, monkeypatch):
    """Steps continue while a slow disk writes; the checkpoint holds the state of the step in its name."""
    written, go_on = [], threading.Event()

    def slowly(path, *arguments):
        assert go_on.wait(60)
        write_checkpoint(path, *arguments)
        written.append(path.name)

    monkeypatch.setattr("stlm.training.run.saver.write_checkpoint", slowly)
    trainer = make_trainer(tmp_path / "run", "training.save_every_steps=4", "training.max_steps=8")
    for step in trainer.steps():
        trainer.train_step(step)
        if step == 4:
            expected = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        if step == 6:
            assert written == [] and newest_checkpoint(tmp_path / "run") is None
            go_on.set()
        trainer.save_checkpoint(step)
    assert written == ["step_00000004", "step_00000008"]
    found = read_state(tmp_path / "run/checkpoints/step_00000004").parameters
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_which_checkpoints_are_kept(make_trainer, tmp_path, monkeypatch):
    scores = {2: 3.0, 4: 2.0, 6: 2.5, 8: 2.0, 10: 2.5, 12: 2.6}  # of equal ones, the newest is the best

    def validate(trainer):
        trainer.progress.validation_bits_per_byte = scores[trainer.step]

    def kept(run_dir, *settings):
        trainer = make_trainer(run_dir, "training.save_every_steps=2", "training.keep_last=1", *settings)
        for step in trainer.steps():
            trainer.train_step(step)
            if step in scores:
                validate(trainer)
            trainer.save_checkpoint(step)
        return [int(path.name[-2:]) for path in checkpoints_of(run_dir)]

    assert kept(tmp_path / "last", "training.keep_best=false") == [12]
    assert kept(tmp_path / "best") == [12, 8]
    assert kept(tmp_path / "every", "training.keep_best=false", "training.keep_every_steps=6") == [12, 6]


def test_an_unwritable_run_directory_is_refused(make_trainer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot use .*file/run as a run directory: Not a directory"):
        make_trainer(tmp_path / "file" / "run")


def test_damaged_records_of_a_run_are_removed_or_reported(make_trainer, finished, stopped):
    """Invalid lines of metrics are removed; a damaged record of the run's starts is an error, not silently replaced."""
    with open(stopped / "metrics.jsonl", "ab") as file:
        file.write(b"\n\xff\xfe\n[]\n")
    starts = (stopped / "environment.json").read_text()
    (stopped / "environment.json").write_text(starts[:100])
    with pytest.raises(CheckpointError, match=r"environment.json: cannot be read \(JSONDecodeError"):
        make_trainer(stopped)
    (stopped / "environment.json").unlink()
    train(make_trainer(stopped))
    assert read_metrics(stopped) == read_metrics(finished)


def test_run_directories_are_chosen_by_name_and_state(tmp_path, finished, stopped):
    runs = tmp_path / "runs"
    assert choose_run_directory("tiny", "auto", runs) == (runs / "tiny", "")
    shutil.copytree(stopped, runs / "tiny")
    assert choose_run_directory("tiny", "auto", runs)[0] == runs / "tiny"
    assert choose_run_directory("tiny", "never", runs)[0] == runs / "tiny-2"
    shutil.rmtree(runs / "tiny")
    shutil.copytree(finished, runs / "tiny")
    assert choose_run_directory("tiny", "auto", runs)[0] == runs / "tiny-2"
    assert choose_run_directory("tiny", "must", runs)[0] == runs / "tiny"
    shutil.copytree(stopped, runs / "tiny-2")
    assert choose_run_directory("tiny", "auto", runs)[0] == runs / "tiny-2"
    assert choose_run_directory("tiny", "must", runs)[0] == runs / "tiny-2"


def test_checkpoints_are_ordered_by_step_and_not_by_time(make_trainer, finished, tmp_path):
    """Step numbers decide which checkpoint is the newest and which are kept, as clocks differ between nodes."""
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    first, last = (run_dir / f"checkpoints/step_{step:08d}" for step in (6, 12))
    for age, path in enumerate((first, last)):  # the older one seems to be written in a future year
        for file in [path, *path.rglob("*")]:
            os.utime(file, (4e9 - 2e9 * age,) * 2)
    assert newest_checkpoint(run_dir) == last
    assert checkpoints_of(run_dir) == [last, first]
    keep = ("training.keep_last=1", "training.keep_best=false", "training.max_steps=12")
    assert list(make_trainer(run_dir, *keep, resume="must").steps()) == []
    assert checkpoints_of(run_dir) == [last]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system, which root alone may")
def test_a_read_only_run_directory_is_refused_and_unchanged(make_trainer, stopped):
    """The error comes before the first step, and no file of the run has changed."""
    before = {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()}
    subprocess.run(["mount", "--bind", stopped, stopped], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", stopped], check=True)
        with pytest.raises(CheckpointError, match=r"cannot use .*run as a run directory: Read-only file system"):
            make_trainer(stopped)
    finally:
        subprocess.run(["umount", stopped], check=True)
    assert {file: file.read_bytes() for file in stopped.rglob("*") if file.is_file()} == before
