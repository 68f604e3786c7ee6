"""Documents of files:

none is lost or invented, however a file is sliced, and what is wrong with one is said and counted.
"""

from __future__ import annotations

import json
import random

import pytest

from data_pipeline import textfiles
from data_pipeline.errors import DataError
from data_pipeline.files import read_slice
from data_pipeline.textfiles import Problems, Reading, clean, slices_of

STOP = Reading(text_bytes=0, text_key="text", on_error="stop")
SKIP = Reading(text_bytes=0, text_key="text", on_error="skip")


def documents(path, reading=STOP, problems=None):
    problems = problems or Problems()
    pieces = slices_of(str(path), path.stat().st_size)
    return [clean(raw, problems).decode() for piece in pieces for raw in read_slice(piece, reading, problems)]


def random_text(seed, size):
    """Paragraphs of all lengths, characters of one to four bytes, both kinds of line ends, blank lines with spaces."""
    rng = random.Random(seed)
    parts = []
    while size > 0:
        parts.append("".join(rng.choices("ab é字😀", k=rng.choice([1, 5, 40, 300]))))
        parts.append(rng.choice(["\n", "\r\n", "\n\n", "\n \t\n", "\r\n\r\n\r\n", "\n\n\n\n"]))
        size -= len(parts[-2])
    return "".join(parts)


def test_a_paragraph_is_a_document_in_a_short_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\n one\ntwo \n\n\n \t\nthree\r\nfour\r\n\r\nfive")
    problems = Problems()
    assert documents(path, problems=problems) == [" one\ntwo ", "three\nfour", "five"]
    assert problems.counts == {"crlf_line_ends": 1}


def test_paragraphs_are_gathered_up_to_a_thousandth_of_the_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(["ten bytes."] * 9))
    assert documents(path, Reading(35 * 1024, "text", "stop")) == ["\n\n".join(["ten bytes."] * 3)] * 3
    assert Reading(10**12, "text", "stop").gathered == Reading(10**12, "text", "stop").longest == 1 << 20


def test_a_long_paragraph_is_cut_at_line_ends_or_spaces_or_characters(tmp_path):
    path = tmp_path / "a.txt"
    longest = STOP.longest
    for unit, fits in (("sentence.\n", longest // 10 * 10), ("word ", longest // 5 * 5), ("字", longest // 3 * 3)):
        text = unit * (3 * longest // len(unit.encode()))
        path.write_text(text)
        found = documents(path)
        assert "".join(found).replace("\n", "") == text.replace("\n", "")
        assert len(found[0].encode().rstrip(b"\n")) in (fits, fits - 1)
        assert max(len(document.encode()) for document in found) <= longest


@pytest.mark.parametrize("seed", range(5))
def test_text_is_the_same_in_blocks_and_slices_of_any_size(tmp_path, monkeypatch, seed):
    path = tmp_path / "a.txt"
    path.write_bytes(random_text(seed, 3000).encode())
    reading = Reading(text_bytes=200 * 1024, text_key="text", on_error="stop")
    monkeypatch.setattr(Reading, "longest", property(lambda self: 256))
    whole = documents(path, reading)
    for block in (1, 7, 100):
        monkeypatch.setattr(textfiles, "_BLOCK", block)
        assert documents(path, reading) == whole
    for size in (20, 333, 1000):
        monkeypatch.setattr(textfiles, "SLICE", size)
        assert "".join("".join(documents(path, reading)).split()) == "".join("".join(whole).split())


def test_lines_are_the_same_in_slices_of_any_size(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    texts = [random_text(seed, seed * 10).replace("\r\n", "\n") for seed in range(40)]
    lines = [json.dumps({"id": 1, "text": text}, ensure_ascii=number % 2 == 0) for number, text in enumerate(texts)]
    path.write_bytes(b"\xef\xbb\xbf" + "\n".join([*lines[:20], "", "  ", *lines[20:]]).encode())
    for size in (1, 10, 100, 1000, 1 << 20):
        monkeypatch.setattr(textfiles, "SLICE", size)
        problems = Problems()
        assert documents(path, problems=problems) == texts
        assert problems.counts["byte_order_marks"] == 1


def test_invalid_utf8_is_replaced_and_counted(tmp_path):
    text, lines = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_bytes(
        b"\xef\xbb\xbfgood \xc3\xa9\n\nbad \xff\xfe end\n\ncut \xe5\xad\n\n\xef\xbf\xbd was here, NUL \0 too"
    )
    problems = Problems()
    found = documents(text, problems=problems)
    assert found == ["good é", "bad \ufffd\ufffd end", "cut \ufffd", "\ufffd was here, NUL \0 too"]
    assert problems.counts == {"byte_order_marks": 1, "invalid_utf8_documents": 2, "replaced_characters": 3}

    lines.write_bytes(b'{"text": "bad \xff"}\n{"text": "lone \\ud800, paired \\ud83d\\ude00, nul \\u0000"}\n')
    problems = Problems()
    assert documents(lines, problems=problems) == ["bad \ufffd", "lone \ufffd, paired \U0001f600, nul \0"]
    assert problems.counts == {"invalid_utf8_documents": 2, "replaced_characters": 2}


BROKEN = [
    ('{"text": "cut', "not valid JSON"),
    ('["text"]', "expected an object with the key 'text', got list"),
    ('{"body": "x", "id": 3}', "no key 'text' (--text-key); the keys are: body, id"),
    ('{"text": null}', "'text' is not a string but NoneType"),
    ("[" * 100_000, "not valid JSON"),
]


@pytest.mark.parametrize(("line", "message"), BROKEN)
def test_a_broken_line_is_named_by_its_number_or_skipped_and_counted(tmp_path, monkeypatch, line, message):
    monkeypatch.setattr(textfiles, "SLICE", 30)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "first"}\n\n' + line + '\n{"text": "last"}\n')
    with pytest.raises(DataError) as caught:
        documents(path)
    assert f"a.jsonl:3: {message}" in str(caught.value)
    assert "--on-error skip" in str(caught.value)
    problems = Problems()
    assert documents(path, SKIP, problems) == ["first", "last"]
    assert problems.counts == {"broken_lines": 1}
    assert "a.jsonl:3" in problems.examples[0]


def test_a_line_that_no_memory_holds_is_refused_or_skipped(tmp_path, monkeypatch):
    monkeypatch.setattr(textfiles, "LONGEST_RECORD", 100)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "first"}\n{"text": "' + "x" * 1000 + '"}\n{"text": "last"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: the line is longer"):
        documents(path)
    assert documents(path, SKIP) == ["first", "last"]


def test_utf16_is_refused_with_the_command_that_converts_it(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("text", encoding="utf-16")
    with pytest.raises(DataError, match=r"a\.txt is UTF-16.*iconv"):
        documents(path)
    problems = Problems()
    assert documents(path, SKIP, problems) == []
    assert problems.counts == {"unreadable_files": 1}
