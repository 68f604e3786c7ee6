"""Encodings other than UTF-8: refused with a guess or converted; pages and tables as other programs write them."""

from __future__ import annotations

import bz2
import gzip
import json
import os
import random
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from data_pipeline.errors import DataError
from data_pipeline.sources import text_files as textfiles
from data_pipeline.sources.encodings import codec_of
from data_pipeline.sources.formats import zstd
from data_pipeline.sources.pages import MAX_DEPTH, MAX_NODES, beyond_limits
from data_pipeline.sources.problems import Problems
from data_pipeline.sources.source import SourceOptions, open_sources

RUSSIAN = "Пришла весна, и птицы поют в саду, а дети играют во дворе. "
JAPANESE = "春が来て、花が咲き、小鳥が枝で歌っています。子供たちは公園で遊びます。"
CHINESE = "春天来了，花儿开了，小鸟在枝头唱歌，孩子们在公园里玩耍。"
ENGLISH = "It’s late, “said” the captain – and the crew didn’t answer, déjà vu. "
FRENCH = "L'été, les élèves ne vont plus à l'école, et la forêt s'éveille très tôt. "


def read(*inputs: Path, **options: Any) -> tuple[list[str], Problems]:
    """Return all documents of some inputs, and the problems found."""
    chosen = {"hub_streaming": False, "input_tokenizer": None, "keep_ids": False, "stdin_format": "txt"}
    chosen |= {"text_key": "text", "on_error": "stop", "hub_split": "train", "spool": Path("spool")} | options
    sources = open_sources([str(name) for name in inputs], SourceOptions(**chosen))
    problems = Problems()
    units = [unit for number, source in enumerate(sources) for unit in source.units(number)]
    return [document.decode() for unit in units for document in unit.read(problems)], problems


@pytest.mark.parametrize(
    ("text", "codec", "guess"),
    [
        (RUSSIAN, "koi8_r", "koi8_r"),
        (RUSSIAN, "cp1251", "cp1251"),
        (JAPANESE, "shift_jis", "cp932"),
        (JAPANESE, "euc_jp", "euc_jp"),
        (JAPANESE, "iso2022_jp", "iso2022_jp"),  # which is ASCII throughout
        (CHINESE, "gb18030", "gb18030"),
        (CHINESE + "\n", "utf-16-le", "utf-16-le"),
        (ENGLISH, "cp1252", "cp1252"),
        (FRENCH, "latin-1", "cp1252"),
        (ENGLISH, "utf-16", "utf-16"),
        (ENGLISH, "utf-16-be", "utf-16-be"),
        (ENGLISH, "utf-32", "utf-32"),
    ],
)
def test_text_that_is_not_utf8_is_refused_with_a_guess_or_converted(
    tmp_path: Path, text: str, codec: str, guess: str
) -> None:
    """Both options that the message names read the text correctly."""
    path = tmp_path / "it's.txt"
    path.write_bytes((text * 20).encode(codec))
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path} is ") and message.endswith(f"or read it with --encoding {guess}")
    (document,), _ = read(path, encoding=codec_of(guess), documents="file")
    assert document.strip() == (text * 20).strip()
    command = message.partition("convert it: ")[2].partition(" > NEW")[0]
    assert subprocess.run(command, shell=True, capture_output=True, check=True).stdout.decode() == text * 20
    documents, problems = read(path, on_error="skip")
    assert documents == [] and problems.counts == {"unreadable_files": 1}


def test_few_broken_bytes_are_replaced_and_many_refuse_the_file_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes((RUSSIAN * 200).encode() + b"\xff\xfe\xe9 caf\xe9, \xe9t\xe9")
    assert read(path)[1].counts == {"invalid_utf8_documents": 1, "replaced_characters": 6}
    # An ASCII beginning does not determine the encoding of the rest; all slices of a file decide alike.
    monkeypatch.setattr(textfiles, "SLICE", 100_000)
    path.write_bytes(b"licence and such\n" * 20_000 + (FRENCH * 8000).encode("latin-1"))
    with pytest.raises(DataError, match="largely not UTF-8; it may be cp1252"):
        read(path, documents="paragraphs")
    documents, problems = read(path, documents="paragraphs", on_error="skip")
    assert documents == [] and problems.counts == {"unreadable_files": 1}
    assert read(path, documents="paragraphs", encoding="utf-8")[1].counts["replaced_characters"] > 9


