"""Every tokenizer restores every text, counts its bytes exactly, and is equal after saving and loading."""

from __future__ import annotations

import json
import re
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
    "<|endoftext|> <|start|> <unk>  <tool> \u2581 [CLS]",
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


def write_byte_level(folder, **pre_tokenizer):
    """Write a byte-level tokenizer like GPT-2's, with one symbol for all purposes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": True} | pre_tokenizer)
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
    )
    library.train_from_iterator(PROSE, trainer)
    library.enable_truncation(8)
    library.enable_padding(length=8)
    folder.mkdir()
    library.save(str(folder / "tokenizer.json"))
    names = dict.fromkeys(["bos_token", "eos_token", "unk_token"], "<|endoftext|>")
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


def write_byte_fallback(folder):
    """Write a tokenizer like Llama's: spaces are U+2581, one precedes each text, unknown characters become bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, trainers

    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Replace(" ", "\u2581")
    trained.train_from_iterator(
        [piece for text in PROSE for piece in re.findall(r"\s?\S+|\s+", text)],
        trainers.BpeTrainer(vocab_size=400, show_progress=False, limit_alphabet=60),
    )
    model = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *model["vocab"]]
    merges = [tuple(merge) for merge in model["merges"]]
    vocabulary = {piece: id for id, piece in enumerate(pieces)}
    library = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    replace = decoders.Replace("\u2581", " ")
    library.decoder = decoders.Sequence(
        [replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    library.add_special_tokens(["<unk>", "<s>", "</s>"])
    library.add_tokens([AddedToken("<tool>", lstrip=True, rstrip=True, normalized=False)])
    folder.mkdir()
    library.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(
    scope="module", params=["byte", "sentencepiece:600", "sentencepiece-bpe:600", "hf:byte-level", "hf:byte-fallback"]
)
def tokenizer(request, tmp_path_factory):
    kind, size = parse_spec(request.param)
    if kind == "hf":
        write = write_byte_level if request.param == "hf:byte-level" else write_byte_fallback
        return build_tokenizer(f"hf:{write(tmp_path_factory.mktemp('hf') / 'tokenizer')}")
    return build_tokenizer(request.param) if kind == "byte" else train_sentencepiece(PROSE, size, kind)


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


def test_a_loaded_tokenizer_equals_the_saved_one(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert (loaded.spec, loaded.fingerprint, loaded.dtype) == (tokenizer.spec, tokenizer.fingerprint, tokenizer.dtype)
    assert np.array_equal(loaded.bytes_per_id, tokenizer.bytes_per_id)
    assert np.array_equal(loaded.encode(PROSE[0]), tokenizer.encode(PROSE[0]))


def test_lone_surrogates_are_refused_with_their_position(tokenizer):
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


def test_sentencepiece_learns_the_requested_size_reproducibly():
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
        ("sentencepiece:-1", r"expected byte, sentencepiece:N or"),
        ("sentencepiece:256", r"at least 262"),
        ("sentencepeice-bpe:900", r"nearest: sentencepiece-bpe:900$"),
        ("hf:", r"nearest: hf:DIR$"),
        ("bpe", r"nearest: sentencepiece-bpe:4096$"),
        ("bpe:8000", r"nearest: sentencepiece-bpe:8000$"),
        ("BPE-8k", r"nearest: sentencepiece-bpe:8000$"),
        ("sentencepiece_bpe:32,000", r"nearest: sentencepiece-bpe:32000$"),
        ("sentencepiece:4k", r"nearest: sentencepiece:4000$"),
        ("spm", r"nearest: sentencepiece:4096$"),
        ("unigram:900", r"nearest: sentencepiece:900$"),
        ("4096", r"nearest: sentencepiece:4096$"),
        ("utf-8", r"nearest: byte$"),
        ("huggingface:gpt2", r"nearest: hf:DIR$"),
        ("models/gpt2/tokenizer.json", r"nearest: hf:models/gpt2/tokenizer.json$"),
        ("klingon", r"a tokenizer.json of Hugging Face\)$"),
        ("", r"'' is unknown"),
    ],
)
def test_unknown_specs_name_the_nearest(spec, message):
    with pytest.raises(DataError, match=message):
        parse_spec(spec)


@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece-bpe"])
def test_a_vocabulary_that_the_corpus_cannot_fill_is_refused_with_one_that_it_can(kind):
    with pytest.raises(DataError, match=rf"{kind}:90000: the corpus is too small") as refused:
        train_sentencepiece(PROSE, 90_000, kind)
    largest = int(re.search(rf"{kind}:(\d+) is the largest", str(refused.value))[1])
    assert train_sentencepiece(PROSE, largest, kind).vocab_size == largest

    many_characters = ["".join(map(chr, range(0x4E00, 0x4E00 + 2000)))]
    with pytest.raises(DataError, match="too many different characters") as refused:
        train_sentencepiece(many_characters, 262, kind)
    smallest = int(re.search(rf"{kind}:(\d+) is the smallest", str(refused.value))[1])
    assert train_sentencepiece(many_characters, smallest, kind).vocab_size == smallest
    assert train_sentencepiece(["0", "1 0"], 264, kind).decode([261, 262, 263]) in ("01 ", " 01", "10 ", " 10", "0 1")


def test_the_special_symbols_of_a_hugging_face_tokenizer_are_found_or_added(tmp_path):
    byte_level = build_tokenizer(f"hf:{write_byte_level(tmp_path / 'byte-level')}")
    assert byte_level.end_of_text_id == 0, "its only symbol ends texts; the others come behind its 600 ids"
    assert (byte_level.start_id, byte_level.pad_id, byte_level.mask_id, byte_level.vocab_size) == (600, 601, 602, 603)
    assert byte_level.decode_bytes(byte_level.encode("x y")) == b"x y", "no space is put before it"

    byte_fallback = build_tokenizer(f"hf:{write_byte_fallback(tmp_path / 'byte-fallback')}")
    assert (byte_fallback.start_id, byte_fallback.end_of_text_id) == (1, 2)
    assert {byte_fallback.pad_id, byte_fallback.mask_id} == {byte_fallback.vocab_size - 2, byte_fallback.vocab_size - 1}
    assert byte_fallback.decode(byte_fallback.encode("\u5b57 <tool> </s>")) == "\u5b57 <tool> </s>"
    assert len(byte_fallback.encode("<tool>")) == 1


@pytest.mark.parametrize("loss", ["lowercases", "normalises", "splits words", "knows few characters"])
def test_a_hugging_face_tokenizer_that_loses_text_is_refused_with_an_example(loss, tmp_path):
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

    path = write_byte_level(tmp_path / "tokenizer") / "tokenizer.json"
    library = Tokenizer.from_file(str(path))
    if loss == "lowercases":
        library.normalizer, example = normalizers.Lowercase(), r"gives back 'A' as 'a'"
    elif loss == "normalises":
        library.normalizer, example = normalizers.NFKC(), r"gives back 'e\\u0301' as '\\xe9'"
    elif loss == "splits words":
        whitespace, byte_level = pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)
        library.pre_tokenizer, example = pre_tokenizers.Sequence([whitespace, byte_level]), r"gives back ' a' as 'a'"
    else:
        library = Tokenizer(models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
        library.pre_tokenizer, example = pre_tokenizers.Whitespace(), r"gives back 'A' as '\[UNK\]'"
    library.save(str(path))
    with pytest.raises(DataError, match=rf"hf:.*loses text: it {example}"):
        build_tokenizer(f"hf:{path.parent}")


def test_folders_without_a_hugging_face_tokenizer_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"there is no .*tokenizer\.json; expected a folder"):
        build_tokenizer(f"hf:{tmp_path}")
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "Telepathy"}}')
    with pytest.raises(DataError, match="cannot be read by the tokenizers library"):
        build_tokenizer(f"hf:{tmp_path}")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is not a file of Hugging Face's tokenizers library"):
        build_tokenizer(f"hf:{tmp_path / 'tokenizer.json'}")


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


