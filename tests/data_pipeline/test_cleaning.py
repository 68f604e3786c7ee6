"""Cleaning: each rule on a text that just breaks it, and on one that just passes."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import re
import sys
import unicodedata
from collections import Counter
from dataclasses import fields
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.cleaning.c4 import c4
from data_pipeline.cleaning.decontamination import texts_of
from data_pipeline.cleaning.documents import Cleaner, Cleaning, parse_steps
from data_pipeline.cleaning.gopher import gopher
from data_pipeline.cleaning.language import language_codes
from data_pipeline.cleaning.normalization import normalize
from data_pipeline.cleaning.words import OVERLAP, PIECE, WORD, pieces, words_of
from data_pipeline.errors import DataError
from data_pipeline.loading.prepared_data import PreparedData
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import prepare
from data_pipeline.storage.documents import Gathered

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

WORDS = [f"{a}{b}{c}{d}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdfglmnrst" for d in "aeiou"]
LETTERS = "abcdefghijklmnopqrstuvwxyzäöü"


def prose(number: int, seed: int = 0) -> str:
    """Return words in an order that does not repeat, with stop words, so that Gopher's rules accept it."""
    generator = random.Random(f"{number} {seed}")
    return " ".join(["the", "of", *(generator.choice(WORDS) for _ in range(number - 2))])


def stored(*texts: str) -> np.ndarray:
    return np.frombuffer(b"".join(text.encode() + b"\xff" for text in texts), np.uint8)


def spelled(text: np.ndarray) -> list[tuple[int, str]]:
    words = words_of(text)
    spans = zip(words.documents.tolist(), words.starts.tolist(), words.stops.tolist(), strict=True)
    return [(document, text[start:stop].tobytes().decode()) for document, start, stop in spans]


def test_normalization_unifies_lookalikes_and_is_idempotent() -> None:
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


def test_c4_knows_sentences_and_words_of_scripts_without_spaces() -> None:
    text = "春天来了，花儿开了。小鸟在枝头唱歌！孩子们在公园里玩耍吗？\n菜单\nهذا كتاب جديد ومفيد جدا؟"
    assert c4(text, Counter()) == (
        "春天来了，花儿开了。小鸟在枝头唱歌！孩子们在公园里玩耍吗？\nهذا كتاب جديد ومفيد جدا؟",
        "",
    )


def test_languages_are_distinguished() -> None:
    english = "The weather was fine this morning, so we went for a walk along the river with our friends."
    german = "Das Wetter war heute morgen schön, und so gingen wir mit unseren Freunden am Fluss spazieren."
    cleaner = Cleaner(Cleaning(("language",), ("en",)))
    assert cleaner(english.encode()) == english.encode() and cleaner(german.encode()) is None
    assert cleaner.record.documents == {"language: de": 1}
    assert Cleaner(Cleaning(("language",), ("de", "en")))(german.encode()) == german.encode()


def test_languages_have_many_names() -> None:
    names = (
        "english",
        "English",
        "en",
        "eng",
        "en-US",
        "German",
        "deutsch",
        "ger",
        "deu",
        "zh_CN",
        "Español",
        "日本語",
    )
    assert language_codes(names) == ("en", "de", "zh", "es", "ja")
    with pytest.raises(DataError, match="unknown language 'englsh'; nearest: english"):
        language_codes(("englsh",))
    one, other = (PrepareConfig(("a",), clean=("language",), languages=(name,)).cleaning for name in ("en", "English"))
    assert one == other