def test_binary_data_is_named(tmp_path: Path) -> None:
    text = (ENGLISH * 50).encode()
    with zipfile.ZipFile(tmp_path / "zip.txt", "w") as archive:
        archive.writestr("a.txt", text)
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "table.txt")
    contents = {
        "gzip.txt": (gzip.compress(text), r"is gzip data, not text; .*gzip\.txt\.gz"),
        "twice.txt.gz": (gzip.compress(gzip.compress(text)), "is gzip data"),
        "zstd.jsonl": (zstd.compress(text), r"is zstd data, .*zstd\.jsonl\.zst"),
        "bzip2": (bz2.compress(text), r"is bzip2 data.*bzip2\.bz2"),
        "gzip.html": (gzip.compress(text), "is gzip data"),
        "zip.txt": (None, "is a zip archive, not text; unpack it"),
        "table.txt": (None, r"is a Parquet file.*\.parquet"),
        "random.txt": (random.Random(1).randbytes(5000), "is binary data, not text"),
        "deflated.csv": (zlib.compress(random.Random(2).randbytes(5000)), "is binary data"),
        "program": (Path(sys.executable).resolve().read_bytes()[:100_000], "is a program"),
    }
    for name, (data, message) in contents.items():
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=message):
            read(tmp_path / name)


