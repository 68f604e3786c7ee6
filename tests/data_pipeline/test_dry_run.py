"""--dry-run prints the inputs and how they would be read, and writes nothing."""

from __future__ import annotations

import gzip
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.preparation.dry_run import dry_run
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import prepare

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Make a folder of five texts and a picture, and 1,000 lines of JSON, compressed."""
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    for number in range(5):
        Path(f"texts/{number}.txt").write_text(f"story {number}\n<|endoftext|>\nanother\n")
    Path("texts/picture.png").write_bytes(b"")
    with gzip.open("lines.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": f"line {number} of a thousand"}) + "\n" for number in range(1000))
    return "texts", "lines.jsonl.gz"


def test_it_prints_the_inputs_and_their_rules(inputs: tuple[str, ...]) -> None:
    before = sorted(Path().rglob("*"))
    text = dry_run(PrepareConfig(inputs, output="out", test=("texts/0.txt",)))
    assert "nothing is written; the output would be out" in text
    assert re.search(r"^texts: 5 files \(text\), about \d+ bytes of text, 1 piece of work$", text, re.MULTILINE)
    assert "5 lines that hold only '<|endoftext|>' separate documents" in text
    assert "about 10 documents" in text
    assert "  1 file of another format left out:\n    texts/" in text
    assert re.search(r"lines\.jsonl\.gz: 1 file \(jsonl\)", text)
    assert "about 1,000 documents" in text
    assert "for test: texts/0.txt" in text
    assert "tokenizer: byte" in text
    assert re.search(r"about 2\d kB of text in \d+ s, with 1 process$", text)
    assert sorted(Path().rglob("*")) == before


def test_limits_and_existing_data_are_reported(inputs: tuple[str, ...]) -> None:
    text = dry_run(PrepareConfig(inputs, "sentencepiece:300", "out", limit="30"))
    assert "sentencepiece:300 (to be trained on a part of the text)" in text
    assert "about 20 documents" in text
    assert "no more than 30 is read (--limit)" in text
    prepare(PrepareConfig(inputs, output="out"))
    assert "out is already prepared" in dry_run(PrepareConfig(inputs, output="out"))
    assert "--tokenizer was byte, now it is sentencepiece:300" in dry_run(
        PrepareConfig(inputs, "sentencepiece:300", "out")
    )
    with pytest.raises(DataError, match="does not exist"):
        dry_run(PrepareConfig(("./gone.txt",)))


def test_the_command(inputs: tuple[str, ...]) -> None:
    command = [sys.executable, str(ROOT / "scripts/preprocess.py"), "--dry-run", "--input", *inputs]
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "the output would be data/texts+lines-byte" in result.stdout
    assert sorted(os.listdir()) == ["lines.jsonl.gz", "texts"]


def test_unreadable_inputs_are_named(inputs: tuple[str, ...]) -> None:
    Path("lines.json").write_text('[{"text": "a"}, ')
    Path("links").mkdir()
    Path("links/gone.txt").symlink_to("nowhere")
    text = dry_run(PrepareConfig((*inputs, "lines.json", "links"), output="out", on_error="skip"))
    assert "1 unreadable file left out, or the rest of it:\n    cannot read lines.json: it was cut short" in text
    assert "1 unreadable file left out, or the rest of it:\n    cannot read links/gone.txt: No such file" in text
