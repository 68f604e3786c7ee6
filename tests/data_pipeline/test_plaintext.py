"""Documents of plain text: the result of each rule, the same for blocks and slices of any size."""

from __future__ import annotations

import gzip
import html
import random
from collections import Counter

import pytest

from data_pipeline.errors import DataError
from data_pipeline.loading.prepared_data import PreparedData
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import prepare
from data_pipeline.report.page import report
from data_pipeline.report.summary import summary
from data_pipeline.sources import plain_text as plaintext
from data_pipeline.sources import text_files as textfiles
from data_pipeline.sources.files import read_slice
from data_pipeline.sources.formats import zstd
from data_pipeline.sources.plain_text import PIECE, Division, Rule, choose, describe
from data_pipeline.sources.problems import Problems
from data_pipeline.sources.text_files import Reading, clean, slices_of

STORY = 'One day, Mia found a cake.\n\n"Look, Mom!" said Mia.\n\nMom smiled. The end.'


def read(paths, rule="auto", others=0, counts=None):
    """Return the documents of some files, and the rules that divided them."""
    files = [(str(path), path.stat().st_size) for path in paths]
    division = choose(Rule.parse(rule), files, others)
    reading, problems = Reading("text", "stop", division=division), Problems()
    pieces = [piece for path, size in files for piece in slices_of(path, size, division)]
    documents = [clean(raw, problems).decode() for piece in pieces for raw in read_slice(piece, reading, problems)]
    if counts is not None:
        counts.update(problems.division)
    return documents


def write(path, contents):
    path.parent.mkdir(exist_ok=True)
    data = contents.encode() if isinstance(contents, str) else contents
    compress = {".gz": gzip.compress, ".zst": zstd.compress}.get(path.suffix, bytes)
    path.write_bytes(compress(data))
    return path


def test_articles_are_one_document_each(tmp_path):
    texts = [f"Title {number}\n\nFirst.\n\n\nSecond.\n" for number in range(10)]
    paths = [write(tmp_path / f"{number}.txt", text) for number, text in enumerate(texts)]
    assert read(paths) == [text.strip() for text in texts]


@pytest.mark.parametrize(
    ("separator", "line", "name"),
    [
        ("<|endoftext|>", "\n{}\n", "a.txt"),
        ("<|end_of_text|>", "\r\n{}\r\n", "a.train"),
        ("</s>", "\n  {} \t\n", "a.txt.gz"),
        ("<eos>", "\n\n{} \r\n\n\n", "a.txt.zst"),
    ],
)
def test_known_separators_that_stand_alone_on_lines_divide_and_are_removed(tmp_path, separator, line, name):
    between = line.format(separator)
    stories = [f"Story {number}. {STORY} Not {separator} here.{separator}" for number in range(200)]
    text = separator + "\n" + between.join(stories) + between
    counts = Counter()
    assert read([write(tmp_path / name, text)], counts=counts) == stories
    assert counts == {separator: 201, f"within lines: {separator}": 400}
    assert len(describe(Division(Rule("auto")), counts)) == 1


def test_separators_that_stand_within_lines_only_are_named(tmp_path):
    """Joined stories, and files with CR line ends: they stay whole, with a message."""
    for text in ("one</s>two</s>three", "one\r</s>\rtwo\r</s>\rthree"):
        counts = Counter()
        assert read([write(tmp_path / "a.txt", text)], others=1, counts=counts) == [text]
        assert describe(Division(Rule("auto")), counts)[1] == (
            "'</s>' stands 2 times within lines, where it is text: --documents 'separator=</s>' makes it separate "
            "documents"
        )


def test_rules_are_shown_as_they_are_typed():
    sentences = describe(Division(Rule.parse("separator=\\n\\n"), anywhere=True), {"\n\n": 2})
    assert sentences == [
        "2 occurrences of '\\n\\n' separate documents, and are left out (--documents separator=\\n\\n)"
    ]