def test_limits_are_settings() -> None:
    def cleaning(*limits: str) -> Cleaning:
        return PrepareConfig(("a",), clean=("c4", "gopher"), cleaning_limits=limits).cleaning

    text = prose(20)
    assert Cleaner(cleaning())(text.encode()) is None
    cleaner = Cleaner(cleaning("gopher.min_words=21", "c4.min_sentences=0", "c4.min_words_in_line=0"))
    assert cleaner(f"{text}.".encode()) is None and cleaner.rule == "gopher: fewer than 21 words"
    cleaner = Cleaner(cleaning("gopher.min_words=20", "c4.min_sentences=1"))
    assert cleaner(f"{text}.".encode()) == f"{text}.".encode()
    german = cleaning("gopher.stop_words=der,die,und", "gopher.max_top_2gram=0.125").gopher
    assert german.rule("min_stop_words") == "fewer than 2 of the words der, die, und"
    assert german.rule("max_top_2gram") == "more than 12.5% of characters in one 2-gram"
    assert german.changed == {"stop_words": ["der", "die", "und"], "max_top_2gram": 0.125}
    for limits, message in {
        ("gopher.min_wrds=3",): "unknown cleaning limit 'gopher.min_wrds'; nearest: gopher.min_words; the limits are",
        ("gopher.min_words",): "expected STEP.NAME=VALUE",
        ("gopher.min_words=2.5",): "gopher.min_words must be a whole number, 0 or more; got '2.5'",
        ("c4.min_sentences=-1",): "c4.min_sentences must be a whole number",
        ("gopher.max_duplicate_lines=30",): "max_duplicate_lines must be a share, 0 to 1; got '30'",
        ("gopher.max_hashes=nan",): "max_hashes must be a number",
        ("gopher.min_words=9", "gopher.min_words=8"): "gopher.min_words is set twice",
        ("gopher.min_words=9", "gopher.max_words=8"): "gopher.min_words=9 is above gopher.max_words=8",
        ("gopher.min_stop_words=9",): "gopher.min_stop_words=9 is above the number of gopher.stop_words, 8",
        ("language.min_probability=0.5",): "limits of a cleaning step that is off: language.min_probability=0.5",
    }.items():
        with pytest.raises(DataError, match=message):
            cleaning(*limits)


def test_every_limit_is_documented() -> None:
    page = Path("docs/data.md").read_text(encoding="utf-8")
    names = [(step, field.name) for step, limits in Cleaning().limits.items() for field in fields(limits)]
    assert [
        name for name in names if f"`{'.'.join(name)}`" not in page and f"`{name[1][-7:].strip('_')}`" not in page
    ] == []


def test_steps_are_named_and_ordered() -> None:
    assert parse_steps(("gopher", "normalize")) == ("normalize", "gopher")
    with pytest.raises(DataError, match="'gofer'; nearest: gopher"):
        parse_steps(("gofer",))
    with pytest.raises(DataError, match="which keeps them, is off"):
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
    assert words.hashes[6] == words.hashes[10]  # 中
    assert words.hashes[5] == words.hashes[1] == words.hashes[13]  # wörld
    assert len(set(words.hashes.tolist())) == len(words.hashes) - 4
    runs, firsts, lasts = words.runs(2 * WORD)
    assert (lasts - firsts).tolist() == [1] * len(firsts)
    assert firsts.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 12]  # none across documents; カ is half a word
    assert runs[0] == runs[-1] and len(set(runs.tolist())) == len(runs) - 1


def test_no_run_of_words_is_lost_where_a_long_document_is_cut() -> None:
    long = prose(400_000)  # more than a MiB
    text = stored("first", long, "last")
    lengths = np.array([6, len(long) + 1, 5])
    found: set[int] = set()
    seen = []
    for first, last, piece in pieces(text, lengths):
        seen.append((first, last))
        found |= set(words_of(piece).runs(13 * WORD)[0].tolist())
    assert seen == [(0, 1), *[(1, 2)] * 4, (2, 3)] and len(long) > PIECE + OVERLAP
    assert set(words_of(text).runs(13 * WORD)[0].tolist()) <= found


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Straße ﬁnden", "STRASSE Finden"),  # case folding and ligatures
        ("ＡＢＣ １２", "abc 12"),  # full width
        ("caf\u00e9 ti\u1ebfng Vi\u1ec7t", "cafe\u0301 tie\u0302\u0301ng VIE\u0323\u0302T"),  # composed or not
        ("ışık İstanbul", "IŞIK istanbul"),  # Turkish
        ("οδός", "ΟΔΟΣ"),
        ("zero width, soft hyphen", "ze\u200bro wi\u200dd\u2060th so\u00adft hy\ufeffphen\u200e"),
        ("à l'été, n'est", "à\u00a0l’été\u202fn’est"),
        ("¿Qué tal? «Sí»", "que tal — si"),
        ("مرحبا، كيف", "مَرْحَبًا كـــيف"),  # vowel signs and stretchers
        ("한국어", "\u1112\u1161\u11ab \u1100\u116e\u11a8\u110b\u1165"),  # syllables, and the letters that make them
        ("カガ", "ｶ ｶﾞ"),
        ("ｗｏｒｄ，２", "word 2"),
    ],
)
def test_disguises_change_no_word(one: str, other: str) -> None:
    text = stored(one, other)
    words = words_of(text)
    half = len(words.hashes) // 2
    assert half and words.documents.tolist() == [0] * half + [1] * half
    assert words.hashes[:half].tolist() == words.hashes[half:].tolist()
    separators = " ,’—，«»\u00a0\u202f"
    assert "".join(word for document, word in spelled(text) if document) == other.translate(
        dict.fromkeys(map(ord, separators))
    )


