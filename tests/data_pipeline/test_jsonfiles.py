"""Documents of .json files: bounded memory, text and turns within records, blank documents, files that shrink."""

from __future__ import annotations

import bz2
import gzip
import json
import random
import tracemalloc

import pytest

from data_pipeline.errors import DataError
from data_pipeline.sources import json_files as jsonfiles
from data_pipeline.sources import text_files as textfiles
from data_pipeline.sources.conversations import segments_of
from data_pipeline.sources.files import read_slice
from data_pipeline.sources.problems import Problems
from data_pipeline.sources.text_files import Reading, clean, is_blank, slices_of

TEXTS = ['a "quoted" [text], {with} \\ brackets\n', "", "caf\u00e9 \U0001f600", "\\", '"', "end"]
RECORDS = [{"n": [1, {"m": "}]"}], "text": text, "meta": {"text": f"inner {text}"}} for text in TEXTS]
FORMS = {
    "lines": "\n".join(map(json.dumps, RECORDS)),
    "array": json.dumps(RECORDS),
    "indented": "\n\n " + json.dumps(RECORDS, indent=2, ensure_ascii=False) + "\n",
    "one after another": "\n".join(json.dumps(record, indent=1) for record in RECORDS),
}


def read(path, reading=None, problems=None):
    reading = reading or Reading("text", "stop")
    problems = problems or Problems()
    [piece] = slices_of(str(path), path.stat().st_size, reading.division)
    return [clean(document, problems).decode() for document in read_slice(piece, reading, problems)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("block", [1, 7, 1 << 20])
def test_every_form_gives_its_documents(tmp_path, monkeypatch, form, block):
    monkeypatch.setattr(jsonfiles, "_BLOCK", block)
    for name, compress in (("a.json", bytes), ("b.json.gz", gzip.compress), ("c.json.bz2", bz2.compress)):
        (tmp_path / name).write_bytes(compress(b"\xef\xbb\xbf" + FORMS[form].encode()))
        assert read(tmp_path / name) == TEXTS
    assert read(tmp_path / "a.json", Reading("meta.text", "stop")) == [f"inner {text}" for text in TEXTS]


@pytest.mark.parametrize("form", ["array", "one after another"])
def test_broken_records_are_named_by_their_line_or_left_out(tmp_path, form):
    records = ['{"text": "a"}', '{"text":\n 3}', '{"body": 1}', "[1]", '{"text" "b"}', '{"text": "lone \\ud800, NaN"}']
    if form == "array":
        text = "[" + ",\n".join(records) + "]"
    else:
        text = "\n".join(['{"text":\n"a"}', *records[1:3], *records[4:]])
    (tmp_path / "a.json").write_text(text)
    line = 2 if form == "array" else 3
    with pytest.raises(DataError, match=rf"a\.json:{line}: 'text' is not a string but int; correct it, or"):
        read(tmp_path / "a.json")
    problems = Problems()
    assert read(tmp_path / "a.json", Reading("text", "skip"), problems) == ["a", "lone \ufffd, NaN"]
    assert problems.counts["broken_lines"] == (4 if form == "array" else 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"text": "a"}, {"text": "b"', r"a\.json: it was cut short: its array has no end"),
        (
            '[{"text": "a"}] {"text": "b"}',
            r"cannot continue reading .*a\.json: expected nothing after its array, got b'{",
        ),
        ('[{"text": "a"},, {"text": "b"}]', r"a\.json:1: not valid JSON"),
        ('{"text":\n"a"}\n{"text":', r"a\.json:3: not valid JSON"),
        ("plain", r"a\.json:1: not valid JSON"),
        ("[" * 100_000, "its array has no end"),
        ("[" * 100_000 + "]" * 100_000, "a.json:1: not valid JSON"),
    ],
)
def test_damaged_files_are_refused(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "a.json")


