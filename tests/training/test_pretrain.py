"""The command scripts/pretrain.py as users and launchers start it: several ranks, kills, signals, errors."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_run import RANK_VARIABLES, ROOT, read_metrics, wait_for_step

from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import prepare
from stlm.config import load_run_config
from stlm.errors import LostRank
from stlm.training.distributed import lost
from stlm.training.distributed.connection import Distributed

LONG = ("--set", "training.max_steps=60", "training.eval_every_steps=10", "training.save_every_steps=20")


@pytest.fixture(scope="module")
def uninterrupted(pretrain, tmp_path_factory):
    """Run 60 steps on one rank, on a machine without a compiler; return the run and its output."""
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    tools, cache = tmp_path_factory.mktemp("tools"), tmp_path_factory.mktemp("extensions")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(tools))
        patch.setenv("TORCH_EXTENSIONS_DIR", str(cache))
        output = pretrain(run_dir, *LONG)
    assert list(cache.iterdir()) == [], "nothing is compiled"
    return run_dir, output


def test_the_output_of_a_run(uninterrupted):
    run_dir, output = uninterrupted
    lines = output.splitlines()
    assert lines[0] == f"run: {run_dir}, a new run of 60 steps"
    data = r"data: \S+: [\d,]+ ids to train on, [\d,]+ to validate with, tokenizer byte, fingerprint \w{12}"
    assert re.fullmatch(data, lines[1])
    assert re.fullmatch(r"model: byte → transformer → linear, width 32, context 32, [\d,]+ parameters", lines[2])
    assert lines[3] == "1 rank, started by python; ZeRO stage 0; fp32: training.precision=fp32"
    lines = lines[3:]
    number = r"\d+\.\d+"
    peak = r"peak: [\d.]+ [GT]FLOP/s of 1 rank, measured on products of \d+ × \d+ in fp32 \(1 thread\)(; no energy .*)?"
    assert re.fullmatch(peak, lines[1])
    line = (
        rf"step  1/60  {number} nats/id  8\.\d{{4}} bits/byte  lr 1\.00e-03  grad {number}  "
        rf"{number} kB/s  mfu {number}%  \? left"
    )
    assert re.fullmatch(r"not compiled: training takes about \d+ s, .*", lines[2])
    lines = lines[1:]
    assert re.fullmatch(line, lines[2])
    assert max(map(len, lines[2:12])) < 110
    validated = rf"step 10/60  validation {number} nats/id  {number} bits/byte  \([\d,]+ bytes in 0:\d\d\)"
    assert re.fullmatch(validated, lines[12])
    assert lines[-3:] == [
        f"The run is in {run_dir}. Next:",
        f"  python scripts/evaluate.py {run_dir}",
        f"  python scripts/generate.py {run_dir}",
    ]
    assert "Warning" not in output and "INFO" not in output


def test_a_killed_run_resumes_with_equal_metrics(pretrain, uninterrupted, tmp_path):
    """Metrics equal those of an uninterrupted run, digit for digit; data and time continue."""
    run_dir = tmp_path / "run"
    (process,) = pretrain.start(run_dir, *LONG)
    wait_for_step(run_dir, 25, [process])
    while not list(run_dir.glob("checkpoints/step_*/COMPLETE")):  # written during the steps
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    output = pretrain(run_dir, *LONG)
    assert f"continuing from {run_dir}/checkpoints/step_000000" in output
    assert read_metrics(run_dir) == read_metrics(uninterrupted[0])


def test_two_ranks_stop_together_on_a_signal_and_one_resumes(pretrain, uninterrupted, tmp_path):
    """One rank gets the signal, all save the same step and exit with 3; one rank then resumes at ZeRO 3."""
    run_dir = tmp_path / "run"
    processes = pretrain.start(run_dir, *LONG, "training.micro_batch_size=2", ranks=2, stage=2)
    wait_for_step(run_dir, 10, processes)
    processes[1].send_signal(signal.SIGTERM)
    processes[1].send_signal(signal.SIGTERM)  # launchers send it twice
    output = "".join(out + err for out, err in (process.communicate(timeout=120) for process in processes))
    assert [process.returncode for process in processes] == [3, 3], output
    (checkpoint,) = (run_dir / "checkpoints").iterdir()
    step = read_metrics(run_dir)[-1]["step"]
    assert checkpoint.name == f"step_{step:08d}"
    assert output.count(f"stopped by a request to another rank at step {step} after saving") == 1
    assert "Traceback" not in output

    output = pretrain(run_dir, *LONG, stage=3)
    assert f"continuing from {checkpoint}" in output
    found, expected = read_metrics(run_dir), read_metrics(uninterrupted[0])
    assert [(record["step"], record["split"]) for record in found] == [(r["step"], r["split"]) for r in expected]
    for key in ("loss", "bits_per_byte"):
        assert [record[key] for record in found] == pytest.approx([record[key] for record in expected], abs=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "training.lerning_rate=1"], "training.lerning_rate: unknown key; nearest: training.learning_rate"),
        (["--set", "training.batch_size=9"], "training.batch_size: got 9 on 2 ranks, expected a multiple of the ranks"),
        (["--ds_config", "ds_configs/zero9.json"], "ds_configs/zero9.json: no such file"),
        (["--profile", "3:2"], "--profile: got '3:2', expected FIRST:LAST, steps of the run from 1 to 12; 3:5 would"),
        (["--profile", "11:13"], "--profile: got '11:13', expected FIRST:LAST, steps of the run from 1 to 12"),
    ],
)
def test_config_errors_are_reported_by_one_rank_before_torch_is_imported(
    pretrain, tmp_path, arguments, message, monkeypatch
):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    output = pretrain(tmp_path / "run", *arguments, ranks=2, expect=2)
    assert output.strip().count("error: ") == 1
    assert message in output
    assert not (tmp_path / "run").exists()


def test_an_error_found_by_rank_0_is_reported_once(pretrain, uninterrupted, tmp_path):
    """All ranks exit with its code: a changed setting on resume, and missing data."""
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted[0], run_dir)
    output = pretrain(run_dir, *LONG, "training.weight_decay=0.2", ranks=2, stage=1, expect=2)
    assert output.count("error: ") == 1
    assert "training.weight_decay: was 0.1, now 0.2" in output
    assert "Traceback" not in output
    assert (run_dir / "metrics.jsonl").read_text() == (uninterrupted[0] / "metrics.jsonl").read_text()


def test_a_run_that_diverges_ends_with_1(pretrain, tmp_path):
    output = pretrain(tmp_path / "run", "--set", "training.learning_rate=1e30", ranks=2, expect=1)
    (line,) = (line for line in output.splitlines() if line.startswith("error: "))
    assert re.match(r"error: the (loss|gradient) of step \d+ is not finite \(rows 0-3, 4-7 of its batch\)", line)
    assert "Traceback" not in output


def test_values_that_deepspeed_refuses_are_reported_once(pretrain, tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 1, "overlap_comm": "much"}}')
    output = pretrain(tmp_path / "run", "--ds_config", str(tmp_path / "ds.json"), ranks=2, expect=2)
    assert output.count("error: ") == 1
    assert "error: DeepSpeed cannot use the values of its configuration: " in output
    assert "overlap_comm Input should be a valid boolean" in output
    assert "Traceback" not in output


def test_a_port_in_use_is_named(pretrain, tmp_path, monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        environment = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        result = subprocess.run(
            [sys.executable, str(ROOT / "scripts/pretrain.py")], capture_output=True, text=True, cwd=tmp_path,
            env=os.environ | {name: str(value) for name, value in environment.items()},
        )  # fmt: skip
    assert result.returncode == 2
    assert f"error: the ranks cannot meet at 127.0.0.1:{port}: " in result.stderr
    assert "--master_port" in result.stderr and "Traceback" not in result.stderr


def test_a_run_continues_when_its_output_is_closed(pretrain, tmp_path):
    """Piped into head, for example, it continues, and its exit code reports success."""
    (process,) = pretrain.start(tmp_path / "run")
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=120) == 0, errors
    assert errors == ""
    assert read_metrics(tmp_path / "run")[-1]["step"] == 12
    assert "step 12/12" in (tmp_path / "run/train.log").read_text()


def test_a_profile_has_the_phases_and_does_not_change_training(pretrain, tmp_path):
    """Each rank writes a trace and a table with the phases of the steps; the curve does not change."""
    run_dir = tmp_path / "run"
    output = pretrain(run_dir, "--profile", "3:4", "--set", "training.max_steps=5", ranks=2, stage=2)
    names = [f"steps_3-4.rank_{rank}.{kind}" for rank in (0, 1) for kind in ("pt.trace.json.gz", "txt")]
    assert sorted(path.name for path in (run_dir / "profile").iterdir()) == names
    for rank in (0, 1):
        trace = json.loads(gzip.decompress((run_dir / f"profile/steps_3-4.rank_{rank}.pt.trace.json.gz").read_bytes()))
        found = [event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
        assert (found.count("forward"), found.count("backward"), found.count("optimizer")) == (2, 2, 2)
        assert any(event["name"] == "aten::mm" for event in trace["traceEvents"])
        assert "aten::mm" in (run_dir / f"profile/steps_3-4.rank_{rank}.txt").read_text()
    assert output.count(f"profile of steps 3 to 4: {run_dir}/profile/steps_3-4.rank_0.txt lists the operators") == 1
    assert "Profiler" not in output
    pretrain(tmp_path / "plain", "--set", "training.max_steps=5", ranks=2, stage=2)
    assert read_metrics(run_dir) == read_metrics(tmp_path / "plain")

    more = ("--set", "training.max_steps=8")
    output = pretrain(run_dir, "--profile", "5:7", *more, ranks=2, stage=2, expect=2)
    assert output.count("error: ") == 1
    assert "error: --profile: got 5:7, but step 5 has been made already; 7:8 would work" in output


def test_the_name_of_a_run(tmp_path, monkeypatch):
    from stlm.training.request import run_name

    (tmp_path / "lr-0.5").mkdir()
    monkeypatch.chdir(tmp_path / "lr-0.5")
    names = [run_name(config) for config in ("quickstart", "../mine.yaml", str(tmp_path / "lr-0.5"), ".", "../lr-0.5/")]
    assert names == ["quickstart", "mine", "lr-0.5", "lr-0.5", "lr-0.5"]


def test_a_flipped_bit_in_the_data_is_named(pretrain, data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    shard = tmp_path / "data/train/shard_00000.bin"
    contents = bytearray(shard.read_bytes())
    contents[100] ^= 1
    shard.write_bytes(contents)
    output = pretrain(tmp_path / "run", "--data", str(tmp_path / "data"), ranks=2, expect=2)
    assert output.count("error: ") == 1
    assert f"error: {shard} is damaged: its sha256 is not the one" in output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_data_alone_determines_tokenizer_embedder_and_head(tmp_path):
    """Without other settings, the first line names the chosen components, and the run resumes with them."""
    lines = (f"A line, the {number}th, of some text with {number * 7919 % 10007:x} in it." for number in range(3000))
    (tmp_path / "a.txt").write_text("\n\n".join(lines))
    prepare(
        PrepareConfig(
            (str(tmp_path / "a.txt"),), "sentencepiece:310", str(tmp_path / "data"), documents="paragraphs", workers=1
        )
    )
    command = [sys.executable, str(ROOT / "scripts/pretrain.py"), "--data", str(tmp_path / "data")]
    command += ["--run", str(tmp_path / "run"), "--set", "model.context_length=32", "training.batch_size=1"]
    for steps in (1, 2):
        result = subprocess.run(
            [*command, f"training.max_steps={steps}"], cwd=ROOT, capture_output=True, text=True, check=True
        )
        assert result.stdout.splitlines()[0] == (
            'follows its data: data.tokenizer="sentencepiece:310", model.embedder={kind: token}, '
            "model.head={kind: linear}"
        )
    assert "continu" in result.stdout
    assert load_run_config(tmp_path / "run").model.embedder.kind == "token"


def test_missing_data_is_named(pretrain, tmp_path):
    output = pretrain(tmp_path / "run", "--data", str(tmp_path / "nowhere"), expect=2)
    assert f"error: no prepared data in {tmp_path / 'nowhere'}" in output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("micro_batch_size", ["null", "2"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_equal_one(pretrain, uninterrupted, tmp_path, stage, micro_batch_size):
    pretrain(tmp_path / "run", *LONG, f"training.micro_batch_size={micro_batch_size}", ranks=2, stage=stage)
    found, expected = read_metrics(tmp_path / "run"), read_metrics(uninterrupted[0])
    for key in ("step", "loss", "bits_per_byte"):
        assert [record[key] for record in found] == pytest.approx([record[key] for record in expected], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun"])
def test_real_launchers_stop_and_resume_a_run(data_dir, config_file, uninterrupted, tmp_path, launcher):
    """Two ranks each; SIGINT to the whole group, as from a terminal, then the same command to the end."""
    from stlm.training.distributed.ranks import free_port

    start = {
        "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", str(free_port())],
        "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port()), "--"],
    }[launcher]  # --: else torchrun takes --run for an abbreviation of its own --run-path
    command = [
        str(Path(sys.executable).parent / start[0]), *start[1:], str(ROOT / "scripts/pretrain.py"),
        "--ds_config", str(ROOT / "ds_configs/zero2.json"), "--config", str(config_file), "--data", str(data_dir),
        "--run", str(tmp_path / "run"), *LONG,
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    first = subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)
    wait_for_step(tmp_path / "run", 10, [first])
    os.killpg(first.pid, signal.SIGINT)
    assert first.wait(timeout=60) != 0
    deadline = time.monotonic() + 60
    while not any((tmp_path / "run/checkpoints").glob("step_*/COMPLETE")) and time.monotonic() < deadline:
        time.sleep(0.1)  # the deepspeed command does not wait for its ranks
    assert any((tmp_path / "run/checkpoints").glob("step_*/COMPLETE"))
    time.sleep(1)

    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL, timeout=240)
    found, expected = read_metrics(tmp_path / "run"), read_metrics(uninterrupted[0])
    assert len(found) == len(expected)
    assert [record["loss"] for record in found] == pytest.approx([record["loss"] for record in expected], abs=1e-5)


def test_a_lost_rank_is_one_line(pretrain, tmp_path):
    """The remaining ranks report it once, by its number, whether or not it hosts the ranks' store."""
    for victim in (1, 0):
        run_dir = tmp_path / f"run-{victim}"
        processes = pretrain.start(run_dir, "--set", "training.max_steps=100000", "training.batch_size=12", ranks=3)
        wait_for_step(run_dir, 3, processes)
        processes[victim].kill()
        errors = [process.communicate(timeout=60)[1] for process in processes]
        assert [process.returncode for process in processes] == [-9 if rank == victim else 1 for rank in range(3)]
        assert "".join(errors) == f"error: rank {victim} is gone; rerun the command to resume the run\n"


def test_lost_ranks_on_other_nodes_are_named(monkeypatch):
    monkeypatch.setattr(lost, "_WAIT_S", 0.0)
    here, there = lost.describe_process(), {"host": "node2", "namespace": "", "pid": 1, "started": None}
    distributed = Distributed.join()
    distributed._processes = [here, there]
    message = r"^a rank on node2 is gone, or cannot be reached any more \(.*reset by peer\);"
    with pytest.raises(LostRank, match=message) as raised, distributed.naming_lost_ranks():
        raise RuntimeError("[pair.cc:1] Connection reset by peer\nmore")
    assert not distributed.reported_by_another(raised.value)
    distributed._processes = [here, here]
    for message in ("Connection reset by peer", "CUDA out of memory"):  # all are there: no rank is lost
        with pytest.raises(RuntimeError, match=message), distributed.naming_lost_ranks():
            raise RuntimeError(message)
