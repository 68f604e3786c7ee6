"""The commands and the Python of docs/generation.md run, with a tiny model in place of the quickstart's."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.tokenizers import build_tokenizer
from stlm.config import ModelConfig, from_dict
from stlm.stlm import STLM

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "generation.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def place(tmp_path, monkeypatch):
    config = {"context_length": 48, "width": 32, "core": {"num_layers": 1, "attention": {"num_heads": 2}}}
    model = STLM.from_config(from_dict(ModelConfig, config), build_tokenizer("byte"), seed=1)
    model.save(tmp_path / "runs" / "quickstart")
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "scripts").symlink_to(ROOT / "scripts")
    monkeypatch.chdir(tmp_path)


def test_its_python_runs(place, capsys):
    for block in blocks("python"):
        exec(compile(block, "docs/generation.md", "exec"), {})
    assert len(capsys.readouterr().out) > 80


@pytest.mark.slow
def test_its_commands_run(place):
    (block,) = blocks("bash")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", block], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("The module") == 5 and "bits per byte" in done.stdout and "One line" in done.stdout


def test_its_table_names_every_rule():
    from dataclasses import fields

    from stlm.generation import Sampling

    named = set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
    assert named == {field.name for field in fields(Sampling)} - {"seed"}
