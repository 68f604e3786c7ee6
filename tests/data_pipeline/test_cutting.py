"""Long texts are encoded in pieces, in bounded memory, with the ids of the whole text."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import unicodedata
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data_pipeline.tokenizers import build_tokenizer, cutting, train_sentencepiece
from data_pipeline.tokenizers.cutting import Cutter

ROOT = Path(__file__).resolve().parents[2]

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
CAPITALS, SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
GPT4 = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
O200K = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}*{SMALL}+{CONTRACTIONS}?|[^\r\n\p{{L}}\p{{N}}]?{CAPITALS}+{SMALL}*{CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split(pattern: str, behavior: str = "isolated", invert: bool = False) -> Any:
    mapped = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), behavior, invert), mapped])


def byte_level() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


FAMILIES = {
    "gpt2": byte_level(),
    "gpt2 spelt out": split(GPT2),
    "gpt4": split(GPT4, "removed", invert=True),
    "llama3": split(LLAMA3),
    "qwen2": split(LLAMA3.replace("{1,3}", "")),
    "o200k": split(O200K),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()]),
    "digits together": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=False), byte_level()]),
}
UNKNOWN = {
    "joins": split(r"\w+ \w+|\s+|\S+"),
    "leaves out numbers": split(r" ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+"),
    "contiguous": split(GPT2, "contiguous"),
    "metaspace": pre_tokenizers.Metaspace(),
    "looks ahead": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\s+$"), "isolated"), byte_level()]),
}

PARTS = [
    *"aAzZbB019 \t\n\r'!,./-_()[]{}|~$<>?:;\"&\\`", "  ", "   ", "\n\n", "\r\n", " \n", "'s", "'S", "'re", "'ll",
    "'\u017f", "\u00e9", "e\u0301", "\u0301", "\u0323", "\u0928\u094d\u0924\u0947", "\u0645\u0631\u062d",
    "\u4e2d\u6587", "\u304b\u304c", "\uac00", "\uff0c", "\u3002", "\uff10", "\u00b2", "\u00bd", "\u2167",
    "\u06f1", "\u01c5", "\u00a0", "\u3000", "\u2028", "\x85", "\x1c", "\x1f", "\x00", "\u200b", "\u180e",
    "\u0434\u043e\u043c", "\u03bb\u03bf", "\u00df\u00fc", "\u05e9\u05dc\u05d5\u05dd", "\u0416", "\u00c9", "\u0301",
    "\ufeff", "\U0001f600", "\U0001f468\u200d\U0001f469", "\u2764\ufe0f", "\ue000", "\uffff",
    "\U0001f1e9\U0001f1ea", "<|endoftext|>", "hello", "World", "HELLO", "123", "1234567",
]  # fmt: skip


def hostile(rng: random.Random, length: int) -> str:
    """Return parts in random order; sometimes only a few kinds, so that runs grow long."""
    parts = rng.sample(PARTS, rng.choice([2, 4, len(PARTS)]))
    return "".join(rng.choice(parts) * rng.choice([1, 1, 1, 2, 7]) for _ in range(length))


def definition(pre_tokenizer: Any, **more: Any) -> dict[str, Any]:
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizer
    return json.loads(library.to_str()) | more


@pytest.mark.parametrize("name", FAMILIES)
def test_pieces_are_split_like_the_whole_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared with the library's own pre-tokenizer, so the result holds for every vocabulary."""
    monkeypatch.setattr(cutting, "PIECE", 12)
    cutter, rng, cuts = Cutter(definition(FAMILIES[name])), random.Random(name), 0
    for number in range(3000):
        text = hostile(rng, 4 + number % 25)
        pieces = list(cutter.pieces(text.encode()))
        assert "".join(pieces) == text
        cuts += len(pieces) - 1
        found = [one for piece in pieces for one, _ in FAMILIES[name].pre_tokenize_str(piece)]
        assert found == [one for one, _ in FAMILIES[name].pre_tokenize_str(text)], (text, pieces)
    assert cuts > 3000


