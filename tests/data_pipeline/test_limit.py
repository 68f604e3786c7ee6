"""A limited part of the input, the first documents or bytes: no more of it is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.loading.prepared_data import PreparedData
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import prepare
from data_pipeline.sources.limit import Limit

TEXTS = [f"document {number:04} of nine words or so, no more" for number in range(200)]


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Make two files of many units, and one that cannot be read."""
    monkeypatch.setattr("data_pipeline.sources.files.SLICE", 1000)
    monkeypatch.setattr("data_pipeline.sources.text_files.SLICE", 1000)
    monkeypatch.chdir(tmp_path)
    for name, texts in (("a", TEXTS[:120]), ("b", TEXTS[120:])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    Path("c.jsonl").write_text("{broken\n" * 300)
    return "a.jsonl", "b.jsonl", "c.jsonl"


@pytest.mark.parametrize(
    ("limit", "number"), [("70", 70), ("130", 130), ("6000B", 6000 // len(TEXTS[0])), ("2kB", 2000 // len(TEXTS[0]))]
)
def test_the_first_ones_are_read_and_no_more(inputs: tuple[str, ...], limit: str, number: int) -> None:
    for output in ("one", "two"):
        manifest = prepare(PrepareConfig(inputs, output=output, limit=limit, workers=1 if output == "one" else 2))
        data = PreparedData.open(output)
        found = [
            data.tokenizer.decode(ids) for split in ("train", "validation") for ids in data.split(split).documents()
        ]
        assert sorted(found) == TEXTS[:number]
        assert [source["name"] for source in manifest.sources] == list(inputs)
        assert sum(source["documents"] for source in manifest.sources) == number
    with pytest.raises(DataError, match=f"--limit was {limit}, now it is none"):
        prepare(PrepareConfig(inputs, output="one"))


def test_held_back_files_are_read_whole(inputs: tuple[str, ...]) -> None:
    manifest = prepare(PrepareConfig(("a.jsonl",), output="out", limit="5", validation=("b.jsonl",)))
    assert [manifest.total(split, "documents") for split in ("train", "validation")] == [5, 80]


def test_a_limit_beyond_the_input_changes_nothing(inputs: tuple[str, ...]) -> None:
    one = prepare(PrepareConfig(inputs[:2], output="one", limit="1TB"))
    assert one.fingerprint == prepare(PrepareConfig(inputs[:2], output="two")).fingerprint


def test_units() -> None:
    sizes = {"1B": 1, "10kB": 10_000, "1.5 MB": 1_500_000, "64KiB": 1 << 16, "2GiB": 2 << 30}
    for text, size in sizes.items():
        assert Limit.parse(text) == Limit(bytes=size)
    assert Limit.parse("1000") == Limit.parse("1k") == Limit(documents=1000)
    assert Limit.parse("2.5k") == Limit(documents=2500)
    for wrong in ("0", "-1", "1.5", "ten", "10M", "1G", "10 parsecs", "0MB", ""):
        with pytest.raises(DataError, match="expected a number of documents, 1000 or 10k, or of bytes, 10MB"):
            Limit.parse(wrong)


def test_a_limit_that_leaves_nothing(inputs: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="--limit 3B leaves nothing: the first document is longer"):
        prepare(PrepareConfig(inputs, output="out", limit="3B"))


def test_an_empty_last_source(inputs: tuple[str, ...]) -> None:
    Path("empty.txt").write_text("")
    assert prepare(PrepareConfig(("a.jsonl", "empty.txt"), output="out")).sources[1]["documents"] == 0
