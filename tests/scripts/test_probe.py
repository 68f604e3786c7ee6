"""Commands that evaluate a model's vectors, called as users call them."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from data_pipeline.tokenizers import build_tokenizer
from stlm.config import GroupedQueryConfig, ModelConfig, TransformerCoreConfig
from stlm.stlm import STLM

ROOT = Path(__file__).parents[2]
CORE = TransformerCoreConfig(num_layers=1, attention=GroupedQueryConfig(num_heads=2))
WORDS = ("bad", "good")


@pytest.fixture
def folder(tmp_path):
    """Make a model, and the files of sst2, with sentences that state their labels."""
    model = STLM.from_config(ModelConfig(context_length=32, width=32, core=CORE), build_tokenizer("byte"))
    model.save(tmp_path / "model")
    for part, number in (("train", 60), ("dev", 30)):
        lines = [{"id": str(n), "sentence": f"{n} {WORDS[n % 2]}", "label": n % 2} for n in range(number)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"glue_sst2.{part}.jsonl").write_text(text)
    return tmp_path


@pytest.fixture
def call(monkeypatch, capsys, folder):
    def call(*arguments, script="probe.py"):
        monkeypatch.syspath_prepend(str(ROOT / "scripts"))
        monkeypatch.setattr(sys, "argv", [script, str(folder / "model"), *map(str, arguments)])
        with pytest.raises(SystemExit) as ending:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        return ending.value.code or 0, *capsys.readouterr()

    return call


def test_results_are_printed_and_written(call, folder):
    arguments = ["--tasks", "sst2", "--tasks-dir", folder, "--max-train-examples", 40]
    code, out, _ = call(*arguments, "--output", folder / "out.json")
    assert code == 0 and "40 of 60" in out
    written = json.loads((folder / "out.json").read_text())
    values = written["results"]["sst2"]
    assert (written["method"], written["seeds"], written["parameters"] > 0) == ("linear", 3, True)
    assert [draw["seed"] for draw in values["draws"]] == [0, 1, 2]
    assert values["measures"]["accuracy"]["value"] > 0.9
    assert all(len(values[name]) == 64 for name in ("dev_sha256", "dev_file_sha256", "train_file_sha256"))

    code, _, _ = call(*arguments, "--method", "finetune", "--seeds", 1, "--output", folder / "out.md")
    page = (folder / "out.md").read_text()
    assert code == 0 and "| sst2 | 40 of 60 | 30 | accuracy |" in page and "- method: finetune" in page


def test_user_errors_are_one_line(call, folder):
    for arguments, message in [
        (["--tasks", "sst"], "'sst' (nearest: sst2)"),
        (["--tasks", "sst2", "--seeds", 0], "--seeds: got 0"),
        (["--tasks", "cola"], "glue_cola.train: no items"),
    ]:
        code, _, error = call(*arguments, "--tasks-dir", folder)
        assert code == 2 and message in error and error.count("\n") == 1


def test_evaluate_runs_similarity_and_retrieval(call, folder):
    pairs = [{"sentence1": "a b", "sentence2": "a b", "score": 5}, {"sentence1": "a b", "sentence2": "x!", "score": 0}]
    queries = [{"query": text, "document": text} for text in ("one", "two", "three")]
    for name, lines in (("similarity", pairs), ("retrieval", queries)):
        text = "".join(json.dumps({"id": str(n), **line}) + "\n" for n, line in enumerate(lines))
        (folder / f"{name}.jsonl").write_text(text)
    tasks = ["--tasks", "similarity,retrieval", "--tasks-dir", folder]
    code, out, _ = call(*tasks, "--output", folder / "out.json", script="evaluate.py")
    results = json.loads((folder / "out.json").read_text())["results"]
    assert code == 0 and results["similarity"]["spearman"]["value"] == pytest.approx(1)
    assert results["retrieval"]["mrr"]["value"] == 1 and "recall_at_10" in out