def test_an_array_is_read_in_bounded_memory_and_a_record_beyond_the_limit_passed_over(tmp_path, monkeypatch):
    for module in (textfiles, jsonfiles):
        monkeypatch.setattr(module, "LONGEST_RECORD", 1 << 20)
    monkeypatch.setattr(jsonfiles, "_BLOCK", 1 << 16)
    texts = [random.Random(number).randbytes(1 << 14).hex() for number in range(200)]
    long = {"text": "x" * (8 << 20)}
    (tmp_path / "a.json").write_text(json.dumps([{"text": texts[0]}, long, *({"text": text} for text in texts[1:])]))
    problems, reading = Problems(), Reading("text", "skip")
    [piece] = slices_of(str(tmp_path / "a.json"), (tmp_path / "a.json").stat().st_size, reading.division)
    tracemalloc.start()
    lengths = [len(document) for document in read_slice(piece, reading, problems)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert lengths == [len(text) for text in texts]
    assert problems.counts == {"broken_lines": 1} and "the record is longer than" in problems.examples[0]
    assert peak < 6 << 20


def test_text_within_other_keys(tmp_path):
    record = {"meta": {"text": "in", "a": {"b": "deep", "score": 2}}, "a.b": "dotted"}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    for key, text in (("meta.text", "in"), ("meta.a.b", "deep"), ("a.b", "dotted")):
        assert read(tmp_path / "a.jsonl", Reading(key, "stop")) == [text]
    problems = Problems()
    read(tmp_path / "a.jsonl", Reading("a.b", "stop", score_key="meta.a.score"), problems)
    assert problems.score == 2
    with pytest.raises(DataError, match=r"no key 'meta\.body' \(--text-key\); the keys are: meta\.text, meta\.a"):
        read(tmp_path / "a.jsonl", Reading("meta.body", "stop"))


def test_text_within_columns_of_parquet_and_of_data_sets(tmp_path, monkeypatch):
    import datasets
    import pyarrow
    from pyarrow import parquet

    from data_pipeline.sources import hub

    rows = [{"n": 1, "meta": {"text": "a", "id": 1}}, {"n": 2, "meta": None}, {"n": 3, "meta": {"text": "b", "id": 2}}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", Reading("meta.text", "stop")) == ["a", "", "b"]
    with pytest.raises(DataError, match=r"has no column 'meta\.body' \(--text-key\); its columns are: n, meta"):
        read(tmp_path / "a.parquet", Reading("meta.body", "stop"))
    data = datasets.Dataset.from_list(rows)
    for streaming in (False, True):
        monkeypatch.setattr(hub, "_load", lambda rows, one=streaming: data.to_iterable_dataset() if one else data)
        source = hub.HubDataset("some/set", "train", "meta.text", streaming=streaming)
        assert [one for unit in source.units(0) for one in unit.read(Problems())] == [b"a", b"", b"b"]
        with pytest.raises(DataError, match=r"has no column 'meta\.body'"):
            hub.HubDataset("some/set", "train", "meta.body", streaming=streaming).units(0)


def shared(who, text):
    return {"from": who, "value": text}


def turns(*messages):
    return "".join(f"\x02{role}\n{text}\x03" for role, text in messages)


@pytest.mark.parametrize(
    ("record", "text"),
    [
        (
            {"conversations": [shared("system", "S"), shared("human", "Q"), shared("gpt", "A")]},
            turns(("system", "S"), ("user", "Q"), ("assistant", "A")),
        ),
        ({"conversations": [{"role": "user", "content": "Q"}, {"from": "gpt", "value": "A"}], "system": "S"},
         turns(("system", "S"), ("user", "Q"), ("assistant", "A"))),
        ({"conversations": [{"from": "Human", "content": "Q"}, {"role": "AI", "value": "A"}]},
         turns(("user", "Q"), ("assistant", "A"))),
        ({"instruction": "I", "input": "", "output": "O"}, turns(("user", "I"), ("assistant", "O"))),
        ({"instruction": "I", "input": "X", "output": "O", "n": 1}, turns(("user", "I\n\nX"), ("assistant", "O"))),
        ({"instruction": "I", "output": "O", "system": "S", "history": [["Q", "A"]]},
         turns(("system", "S"), ("user", "Q"), ("assistant", "A"), ("user", "I"), ("assistant", "O"))),
    ],
)  # fmt: skip
def test_conversations_of_sharegpt_and_alpaca(record, text):
    segments = segments_of(record)
    assert "".join(segments) == text
    assert segments[-1].endswith("\x03") and segments[-1][:-1] in ("A", "O"), "the last answer counts"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"conversations": [{"from": "observation", "value": "x"}]}, "the role of a message is 'observation'"),
        ({"conversations": [shared("human", "x")]}, "'conversations' holds no message of the role 'assistant'"),
        ({"conversations": [{"from": "gpt", "value": None}]}, "the content of a message is not a text but null"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": ""}]},
         "'messages' holds only empty messages of the role 'assistant'"),
        ({"conversations": {}}, "'conversations' is not a list of messages"),
        ({"instruction": "I", "input": 3, "output": "O"}, "are texts, got int '3'"),
        ({"instruction": "I", "output": ""}, "'output' is empty"),
        ({"instruction": "I", "output": "O", "history": [["Q"]]}, "'history' is not a list of pairs"),
        ({"text": "x"}, "expected the key 'messages' or 'conversations'"),
    ],
)  # fmt: skip
def test_broken_conversations_are_explained(record, message):
    with pytest.raises(ValueError, match=message):
        segments_of(record)


