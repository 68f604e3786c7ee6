"""Cleaning: each rule on a text that just breaks it, and on one that just does not."""

from __future__ import annotations

import json
import random
from collections import Counter
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.cleaning.c4 import c4
from data_pipeline.cleaning.documents import Cleaner, Cleaning, parse_steps
from data_pipeline.cleaning.gopher import gopher
from data_pipeline.cleaning.normalization import normalize
from data_pipeline.cleaning.words import OVERLAP, PIECE, pieces, words_of
from data_pipeline.errors import DataError
from data_pipeline.gathering import Gathered
from data_pipeline.preparation import PrepareConfig
from data_pipeline.prepare import prepare
from data_pipeline.reader import PreparedData

WORDS = [f"{a}{b}{c}{d}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfglmnrst" for d in "aeiou"]
LETTERS = "abcdefghijklmnopqrstuvwxyzäöü"


def prose(number: int, seed: int = 0) -> str:
    """Words in no order that repeats; with stop words, so that Gopher's rules let it pass."""
    generator = random.Random(f"{number} {seed}")
    return " ".join(["the", "of", *(generator.choice(WORDS) for _ in range(number - 2))])


def stored(*texts: str) -> np.ndarray:
    return np.frombuffer(b"".join(text.encode() + b"\xff" for text in texts), np.uint8)


def spelled(text: np.ndarray) -> list[tuple[int, str]]:
    words = words_of(text)
    spans = zip(words.documents.tolist(), words.starts.tolist(), words.stops.tolist(), strict=True)
    return [(document, text[start:stop].tobytes().decode()) for document, start, stop in spans]


def test_normalization_joins_what_looks_the_same_and_does_so_once() -> None:
    edits: Counter[str] = Counter()
    text = "\n\nCafe\u0301\u00a0noir \t\r\nA\x00\ufeffB\u2028C\n \n\n\n  indented  inner\n"
    assert normalize(text, edits) == ("Caf\u00e9 noir\nAB\nC\n\n  indented  inner", "")
    assert edits == {
        "normalize: line ends made \\n": 2,
        "normalize: spaces of other kinds made plain": 1,
        "normalize: control characters removed": 2,
        "normalize: spaces at line ends removed": 2,
        "normalize: runs of blank lines made one": 1,
        "normalize: documents put into NFC": 1,
    }
    again: Counter[str] = Counter()
    assert normalize("Caf\u00e9 noir\nAB\nC\n\n  indented  inner", again)[0] and not again
    assert normalize("\ufeff\x00", Counter())[1] == "normalize: nothing left"


@pytest.mark.parametrize(
    ("good", "bad", "rule"),
    [
        (prose(50), prose(49), "fewer than 50 words"),
        (
            prose(60) + " " + " ".join(LETTERS[:28]),
            prose(60) + " " + " ".join(LETTERS),
            "mean length of words outside 3 to 10",
        ),
        (prose(60) + " #" * 6, prose(60) + " #" * 7, "more than 0.1 hashes per word"),
        ("... " * 5 + prose(50), "... " * 6 + prose(50), "more than 0.1 ellipses per word"),
        (
            "\n".join(f"- {prose(9, seed)}" for seed in range(9)) + "\n" + prose(9, 10),
            "\n".join(f"- {prose(9, seed)}" for seed in range(10)),
            "more than 90% of lines begin with a bullet",
        ),
        (
            "\n".join(prose(20, seed) + "…" * (seed < 3) for seed in range(10)),
            "\n".join(prose(20, seed) + "…" * (seed < 4) for seed in range(10)),
            "more than 30% of lines end with an ellipsis",
        ),
        (
            prose(80) + " " + " ".join(map(str, range(100, 120))),
            prose(80) + " " + " ".join(map(str, range(100, 121))),
            "fewer than 80% of words with a letter",
        ),
        (
            prose(60),
            prose(60).replace("of", "on"),
            "fewer than 2 of the words the, be, to, of, and, that, have, with",
        ),
        (
            "\n".join(prose(30, seed) for seed in range(9)) + "\nshort" * 4,
            "\n".join(prose(30, seed) for seed in range(9)) + "\nshort" * 8,
            "more than 30% of lines are duplicates",
        ),
        (
            "\n".join(prose(20, seed) for seed in (*range(24), 23)),
            "\n".join([*(prose(20, seed) for seed in range(6)), prose(60, 7), prose(60, 7)]),
            "more than 20% of characters in duplicate lines",
        ),
        (
            prose(100) + " " + " ".join(f"gammas deltas {word}" for word in WORDS[:9]),
            prose(100) + " " + " ".join(f"gammas deltas {word}" for word in WORDS[:16]),
            "more than 20% of characters in one 2-gram",
        ),
        (
            " ".join(prose(*part) for part in ((60, 0), (7, 2), (60, 1), (7, 2))),
            " ".join(prose(*part) for part in ((60, 0), (13, 2), (60, 1), (13, 2))),
            "more than 15% of characters in repeated 5-grams",
        ),
    ],
)
def test_gopher_rules_at_their_thresholds(good: str, bad: str, rule: str) -> None:
    assert gopher(good, Counter()) == (good, "")
    assert gopher(bad, Counter()) == (bad, f"gopher: {rule}")


