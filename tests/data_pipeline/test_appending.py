"""Appending to finished data keeps everything that exists, and never adds text partially."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError
from data_pipeline.loading.prepared_data import PreparedData
from data_pipeline.loading.verify import verify
from data_pipeline.preparation.appending import append, append_config
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import Preparation, prepare
from data_pipeline.preparation.workers import Workers
from data_pipeline.report.page import write_report
from data_pipeline.storage.manifest import Manifest

ROOT = Path(__file__).resolve().parents[2]


def texts(number: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    return [
        " ".join(rng.choices(["the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "off"], k=30))
        for _ in range(number)
    ]


def lines(path: Path | str, found: list[str]) -> str:
    Path(path).write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
    return str(path)


def documents(directory: str, split: str) -> list[str]:
    data = PreparedData.open(directory, verify=True)
    return [data.tokenizer.decode(ids) for ids in data.split(split).documents()]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    lines("a.jsonl", texts(200, 1))
    lines("b.jsonl", [*texts(100, 2), *texts(10, 1)])
    return tmp_path


def adding(*inputs: str, **options: Any) -> PrepareConfig:
    defaults = {field.name: field.default for field in dataclasses.fields(PrepareConfig)}
    return append_config(defaults | {"inputs": inputs, "output": "out"} | options, set(options))


@pytest.mark.parametrize("tokenizer", ["byte", "sentencepiece:290"])
def test_existing_documents_stay_and_new_ones_are_split_by_the_same_rule(folder: Path, tokenizer: str) -> None:
    prepare(PrepareConfig(("a.jsonl",), tokenizer, "out", validation_fraction=0.1))
    before, tokens = (
        {split: documents("out", split) for split in ("train", "validation")},
        PreparedData.open("out").tokenizer,
    )
    manifest, new = append(adding("b.jsonl"))
    assert new
    after = {split: documents("out", split) for split in ("train", "validation")}
    for split, there in before.items():
        assert after[split][: len(there)] == there
    added = [text for split in before for text in after[split][len(before[split]) :]]
    assert sorted(added) == sorted(texts(100, 2)), "copies of what is there are left out"
    assert 15 <= len(after["validation"]) <= 60
    assert PreparedData.open("out").tokenizer.fingerprint == tokens.fingerprint
    assert [source["name"] for source in manifest.sources] == ["a.jsonl", "b.jsonl"]
    assert sum(source["validation"]["documents"] for source in manifest.sources) == len(after["validation"])
    assert manifest.cleaning["removed"]["copies of documents that are there already"]["documents"] == 10
    assert sorted(os.listdir("out")) == ["manifest.json", "tokenizer", "train", "validation"]
    assert verify("out", Workers(1)) == 4
    write_report("out")

    both, twice = append(adding("b.jsonl"))
    assert (both.fingerprint, twice) == (manifest.fingerprint, False)
    shutil.move("b.jsonl", "moved.jsonl")
    assert append(adding("moved.jsonl")) == (manifest, False)
    with pytest.raises(DataError, match=r"out holds data .*:\n.*b\.jsonl was added to it by --append"):
        Preparation(PrepareConfig(("a.jsonl",), tokenizer, "out", validation_fraction=0.1)).existing()
    lines("c.jsonl", texts(5, 3))
    assert len(append(adding("c.jsonl"))[0].sources) == 3
    nothing, _ = append(adding(lines("d.jsonl", texts(5, 3))))
    assert nothing.total("train", "documents") + nothing.total("validation", "documents") == 305


def test_own_validation_and_test_stay_as_they_are(folder: Path) -> None:
    held = (lines("dev.jsonl", texts(20, 5)),)
    prepare(
        PrepareConfig(
            ("a.jsonl",),
            output="out",
            validation=held,
            test=(lines("t.jsonl", texts(4, 6)),),
            clean=("normalize", "near-duplicates"),
        )
    )
    changed = texts(20, 5)[0]
    append(adding(lines("more.jsonl", [*texts(30, 7), changed, *texts(2, 6)])))
    assert documents("out", "validation") == texts(20, 5)
    assert documents("out", "test") == texts(4, 6)
    assert not set(documents("out", "train")) & {*texts(20, 5), *texts(4, 6)}


KILLED = """
import os, signal, sys
from data_pipeline.preparation import appending
from tests.data_pipeline.test_appending import adding
renames = 0
def killing(function):
    def call(*arguments, **options):
        global renames
        renames += 1
        if renames > int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