def test_a_separator_may_end_the_file_and_stand_in_some_files_only(tmp_path):
    paths = [
        write(tmp_path / "a.txt", f"\ufeff<|endoftext|>\n{STORY}\n<|endoftext|>\nb\n<|endoftext|>"),
        write(tmp_path / "b.txt", STORY + "\n"),
        write(tmp_path / "c.txt", f"c\n</s>\n{STORY}\n</s>"),
        write(tmp_path / "d.md", f"# Separators\n\n```\n<|endoftext|>\n```\n\n{STORY}"),
    ]
    expected = [STORY, "b", STORY, "c", STORY, f"# Separators\n\n```\n<|endoftext|>\n```\n\n{STORY}"]
    assert read(paths) == expected
    assert len(read(paths, "separator=<|endoftext|>")) == 6, "named, it counts in Markdown too"
    assert read(paths, "file")[0] == paths[0].read_text().removeprefix("\ufeff").strip()


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.md"])
def test_a_single_file_is_cut_so_that_there_is_a_validation(tmp_path, name):
    paragraphs = [" ".join(random.Random(number).choices(["stone", "sea", "wind"], k=60)) for number in range(600)]
    counts = Counter()
    found = read([write(tmp_path / name, "\n\n".join(paragraphs))], counts=counts)
    assert "\n\n".join(found).split("\n\n") == paragraphs
    assert 16 <= len(found) <= 80
    assert counts == {"cut": 1, "pieces": len(found)}
    short = "\n\n".join(paragraphs[:20])
    assert "\n\n".join(read([write(tmp_path / "short.txt", short)])) == short
    assert len(read([tmp_path / "short.txt"])) > 2
    assert read([tmp_path / "short.txt"], others=1) == [short]


def test_only_large_files_among_few_documents_are_cut(tmp_path):
    large = "\n\n".join(f"{number} " + "x" * 1000 for number in range(200))
    paths = [write(tmp_path / f"{number}.txt", f"{number}. {STORY}") for number in range(99)]
    before = read(paths)
    assert len(before) == 99
    found = read([*paths[1:], write(tmp_path / "large.txt", large)])
    assert found[:98] == before[1:]
    assert "\n\n".join(found[98:]) == large
    assert PIECE // 2 < max(len(document) for document in found) <= PIECE
    assert read([*paths, tmp_path / "large.txt"]) == [*before, large]
    many = "\n<eos>\n".join([large, *before])
    assert read([write(tmp_path / "many.txt", many)]) == [large, *before], "separators give enough documents too"


def test_a_separator_of_ones_own_stands_alone_on_lines_or_else_anywhere(tmp_path):
    path = write(tmp_path / "a.txt", "one\n=====\n\na === b\n ===\r\ntwo\n===\n")
    assert read([path], "separator====") == ["one\n=====\n\na === b", "two"]
    path = write(tmp_path / "b.txt", "one<|endoftext|>two\n\nthree<|endoftext|>")
    assert read([path], "separator=<|endoftext|>") == ["one", "two\n\nthree"]
    path = write(tmp_path / "c.txt", "one\n\ntwo\n\n\nthree\n")
    assert read([path], r"separator=\n\n\n") == ["one\n\ntwo", "three"]
    path = write(tmp_path / "d.txt", "\n one\r\ntwo \r\n\n \t\nthree\n")
    assert read([path], "lines") == [" one", "two ", "three"]
    assert read([path], "paragraphs") == [" one\ntwo ", "three"]


def random_text(seed, size, separator):
    rng = random.Random(seed)
    parts, separators = [], ["\n", "\r\n", "\n\n", "\n \t\n", "\n\n\n", f"\n{separator}\n", f"\n {separator}\r\n"]
    while size > 0:
        parts.append(
            "".join(
                rng.choices(["a", "b", " ", "\u00e9", "\u5b57", "\U0001f600", separator], k=rng.choice([1, 5, 40, 300]))
            )
        )
        parts.append(rng.choice(separators))
        size -= len(parts[-2])
    return "".join(parts)


@pytest.mark.parametrize("rule", ["auto", "separator=<eos>", "separator=a", "file", "paragraphs", "lines"])
@pytest.mark.parametrize("seed", range(3))
def test_documents_are_the_same_in_blocks_and_slices_of_any_size(tmp_path, monkeypatch, rule, seed):
    path = write(tmp_path / "a.txt", random_text(seed, 4000, "<eos>"))
    monkeypatch.setattr(plaintext, "ENOUGH", 2)
    whole = read([path], rule)
    assert len(whole) > 1 or rule == "file"
    for block in (1, 7, 100):
        monkeypatch.setattr(plaintext, "_BLOCK", block)
        assert read([path], rule) == whole
    for size in (10, 333, 1000):
        monkeypatch.setattr(textfiles, "SLICE", size)
        assert read([path], rule) == whole


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_where_documents_are_cut(tmp_path, monkeypatch, seed):
    text = random_text(seed, 4000, "<eos>")
    path = write(tmp_path / "a.txt", text)
    monkeypatch.setattr(plaintext, "PIECE", 300)
    monkeypatch.setattr(plaintext, "_SMALLEST_PIECE", 300)
    monkeypatch.setattr(plaintext, "ENOUGH", 10_000)
    whole = read([path])
    expected = read([path], "separator=<eos>")
    assert "".join("".join(whole).split()) == "".join("".join(expected).split())
    assert set(whole) >= {document for document in expected if len(document.encode()) < 290}
    assert max(len(document.encode()) for document in whole) <= 300
    for block in (1, 50, 1000):
        monkeypatch.setattr(plaintext, "_BLOCK", block)
        assert read([path]) == whole
    for size in (333, 2000):
        monkeypatch.setattr(textfiles, "SLICE", size)
        sliced = read([path])
        assert "".join("".join(sliced).split()) == "".join("".join(whole).split())
        assert set(sliced) >= {document for document in expected if len(document.encode()) < 290}