def test_an_encoding_is_that_of_every_kind_of_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither slice sizes nor byte-order marks change the result, and lines keep their numbers."""
    monkeypatch.setattr(textfiles, "SLICE", 64)
    stories = [f"{JAPANESE}\n{number}" for number in range(20)]
    files = {
        "a.txt": "\n<|endoftext|>\n".join(stories),
        "b.jsonl": "".join(json.dumps({"text": story}, ensure_ascii=False) + "\n" for story in stories),
        "c.csv": "text\n" + "".join(f'"{story}"\n' for story in stories),
        "d.json": json.dumps([{"text": story} for story in stories], ensure_ascii=False),
    }
    for codec in ("cp932", "utf-16", "utf-16-le"):
        for name, text in files.items():
            (tmp_path / name).write_bytes(text.encode(codec))
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode(codec)))
            for path in (tmp_path / name, tmp_path / f"{name}.gz"):
                assert read(path, encoding=codec)[0] == stories, (path, codec)
    (tmp_path / "b.jsonl").write_text(files["b.jsonl"] + "[]\n", encoding="cp932")
    with pytest.raises(DataError, match=r"b\.jsonl:21: "):
        read(tmp_path / "b.jsonl", encoding="cp932")
    (tmp_path / "a.txt").write_bytes((RUSSIAN * 20).encode("koi8_r"))
    with pytest.raises(DataError, match="is not text in euc_jp"):
        read(tmp_path / "a.txt", encoding="euc_jp")


@pytest.mark.parametrize("codec", ["utf-16", "utf-32"])
@pytest.mark.parametrize("order", ["le", "be"])
def test_the_byte_order_is_found_without_a_mark(tmp_path: Path, codec: str, order: str) -> None:
    files = {"a.txt": ENGLISH.strip(), "a.html": f"<html><body><article><p>{ENGLISH * 5}</p></article></body></html>"}
    for name, text in files.items():
        (tmp_path / name).write_bytes(text.encode(f"{codec}-{order}"))
        (document,), problems = read(tmp_path / name, encoding=codec)
        assert document.startswith(ENGLISH.strip()), name
        assert not problems.counts
    (tmp_path / "a.jsonl").write_bytes('{"text":"x"}'.encode(f"{codec}-le"))  # too short to decide
    assert read(tmp_path / "a.jsonl", encoding=codec)[0] == ["x"]


def test_names_of_encodings() -> None:
    names = {"gb2312": "gb18030", "latin1": "cp1252", "x-sjis": "cp932", "KOI8-R": "koi8-r", "cp437": "cp437"}
    assert {name: codec_of(name) for name in names} == names
    for name in ("base64", "idna", "klingon"):
        with pytest.raises(DataError, match=f"--encoding '{name}' is unknown"):
            codec_of(name)


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"text": ["a"]}), tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match="--encoding says how files of text are read, but there are none"):
        read(tmp_path / "a.parquet", encoding="gb18030")
    with pytest.raises(DataError, match="--encoding says"):
        read(encoding="gb18030")
    with pytest.raises(DataError, match="--quoting says how tables are read"):
        read(tmp_path / "a.txt", quoting="none")


BODY = "<body><article><p>{}</p></article></body></html>"


@pytest.mark.parametrize(
    ("head", "codec", "text"),
    [
        ("<html><head><meta charset=gb2312></head>", "gbk", "朱镕基曾任总理，" + CHINESE),  # 镕 is not in GB 2312
        ("<html><head><meta charset='iso-8859-1'></head>", "cp1252", ENGLISH),
        (
            '<html><head><META HTTP-EQUIV="Content-Type" CONTENT="text/html; charset=Shift_JIS">',
            "cp932",
            "①" + JAPANESE,
        ),
        ('<html><meta content="text/html;charset=windows-1251" http-equiv=content-type>', "cp1251", RUSSIAN),
        ("<html><!-- <meta charset=koi8-r> --><meta charset=ks_c_5601-1987>", "cp949", "똠방각하, 봄이 오고 꽃이 피고"),
        ("<html><meta charset=big5>", "big5hkscs", "春天來了，花兒開了，小鳥在枝頭唱歌"),
        ("<html><meta charset=iso-2022-jp>", "iso2022_jp", JAPANESE),
        ("<html>" + "<!-- far behind -->" * 200 + "<meta charset=koi8-r>", "koi8_r", RUSSIAN),
        ('<?xml version="1.0" encoding="iso-8859-2"?><html>', "iso8859_2", "Zażółć gęślą jaźń"),
        ("<html><meta charset=koi8-r>", "utf-8", RUSSIAN),  # valid UTF-8 is read as UTF-8
        ("<html><meta charset=koi8-r>", "utf-8-sig", RUSSIAN),  # a byte-order mark has precedence
        ("<html><meta charset=koi8-r>", "utf-16", RUSSIAN),
        ("<html><meta charset=utf-16>", "utf-8", RUSSIAN),  # a file that was unreadable before
        ("<html>", "utf-8", FRENCH),
    ],
)
@pytest.mark.parametrize("suffix", [".html", ".xhtml"])
def test_pages_are_read_by_the_labels_of_the_web(tmp_path: Path, head: str, codec: str, text: str, suffix: str) -> None:
    path = tmp_path / f"page{suffix}"
    path.write_bytes((head + BODY.format(text)).encode(codec))
    documents, problems = read(path)
    assert documents == [text.strip()] and not problems.counts


def test_pages_without_a_label_or_with_another(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_bytes(("<html>" + BODY.format(FRENCH * 5)).encode("cp1252"))
    with pytest.raises(DataError, match="largely not UTF-8; it may be cp1252"):
        read(path)
    assert read(path, encoding="cp1252")[0] == [(FRENCH * 5).strip()]
    path.write_bytes(("<meta charset=gb2312>" + BODY.format(CHINESE)).encode("gbk") + b"\xff")
    documents, problems = read(path)
    assert CHINESE in documents[0] and problems.counts == {"invalid_utf8_documents": 1, "replaced_characters": 1}
    path = tmp_path / "both.xhtml"  # in XHTML the prolog, in HTML the tag goes first
    page = '<?xml version="1.0" encoding="koi8-r"?><html><meta charset="windows-1251">' + BODY.format(RUSSIAN)
    path.write_bytes(page.encode("koi8_r"))
    assert read(path)[0] == [RUSSIAN.strip()]
    path = path.rename(tmp_path / "both.html")
    path.write_bytes(page.encode("cp1251"))
    assert read(path)[0] == [RUSSIAN.strip()]


def test_pages_that_are_too_deep_or_too_large_are_named_and_the_others_read(tmp_path: Path) -> None:
    for name, page in {"a": "<div>" * 60_000, "b": "<p><font color=1>x" * 3000, "c": "<p>fine" * 3}.items():
        (tmp_path / f"{name}.html").write_text(page)
    documents, problems = read(tmp_path)
    assert documents == ["fine\n\nfine\n\nfine"]
    assert problems.counts == {"pages_beyond_limits": 2}
    assert problems.left_out["pages_beyond_limits"] == [
        f"{tmp_path / 'a.html'}: elements nested more than {MAX_DEPTH:,} deep",
        f"{tmp_path / 'b.html'}: more than {MAX_NODES:,} elements",
    ]


@pytest.mark.parametrize(
    "page",
    [
        b"<table>" + b"<tr><td>x" * 5000,
        b"<ul>" + b"<li>x" * 5000,
        b"<p>x<br>" * 5000,
        b"<a name=x>x<p>" * 5000,
        b"<div><span>x</div>" * 5000,
        b"<svg>" + b"<path d='x'/>" * 5000 + b"</svg>",
        b"<script>" + b"x = '<div>';" * 5000 + b"</script>",
        b"<!-- " + b"<div>" * 5000 + b"-->",
        b"<b>x</b>" * 5000,
    ],
)
def test_pages_that_are_not_nested_deeply_are_within_the_limits(page: bytes) -> None:
    assert beyond_limits(b"<html><body>" + page) == ""


def test_quotes_in_tables(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_bytes(b'n\ttext\n1\t"Well," he said\n2\t5" of rain\r\n3\t"and on\n\n4\ta \r lone "" one\n5\t"\n')
    texts = ['"Well," he said', '5" of rain', '"and on', 'a \r lone "" one', '"']
    assert read(path)[0] == texts
    path.write_text('n\ttext\n1\t"two\nlines ""here"""\n')
    assert read(path, quoting="minimal")[0] == ['two\nlines "here"']
    path.write_text('"n"\t"text"\n')
    with pytest.raises(DataError, match=r"no column 'text'.*; with --quoting minimal"):
        read(path)
    path = tmp_path / "a.csv"
    path.write_text('n,text\n1,"a" b\n2,"c\n')
    assert read(path, quoting="none")[0] == ['"a" b', '"c']


