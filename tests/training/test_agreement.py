"""Two ranks as on two nodes with different files."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
from tiny_run import RANK_VARIABLES, ROOT

from data_pipeline.preparation.pipeline import PrepareConfig, prepare
from stlm.training.distributed.ranks import free_port


@pytest.fixture
def nodes(data_dir, config_file, tmp_path):
    """Return a function that runs a rank in each of two folders, with its own scripts, and returns codes and output."""

    def run(scripts, *arguments):
        environment = {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}
        environment |= {"OMP_NUM_THREADS": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        environment["MASTER_PORT"] = str(free_port())
        processes = []
        for rank, folder in enumerate(scripts):
            (tmp_path / f"node{rank}").mkdir(exist_ok=True)
            command = [sys.executable, folder / "pretrain.py", "--config", config_file, *arguments]
            processes.append(
                subprocess.Popen(
                    command, cwd=tmp_path / f"node{rank}", text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                    env=environment | {"RANK": str(rank), "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
                )
            )  # fmt: skip
        output = "".join(process.communicate(timeout=120)[0] for process in processes)
        return [process.returncode for process in processes], output

    return run


def test_different_code_and_different_data_are_one_message(nodes, data_dir, tmp_path):
    """One message names both, before anything is written."""
    for package in ("stlm", "data_pipeline", "scripts"):
        shutil.copytree(ROOT / package, tmp_path / "changed" / package, ignore=shutil.ignore_patterns("__pycache__"))
    with open(tmp_path / "changed/stlm/objectives/next_token.py", "a") as file:
        file.write("# a change\n")
    texts = [" ".join(["the dog lay under the mat"] * count) for count in range(1, 40)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for node in ("node0", "node1"):
        (tmp_path / node).mkdir()
    (tmp_path / "node0/data").symlink_to(data_dir)
    text = str(tmp_path / "text.jsonl")
    prepare(PrepareConfig((text,), output=str(tmp_path / "node1/data"), workers=1, validation_fraction=0.5))

    scripts = (ROOT / "scripts", tmp_path / "changed/scripts")
    codes, output = nodes(scripts, "--data", "data", "--run", tmp_path / "run")
    assert codes == [2, 2], output
    error, *lines = output.splitlines()
    assert error == "error: the nodes differ:"
    assert [line.split(":")[0] for line in lines[:-1]] == ["  code", "  data"]
    assert all(" at rank 0 on " in line and " at rank 1 on " in line for line in lines[:-1])
    assert lines[-1].startswith("copy the same files to all of them")
    assert not (tmp_path / "run").exists()


def test_files_missing_on_one_node_end_all_ranks(nodes, data_dir, tmp_path):
    """Rank 1 misses the run directory or the data, rank 0 reports it, and neither waits for the other."""
    same = (ROOT / "scripts", ROOT / "scripts")
    codes, output = nodes(same, "--data", data_dir, "--run", "run")
    assert codes == [2, 2], output
    (error,) = output.splitlines()
    assert error.startswith("error: rank 1 on ") and ": run does not exist here, but rank 0 created it; choose" in error

    (tmp_path / "node0/data").symlink_to(data_dir)
    codes, output = nodes(same, "--data", "data", "--run", tmp_path / "run")
    assert codes == [2, 2], output
    (error,) = output.splitlines()
    assert error.startswith("error: rank 1 on ") and ": no prepared data in data" in error


def test_code_from_the_standard_input_has_a_fingerprint():
    script = "from stlm.config import RunConfig\nfrom stlm.training.distributed.agreement import fingerprints\n"
    script += "assert len(fingerprints(RunConfig(), None, 'data')['code']) == 64"
    subprocess.run([sys.executable, "-"], input=script, cwd=ROOT, text=True, check=True)