def test_c4_keeps_sentences_and_counts_the_lines_it_drops() -> None:
    edits: Counter[str] = Counter()
    text = (
        "Menu\nThis line is a good sentence.[1] And here is another!\nIs this the third one, then?\n"
        "Too few words here.\nPlease enable Javascript to see this page.\nWe use cookies on this site, you know.\n"
        "And so it goes on and on..."
    )
    kept = "This line is a good sentence. And here is another!\nIs this the third one, then?"
    assert c4(text, edits) == (kept, "")
    assert edits == {
        "c4: citation markers removed": 1,
        "c4: lines without terminal punctuation": 2,
        "c4: lines of fewer than 5 words": 1,
        "c4: lines with the word Javascript": 1,
        "c4: lines with a policy notice": 1,
    }
    assert c4("Only one sentence stands in here. And this is the second.", Counter())[1] == "c4: fewer than 3 sentences"
    assert c4(kept + " {", Counter())[1] == "c4: a curly bracket"
    assert c4(kept + " Lorem ipsum.", Counter())[1] == "c4: lorem ipsum"


def test_languages_are_told_apart() -> None:
    english = "The weather was fine this morning, so we went for a walk along the river with our friends."
    german = "Das Wetter war heute morgen schön, und so gingen wir mit unseren Freunden am Fluss spazieren."
    cleaner = Cleaner(Cleaning(("language",), ("en",)))
    assert cleaner(english.encode()) == english.encode() and cleaner(german.encode()) is None
    assert cleaner.record.documents == {"language: de": 1}
    assert Cleaner(Cleaning(("language",), ("de", "en")))(german.encode()) == german.encode()
    with pytest.raises(DataError, match="unknown language 'xx'"):
        Cleaning(("language",), ("xx",))


def test_steps_are_named_and_ordered() -> None:
    assert parse_steps(("gopher", "normalize")) == ("normalize", "gopher")
    with pytest.raises(DataError, match="'gofer'; nearest: gopher"):
        parse_steps(("gofer",))
    with pytest.raises(DataError, match="step that keeps them is off"):
        PrepareConfig(languages=("en",))


def test_words_ignore_case_punctuation_and_layout() -> None:
    text = stored("Hello, “World” — it's\nfine… wörld!", "中文字。abc中 カ", "HELLO world")
    assert spelled(text) == [
        *((0, word) for word in ("Hello", "World", "it", "s", "fine", "wörld")),
        *((1, word) for word in ("中", "文", "字", "abc", "中", "カ")),
        *((2, word) for word in ("HELLO", "world")),
    ]
    words = words_of(text)
    assert words.hashes[0] == words.hashes[12] and words.hashes[1] == words.hashes[13]
    assert len(set(words.hashes.tolist())) == len(words.hashes) - 3
    runs, firsts = words.runs(2)
    assert firsts.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12]  # none across documents
    assert runs[0] == runs[-1] and len(set(runs.tolist())) == len(runs) - 1


