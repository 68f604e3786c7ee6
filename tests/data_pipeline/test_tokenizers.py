"""Every tokenizer gives back every text, counts its bytes exactly, and knows itself again after a save."""

from __future__ import annotations

from pydoc_data.topics import topics

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.tokenizers import build_tokenizer, load_tokenizer, parse_spec, train_sentencepiece

PROSE = [topics[name] for name in sorted(topics)[:20]]

HOSTILE = [
    "",
    " ",
    "  leading, inner   and trailing  ",
    "\u2581",
    "a\u2581b \u2581\u2581 c",
    "\u2585 and \u2047 are what the library reserves",
    "\0",
    "a\0b\0\0",
    "\r",
    "lone\rCR, CRLF\r\nand LF\n",
    "\n\n\n \n\t\n",
    "<0x41><s></s><unknown><start><end_of_text><pad><mask>",
    "e\u0301 o\u0308\u0323 \u1112\u1161\u11ab",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea \u2764\ufe0f",
    "\ufeffbyte-order mark",
    "\u0080\u009f\u00a0\u2028\u2029\u200b\u202e",
    "\u5b57 \u0928\u092e\u0938\u094d\u0924\u0947 \u0645\u0631\u062d\u0628\u0627",
    "\ufffd\ufffe\uffff\ue000",
    "".join(chr(plane << 16 | offset) for plane in range(17) for offset in (0x41, 0x2581, 0xABCD, 0xFFFE, 0xFFFF)),
    "".join(map(chr, range(0x3000))),
    "x" * 70_000 + "\n" + " y" * 70_000,
]


@pytest.fixture(scope="module", params=["byte", "sentencepiece:600"])
def tokenizer(request):
    kind, size = parse_spec(request.param)
    return build_tokenizer(request.param) if kind == "byte" else train_sentencepiece(PROSE, size)


@pytest.mark.parametrize("text", HOSTILE + PROSE[:1], ids=lambda text: ascii(text[:12]))
def test_every_text_comes_back_and_its_bytes_are_counted(tokenizer, text):
    ids = tokenizer.encode(text)
    assert ids.dtype == tokenizer.dtype
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert tokenizer.bytes_per_id[ids].sum() == len(text.encode())
    assert not set(ids.tolist()) & {tokenizer.start_id, tokenizer.end_of_text_id, tokenizer.pad_id, tokenizer.mask_id}


def test_documents_encode_in_one_go_as_they_do_one_by_one(tokenizer):
    texts = [text for text in HOSTILE if text] + PROSE
    stored = np.frombuffer(b"".join(text.encode() + b"\xff" for text in texts), dtype=np.uint8)
    ids, counts = tokenizer.encode_documents(stored, np.array([len(text.encode()) + 1 for text in texts]))
    one_by_one = [np.append(tokenizer.encode(text), tokenizer.end_of_text_id) for text in texts]
    assert counts.tolist() == [len(document) for document in one_by_one]
    assert ids.dtype == tokenizer.dtype
    assert np.array_equal(ids, np.concatenate(one_by_one))


def test_every_id_decodes_to_as_many_bytes_as_the_table_says(tokenizer):
    assert [len(tokenizer.decode_bytes([id])) for id in range(tokenizer.vocab_size)] == tokenizer.bytes_per_id.tolist()
    everything = np.arange(tokenizer.vocab_size)
    assert tokenizer.decode(everything) == tokenizer.decode_bytes(everything).decode(errors="replace")
    for special in (tokenizer.start_id, tokenizer.end_of_text_id, tokenizer.pad_id, tokenizer.mask_id):
        assert tokenizer.bytes_per_id[special] == 0
    with pytest.raises(DataError, match=rf"id {tokenizer.vocab_size} is outside"):
        tokenizer.decode([0, tokenizer.vocab_size])


def test_it_is_the_same_after_save_and_load(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.spec, loaded.fingerprint, loaded.dtype) == (tokenizer.spec, tokenizer.fingerprint, tokenizer.dtype)
    assert np.array_equal(loaded.bytes_per_id, tokenizer.bytes_per_id)
    assert np.array_equal(loaded.encode(PROSE[0]), tokenizer.encode(PROSE[0]))


def test_lone_surrogates_are_refused_by_place(tokenizer):
    with pytest.raises(DataError, match=r"U\+D800 at character 2"):
        tokenizer.encode("ab\ud800")


def test_the_byte_vocabulary_is_the_one_promised():
    tokenizer = build_tokenizer("byte")
    assert (tokenizer.vocab_size, tokenizer.dtype) == (256, np.dtype("uint8"))
    ids = (tokenizer.start_id, tokenizer.mask_id, tokenizer.pad_id, tokenizer.end_of_text_id)
    assert ids == (0xFC, 0xFD, 0xFE, 0xFF)
    assert np.flatnonzero(tokenizer.bytes_per_id == 0).tolist() == [0xC0, 0xC1, *range(0xF5, 0x100)]
    assert tokenizer.encode("é").tolist() == [0xC3, 0xA9]
    assert tokenizer.decode([0xC3, 0x41, 0xFF]) == "\ufffdA"


def test_sentencepiece_learns_exactly_the_size_asked_for_and_the_same_each_time():
    first, second = train_sentencepiece(PROSE, 600), train_sentencepiece(PROSE, 600)
    assert first.vocab_size == 600
    assert first.fingerprint == second.fingerprint
    pieces = [first.decode([id]) for id in range(600)]
    assert any("\n" in piece and len(piece) > 1 for piece in pieces)
    assert len(first.encode(PROSE[0])) < 0.6 * len(PROSE[0])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bytes", r"'bytes' is unknown.*nearest: byte$"),
        ("byte:256", r"nearest: byte$"),
        ("sentencepice:4096", r"nearest: sentencepiece:4096$"),
        ("sentencepiece", r"nearest: sentencepiece:4096$"),
        ("sentencepiece:-1", r"expected byte, or sentencepiece:N"),
        ("sentencepiece:256", r"at least 300"),
        ("", r"'' is unknown"),
    ],
)
def test_unknown_specs_name_the_nearest(spec, message):
    with pytest.raises(DataError, match=message):
        parse_spec(spec)


def test_a_vocabulary_that_the_corpus_cannot_fill_is_refused():
    with pytest.raises(
        DataError, match=r"sentencepiece:50000: the corpus is too small.*sentencepiece:\d+ is the largest"
    ):
        train_sentencepiece(PROSE, 50_000)
    many_characters = ["".join(map(chr, range(0x4E00, 0x4E00 + 2000)))]
    with pytest.raises(DataError, match=r"too many different characters; sentencepiece:\d+ is the smallest"):
        train_sentencepiece(many_characters, 300)


def test_damaged_tokenizer_folders_are_named(tmp_path):
    with pytest.raises(DataError, match=r"tokenizer\.json is missing"):
        load_tokenizer(tmp_path)
    train_sentencepiece(PROSE, 600).save(tmp_path)
    model = tmp_path / "sentencepiece.model"
    model.write_bytes(model.read_bytes()[:-2000])
    with pytest.raises(DataError, match=r"sentencepiece\.model is damaged|not the one that was saved"):
        load_tokenizer(tmp_path)
    model.unlink()
    with pytest.raises(DataError, match=r"sentencepiece\.model is missing"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"kind": ')
    with pytest.raises(DataError, match="damaged"):
        load_tokenizer(tmp_path)
