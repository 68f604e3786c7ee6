"""A preparation shared by the ranks of an MPI job, with a real mpirun where one is installed."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.loading.prepared_data import PreparedData
from data_pipeline.loading.verify import verify
from data_pipeline.preparation.gathering import gather
from data_pipeline.preparation.mpi import JOBS, decode, encode
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import prepare
from data_pipeline.preparation.workers import Workers
from data_pipeline.sources.hub import HubUnit, Rows
from data_pipeline.sources.indexed import IndexedReading, IndexedUnit
from data_pipeline.sources.source import CorpusUnit
from data_pipeline.storage.atomic import sha256_file

ROOT = Path(__file__).resolve().parents[2]
needs_mpirun = pytest.mark.skipif(
    shutil.which("mpirun") is None, reason="there is no mpirun; on Debian: apt-get install openmpi-bin"
)

# scripts/preprocess.py with small units, so that little text gives every rank some of it, and with the fault that
# FAULT names on rank 1.
PREPROCESS = f"""
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from stlm.commands import preprocess, program
from data_pipeline.preparation import encoding
from data_pipeline.sources import files
from data_pipeline.preparation import mpi as ranks
from data_pipeline.sources import text_files as textfiles
files.SLICE = textfiles.SLICE = 4000
encoding.SHARD_BYTES = 10_000

def die_at_work(running):
    if running:
        os.kill(os.getpid(), signal.SIGKILL)
    return []

if __name__ == "__main__":
    if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
        if os.environ.get("FAULT") == "dies":
            ranks._finished = die_at_work
        if os.environ.get("FAULT") == "sees nothing":
            Path.exists = lambda path: False
    program.run(preprocess.main)
"""


@pytest.fixture
def inputs(tmp_path):
    rng = random.Random(1)
    words = ["the", "of", "and", "to", "in", "is", "was", "it", "for", "with", "he", "be", "on", "that", "by", "you"]
    for name in ("a.txt", "b.txt"):
        paragraphs = [" ".join(rng.choices(words, k=rng.randint(5, 30))) for _ in range(250)]
        (tmp_path / name).write_text("\n<eos>\n".join(paragraphs))
    return [tmp_path / "a.txt", tmp_path / "b.txt"]


def mpirun(ranks, tmp_path, *arguments, **environment):
    """Run the script above under mpirun with the given environment, without the settings of an outer launcher."""
    script = tmp_path / "preprocess_in_small_pieces.py"
    script.write_text(PREPROCESS)
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    outside = {k: v for k, v in os.environ.items() if not k.startswith(("OMPI_", "PMIX_", "PMI_", "SLURM_"))}
    command = ["mpirun", "-n", str(ranks), "--oversubscribe", "--bind-to", "none", sys.executable, str(script)]
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=tmp_path, env=outside | root | environment,
        capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip


def alone(*arguments, **environment):
    command = [sys.executable, str(ROOT / "scripts" / "preprocess.py"), *map(str, arguments)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def hashes(directory):
    """Return the sha256 of every file except the report, which contains its folder's name."""
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.name != "report.html")
    return {str(path.relative_to(directory)): sha256_file(path) for path in files}


def told(result):
    """Return our own lines on stderr; mpirun adds some when a rank exits with a code other than 0."""
    return [line for line in result.stderr.splitlines() if line.startswith(("error:", "Traceback"))]


@needs_mpirun
def test_the_number_of_ranks_changes_no_byte_and_one_of_them_prints(inputs, tmp_path):
    options = ["--input", inputs[0], "--input", inputs[1], "--tokenizer", "sentencepiece:300"]
    found = []
    for ranks, workers in ((1, 2), (3, 1)):
        output = tmp_path / f"{ranks}-{workers}"
        result = mpirun(ranks, tmp_path, *options, "--workers", workers, "--output", output.name)
        assert result.returncode == 0, result.stderr
        assert result.stdout.count("done in") == 1
        assert result.stdout.count(f"{output.name}: tokenizer") == 1
        found.append(hashes(output))
    assert len(PreparedData.open(output, verify=True).manifest.splits["train"]) > 2
    assert found[0] == found[1]

    result = mpirun(2, tmp_path, *options, "--output", output.name)
    assert (result.returncode, result.stdout.count("already prepared")) == (0, 1)
    result = mpirun(2, tmp_path, "verify", output.name)
    assert (result.returncode, result.stdout.count("every byte as written")) == (0, 1)