@pytest.mark.parametrize(
    "rows",
    [
        '1,"one\n2,two\n3,three\n4,"four"\n',  # up to the next quote
        '1,"one\n2,two\n3,three\n4,four\n',  # up to the end
        '1,"one\n2,"two\nlines"\n3,three\n4,four\n',
    ],
)
def test_rows_that_a_quote_swallows_are_noticed_and_read(tmp_path: Path, rows: str) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"n,text\n0,zero\n{rows}5,five\n")
    with pytest.raises(
        DataError, match=r"a\.csv:3: a quote without a partner: the row would swallow the lines up to \d"
    ):
        read(path)
    documents, problems = read(path, on_error="skip")
    two = "two\nlines" if "lines" in rows else "two"
    assert documents == ["zero", two, "three", "four", "five"]
    assert problems.counts == {"broken_lines": 1}


def test_a_file_that_ends_within_a_cell_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('n,text\n1,one\n2,"two and')
    with pytest.raises(DataError, match=r"a\.csv:3: a quote without a partner"):
        read(path)
    documents, problems = read(path, on_error="skip")
    assert documents == ["one"] and problems.counts == {"broken_lines": 1}


def test_lines_that_end_in_cr_alone_are_explained(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"n,text\r1,one\r2,two\r")
    with pytest.raises(DataError, match=r"a\.csv:1: a carriage return \(CR\) within a line; if CR ends its lines"):
        read(tmp_path / "a.csv")


def test_cells_that_may_have_swallowed_rows_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('n,text\n1,"one\n2,two\n3,three\n4,four"\n5,"a poem\nof two\nlines, and more\nwords"\n')
    documents, problems = read(path)
    assert documents == ["one\n2,two\n3,three\n4,four", "a poem\nof two\nlines, and more\nwords"]
    assert problems.counts == {"cells_like_rows": 1} and f"{path}:2: a cell of 4 lines" in problems.examples[0]
    path.write_text("n,text\n1,one, and more\n2,two,\n")
    with pytest.raises(DataError, match=r"a\.csv:2: the row has 3 columns, expected 2"):
        read(path)
    assert read(path, on_error="skip")[0] == ["two"]


def test_a_repeated_column_is_one_message(tmp_path: Path) -> None:
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text("text,n,text\na,1,b\n")
    (tmp_path / "a.tsv").write_text("text\ttext\na\tb\n")
    for suffix in ("parquet", "csv", "tsv"):
        with pytest.raises(DataError, match=rf"a\.{suffix} has 2 columns called 'text': which is the text\?"):
            read(tmp_path / f"a.{suffix}")


def test_the_command_converts_and_explains(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\n\n".join(f"{number} {RUSSIAN}" * 9 for number in range(200)).encode("koi8_r"))
    command = [sys.executable, "scripts/preprocess.py", "--input", tmp_path / "a.txt", "--output", tmp_path / "out"]
    environment = os.environ | {"PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "--encoding koi8_r" in result.stderr
    result = subprocess.run([*command, "--encoding", "koi8-r"], capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["settings"]["encoding"] == "koi8-r" and manifest["sources"][0]["problems"] == {}