def test_no_run_of_words_is_lost_where_a_long_document_is_cut() -> None:
    long = prose(400_000)  # more than a MiB
    text = stored("first", long, "last")
    lengths = np.array([6, len(long) + 1, 5])
    found: set[int] = set()
    seen = []
    for first, last, piece in pieces(text, lengths):
        seen.append((first, last))
        found |= set(words_of(piece).runs(13)[0].tolist())
    assert seen == [(0, 1), (1, 2), (1, 2), (2, 3)] and len(long) > PIECE + OVERLAP
    assert set(words_of(text).runs(13)[0].tolist()) <= found


def changed(text: str, number: int) -> str:
    words = text.split()
    words[len(words) // 2 : len(words) // 2 + number] = ["other"] * number
    return " ".join(words)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """300 documents; behind them 100 of these with one word changed, 50 with 20, 20 as they are."""
    texts = [prose(80, seed) for seed in range(300)]
    texts += [changed(texts[n], 1) for n in range(100)] + [changed(texts[n], 20) for n in range(100, 150)] + texts[:20]
    path = tmp_path_factory.mktemp("corpus") / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path, texts


def documents(data: PreparedData, split: str) -> list[str]:
    return [data.tokenizer.decode(ids) for ids in data.split(split).documents()]


def test_near_duplicates_go_and_the_first_stays_on_either_side(corpus: tuple[Path, list[str]], tmp_path: Path) -> None:
    path, texts = corpus
    config = PrepareConfig((str(path),), output=str(tmp_path), clean=("near-duplicates",), validation_fraction=0.3)
    manifest = prepare(config)
    data = PreparedData.open(tmp_path)
    left = [*documents(data, "train"), *documents(data, "validation")]
    assert sorted(left) == sorted(texts[:300] + texts[400:450])
    removed = manifest.cleaning["removed"]
    assert removed["exact duplicates"]["documents"] == 20 and removed["near-duplicates"]["documents"] == 100
    assert removed["near-duplicates"]["bytes"] == sum(len(text) for text in texts[300:400])
    example = removed["near-duplicates"]["examples"][0]
    assert example["stays"][:100] == texts[0][:100] and 0.8 <= example["similarity"] < 1


def test_signatures_are_cut_into_units_and_bands_without_a_difference(tmp_path: Path, monkeypatch) -> None:
    """Many units, small blocks and several passes decide as one of each does."""
    from data_pipeline.cleaning import near_duplicates as module
    from data_pipeline.gathering import gather
    from data_pipeline.textfiles import Problems

    class Unit:
        source, size = 0, 0

        def __init__(self, texts: list[str]) -> None:
            self.texts = texts

        def read(self, problems: Problems):
            yield from (text.encode() for text in self.texts)

    texts = [prose(100, seed) for seed in range(200)]
    texts += [changed(text, 1) for text in texts[:50]] + ["two words", "...", "Two, words!", "!!!"]
    texts = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]

    def decide(name: str, cuts: list[int]) -> list[int]:
        units = []
        for number, (start, stop) in enumerate(zip([0, *cuts], [*cuts, len(texts)], strict=True)):
            units.append(Gathered(tmp_path / f"{name}{number}"))
            gather(Unit(texts[start:stop]), units[-1], Cleaning())
            module.sign(units[-1])
        return module.near_duplicates(units, np.ones(len(texts), np.bool_)).tolist()

    whole = decide("whole", [])
    monkeypatch.setattr(module, "_SORTED_AT_A_TIME", 32)
    monkeypatch.setattr(module, "_SIGNED_AT_A_TIME", 7)
    monkeypatch.setattr(module, "_COMPARED_AT_A_TIME", 5)
    assert decide("parts", [10, 10, 77]) == whole
    assert sum(stays != number for number, stays in enumerate(whole)) == 51
    twins = {frozenset((texts[n], texts[stays])) for n, stays in enumerate(whole) if n != stays}
    assert frozenset(("two words", "Two, words!")) in twins  # what has no words at all is like nothing


