"""Reading each kind of input: the same documents in every container, and a name for each problem."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.loading.prepared_data import PreparedData
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import prepare
from data_pipeline.sources import text_files as textfiles
from data_pipeline.sources.formats import zstd
from data_pipeline.sources.problems import Problems
from data_pipeline.sources.source import SourceOptions, open_sources
from data_pipeline.storage.shards import write_shard
from data_pipeline.tokenizers import build_tokenizer

ROOT = Path(__file__).parents[2]
TEXTS = ['Ein Satz, "quoted".', "two\nlines, and more", "caf\u00e9 \U0001f600", "tab\there"]
COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd.compress}


def read(*inputs, text_key="text", on_error="stop", split="train", **options):
    """Return all documents of some inputs, as text, and the problems found."""
    chosen = {"hub_streaming": False, "input_tokenizer": None, "keep_ids": False}
    chosen |= {"stdin_format": "txt", "spool": Path("spool")} | options
    sources = open_sources([str(name) for name in inputs], SourceOptions(text_key, on_error, split, **chosen))
    problems = Problems()
    units = [unit for number, source in enumerate(sources) for unit in source.units(number)]
    return [document.decode() for unit in units for document in unit.read(problems)], problems


def contents(suffix, texts=TEXTS, column="text"):
    """Return a file of some format that holds the texts."""
    if suffix == ".jsonl":
        return "".join(json.dumps({"n": 1, column: text}) + "\n" for text in texts).encode()
    if suffix in (".csv", ".tsv"):
        separator = "," if suffix == ".csv" else "\t"
        quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
        return "".join(f"{a}{separator}{b}\r\n" for a, b in [("n", column), *(("1", text) for text in quoted)]).encode()
    if suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        out = pyarrow.BufferOutputStream()
        parquet.write_table(pyarrow.table({"n": [1] * len(texts), column: texts}), out, row_group_size=3)
        return out.getvalue().to_pybytes()
    if suffix == ".html":
        return f"<html><title>no</title><script>no</script><article><p>{texts[0]}</p></article></html>".encode()
    return "\n\n".join(texts).encode()  # --documents paragraphs


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".txt", ".md", ".html", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_format_gives_its_documents_compressed_or_not(suffix, compression, tmp_path):
    path = tmp_path / f"x{suffix}{compression}"
    path.write_bytes(COMPRESS[compression](contents(suffix)))
    quoting = "minimal" if suffix == ".tsv" else "auto"
    documents, problems = read(path, documents="paragraphs" if suffix in (".txt", ".md") else "auto", quoting=quoting)
    assert documents == (TEXTS[:1] if suffix == ".html" else TEXTS)
    assert not problems.counts


@pytest.mark.parametrize("compression", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files_may_have_several_streams_and_must_have_an_end(compression, tmp_path):
    compress = COMPRESS[compression]
    texts = [random.Random(number).randbytes(3000).hex() for number in range(20)]
    data = contents(".jsonl", texts)
    both = compress(data[:50_000]) + compress(data[50_000:])
    (tmp_path / f"x.jsonl{compression}").write_bytes(both)
    assert read(tmp_path / f"x.jsonl{compression}")[0] == texts

    (tmp_path / f"x.jsonl{compression}").write_bytes(both[:-20])
    with pytest.raises(DataError, match=rf"x\.jsonl{compression}: it was cut short"):
        read(tmp_path / f"x.jsonl{compression}")
    (tmp_path / f"y.jsonl{compression}").write_bytes(compress(contents(".jsonl")))
    documents, problems = read(tmp_path, on_error="skip")
    assert documents[-4:] == TEXTS
    assert documents[:-4] == texts[: len(documents) - 4]
    assert problems.counts["unreadable_files"] == 1

    (tmp_path / f"x.jsonl{compression}").write_bytes(b"not compressed at all, but longer than any header")
    with pytest.raises(DataError, match=rf"x\.jsonl{compression}: its {compression} compression is damaged"):
        read(tmp_path / f"x.jsonl{compression}")


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".parquet"])
def test_slices_lose_and_repeat_nothing(suffix, tmp_path, monkeypatch):
    texts = [f"{number} " + "x" * (number * 7 % 50) for number in range(400)]
    path = tmp_path / f"x{suffix}"
    path.write_bytes(contents(suffix, texts))
    whole, _ = read(path)
    for size in (64, 1000, 4096):
        monkeypatch.setattr(textfiles, "SLICE", size)
        sliced, _ = read(path)
        assert "\n\n".join(sliced) == "\n\n".join(whole)
        if suffix != ".txt":
            assert sliced == texts


def test_the_lines_of_a_table_may_lie_in_many_row_groups_and_kinds_of_strings(tmp_path):
    import pyarrow
    from pyarrow import parquet

    texts = [*TEXTS, None, ""]
    for number, kind in enumerate([pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())]):
        column = pyarrow.array(texts).cast(kind)
        nested = pyarrow.array([{"text": 1}] * 6)
        parquet.write_table(pyarrow.table({"s": nested, "text": column}), tmp_path / f"{number}.parquet")
    raw = pyarrow.array([b"a\xffb", b"c"]).cast(pyarrow.binary())
    parquet.write_table(pyarrow.table({"text": raw}), tmp_path / "2.parquet")
    documents, problems = read(tmp_path)
    assert documents == [*TEXTS, "", "", *TEXTS, "", "", "a\ufffdb", "c"]
    assert problems.counts == {"invalid_utf8_documents": 1, "replaced_characters": 1}


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_table_without_the_text_column_lists_its_columns(suffix, tmp_path):
    path = tmp_path / f"x{suffix}"
    path.write_bytes(contents(suffix, column="body"))
    with pytest.raises(DataError, match=r"no (key|column) 'text' \(--text-key\); .* are: n, body"):
        read(path)
    assert read(path, text_key="body")[0] == TEXTS
    if suffix == ".parquet":
        with pytest.raises(
            DataError, match=r"the column 'n' of .* holds int64, expected text; its columns are: n, body"
        ):
            read(path, text_key="n")


def test_broken_lines_and_rows_are_named_or_counted(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n\n{"text": 1}\n{"text": "b"\n{"text": "c\\ud800d"}\n[]')
    (tmp_path / "y.csv").write_bytes(b'\xef\xbb\xbfn,text\r\n1,a\r\n2\r\n\r\n3,"x\xff\r\ny\0"\r\n')
    with pytest.raises(
        DataError, match=r"x\.jsonl:3: 'text' is not a string but int; correct it, or .*--on-error skip"
    ):
        read(tmp_path / "x.jsonl")
    with pytest.raises(DataError, match=r"y\.csv:3: the row has 1 column, expected 2"):
        read(tmp_path / "y.csv")
    documents, problems = read(tmp_path, on_error="skip")
    assert documents == ["a", "c\ufffdd", "a", "x\ufffd\ny\0"]
    assert problems.counts == {
        "broken_lines": 4,
        "invalid_utf8_documents": 2,
        "replaced_characters": 2,
        "byte_order_marks": 1,
        "crlf_line_ends": 1,
    }
    assert [Path(example).name.split(" ")[0] for example in problems.examples] == [
        "x.jsonl:3:", "x.jsonl:4:", "x.jsonl:6:", "y.csv:3:",
    ]  # fmt: skip


def test_lines_and_pages_beyond_the_limit_are_refused_without_being_held(tmp_path, monkeypatch):
    import data_pipeline.sources.records as records

    for module in (textfiles, records):
        monkeypatch.setattr(module, "LONGEST_RECORD", 1 << 16)
    monkeypatch.setattr(textfiles, "_BLOCK", 1 << 12)
    long = json.dumps({"text": "x" * 200_000}) + "\n"
    (tmp_path / "x.jsonl").write_text(long + '{"text": "after"}\n' + long)
    (tmp_path / "y.jsonl.gz").write_bytes(gzip.compress((tmp_path / "x.jsonl").read_bytes()))
    (tmp_path / "z.html").write_text("<p>" + "x" * 100_000)
    documents, problems = read(tmp_path, on_error="skip")
    assert documents == ["after", "after"]
    assert problems.counts == {"broken_lines": 4, "unreadable_files": 1}
    assert "x.jsonl:1: the line is longer than" in problems.examples[0]
    assert "x.jsonl:3:" in problems.examples[1]


def test_text_without_any_line_end_is_cut(tmp_path):
    text = "".join(random.Random(1).choices("ab\u00e9\U0001f600", k=3 << 20))
    (tmp_path / "x.txt").write_text(text)
    (tmp_path / "y.txt.zst").write_bytes(zstd.compress(text.encode()))
    documents, problems = read(tmp_path / "x.txt")
    assert "".join(documents) == text
    assert max(len(document.encode()) for document in documents) <= 1 << 20
    assert "".join(read(tmp_path / "y.txt.zst")[0]) == text
    assert not problems.counts


def test_a_page_is_its_main_text_in_the_encoding_that_it_names(tmp_path):
    page = '<html><head><meta charset="{}"></head><nav><a href=/>Home</a></nav><main><p>caf\u00e9</p></main></html>'
    (tmp_path / "1.html").write_bytes(page.format("iso-8859-1").encode("iso-8859-1"))
    (tmp_path / "2.htm").write_bytes(page.format("iso-8859-1").encode())
    (tmp_path / "3.html").write_bytes(page.format("klingon").encode("iso-8859-1"))
    documents, problems = read(tmp_path)
    assert documents == ["caf\u00e9", "caf\u00e9", "caf\ufffd"], "UTF-8 goes before what a page says"
    assert problems.counts == {"invalid_utf8_documents": 1, "replaced_characters": 1}


def test_patterns_and_folders_find_files_and_name_those_left_out(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/1.jsonl", "a/b/2.jsonl.gz", "a/b/3.JSONL"):
        data = contents(".jsonl", [name])
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    (tmp_path / "a" / "notes.pdf").write_bytes(b"%PDF")
    assert read(tmp_path / "a")[0] == ["a/1.jsonl", "a/b/2.jsonl.gz", "a/b/3.JSONL"]
    assert read(f"{tmp_path}/**/*.jsonl*")[0] == ["a/1.jsonl", "a/b/2.jsonl.gz"]
    assert read(f"{tmp_path}/a/[b1]*")[0] == ["a/1.jsonl", "a/b/2.jsonl.gz", "a/b/3.JSONL"]
    with pytest.raises(DataError, match="matches no file; patterns know"):
        read(f"{tmp_path}/*.parquet")
    with pytest.raises(DataError, match=r"notes\.pdf: its format is not supported; the formats are text: \.txt"):
        read(f"{tmp_path}/a/*")


def test_the_standard_input_is_kept_resumed_and_removed(tmp_path):
    def run(data, *options):
        command = [sys.executable, ROOT / "scripts" / "preprocess.py", "--output", tmp_path / "out", *options]
        return subprocess.run(command, input=data, capture_output=True, cwd=tmp_path)

    data = gzip.compress(contents(".jsonl"), mtime=0)
    options = ["--input", "-", "--stdin-format", "jsonl.gz"]
    assert run(data, *options).returncode == 0
    stream = PreparedData.open(tmp_path / "out")
    found = {document for split in ("train", "validation") for document in map(
        stream.tokenizer.decode, stream.split(split).documents())}  # fmt: skip
    assert found == set(TEXTS)
    assert os.listdir(tmp_path) == ["out"]
    assert b"already prepared" in run(data, *options).stdout
    assert b"prepared from other input" in run(gzip.compress(contents(".jsonl", TEXTS[1:])), *options).stderr
    assert b"can be read once only" in run(data, *options, "--input", "-").stderr
    refused = run(data, "--input", "-", "--stdin-format", "doc")
    assert (refused.returncode, b"the format 'doc' of the standard input is unknown" in refused.stderr) == (2, True)
    assert os.listdir(tmp_path) == ["out"]


def test_saved_data_sets_and_streams_are_read_by_the_datasets_library(tmp_path, monkeypatch):
    import datasets

    from data_pipeline.sources import hub

    data = datasets.Dataset.from_dict({"n": [1] * 4, "text": TEXTS})
    data.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": data, "dev": data.select([1])}).save_to_disk(tmp_path / "several")
    assert read(tmp_path / "one")[0] == TEXTS
    assert read(tmp_path / "several", split="dev")[0] == TEXTS[1:2]
    with pytest.raises(DataError, match=r"has no split 'test' \(--split\); its splits are: train, dev"):
        read(tmp_path / "several", split="test")
    with pytest.raises(DataError, match=r"no column 'body' \(--text-key\); its columns are: n, text"):
        read(tmp_path / "one", text_key="body")

    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return data.to_iterable_dataset(num_shards=3)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub._load.cache_clear()
    assert read("some/set:part", hub_streaming=True)[0] == TEXTS
    assert asked[0] == (("some/set", "part"), {"split": "train", "streaming": True})
    with pytest.raises(DataError, match="its columns are: n, text"):
        read("some/set", hub_streaming=True, text_key="body")
    hub._load.cache_clear()


def write_indexed(prefix, texts, end=0xFF, dtype="int32"):
    documents = [np.append(np.frombuffer(text.encode(), np.uint8), end).astype(dtype) for text in texts]
    write_shard(prefix, np.dtype(dtype), [(ids, np.array([len(ids)])) for ids in documents])
    return prefix


def test_indexed_files_become_text_again_or_keep_their_ids(tmp_path):
    write_indexed(tmp_path / "x", TEXTS)
    for name in ("x", "x.bin", "x.idx", "*.idx"):
        assert read(tmp_path / name, input_tokenizer="byte")[0] == TEXTS
    with pytest.raises(DataError, match="holds ids: name the tokenizer that made them with --input-tokenizer: byte"):
        read(tmp_path / "x")

    config = PrepareConfig(
        (str(tmp_path / "x"),), tokenizer="byte", input_tokenizer="byte", output=str(tmp_path / "out"), workers=1
    )
    manifest = prepare(config)
    assert manifest.sources[0]["ids"] == "kept"
    data = PreparedData.open(tmp_path / "out", verify=True)
    kept = [data.tokenizer.decode(d) for split in ("train", "validation") for d in data.split(split).documents()]
    assert sorted(kept) == sorted(TEXTS)
    assert sum(data.split(split).num_bytes for split in ("train", "validation")) == len("".join(TEXTS).encode())
    assert data.split("train").read(0, 1).dtype == np.uint8


def test_kept_ids_are_those_of_the_file_where_text_would_give_others(tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library = Tokenizer(models.BPE({c: i for i, c in enumerate([*alphabet, "aa"])}, [("a", "a")]))
    library.pre_tokenizer, library.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    library.add_special_tokens(["</s>"])
    library.save(str(tmp_path / "tokenizer.json"))
    spec = f"hf:{tmp_path}"
    a, aa, end = alphabet.index("a"), 256, 257
    documents = [np.array(ids, np.int16) for ids in ([a, a, a, end], [aa, a], [end], [aa, aa, aa, aa, end])]
    blocks = [(ids, np.array([len(ids)])) for ids in documents]
    write_shard(tmp_path / "x", np.dtype(np.int16), blocks)

    options = {"input_tokenizer": spec, "workers": 1}
    prepare(PrepareConfig((str(tmp_path / "x.bin"),), tokenizer=spec, output=str(tmp_path / "kept"), **options))
    data = PreparedData.open(tmp_path / "kept")
    kept = [ids.tolist() for split in ("train", "validation") for ids in data.split(split).documents()]
    assert sorted(kept) == sorted([[a, a, a, end], [aa, a, end], [aa, aa, aa, aa, end]])
    assert sum(data.split(split).num_bytes for split in ("train", "validation")) == 3 + 3 + 8

    texts, _ = read(tmp_path / "x", input_tokenizer=spec)
    assert texts == ["aaa", "aaa", "", "aaaaaaaa"]
    assert build_tokenizer(spec).encode("aaa").tolist() == [aa, a]


def test_ids_that_are_no_ids_of_the_tokenizer_are_refused(tmp_path):
    write_indexed(tmp_path / "x", ["ok", "bad"], end=300)
    with pytest.raises(
        DataError, match=r"x\.bin: document 0: id 300 is outside the vocabulary of 256 ids; is byte its"
    ):
        read(tmp_path / "x", input_tokenizer="byte")
    documents, problems = read(tmp_path / "x", input_tokenizer="byte", on_error="skip")
    assert (documents, problems.counts) == ([], {"broken_documents": 2})
    (tmp_path / "y.txt").write_text("text")
    with pytest.raises(DataError, match="but there are none"):
        read(tmp_path / "y.txt", input_tokenizer="byte")
    with pytest.raises(DataError, match="kept as they are only if all inputs"):
        read(tmp_path / "y.txt", tmp_path / "x", input_tokenizer="byte", keep_ids=True)
    with pytest.raises(DataError, match=r"--input-tokenizer 'gpt2' is unknown: expected byte, sentencepiece:FILE"):
        read(tmp_path / "x", input_tokenizer="gpt2")


def test_missing_inputs_are_named(tmp_path):
    for name in ("nowhere.csv", "nowhere.parquet.zst", "x.bin", "no such thing", "a/b/c"):
        with pytest.raises(DataError, match=r"does not exist: expected a file, a folder, or the id"):
            read(name)
