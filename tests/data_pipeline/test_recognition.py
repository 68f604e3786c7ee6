"""Finished data is recognised by the contents of its input; differences are described in words."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import Preparation, prepare

TEXTS = [f"{number} document of some words" for number in range(20)]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make texts/a.txt, b.md and c.jsonl below the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("texts").mkdir()
    Path("texts/a.txt").write_text("\n\n".join(TEXTS))
    Path("texts/b.md").write_text("other words")
    Path("texts/c.jsonl").write_text("".join(json.dumps({"text": f"{text}!"}) + "\n" for text in TEXTS))
    return tmp_path


def config(*inputs: str, **options: object) -> PrepareConfig:
    return PrepareConfig(inputs or ("texts",), **({"output": "out"} | options))  # type: ignore[arg-type]


def test_equal_files_are_recognised_in_any_place_and_by_any_name(folder: Path) -> None:
    fingerprint = prepare(config()).fingerprint
    os.utime("texts/a.txt")
    os.utime("texts/b.md", (1, 1))
    same = [config(), config(str(folder / "texts")), config("./texts/../texts/"), config("texts/*")]
    shutil.copytree("texts", "copy")
    os.rename("copy/a.txt", "copy/a2.text")
    same.append(config("copy"))
    for one in same:
        found = Preparation(one).existing()
        assert found is not None
        assert found.fingerprint == prepare(one).fingerprint == fingerprint
    shutil.move("texts", "elsewhere")
    assert Preparation(config("elsewhere")).existing() is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda: Path("texts/a.txt").write_text("changed"),
            r"--input .*texts has changed since: it had 3 files of [\d,]+",
        ),
        (lambda: Path("texts/d.txt").write_text("new"), "had 3 files of .*, now it has 4 files of"),
        (lambda: Path("texts/b.md").write_text("othre words"), "texts has changed since: the same number of bytes"),
        (lambda: os.rename("texts/a.txt", "texts/z.txt"), "texts has changed since: the same number of bytes"),
        (lambda: os.rename("texts/c.jsonl", "texts/c.txt"), "texts has changed since: the same number of bytes"),
    ],
)
def test_changes_of_the_input_are_described_in_words(folder: Path, change: object, words: str) -> None:
    """A different order, or a different way of reading, makes a different text."""
    prepare(config())
    change()  # type: ignore[operator]
    with pytest.raises(DataError, match=words) as caught:
        prepare(config())
    assert not any(len(word) > 60 and word.isalnum() for word in str(caught.value).split())


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (config("texts/a.txt"), r"--input was .*/texts, now it is .*/texts/a\.txt, which holds other text"),
        (config("texts", "texts/a.txt"), r"--input was .*/texts, now it is .*/texts, .*a\.txt"),
        (config(validation=("texts/b.md",)), r"--validation was none, now it is .*b\.md"),
        (config(clean=("normalize",)), "--clean was none, now it is normalize"),
        (config(deduplicate=False), "--keep-duplicates was off, now it is on"),
        (config(documents="paragraphs"), "--input .*texts: documents was auto, now it is paragraphs"),
        (config(decontaminate=("texts/b.md",)), "the evaluation files of --decontaminate differ"),
    ],
)
def test_changes_of_settings_are_described_in_words(folder: Path, other: PrepareConfig, words: str) -> None:
    prepare(config())
    with pytest.raises(DataError, match=words):
        prepare(other)


def test_interrupted_work_resumes_after_the_input_was_moved(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("data_pipeline.preparation.split.choose_by_hash", killed)
        prepare(config())
    shutil.move("texts", "elsewhere")
    with monkeypatch.context() as patch:
        patch.setattr("data_pipeline.preparation.pipeline.gather", killed)  # all has been read
        prepare(config("elsewhere"))
    assert Preparation(config("elsewhere")).existing() is not None


def test_evaluation_files_are_recognised_by_their_contents(folder: Path) -> None:
    Path("questions.txt").write_text("nothing of the kind is in the corpus")
    prepare(config(decontaminate=("questions.txt",)))
    os.rename("questions.txt", "asked.txt")
    assert Preparation(config(decontaminate=("asked.txt",))).existing() is not None


def test_files_that_the_shell_names_are_one_source_as_their_pattern_is(folder: Path) -> None:
    """Separate sources would each need a unit, and entries in the manifest and the report."""
    Path("many").mkdir()
    names = [f"many/{number:03}.txt" for number in range(40)]
    for name in names:
        Path(name).write_text(f"the text of {name}")
    manifest = prepare(config(*reversed(names), validation=("texts/b.md",)))
    assert [source["name"] for source in manifest.sources] == ["many/0*.txt", "texts/b.md"]
    assert manifest.sources[0]["documents"] == 40
    for same in (config("many/*.txt", validation=("texts/b.md",)), config("many", validation=("texts/b.md",))):
        found = Preparation(same).existing()
        assert found is not None
        assert found.fingerprint == manifest.fingerprint
    few = prepare(config("texts/c.jsonl", *names[:5], output="few"))
    assert [source["name"] for source in few.sources] == ["texts/c.jsonl", *names[:5]]


def test_only_differences_are_named(folder: Path) -> None:
    prepare(config(validation=("texts/b.md",)))
    os.utime("texts/b.md")
    with pytest.raises(DataError) as caught:
        prepare(config("texts", "texts/a.txt", validation=("texts/b.md",)))
    assert "--validation" not in str(caught.value)