def test_text_without_any_line_end_is_cut(tmp_path):
    text = "".join(random.Random(1).choices("ab\u00e9\U0001f600", k=1 << 20))
    for path in (write(tmp_path / "x.txt", text), write(tmp_path / "y.txt.zst", text)):
        found = read([path])
        assert "".join(found) == text
        assert max(len(document.encode()) for document in found) <= PIECE


def test_the_chosen_rule_is_reported_and_a_rule_without_effect_refused(tmp_path):
    write(tmp_path / "in/a.txt", f"a\n<eos>\n{STORY}\n<eos>\n")
    write(tmp_path / "in/b.txt", "b")
    write(tmp_path / "in/c.html", f"<h1>c</h1><p>{STORY}</p><p>more</p>")
    manifest = prepare(PrepareConfig((str(tmp_path / "in"),), output=str(tmp_path / "out"), workers=1))
    assert manifest.sources[0]["documents"] == 4, "a page is one document"
    sentences = manifest.sources[0]["division"]["text"]
    assert sentences == [
        "2 lines that hold only '<eos>' separate documents, and are left out",
        "1 file is one document: no line holds only a separator",
    ]
    for place in (summary(manifest, "out"), html.unescape(report(manifest, "out"))):
        assert all(sentence in place for sentence in sentences)
    with pytest.raises(DataError, match=r"documents was auto, now it is file"):
        prepare(PrepareConfig((str(tmp_path / "in"),), output=str(tmp_path / "out"), documents="file"))
    with pytest.raises(DataError, match="the text nowhere holds 'nowhere', so nothing is divided"):
        prepare(PrepareConfig((str(tmp_path / "in"),), output=str(tmp_path / "b"), documents="separator=nowhere"))
    write(tmp_path / "d.jsonl", '{"text": "d"}')
    with pytest.raises(DataError, match="--documents lines says how plain text is divided, but there is none"):
        prepare(PrepareConfig((str(tmp_path / "d.jsonl"),), output=str(tmp_path / "c"), documents="lines"))
    for wrong in ("pages", "separator", "separator= ", "lines=3"):
        with pytest.raises(DataError, match="--documents"):
            PrepareConfig((str(tmp_path / "d.jsonl"),), documents=wrong)
    with pytest.raises(DataError, match="which the default corpus is not"):
        PrepareConfig(documents="lines")


def test_end_of_text_follows_each_document_once_and_no_separator_becomes_ids(tmp_path):
    stories = [f"{number}. {STORY}" for number in range(30)]
    write(tmp_path / "a.txt", "\n<|endoftext|>\n".join(stories))
    prepare(PrepareConfig((str(tmp_path / "a.txt"),), output=str(tmp_path / "out"), workers=1))
    data = PreparedData.open(tmp_path / "out")
    documents = [ids for split in ("train", "validation") for ids in data.split(split).documents()]
    assert sorted(map(data.tokenizer.decode, documents)) == sorted(stories)
    assert all(
        (ids == data.tokenizer.end_of_text_id).tolist() == [False] * (len(ids) - 1) + [True] for ids in documents
    )


def test_where_validation_has_its_own_text_a_single_file_stays_whole(tmp_path):
    text = "\n\n".join(f"{number} " + "x" * 1000 for number in range(200))
    train, validation = write(tmp_path / "train.txt", text), write(tmp_path / "validation.txt", STORY)
    config = PrepareConfig((str(train),), output=str(tmp_path / "out"), validation=(str(validation),), workers=1)
    assert [source["documents"] for source in prepare(config).sources] == [1, 1]