@needs_mpirun
def test_ranks_clean_and_report_like_one_process(tmp_path):
    rng = random.Random(2)
    words = ["".join(rng.choices("abcdefghijklmnoprstu", k=rng.randint(4, 8))) for _ in range(500)]
    texts = [" ".join(rng.choice(["the", "of", "and", *words]) for _ in range(rng.randint(40, 90))) for _ in range(150)]
    texts += [*texts[:9], *(text.replace("a", "e", 1) for text in texts[9:15])]
    texts = [f"{text} the end of that" for text in texts]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    questions = tmp_path / "questions.txt"
    questions.write_text(" ".join(texts[20].split()[5:25]))
    options = ["--input", "a.jsonl", "--clean", "normalize,gopher,near-duplicates"]
    options += ["--decontaminate", questions.name, "--workers", "1", "--output"]
    reports = []
    for ranks in (1, 2):
        result = mpirun(ranks, tmp_path, *options, f"{ranks}")
        assert result.returncode == 0, result.stderr
        reports.append((tmp_path / f"{ranks}" / "report.html").read_text().replace(f"<title>{ranks}", "<title>"))
    assert hashes(tmp_path / "1") == hashes(tmp_path / "2")
    assert reports[0].split("</h1>")[1] == reports[1].split("</h1>")[1]
    manifest = PreparedData.open(tmp_path / "2").manifest
    removed = manifest.cleaning["removed"]
    assert removed["exact duplicates"]["documents"] == 9
    assert removed["decontamination"]["documents"] == 1
    assert removed["near-duplicates"]["documents"]
    assert any(rule.startswith("gopher") for rule in removed)
    assert set(manifest.settings["libraries"]) == {"rensa"}


@needs_mpirun
def test_an_error_on_any_rank_ends_all_of_them_with_one_message(tmp_path):
    (tmp_path / "small.txt").write_text("one\n<eos>\ntwo\n")
    (tmp_path / "b.jsonl").write_text("{\n")  # the second unit, and so that of rank 1, is invalid
    broken = ["--input", "small.txt", "--input", "b.jsonl", "--workers", "1", "--output", "out"]
    result = mpirun(2, tmp_path, *broken)
    assert result.returncode == 2
    assert len(told(result)) == 1 and told(result)[0].startswith("error: b.jsonl:1: not valid JSON"), result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "out" / "manifest.json").exists()

    result = mpirun(2, tmp_path, "--input", "small.txt", "--output", "out2", FAULT="sees nothing")
    assert result.returncode == 2
    assert len(told(result)) == 1 and "rank 1 on" in told(result)[0] and "does not see" in told(result)[0]

    result = mpirun(2, tmp_path, "--worker", "many")
    assert result.returncode == 2
    assert result.stderr.count("invalid int value: 'many'") == 1


@needs_mpirun
def test_a_lost_rank_ends_the_others_and_the_same_command_resumes(inputs, tmp_path):
    options = ["--input", inputs[0], "--input", inputs[1], "--workers", "1", "--output"]
    result = mpirun(2, tmp_path, *options, "out", FAULT="dies")
    assert result.returncode not in (0, 2)
    assert f"signal {signal.SIGKILL.value}" in result.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert mpirun(2, tmp_path, *options, "out").returncode == 0
    assert mpirun(1, tmp_path, *options, "whole").returncode == 0
    assert hashes(tmp_path / "out") == hashes(tmp_path / "whole")


