"""Held-back text: the user's own files whole, or a share of documents and bytes; warnings where it is too little."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import DataError
from data_pipeline.loading.mixture import Mixture
from data_pipeline.loading.prepared_data import PreparedData
from data_pipeline.preparation import encoding
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import Preparation, prepare
from data_pipeline.report.page import write_report
from data_pipeline.report.summary import summary, warnings_of
from data_pipeline.storage.manifest import Manifest

ROOT = Path(__file__).resolve().parents[2]


def lines(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def documents(data: PreparedData, split: str) -> list[str]:
    return [data.tokenizer.decode(ids) for ids in data.split(split).documents()]


def texts(number: int, seed: int = 0, words: int = 30) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(str(rng.random()) for _ in range(words)) for _ in range(number)]


def test_own_files_are_kept_whole_and_their_copies_leave_the_training_text(tmp_path: Path) -> None:
    train, held, tried = texts(40), [*texts(5, 1), "twice", "twice"], texts(4, 2)
    inputs = lines(tmp_path / "train.jsonl", [*train, held[2], tried[1], train[3]])
    config = PrepareConfig(
        (inputs,),
        output=str(tmp_path / "out"),
        validation=(lines(tmp_path / "dev.jsonl", held),),
        test=(lines(tmp_path / "test.jsonl", tried),),
    )
    manifest = prepare(config)
    data = PreparedData.open(tmp_path / "out", verify=True)
    assert documents(data, "train") == train
    assert documents(data, "validation") == held
    assert documents(data, "test") == tried
    assert manifest.cleaning["removed"]["copies of documents that are held back"]["documents"] == 2
    assert manifest.duplicates["documents"] == 1
    assert [source.name for source in data.sources("test")] == [str(tmp_path / "test.jsonl")]
    found = Preparation(config).existing()
    assert found is not None
    assert found.fingerprint == manifest.fingerprint
    assert "test" in write_report(tmp_path / "out").read_text()
    lines(tmp_path / "test.jsonl", texts(9, 3))
    with pytest.raises(DataError, match="test"):
        Preparation(config).existing()


def test_cleaning_keeps_held_back_text_and_removes_similar_training_text(tmp_path: Path) -> None:
    held = [" ".join(f"word{number}" for number in range(400)), "short\u00a0one"]
    alike = held[0].replace("word7 ", "other ")
    manifest = prepare(
        PrepareConfig(
            (lines(tmp_path / "train.jsonl", [*texts(9), alike]),),
            output=str(tmp_path / "out"),
            validation=(lines(tmp_path / "dev.jsonl", held),),
            clean=("normalize", "near-duplicates"),
        )
    )
    data = PreparedData.open(tmp_path / "out")
    assert documents(data, "validation") == [held[0], "short one"]
    assert documents(data, "train") == texts(9)
    assert manifest.cleaning["removed"]["near-duplicates"]["documents"] == 1


def test_a_test_alone_leaves_validation_to_the_hash(tmp_path: Path) -> None:
    inputs = (lines(tmp_path / "train.jsonl", texts(200)),)
    prepare(PrepareConfig(inputs, output=str(tmp_path / "plain")))
    prepare(PrepareConfig(inputs, output=str(tmp_path / "out"), test=(lines(tmp_path / "t.jsonl", texts(3, 1)),)))
    plain, data = PreparedData.open(tmp_path / "plain"), PreparedData.open(tmp_path / "out")
    assert documents(plain, "validation") == documents(data, "validation")
    with pytest.raises(DataError, match=r"no text for a test.*--test"):
        plain.split("test")
    assert len(Mixture([plain, data], [1, 1]).split("test")) == len(data.split("test"))
    assert "test" not in json.loads((tmp_path / "plain/manifest.json").read_text())["splits"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"validation": ("dev.jsonl",), "validation_fraction": 0.1}, "--validation-fraction has no effect"),
        ({"validation": ("blank.txt",)}, "the files given with --validation hold no text: blank.txt"),
        ({"test": ("blank.txt",)}, "the files given with --test hold no text"),
        ({"validation": ("empty.txt",)}, "the files given with --validation hold no text: empty.txt"),
        ({"test": ("empty.txt",)}, "the files given with --test hold no text: empty.txt"),
        ({"validation": ("links",), "on_error": "skip"}, "the files given with --validation hold no text: links"),
        ({"test": ("gone.jsonl",)}, "input 'gone.jsonl' does not exist"),
        (
            {"validation": ("train.jsonl",)},
            "no document of the input is left to train on: of 40 documents these were left out: 40 by copies",
        ),
    ],
)
def test_user_errors_are_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    lines(tmp_path / "train.jsonl", texts(40))
    lines(tmp_path / "dev.jsonl", texts(4, 1))
    Path("blank.txt").write_text(" \n")
    Path("empty.txt").touch()
    Path("links").mkdir()
    Path("links/gone.txt").symlink_to("nowhere")
    with pytest.raises(DataError, match=message):
        prepare(PrepareConfig(("train.jsonl",), output="out", **options))


@pytest.mark.parametrize("fraction", [0.02, 0.5])
@pytest.mark.parametrize("seed", range(2))
def test_the_share_is_one_of_bytes_too(tmp_path: Path, fraction: float, seed: int) -> None:
    """One book and many notes: a hash alone would hold back either the whole book or hardly a byte."""
    rng = random.Random(seed)
    found = [" ".join(texts(1, number, rng.randint(1, 20))) for number in range(300)] + texts(3, seed, 800)
    prepare(
        PrepareConfig((lines(tmp_path / "a.jsonl", found),), output=str(tmp_path / "out"), validation_fraction=fraction)
    )
    data = PreparedData.open(tmp_path / "out")
    held, all_bytes = data.split("validation"), sum(len(text.encode()) for text in found)
    assert fraction / 2 <= held.num_bytes / all_bytes <= 2 * fraction
    assert 0.3 * fraction <= held.num_documents / len(found) <= 2 * fraction
    assert data.split("train").num_documents + held.num_documents == len(found)


def test_a_long_document_is_not_held_back_among_few_short_ones(tmp_path: Path) -> None:
    for seed in range(6):  # by hash alone the book would be chosen once in four
        found = [*texts(3, seed, 10), *texts(1, 100 + seed, 900)]
        path = lines(tmp_path / f"{seed}.jsonl", found)
        prepare(PrepareConfig((path,), output=str(tmp_path / str(seed))))
        data = PreparedData.open(tmp_path / str(seed))
        assert data.split("validation").num_documents == 1
        assert data.split("validation").num_bytes < 1000


def test_warnings_of_too_little_text_name_a_remedy(tmp_path: Path) -> None:
    big, small, tiny = texts(900, 1), texts(300, 2), texts(1, 3)
    inputs = tuple(
        lines(tmp_path / f"{name}.jsonl", one) for name, one in (("big", big), ("small", small), ("tiny", tiny))
    )
    manifest = prepare(PrepareConfig(inputs, output=str(tmp_path / "out")))
    warnings = warnings_of(manifest)
    assert len(warnings) == 2
    assert "for validation is" in warnings[0]
    assert "less than 64 KiB: hold back more with --validation-fraction 0.15, or" in warnings[0]
    assert "tiny.jsonl holds 1 document of " in warnings[1]
    assert "--documents" not in warnings[1], "which divides plain text, and there is none"
    tiny_text = tmp_path / "tiny.txt"
    tiny_text.write_text(tiny[0])
    warnings = warnings_of(prepare(PrepareConfig((*inputs[:2], str(tiny_text)), output=str(tmp_path / "text"))))
    assert "--documents paragraphs makes several documents of it" in warnings[1]
    assert f"warning: {warnings[0]}" in summary(manifest, "out")

    more = PrepareConfig(inputs, output=str(tmp_path / "more"), validation_fraction=0.15)
    (of_source,) = [one for one in warnings_of(prepare(more)) if "tiny" not in one]
    assert "the text for validation of" in of_source and "small.jsonl is less than 64 KiB" in of_source
    assert of_source.endswith("--validation-fraction 0.5")

    held = lines(tmp_path / "dev.jsonl", texts(200, 4))
    alone = PrepareConfig(inputs[:1], output=str(tmp_path / "own"), validation=(held,))
    assert warnings_of(prepare(alone)) == []
    lone = PrepareConfig(inputs[:1], output=str(tmp_path / "lone"), validation=(lines(tmp_path / "x.jsonl", tiny),))
    (warning,) = [one for one in warnings_of(prepare(lone)) if one.startswith("the text")]
    assert "give more text with --validation" in warning


def test_the_remedy_in_a_warning_works(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", texts(900))
    (warning,) = warnings_of(prepare(PrepareConfig((path,), output=str(tmp_path / "out"))))
    share = float(warning.split("--validation-fraction ")[1].split(",")[0])
    assert warnings_of(prepare(PrepareConfig((path,), output=str(tmp_path / "b"), validation_fraction=share))) == []


def test_pipes_are_read_once_and_recognised_by_their_contents(tmp_path: Path) -> None:
    """Splitting one text at a byte, as nanoGPT does, takes one command."""
    (tmp_path / "input.txt").write_text(" ".join(f"{number}: to be, or not to be" for number in range(200)))
    command = (
        f"{sys.executable} {ROOT}/scripts/preprocess.py --input <(head -c 4000 input.txt) "
        "--validation <(tail -c +4001 input.txt) --output out"
    )
    for printed in ("validation", "already prepared"):
        result = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (result.returncode, result.stderr) == (0, "")
        assert printed in result.stdout
    manifest = Manifest.load(tmp_path / "out")
    assert manifest.total("train", "bytes") == 4000
    assert manifest.total("validation", "bytes") == (tmp_path / "input.txt").stat().st_size - 4000
    assert {path.name for path in tmp_path.iterdir()} == {"input.txt", "out"}


def test_one_very_long_document_takes_no_others_with_it(tmp_path: Path) -> None:
    """Half of the share of bytes would otherwise take all short documents."""
    path = lines(tmp_path / "a.jsonl", [*texts(100, 1), " ".join(texts(1, 2, 30_000))])
    manifest = prepare(PrepareConfig((path,), output=str(tmp_path / "out")))
    assert 1 <= manifest.total("validation", "documents") <= 5


def test_a_tokenizer_is_trained_on_a_part_of_a_long_document_where_chance_takes_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "_SAMPLE_BYTES", 1 << 14)
    path = lines(tmp_path / "a.jsonl", ["the lazy dog and the quick fox " * 20_000, "a short one"])
    assert prepare(PrepareConfig((path,), "sentencepiece:280", output=str(tmp_path / "out"))).total("train", "ids")