os.replace, os.unlink, os.rmdir = killing(os.replace), killing(os.unlink), killing(os.rmdir)
print(appending.append(adding("b.jsonl"))[0].fingerprint)
"""


@pytest.mark.slow
def test_text_is_added_once_or_not_at_all_wherever_the_process_is_killed(folder: Path) -> None:
    prepare(PrepareConfig(("a.jsonl",), "sentencepiece:290", "out", validation_fraction=0.1))
    before = Manifest.load("out").fingerprint
    shutil.copytree("out", "whole")
    os.rename("out", "kept")
    os.rename("whole", "out")
    expected = append(adding("b.jsonl"))[0].fingerprint
    shutil.rmtree("out")
    shutil.copytree("kept", "out")
    deaths, code = 0, -signal.SIGKILL
    while code == -signal.SIGKILL:
        command = [sys.executable, "-c", KILLED, str(deaths)]
        code = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False, capture_output=True
        ).returncode
        deaths += code == -signal.SIGKILL
        found = Manifest.load("out")
        found.check("out", hashes=True)
        assert found.fingerprint in (before, expected)
    assert code == 0
    assert deaths > 8
    assert Manifest.load("out").fingerprint == expected
    assert sorted(os.listdir("out")) == ["manifest.json", "tokenizer", "train", "validation"]


def test_new_text_is_read_with_the_rules_of_the_existing_text(folder: Path) -> None:
    Path("a.txt").write_text("\n".join(texts(50, 3)))
    Path("a.csv").write_text("text\n" + "\n".join(texts(5, 4)))
    prepare(PrepareConfig(("a.txt", "a.csv"), output="out", documents="lines", quoting="none"))
    Path("b.txt").write_text("\n".join(texts(20, 5)))
    append(adding("b.txt"))
    append(adding("b.jsonl"))  # neither rule applies
    Path("c.txt").write_text("\n\n".join(texts(20, 6)))
    manifest, _ = append(adding("c.txt", documents="file"))
    assert [source["documents"] for source in manifest.sources] == [50, 5, 20, 110, 1]
    assert [record.get("quoting") for record in manifest.settings["appended"]] == ["none"] * 3
    assert append(adding("b.txt"))[1] is False


def test_user_errors_are_one_message(folder: Path) -> None:
    prepare(PrepareConfig(("a.jsonl",), output="out", clean=("normalize",)))
    for options, message in (
        ({"tokenizer": "sentencepiece:512"}, "--tokenizer: out was prepared with byte, which cannot change when"),
        ({"validation_fraction": 0.2}, r"--validation-fraction: out was prepared with 0\.01, which cannot change"),
        ({"clean": ("c4",)}, "--clean: out was prepared with normalize, which cannot change"),
        ({"deduplicate": False}, "--deduplicate: out was prepared with True"),
        ({"validation": ("b.jsonl",)}, "--validation cannot be used with --append"),
        ({"output": "nowhere"}, "no prepared data in nowhere"),
        ({"output": None}, "name the text with --input, and the folder with --output"),
    ):
        with pytest.raises(DataError, match=message):
            adding("b.jsonl", **options)
    with pytest.raises(DataError, match=r"gone\.jsonl' does not exist"):
        append(adding("gone.jsonl"))
    assert sorted(os.listdir("out")) == ["manifest.json", "tokenizer", "train", "validation"]


def test_the_command(folder: Path) -> None:
    script = [sys.executable, str(ROOT / "scripts/preprocess.py"), "--output", "out", "--input"]
    subprocess.run([*script, "a.jsonl", "--clean", "normalize"], check=True, capture_output=True)
    for printed in ("read from b.jsonl: 110 documents", "out already holds this text; nothing to do"):
        result = subprocess.run([*script, "b.jsonl", "--append"], check=False, capture_output=True, text=True)
        assert (result.returncode, result.stderr) == (0, "")
        assert printed in result.stdout
        assert "b.jsonl" in Path("out/report.html").read_text()
        Path("out/report.html").write_text("of the text before")  # as an interrupted command leaves it
        os.utime("out/report.html", (0, 0))
    result = subprocess.run(
        [*script, "b.jsonl", "--append", "--clean", "c4"], check=False, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "--clean: out was prepared with normalize" in result.stderr