def test_decontamination_lists_what_it_removes(corpus: tuple[Path, list[str]], tmp_path: Path) -> None:
    path, texts = corpus
    thirteen = texts[200].split()[30:43]
    evaluation = tmp_path / "evaluation.jsonl"
    lines = [
        {"question": "Unseen. " + ", ".join(thirteen).upper(), "answers": [" ".join(texts[201].split()[5:13])]},
        {"question": " ".join(texts[202].split()[5:12]), "label": 3},  # seven words are too few
        {"question": "before " + " ".join(texts[203].split()[:12]) + " behind"},  # twelve, in a text of fourteen
    ]
    evaluation.write_text("".join(json.dumps(line) + "\n" for line in lines))
    output = tmp_path / "out"
    manifest = prepare(PrepareConfig((str(path),), output=str(output), decontaminate=(str(evaluation),)))
    left = [text for split in ("train", "validation") for text in documents(PreparedData.open(output), split)]
    assert sorted(left) == sorted({*texts} - {texts[200], texts[201]})
    listed = [json.loads(line) for line in (output / "removed.jsonl").read_text().splitlines()]
    assert [(entry["document"], entry["ngram"]) for entry in listed] == [
        (200, " ".join(thirteen)),
        (201, " ".join(texts[201].split()[5:13])),
    ]
    assert manifest.cleaning["removed"]["decontamination"]["documents"] == 2
    assert manifest.cleaning["decontamination"]["texts"] == 4 and manifest.cleaning["decontamination"]["too_short"] == 1


def test_cleaned_data_is_the_same_for_any_workers_and_after_an_interruption(
    corpus: tuple[Path, list[str]], tmp_path: Path, monkeypatch
) -> None:
    path, texts = corpus
    copies = tmp_path / "in"
    copies.mkdir()
    for name in "abc":  # several units: each of its own source
        (copies / f"{name}.jsonl").write_bytes(path.read_bytes() + json.dumps({"text": f"{name} short"}).encode())
    inputs = tuple(str(copies / f"{name}.jsonl") for name in "abc")
    evaluation = tmp_path / "evaluation.txt"
    evaluation.write_text(texts[250])

    def config(name: str, workers: int) -> PrepareConfig:
        return PrepareConfig(
            inputs,
            output=str(tmp_path / name),
            workers=workers,
            clean=("normalize", "gopher", "near-duplicates"),
            decontaminate=(str(evaluation),),
        )

    one = prepare(config("one", 1))
    assert one.settings["libraries"] == {"rensa": metadata.version("rensa")}
    with (
        monkeypatch.context() as patch,
        pytest.raises(DataError, match=r"libraries\.rensa: .* there, \"99\" asked for"),
    ):
        patch.setattr(metadata, "version", lambda name: "99")
        prepare(config("one", 1))
    from data_pipeline import selection

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    for name in ("drop_duplicates", "near_duplicates", "split"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(selection, name, killed)
            prepare(config("two", 1))
    two = prepare(config("two", 2))
    assert one.fingerprint == two.fingerprint
    assert (one.cleaning, one.statistics) == (two.cleaning, two.statistics)
    assert (tmp_path / "one/removed.jsonl").read_bytes() == (tmp_path / "two/removed.jsonl").read_bytes()
    assert one.cleaning["removed"]["gopher: fewer than 50 words"]["documents"] == 3


def test_where_no_document_is_left_to_compare_that_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("short\n\nand short\n")
    config = PrepareConfig(
        (str(tmp_path / "a.txt"),), output=str(tmp_path / "out"), clean=("gopher", "near-duplicates")
    )
    with pytest.raises(DataError, match="different documents of text in the input: 0; expected at least two"):
        prepare(config)


def test_without_cleaning_nothing_is_mentioned_and_nothing_changed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("caf\u0065\u0301 \n\nshort\n\nanother {\n")
    manifest = prepare(PrepareConfig((str(tmp_path / "a.txt"),), output=str(tmp_path / "out")))
    assert not {"clean", "libraries", "languages", "decontaminate"} & set(manifest.settings)
    assert manifest.cleaning == {"steps": [], "removed": {}, "edits": {}, "decontamination": {}}
    data = PreparedData.open(tmp_path / "out")
    left = {*documents(data, "train"), *documents(data, "validation")}
    assert left == {"caf\u0065\u0301 ", "short", "another {"}