def test_conversations_stand_under_the_key_that_is_named(tmp_path):
    record = {"meta": {"turns": [shared("human", "Q"), shared("gpt", "A")]}, "system": "S", "messages": "other"}
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    (document,) = read(tmp_path / "a.jsonl", Reading("meta.turns", "stop", conversations=True))
    assert document == turns(("system", "S"), ("user", "Q")) + "\x02assistant\n" + "\ufffd" + "A\x03"
    with pytest.raises(DataError, match=r"no key 'turns' \(--text-key\); the keys are: meta, system, messages"):
        read(tmp_path / "a.jsonl", Reading("turns", "stop", conversations=True))


def test_white_space_of_any_kind_is_no_document():
    for text in (
        "",
        " \t\n\r\v\f",
        "\u00a0",
        "\u3000\u3000",
        "\u200b",
        " \u2028\ufeff\u00ad\u2060\u200d",
        "\u2800\u3164",
    ):
        assert is_blank(text.encode())
    for text in ("a", " \u00a0.", "\u200b\u5b57", "\0", "\ufffd"):
        assert not is_blank(text.encode())
    assert not is_blank(b" \xff")


@pytest.mark.parametrize(
    "name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.html", "a.parquet", "a.jsonl.bz2", "a.txt.gz"]
)
def test_a_file_that_shrinks_is_an_error_in_every_format(tmp_path, name):
    import pyarrow
    from pyarrow import parquet

    lines = "".join(json.dumps({"text": f"text {number}"}) + "\n" for number in range(100))
    contents = {
        ".txt": "text\n" * 100,
        ".jsonl": lines,
        ".json": "[" + ",".join(lines.splitlines()) + "]",
        ".csv": "text\n" + "text\n" * 100,
        ".html": "<p>" + "text " * 100,
        ".bz2": bz2.compress(lines.encode()),
        ".gz": gzip.compress(random.Random(1).randbytes(1000).hex().encode()),
    }
    path = tmp_path / name
    if name.endswith(".parquet"):
        parquet.write_table(pyarrow.table({"text": ["text"] * 100}), path)
    else:
        data = contents[path.suffix]
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
    size = path.stat().st_size
    [piece] = slices_of(str(path), size, Reading("text", "stop").division)
    for left in (size // 2, 5):
        os_truncate(path, left)
        with pytest.raises(DataError, match=name):
            list(read_slice(piece, Reading("text", "stop"), Problems()))
        problems = Problems()
        list(read_slice(piece, Reading("text", "skip"), problems))
        assert problems.counts["unreadable_files"] == 1 and name in problems.left_out["unreadable_files"][0]


def os_truncate(path, size):
    with path.open("rb+") as file:
        file.truncate(size)