@pytest.mark.parametrize("name", [*UNKNOWN, "normalized"])
def test_texts_of_unknown_pre_tokenizers_are_not_cut(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "PIECE", 12)
    cutter = Cutter(
        definition(UNKNOWN.get(name, byte_level()), **({} if name in UNKNOWN else {"normalizer": {"type": "NFC"}}))
    )
    assert list(cutter.pieces(b"one two three four five six")) == ["one two three four five six"]


def write_tokenizer(folder: Path, pre_tokenizer: Any, texts: list[str], words: list[str]) -> str:
    library = Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizer
    library.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    library.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=1500, initial_alphabet=alphabet, special_tokens=["<|endoftext|>"], show_progress=False
        ),
    )
    library.add_tokens([AddedToken(word, normalized=False) for word in words])
    folder.mkdir()
    library.save(str(folder / "tokenizer.json"))
    return f"hf:{folder}"


@pytest.mark.parametrize("name", ["gpt2", "llama3"])
def test_pieces_have_the_ids_of_the_whole_text(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merges fit these texts, added words contain spaces, and some texts are runs of one kind of character."""
    rng = random.Random(1)
    texts = [hostile(rng, 300) for _ in range(60)]
    tokenizer = build_tokenizer(write_tokenizer(tmp_path / "t", FAMILIES[name], texts, ["a b", "1 ", "z!z", "   "]))
    runs = ["a" * 5000, " " * 5000, "\n" * 5000, "7" * 5000, "\U0001f600" * 2000, "a\u0301" * 2000, "\t \n" * 2000]
    texts += ["a b" * 1000, "1 1 1 " * 500, "az!zb! " * 700, "", *runs, "x ".join(runs)]
    expected = [tokenizer._library.encode(text, add_special_tokens=False).ids for text in texts]
    monkeypatch.setattr(cutting, "PIECE", 200)
    monkeypatch.setattr("data_pipeline.tokenizers.huggingface._BATCH_BYTES", 500)
    assert [tokenizer.encode(text).tolist() for text in texts] == expected
    lengths = np.array([len(text.encode()) + 1 for text in texts])
    stored = np.frombuffer(b"".join(text.encode() + b"\xff" for text in texts), np.uint8)
    ids, counts = tokenizer.encode_documents(stored, lengths)
    assert counts.tolist() == [len(one) + 1 for one in expected]
    assert ids.tolist() == [id for one in expected for id in (*one, tokenizer.end_of_text_id)]


MEASURED = """
import resource, sys
import numpy as np
from data_pipeline.tokenizers import load_tokenizer
tokenizer = load_tokenizer(sys.argv[1])
text = np.frombuffer((b"The quick brown fox, 12 times. " * (int(sys.argv[2]) // 31)) + b"\\xff", np.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ids, counts = tokenizer.encode_documents(text, np.array([len(text)]))
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / len(text))
"""


@pytest.mark.parametrize("kind", ["hf", "sentencepiece"])
def test_a_long_document_takes_little_memory(kind: str, tmp_path: Path) -> None:
    """Memory grows by less than 20 bytes per byte of text; encoding the text whole would take 130."""
    if kind == "hf":
        tokenizer = build_tokenizer(
            write_tokenizer(tmp_path / "t", byte_level(), ["The quick brown fox, 12 times."], [])
        )
    else:
        tokenizer = train_sentencepiece([topics[name] for name in sorted(topics)[:5]], 400)
    tokenizer.save(tmp_path / "saved")
    used = []
    for size in (3 << 20, 8 << 20):
        command = [sys.executable, "-c", MEASURED, str(tmp_path / "saved"), str(size)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        used.append(float(result.stdout) * size)
    assert (used[1] - used[0]) / (5 << 20) < 20


def test_characters_are_classified_as_letters_correctly() -> None:
    """Valid for any version of Unicode, down to the database of 2002 in Python."""
    characters = [chr(code) for code in range(0x110000)]
    letters = [one for one in characters if re.fullmatch(f"[{cutting._LETTERS}]", one)]
    others = [one for one in characters if re.fullmatch(f"[{cutting._OTHERS}]", one)]
    assert len(letters) > 30_000
    assert len(others) > 35
    for database in (unicodedata, unicodedata.ucd_3_2_0):
        assert {database.category(one)[0] for one in letters} == {"L"}
        assert not {database.category(one)[0] for one in others} & set("LNMZC")
    assert "'" not in others
