"""Documents of files: slices neither lose nor invent any, and problems are named and counted."""

from __future__ import annotations

import json
import random

import pytest

from data_pipeline.errors import DataError
from data_pipeline.sources import text_files as textfiles
from data_pipeline.sources.files import read_slice
from data_pipeline.sources.plain_text import Division, Rule
from data_pipeline.sources.problems import Problems
from data_pipeline.sources.text_files import Reading, clean, slices_of

STOP = Reading(text_key="text", on_error="stop", division=Division(Rule("paragraphs")))
SKIP = Reading(text_key="text", on_error="skip", division=Division(Rule("paragraphs")))


def documents(path, reading=STOP, problems=None):
    problems = problems or Problems()
    pieces = slices_of(str(path), path.stat().st_size, reading.division)
    return [clean(raw, problems).decode() for piece in pieces for raw in read_slice(piece, reading, problems)]


def random_text(seed, size):
    """Return paragraphs of all lengths: characters of one to four bytes, both line ends, blank lines with spaces."""
    rng = random.Random(seed)
    parts = []
    while size > 0:
        parts.append("".join(rng.choices("ab é字😀", k=rng.choice([1, 5, 40, 300]))))
        parts.append(rng.choice(["\n", "\r\n", "\n\n", "\n \t\n", "\r\n\r\n\r\n", "\n\n\n\n"]))
        size -= len(parts[-2])
    return "".join(parts)


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


def test_a_line_too_long_for_memory_is_refused_or_skipped(tmp_path, monkeypatch):
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
