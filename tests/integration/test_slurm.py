"""The jobs in scripts/slurm/ on a real Slurm of two nodes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from daemons import need, wait_until
from mini_slurm import PROGRAMS, Slurm
from tiny_project import CONFIG, OPTIONS, read_metrics, wait_for_step

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    need("slurm-wlm munge", *PROGRAMS)
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()


@pytest.fixture
def pretrain(slurm, project):
    """Return a function that submits pretrain.sbatch for the tiny run and returns job number and output path."""

    def submit(run, *options):
        job = slurm.submit(project, "scripts/slurm/pretrain.sbatch", run, *OPTIONS, *options)
        return job, project / f"slurm-{job}.out"

    return submit


def stops(output: Path) -> int:
    """Return how often a run was stopped, whichever rank was asked first and by whichever signal."""
    return len(re.findall(r"^stopped by .* at step \d+ after saving;", output.read_text(), re.MULTILINE))


def test_a_job_that_is_preempted_twice_finishes_with_the_curve_of_one_that_was_not(
    slurm, project, pretrain, uninterrupted
):
    """The first preemption is like that of a time limit, the second like that of an operator."""
    run = project / "runs/preempted"
    job, output = pretrain("runs/preempted")
    wait_for_step(run, 20, slurm.daemons.check)
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    wait_until(lambda: stops(output) == 1, "stop by SIGUSR1", slurm.daemons)
    first = read_metrics(run)[-1]["step"]

    wait_for_step(run, first + 5, slurm.daemons.check)
    slurm.run("scontrol", "requeue", job)
    wait_until(lambda: stops(output) == 2, "stop by SIGTERM", slurm.daemons)
    second = read_metrics(run)[-1]["step"]
    assert first < second

    done = slurm.wait_for(job, "COMPLETED", "FAILED")
    printed = output.read_text()
    assert (done["JobState"], done["Restarts"]) == ("COMPLETED", "2"), printed
    assert "2 ranks on 2 nodes, started by Slurm, meeting at 127.0.0.1:" in printed
    assert f"continuing from runs/preempted/checkpoints/step_{first:08d}" in printed
    assert f"continuing from runs/preempted/checkpoints/step_{second:08d}" in printed
    assert read_metrics(run) == uninterrupted


def test_a_rank_that_is_killed_is_started_again_within_the_job(slurm, project, pretrain, uninterrupted):
    """The job continues on one rank where that is allowed, with the same curve within rounding."""
    run = project / "runs/accident"
    slurm.environment["STLM_MIN_RANKS"] = "1"
    try:
        job, output = pretrain("runs/accident", "--set", "training.save_every_steps=20")
    finally:
        del slurm.environment["STLM_MIN_RANKS"]
    wait_for_step(run, 30, slurm.daemons.check)
    rank = next(pid for pid in pids_with("scripts/pretrain.py --run runs/accident") if environment_of(pid) == "1")
    os.kill(rank, signal.SIGKILL)
    done = slurm.wait_for(job, "COMPLETED", "FAILED")
    printed = output.read_text()
    assert (done["JobState"], done["Restarts"]) == ("COMPLETED", "0"), printed
    assert "supervise: ended with " in printed and "1 rank, started by Slurm" in printed
    found = read_metrics(run)
    assert [record["loss"] for record in found] == pytest.approx([r["loss"] for r in uninterrupted], abs=1e-4)


def pids_with(words: str) -> list[int]:
    """Return the ids of Python processes with these words in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if words in line and line.split()[0].endswith("python"):
                found.append(int(path.parent.name))
    return found


def environment_of(pid: int) -> str:
    """Return a process's SLURM_PROCID variable; empty if unset."""
    variables = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    return next((word.partition("=")[2] for word in variables if word.startswith("SLURM_PROCID=")), "")


def test_a_user_error_ends_a_job_with_2(slurm, project, pretrain):
    """The error is reported once, and the job is not requeued although its script allows requeuing."""
    job, output = pretrain("runs/mistake", "--set", "training.batch_size=9")
    done = slurm.wait_for(job, "COMPLETED", "FAILED")
    assert (done["JobState"], done["ExitCode"], done["Restarts"]) == ("FAILED", "2:0", "0")
    (error,) = (line for line in output.read_text().splitlines() if line.startswith("error: "))
    assert "got 9 on 2 ranks, expected a multiple of the ranks; training.batch_size=8 or 10 would work" in error
    assert not (project / "runs/mistake").exists()


def test_two_jobs_on_one_run_and_a_cancelled_one(slurm, project, pretrain):
    """The second job names the first; the first saves when cancelled, and is not requeued."""
    run = project / "runs/busy"
    first, first_output = pretrain("runs/busy", "--set", "training.max_steps=100000")
    wait_for_step(run, 5, slurm.daemons.check)
    second, second_output = pretrain("runs/busy", "--set", "training.max_steps=100000")
    done = slurm.wait_for(second, "COMPLETED", "FAILED")
    assert (done["JobState"], done["ExitCode"]) == ("FAILED", "2:0")
    (error,) = (line for line in second_output.read_text().splitlines() if line.startswith("error: "))
    assert re.match(r"error: runs/busy is in use by process \d+ on ", error)

    slurm.run("scancel", first)
    done = slurm.wait_for(first, "CANCELLED")
    assert done["Restarts"] == "0"
    wait_until(lambda: stops(first_output) == 1, "stop by SIGTERM", slurm.daemons)
    step = read_metrics(run)[-1]["step"]
    assert (run / f"checkpoints/step_{step:08d}/COMPLETE").is_file()


def test_from_text_to_the_scores_of_two_seeds(slurm, project):
    (project / "short.yaml").write_text(CONFIG.replace("300", "20"))
    command = [
        "bash", "scripts/slurm/pipeline.sh", "--name", "seeds", "--input", "text", "--config", "short.yaml",
        "--ds_config", "ds_configs/zero2.json", "--seeds", "1-2",
    ]  # fmt: skip
    shown = subprocess.run([*command, "--dry-run"], cwd=project, capture_output=True, text=True, check=True).stdout
    assert slurm.run("squeue", "-h") == ""
    ran = subprocess.run(command, cwd=project, env=slurm.environment, capture_output=True, text=True, check=True).stdout
    preprocess, pretrain, evaluate, export = (line.split()[1] for line in ran.splitlines() if line.startswith("  job "))
    jobs = {"PREPROCESS": preprocess, "PRETRAIN": pretrain}
    commands = [line for line in ran.splitlines() if not line.startswith("  job ")]
    for word, job in jobs.items():
        shown = shown.replace(word, job)
    assert commands == shown.splitlines()

    for job in (evaluate, export):
        slurm.wait_for(job, "COMPLETED", "FAILED", "CANCELLED")
    wait_until(lambda: slurm.run("squeue", "-h") == "", "end of all jobs", slurm.daemons)
    for seed in (1, 2):
        results = json.loads((project / f"runs/seeds-seed-{seed}/evaluation.json").read_text())
        assert 0 < results["results"]["bits_per_byte"]["bits_per_byte"] < 8
        assert (project / f"runs/seeds-seed-{seed}/safetensors/model.safetensors").is_file()