def test_scripts_without_spaces_have_units_that_weigh_less_than_a_word() -> None:
    words = words_of(stored("ab 中 か 한 ท abท"))
    assert words.weights.tolist() == [WORD, WORD, WORD // 2, WORD // 2, WORD // 3, WORD, WORD // 3]
    _, firsts, lasts = words.runs(2 * WORD)
    assert list(zip(firsts.tolist(), lasts.tolist(), strict=True)) == [(0, 1), (1, 3), (2, 5), (3, 6)]
    assert words_of(stored("", "...")).runs(WORD)[0].tolist() == []


def changed(text: str, number: int) -> str:
    words = text.split()
    words[len(words) // 2 : len(words) // 2 + number] = ["other"] * number
    return " ".join(words)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Return 300 documents, then 100 of them with one word changed, 50 with 20 changed, and 20 unchanged."""
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
    """Many units, small blocks and several passes give the same decisions as one of each."""
    from data_pipeline.cleaning import near_duplicates as module
    from data_pipeline.preparation.gathering import gather
    from data_pipeline.sources.problems import Problems

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
    assert frozenset(("two words", "Two, words!")) in twins  # a text without words resembles no other


def test_decontamination_lists_removed_documents(corpus: tuple[Path, list[str]], tmp_path: Path) -> None:
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


EVALUATED = {
    "zh": "春天来了，花儿开了，小鸟在枝头唱歌，孩子们在公园里玩耍，大人们在树下聊天。",
    "ja": "春が来て、花が咲き、小鳥が枝で歌い、子供たちは公園で楽しく遊んでいます。",
    "ko": "봄이 오고 꽃이 피고 작은 새들이 나뭇가지에서 노래하며 아이들은 공원에서 즐겁게 놀고 있다.",
    "th": "ฤดูใบไม้ผลิมาถึงแล้วดอกไม้บานนกน้อยร้องเพลงบนกิ่งไม้เด็กๆเล่นในสวนสาธารณะ",
    "ar": "جاء الربيع، وتفتحت الأزهار، وغنت العصافير على الأغصان، ولعب الأطفال في الحديقة.",
    "es": "¿Sabías que la primavera llegó, y que los niños jugaron en el jardín con su pequeño pájaro azul?",
    "fr": "C'est l'été\u00a0: les élèves ne sont plus à l'école, et la forêt s'éveille très tôt.",
    "de": "Die Straße führt über den großen Fluß, und die Kinder grüßen höflich jeden müden Fußgänger am Weg.",
    "tr": "Işıklı İstanbul sokaklarında iki küçük kız çiçekçi kadına gülümseyip ılık simit alıyor bugün yine.",
    "vi": "Mùa xuân đã đến, những bông hoa nở rộ và các em nhỏ đang chơi đùa trong công viên.",
    "en": "The \uff24\uff2f\uff27 ran swiftly over seven wet ﬁelds, barking at every single crow it met.",
}
DISGUISES = [
    lambda text: text,
    lambda text: unicodedata.normalize("NFD", text),
    lambda text: unicodedata.normalize("NFKC", text),
    lambda text: text.translate({ord(one): "、" for one in ",，.。،?"}).upper(),
    lambda text: "\u200b".join(text),
    lambda text: text.replace(" ", "\u00a0").replace("e", "e\u00ad"),
]


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_decontamination_finds_every_script_in_every_disguise(tmp_path: Path, form: str) -> None:
    evaluation = tmp_path / "evaluation.jsonl.gz"
    lines = [json.dumps({"q": unicodedata.normalize(form, text)}) for text in EVALUATED.values()]
    evaluation.write_bytes(gzip.compress("\n".join(lines).encode()))
    # Surrounding text is of the same script, and adjacent where the script has no spaces.
    hidden = [
        text[:9] + disguise(text) + text[:9]
        if name in ("zh", "ja", "th")
        else f"{text[:9]} {disguise(text)} {text[:9]}"
        for name, text in EVALUATED.items()
        for disguise in DISGUISES
    ]
    innocent = [text[: len(text) // 3] + text[len(text) // 2 :][::-1] for text in EVALUATED.values()]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [*hidden, *innocent]))
    output = tmp_path / "out"
    prepare(PrepareConfig((str(path),), output=str(output), workers=1, decontaminate=(str(evaluation),)))
    data = PreparedData.open(output)
    assert sorted(documents(data, "train") + documents(data, "validation")) == sorted(innocent)


def test_evaluation_files_of_many_formats_are_read(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    records = [{"q": "one text", "a": ["two", {"x": "three"}]}]
    in_lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "a.jsonl").write_text(in_lines)
    (tmp_path / "b.json").write_text(json.dumps(records, indent=1))
    (tmp_path / "c.json").write_text(in_lines * 2)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(in_lines.encode()))
    (tmp_path / "e.ndjson.xz").write_bytes(lzma.compress(in_lines.encode()))
    (tmp_path / "f.json.zst").write_bytes(zstd.compress(in_lines.encode()))
    (tmp_path / "g.csv").write_text('q,a\n"one, text",two\n')
    (tmp_path / "h.tsv.gz").write_bytes(gzip.compress(b'q\ta\n"one\ttwo\n'))
    (tmp_path / "i.txt.gz").write_bytes(gzip.compress(b"one\r\n\r\ntwo"))
    parquet.write_table(pyarrow.table({"q": ["one"], "n": [1], "a": [["two", "three"]]}), tmp_path / "j.parquet")
    found = {path.name[0]: list(texts_of(str(path))) for path in sorted(tmp_path.iterdir())}
    assert found == {
        **{name: ["one text", "two", "three"] for name in "abdef"},
        "c": ["one text", "two", "three"] * 2,
        "g": ["q", "a", "one, text", "two"],
        "h": ["q", "a", '"one', "two"],
        "i": ["one", "two"],
        "j": ["one", "two", "three"],
    }
    (tmp_path / "bad.jsonl").write_text('{"q": "one"}\n{"q": \n')
    (tmp_path / "bad.gz").write_text("one")
    for name, message in (("bad.jsonl", r"bad\.jsonl: line 2: Expecting value"), ("bad.gz", "compression is damaged")):
        with pytest.raises(DataError, match=message):
            list(texts_of(str(tmp_path / name)))


@pytest.mark.parametrize("encoding", ["gb18030", "utf-16", "utf-16-le"])
def test_evaluation_files_are_read_in_the_encoding_of_the_inputs(tmp_path: Path, encoding: str):
    texts = ["第一段文字在这里", "and a second one"]
    (tmp_path / "a.txt").write_bytes("\n\n".join(texts).encode(encoding))
    (tmp_path / "b.txt").write_text("\n\n".join(texts))
    with pytest.raises(DataError, match=r"a\.txt is .*expected UTF-8"):
        list(texts_of(str(tmp_path / "a.txt")))
    assert [list(texts_of(str(tmp_path / name), encoding)) for name in ("a.txt", "b.txt")] == [texts, texts]


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
        pytest.raises(DataError, match=r"the library rensa had version .*, now it has 99"),
    ):
        patch.setattr(metadata, "version", lambda name: "99")
        prepare(config("one", 1))
    from data_pipeline.preparation import split as selection

    class Killed(BaseException):
        pass

    def killed(*_: object) -> None:
        raise Killed

    for name in ("drop_duplicates", "near_duplicates", "choose_by_hash"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(selection, name, killed)
            prepare(config("two", 1))
    two = prepare(config("two", 2))
    assert one.fingerprint == two.fingerprint
    assert (one.cleaning, one.statistics) == (two.cleaning, two.statistics)
    assert (tmp_path / "one/removed.jsonl").read_bytes() == (tmp_path / "two/removed.jsonl").read_bytes()
    assert one.cleaning["removed"]["gopher: fewer than 50 words"]["documents"] == 3


@pytest.mark.parametrize(
    ("options", "rules"),
    [
        (
            {"clean": ("gopher", "near-duplicates")},
            "40 by gopher: fewer than 50 words (the limit is gopher.min_words=50;",
        ),
        ({"clean": ("c4",)}, "40 by c4: fewer than 3 sentences (the limit is c4.min_sentences=3;"),
        (
            {"clean": ("language",), "languages": ("de",)},
            "40 by language: en (kept: de, --languages; the limit is language.min_probability=0.65;",
        ),
        ({"decontaminate": ("a.jsonl",)}, "40 by decontamination (13 words in a row of an evaluation text"),
        ({"clean": ("near-duplicates",)}, "39 by near-duplicates (a similarity of 0.8 or more to one that was kept"),
    ],
)
def test_a_rule_that_removes_everything_is_named_with_its_limit_and_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Any, rules: str
) -> None:
    monkeypatch.chdir(tmp_path)
    text = "The weather was fine this morning so we went for a long walk along the river with our old friends again"
    Path("a.jsonl").write_text("".join(json.dumps({"text": text + "!" * n}) + "\n" for n in range(40)))
    with pytest.raises(DataError) as caught:
        prepare(PrepareConfig(("a.jsonl",), output="out", workers=1, **options))
    message = str(caught.value)
    assert re.match(
        r"the input holds [01] different documents? of text; expected at least two: of 40 documents these were left "
        r"out: [34]",
        message,
    )
    assert rules in message and message.endswith("; change the limit of a rule, or leave its step out")


def test_removed_documents_are_listed_by_source_and_rule(
    corpus: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, texts = corpus
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_bytes(path.read_bytes() + json.dumps({"text": f"{name}\n short é"}).encode())
    evaluation = tmp_path / "evaluation.txt"
    evaluation.write_text(texts[250])
    inputs = tuple(str(tmp_path / f"{name}.jsonl") for name in "ab")

    def config(name: str, workers: int, removed: str | None = "removed") -> PrepareConfig:
        return PrepareConfig(
            inputs,
            output=str(tmp_path / name),
            workers=workers,
            clean=("gopher", "near-duplicates"),
            decontaminate=(str(evaluation),),
            keep_removed=None if removed is None else str(tmp_path / f"{name}-{removed}.jsonl"),
        )

    from data_pipeline.preparation import split as selection

    one = prepare(config("one", 1))
    for function in ("drop_duplicates", "write_removed", "choose_by_hash"):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(selection, function, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            prepare(config("two", 2))
    prepare(config("two", 2))
    written = (tmp_path / "one-removed.jsonl").read_bytes()
    assert written == (tmp_path / "two-removed.jsonl").read_bytes()
    entries = [json.loads(line) for line in written.decode().splitlines()]
    counts = Counter(entry["rule"] for entry in entries)
    assert counts == {rule: removed["documents"] for rule, removed in one.cleaning["removed"].items()}
    assert counts["exact duplicates"] == 20 + 420 and counts["near-duplicates"] == 100
    assert [entry["source"] for entry in entries].count(inputs[0]) == 20 + 51 + 100 + 1  # 50 repeat a word
    first = [entry for entry in entries if entry["source"] == inputs[0]]
    assert first[50] == {"source": inputs[0], "rule": "gopher: fewer than 50 words", "text": "a\n short é"}
    assert [entry["text"] for entry in first if entry["rule"] == "exact duplicates"] == texts[:20]
    assert {entry["text"] for entry in first if entry["rule"] == "near-duplicates"} == set(texts[300:400])
    (found,) = [entry for entry in entries if entry["rule"] == "decontamination"]
    assert found["text"] == texts[250] and found["ngram"] in texts[250]
    assert all("stays" in entry for entry in entries if entry["rule"] == "near-duplicates")

    # The list does not change the data: finished data is recognised without it, unless it is requested and missing.
    assert prepare(config("one", 1, None)).fingerprint == one.fingerprint
    (tmp_path / "one-removed.jsonl").unlink()
    with pytest.raises(DataError, match=r"is already prepared, but .*one-removed.jsonl is missing"):
        prepare(config("one", 1))


def test_the_list_of_removed_documents_overwrites_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.jsonl").write_text('{"text": "x"}\n')
    (tmp_path / "list.jsonl").write_text('{"source": "a", "rule": "b", "text": "c"}\n')
    for name, message in {
        "in/a.jsonl": "lies in the input",
        "in/b.jsonl": "lies in the input",
        "list.txt": "expected a name in .jsonl",
        "other.jsonl": "exists and is not a list of removed documents",
    }.items():
        (tmp_path / "other.jsonl").write_text('{"text": "x"}\n')
        with pytest.raises(DataError, match=message):
            PrepareConfig((str(tmp_path / "in"),), keep_removed=str(tmp_path / name))
    PrepareConfig((str(tmp_path / "in"),), keep_removed=str(tmp_path / "list.jsonl"))


def test_without_cleaning_nothing_is_mentioned_and_nothing_changed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("caf\u0065\u0301 \n<eos>\nshort\n<eos>\nanother {\n")
    manifest = prepare(PrepareConfig((str(tmp_path / "a.txt"),), output=str(tmp_path / "out")))
    assert not {"clean", "libraries", "languages", "decontaminate"} & set(manifest.settings)
    assert manifest.cleaning == {"steps": [], "removed": {}, "edits": {}, "decontamination": {}}
    data = PreparedData.open(tmp_path / "out")
    left = {*documents(data, "train"), *documents(data, "validation")}
    assert left == {"caf\u0065\u0301 ", "short", "another {"}