def write_with_symbols_among_pieces(folder, kind):
    """Write tokenizers whose models list special symbols as pieces: unigram, and BPE that takes whole words first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    symbols = ["<unk>", "</s>", "<|endoftext|>", "<|im_start|>"]
    if kind == "unigram":
        bytes_ = [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
        learned = [(character, -2.0) for character in "abcdefghijklmnopqrstuvwxyz<>/|_\u2581"]
        library = Tokenizer(models.Unigram([*((symbol, 0.0) for symbol in symbols), *bytes_, *learned], 0, True))
        library.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
        library.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    else:
        pieces = [*symbols, *sorted(pre_tokenizers.ByteLevel.alphabet())]
        vocabulary = {piece: id for id, piece in enumerate(pieces)}
        library = Tokenizer(models.BPE(vocabulary, [], ignore_merges=True))
        library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        library.decoder = decoders.ByteLevel()
    library.add_special_tokens(symbols)
    folder.mkdir()
    library.save(str(folder / "tokenizer.json"))
    return build_tokenizer(f"hf:{folder}")


@pytest.mark.parametrize("kind", ["unigram", "whole words"])
def test_text_that_spells_a_symbol_is_text_also_where_the_model_has_it_among_its_pieces(tmp_path, kind):
    tokenizer = write_with_symbols_among_pieces(tmp_path / "tokenizer", kind)
    specials = {tokenizer.start_id, tokenizer.end_of_text_id, tokenizer.pad_id, tokenizer.mask_id}
    for text in ("</s>", "a <|endoftext|> b</s></s>", "<|im_start|>user", "<0x41>", "<</s>|endoftext|>"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids.tolist()) & specials