def test_ranks_that_cannot_find_each_other_are_one_message(tmp_path):
    """Every process would prepare the same folder if the launcher and the library were of different MPIs."""
    for size, rank in (("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"), ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID")):
        result = alone("--output", tmp_path / "out", **{size: "2", rank: "0"})
        assert result.returncode == 2
        assert len(result.stderr.splitlines()) == 1
        assert "started 2 processes" in result.stderr
        result = alone("--output", tmp_path / "out", **{size: "2", rank: "1"})
        assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not (tmp_path / "out").exists()


def test_mpi_is_not_touched_by_a_process_that_was_started_alone():
    code = "import sys\nfrom data_pipeline.preparation.mpi import joined\n"
    code += "with joined() as ranks: print(ranks, 'mpi4py' in sys.modules)"
    for environment in ({}, {"SLURM_NTASKS": "8"}, {"SLURM_STEP_NUM_TASKS": "1"}, {"OMPI_COMM_WORLD_SIZE": "1"}):
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
        )
        assert result.stdout == "None False\n", json.dumps(environment) + result.stderr


# ---------------------------------------------------------------------- messages, without MPI


class Posted(Workers):
    """Workers that receive jobs and return results as ranks do: as messages."""

    def run(self, function, jobs, size):
        self.functions.add(function.__name__)
        for number, job in enumerate(jobs):
            function_there, job_there = decode(encode((function, job)))
            assert function_there is function and job_there == job
            result = function_there(*job_there)
            back = decode(encode(result))
            assert back == result
            yield number, back


def test_all_jobs_and_results_are_messages(inputs, tmp_path):
    """The jobs are those of a preparation with every step, and of its verification."""
    team = Posted(1)
    team.functions = set()
    (tmp_path / "a.jsonl").write_text('{"text": "some of the text of a line that is long enough"}\n' * 3)
    evaluation = tmp_path / "evaluation.txt"
    evaluation.write_text("one two three four five six seven eight nine ten eleven twelve thirteen fourteen\n")
    config = PrepareConfig(
        (*map(str, inputs), str(tmp_path / "a.jsonl")), output=str(tmp_path / "data"), documents="paragraphs",
        tokenizer="sentencepiece:300", clean=("normalize", "near-duplicates"), decontaminate=(str(evaluation),),
        validation_fraction=0.1,
    )  # fmt: skip
    prepare(config, team=team)
    verify(tmp_path / "data", team)
    assert {name.rpartition(":")[2] for name in JOBS} - {"write_planned", "describe_source"} == team.functions


@pytest.mark.parametrize(
    "unit",
    [
        CorpusUnit(0, 9, "json", ("a.py", "b.py")),
        HubUnit(1, 9, Rows("name", "train", "text", True), 0, 5),
        IndexedUnit(2, 9, "prefix", 0, 3, 7, IndexedReading("byte", False, "stop")),
    ],
)
def test_units_are_messages(unit):
    assert decode(encode(("run", 2, 0, gather, (unit, np.int64(3))))) == ("run", 2, 0, gather, (unit, 3))


@pytest.mark.parametrize(
    "message",
    [
        ["job", "data_pipeline.storage.atomic:write_bytes"],
        ["job", "os:system"],
        ["os:system", {}],
        ["data_pipeline.storage.atomic:write_bytes", {}],
        ["data_pipeline.storage.documents:Gathered", {}],
        ["data_pipeline.storage.documents:Gathered", {"prefix": ["path", "x"], "file": 1}],
        ["data_pipeline.storage.documents:Path", {}],
        ["path", 3],
    ],
)
def test_other_messages_are_refused(message):
    with pytest.raises(ValueError, match="a message holds"):
        decode(json.dumps(message).encode())
    with pytest.raises(ValueError):
        decode(pickle.dumps(print))
    for value in (print, object(), re.compile("x"), sha256_file):
        with pytest.raises(TypeError):
            encode(value)
