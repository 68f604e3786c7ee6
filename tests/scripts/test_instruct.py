"""The whole of scripts/instruct.sh, on a quickstart model of a few thousand parameters."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.sources.default_corpus.instructions import as_lines, instructions

ROOT = Path(__file__).parents[2]
MADE_BY_IT = {".venv", "data", "runs"}
SMALL = [
    "model.width=24", "model.embedder={kind: byte}", "model.head={kind: linear}", "model.core.num_layers=1",
    "model.core.attention.num_heads=2", "training.batch_size=1", "training.max_steps=2", "training.save_every_steps=2",
]  # fmt: skip


@pytest.fixture
def project(tmp_path):
    """Copy the project with its own data and runs: a poorly trained quickstart model, and few instructions."""
    if sys.prefix == sys.base_prefix:
        pytest.skip("needs a virtual environment: scripts/test.sh makes one")
    folder = tmp_path / "stlm"
    folder.mkdir()
    for path in ROOT.iterdir():
        if path.name not in MADE_BY_IT:
            (folder / path.name).symlink_to(path)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "data").mkdir()
    (folder / "data" / "instructions.jsonl").write_text(as_lines(instructions(400)))
    (tmp_path / "text.txt").write_text("\n<eos>\n".join(f"Text {n} about the number {n}." for n in range(400)))
    for command in (
        ["preprocess.py", "--input", tmp_path / "text.txt", "--output", "data/text"],
        ["pretrain.py", "--config", "quickstart", "--data", "data/text", "--run", "runs/quickstart", "--set", *SMALL],
    ):
        script = folder / "scripts" / command[0]
        subprocess.run([sys.executable, script, *command[1:]], cwd=folder, check=True, capture_output=True)
    return folder


def instruct(project):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("STLM_")}
    environment |= {"HF_HUB_OFFLINE": "1", "PIP_NO_INDEX": "1"}
    finished = subprocess.run(
        ["bash", "scripts/instruct.sh"], cwd=project, env=environment, capture_output=True, text=True,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-4000:]
    return finished.stdout


def losses(project):
    records = map(json.loads, (project / "runs" / "instruct" / "metrics.jsonl").read_text().splitlines())
    return [record["bits_per_byte"] for record in records if record["split"] == "validation"]


@pytest.mark.slow
def test_the_script_trains_a_model_that_answers_and_can_be_rerun(project):
    printed = instruct(project)
    found = losses(project)
    assert len(found) > 2 and found[-1] < found[0]
    shown = [line for line in printed.splitlines() if line.startswith("$ ")]
    assert [line.split()[2] for line in shown] == [
        "scripts/preprocess.py", "scripts/preprocess.py", "scripts/pretrain.py", "scripts/evaluate.py",
        *["scripts/generate.py"] * 4,
    ]  # fmt: skip

    again = instruct(project)  # finished work is not repeated
    assert losses(project) == found
    assert again.split("$ python scripts/evaluate.py")[1] == printed.split("$ python scripts/evaluate.py")[1]
