"""Files saved by an earlier commit open, resume and give the losses stored with them; see make.py."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stlm import STLM

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LOSSES = json.loads((HERE / "saved" / "losses.json").read_text())
TEXT = (HERE / "saved" / "text.txt").read_text()


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """Copy the saved files and make the copy the current folder."""
    shutil.copytree(HERE / "saved", tmp_path / "saved")
    monkeypatch.chdir(tmp_path / "saved")
    return tmp_path / "saved"


def script(name, *arguments):
    command = [sys.executable, ROOT / "scripts" / name, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("folder", ["prepared", "subwords"])
def test_saved_data_verify_and_are_recognised(saved, folder):
    script("preprocess.py", "verify", folder)
    before = {path: path.stat().st_mtime_ns for path in (saved / folder).rglob("*.bin")}
    spec = [] if folder == "prepared" else ["--tokenizer", "sentencepiece:296"]
    script("preprocess.py", "--input", "text.txt", "--documents", "paragraphs", "--validation-fraction", "0.2", *spec,
           "--output", folder)  # fmt: skip
    assert before == {path: path.stat().st_mtime_ns for path in (saved / folder).rglob("*.bin")}


def test_saved_models_give_the_stored_losses(saved):
    assert STLM.load(saved / "run").log_likelihood(TEXT[:500]) == pytest.approx(LOSSES["model"], rel=1e-6)
    assert STLM.load("model.stlm").log_likelihood(TEXT[:500]) == pytest.approx(LOSSES["artifact"], rel=1e-6)


def test_a_saved_run_resumes_with_the_stored_losses(saved):
    script("pretrain.py", "--config", "config.yaml", "--run", "run", "--resume", "must")
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    train = {str(record["step"]): record["loss"] for record in records if record["split"] == "train"}
    assert train == pytest.approx(LOSSES["train"], abs=1e-6)
    (validation,) = (record["loss"] for record in records if record["split"] == "validation")
    assert validation == pytest.approx(LOSSES["validation"], abs=1e-6)
