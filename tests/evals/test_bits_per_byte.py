"""Bits per byte of models with known probabilities, against numbers worked out by hand and against brute force."""

import bz2
import gzip
import hashlib
import lzma
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_pipeline.loading.prepared_data import SourceRange
from data_pipeline.tokenizers import build_tokenizer, train_sentencepiece
from stlm.config import (
    ByteEmbedderConfig,
    BytePatchEmbedderConfig,
    BytePatchHeadConfig,
    GroupedQueryConfig,
    LinearHeadConfig,
    ModelConfig,
    TransformerCoreConfig,
)
from stlm.errors import StlmError
from stlm.evals import COMPRESSORS, compressed_bits_per_byte, score_split
from stlm.evals.tasks.bits_per_byte import text_fingerprint
from stlm.export.comparison import sample_text
from stlm.model import Output
from stlm.stlm import STLM

BYTE = build_tokenizer("byte")


class Stream:
    """An IdStream made of texts."""

    given = None

    def __init__(self, *texts):
        self._documents = [np.append(BYTE.encode(text), np.uint8(BYTE.end_of_text_id)) for text in texts]
        self._ids = np.concatenate(self._documents)
        self.num_bytes = sum(len(text.encode()) for text in texts)
        self.num_documents = len(texts)

    def __len__(self):
        return len(self._ids)

    def read(self, start, stop):
        assert 0 <= start <= stop <= len(self)
        return self._ids[start:stop].copy()

    def documents(self):
        return iter(self._documents)


class Unigram:
    """A model that gives every id the same probability everywhere: 1/2 for "a", 1/4 for "b", 1/8 for the end."""

    tokenizer = BYTE
    device = "cpu"
    config = ModelConfig(context_length=8)

    def __init__(self):
        probability = torch.full((256,), (1 / 8) / 253)
        probability[[ord("a"), ord("b"), BYTE.end_of_text_id]] = torch.tensor([1 / 2, 1 / 4, 1 / 8])
        self.logits_V = probability.log()
        self.sizes = []

    def eval(self):
        return self

    def __call__(self, ids_BT, document_ids_BT=None):
        self.sizes.append(tuple(ids_BT.shape))
        return Output(self.logits_V.expand(*ids_BT.shape, 256), {}, {})


def tiny_model(patched, context=24):
    embedder = BytePatchEmbedderConfig(width=16, num_heads=2, window=8) if patched else ByteEmbedderConfig()
    head = BytePatchHeadConfig(num_heads=2, window=8) if patched else LinearHeadConfig()
    core = TransformerCoreConfig(num_layers=1, attention=GroupedQueryConfig(num_heads=2))
    config = ModelConfig(context_length=context, width=32, embedder=embedder, head=head, core=core)
    return STLM.from_config(config, BYTE, seed=1).eval()


class Given:
    """The loss mask that accompanies the ids of conversations."""

    def __init__(self, given):
        self._given = np.array(given, np.uint8)

    def read(self, start, stop):
        return self._given[start:stop]


def test_only_answers_of_conversations_are_scored():
    stream = Stream("aab", "ba")
    stream.given = Given([1, 1, 0, 0, 0, 1, 1])  # "b" with its end, and "b" without
    sources = [SourceRange("first", 0, 4), SourceRange("second", 4, 7)]
    score = score_split(Unigram(), stream, sources=sources)
    assert score.bits_per_byte == pytest.approx((2 + 3 + 2) / 2)
    assert (score.ids, score.bytes) == (3, 2)
    assert score.sources["first"][1:] == (2, 1, 1)
    assert score.sources["second"][1:] == (1, 1, 1)
    assert score.bytes_D.tolist() == [1, 1]


@pytest.mark.parametrize("stride", [1, 3, 8, None])
def test_known_probabilities_give_the_known_bits(stride):
    # "aab" costs 1 + 1 + 2 bits and its end 3; "ab" 1 + 2 and 3: 13 bits for 5 bytes of text.
    score = score_split(Unigram(), Stream("aab", "ab"), stride=stride)
    assert score.bits_per_byte == pytest.approx(13 / 5, rel=1e-5)
    assert score.nats == pytest.approx(13 * math.log(2), rel=1e-5)
    assert (score.ids, score.bytes) == (7, 5)
    assert (score.context_length, score.stride) == (8, stride or 4)


@pytest.mark.parametrize("stride", [1, 5, 8])
def test_each_source_is_scored_by_itself(stride):
    texts = ["aab", "ab" * 700, "b"]
    ends = np.cumsum([len(text) + 1 for text in texts]).tolist()
    sources = [
        SourceRange(name, stop - len(text) - 1, stop) for name, text, stop in zip("xyz", texts, ends, strict=True)
    ]
    score = score_split(Unigram(), Stream(*texts), stride=stride, sources=sources)
    bits = {name: part.bits_per_byte for name, part in score.sources.items()}
    assert bits == pytest.approx({"x": 7 / 3, "y": (2100 + 3) / 1400, "z": 5 / 1}, rel=1e-5)
    assert sum(part.ids for part in score.sources.values()) == score.ids
    assert sum(part.bytes for part in score.sources.values()) == score.bytes
    assert sum(part.nats for part in score.sources.values()) == pytest.approx(score.nats)


def test_the_interval_is_over_documents_and_of_each_source_over_its_own():
    texts = ["aaaa", "bb", "ab"]  # 7, 7 and 6 bits with their ends, for 4, 2 and 2 bytes
    sources = [SourceRange("x", 0, 8), SourceRange("y", 8, 11)]
    score = score_split(Unigram(), Stream(*texts), sources=sources)
    assert (score.nats_D / math.log(2)).tolist() == pytest.approx([7, 7, 6], rel=1e-5)
    assert score.bytes_D.tolist() == [4, 2, 2]
    found = score.interval()
    assert found.value == pytest.approx(score.bits_per_byte)
    assert (found.low, found.high) == pytest.approx((7 / 4, 7 / 2), rel=1e-5)  # one document, three times
    of_sources = score.source_intervals()
    assert of_sources["x"][:2] == pytest.approx((14 / 6, 7 / 4), rel=1e-5)
    assert of_sources["y"] == (pytest.approx(6 / 2, rel=1e-5), None, None)


def test_long_streams_are_read_in_segments_and_every_id_counts_once():
    text = "ab" * 1500
    model = Unigram()
    score = score_split(model, Stream(text), stride=2)
    assert (score.ids, score.bytes) == (3001, 3000)
    assert score.bits_per_byte == pytest.approx((1.5 * 3000 + 3) / 3000, rel=1e-5)
    assert len(model.sizes) > 64 and max(model.sizes) <= (16, 8)


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("stride", [5, 12, 24])
@torch.no_grad()
def test_strided_windows_equal_scoring_each_id_by_itself(patched, stride, monkeypatch):
    monkeypatch.setattr("stlm.evals.tasks.bits_per_byte._WINDOWS_PER_SEGMENT", 3)
    model = tiny_model(patched)
    stream = Stream("How vexingly quick daft zebras jump; ", "", "é" * 30, "sphinx of black quartz, judge my vow")
    ids = torch.from_numpy(stream.read(0, len(stream))).long()
    nats = 0.0
    for t in range(len(ids)):
        # Find the first window that includes id t.
        start = max(0, -(-(t + 1 - 24) // stride) * stride)
        logits = model(ids[None, start : t + 1]).logits[0, -1]
        nats -= logits.double().log_softmax(-1)[ids[t]].item()
    assert score_split(model, stream, stride=stride).nats == pytest.approx(nats, rel=1e-5)


@torch.no_grad()
def test_isolated_documents_are_scored_as_if_each_were_alone_after_an_end():
    model, texts = tiny_model(False), ["quick daft", "vow", "zebra"]
    nats = 0.0
    for number, text in enumerate(texts):
        before = [BYTE.end_of_text_id] if number else []  # the first one begins with the stream
        ids = torch.tensor([[*before, *BYTE.encode(text).tolist(), BYTE.end_of_text_id]])
        documents = torch.ones_like(ids)
        documents[:, : len(before)] = 0
        log_probabilities = model(ids, documents).logits[0].double().log_softmax(-1)
        nats -= log_probabilities.gather(1, ids[0, :, None])[len(before) :].sum().item()
    stream = Stream(*texts)
    assert len(stream) <= 24, "one window"
    assert score_split(model, stream, documents_apart=True).nats == pytest.approx(nats, rel=1e-5)
    assert score_split(model, stream).nats != pytest.approx(nats, rel=1e-4)


def test_the_hash_covers_the_text_and_the_ends_of_documents():
    def of(tokenizer, *texts):
        documents = [np.append(tokenizer.encode(text), tokenizer.end_of_text_id) for text in texts]
        return text_fingerprint(SimpleNamespace(documents=lambda: iter(documents)), tokenizer)

    subwords = train_sentencepiece([sample_text()], 500)
    assert len({of(BYTE, "the cat", "sat"), of(BYTE, "the ", "catsat"), of(BYTE, "the cat", "sat", "")}) == 3
    assert of(subwords, "the cat", "sat") == of(BYTE, "the cat", "sat")
    lengths_and_texts = b"\x07" + bytes(7) + b"the cat" + b"\x03" + bytes(7) + b"sat"
    assert of(BYTE, "the cat", "sat") == hashlib.sha256(lengths_and_texts).hexdigest()


def test_more_context_helps_a_model_that_uses_it():
    model, stream = tiny_model(False), Stream("abcdefgh" * 40)
    assert score_split(model, stream, stride=1).nats != score_split(model, stream, stride=24).nats


def test_a_split_without_text_is_refused():
    with pytest.raises(StlmError, match="no text"):
        score_split(Unigram(), Stream("", ""))


def test_compressors_count_separators_as_cost_and_not_as_text():
    words = np.random.default_rng(1).choice(["lorem ", "ipsum ", "dolor ", "sit ", "amet\n"], 40_000)
    texts = ["the quick brown fox " * 20, "jumps over " * 9, "é", "".join(words)]
    data = b"".join(text.encode() + b"\xff" for text in texts)
    num_bytes = len(data) - len(texts)
    bits = compressed_bits_per_byte(Stream(*texts), BYTE)
    assert bits == {
        "gzip -9": 8 * len(gzip.compress(data, 9)) / num_bytes,
        "bz2 -9": 8 * len(bz2.compress(data, 9)) / num_bytes,
        "xz -9": 8 * len(lzma.compress(data, preset=9)) / num_bytes,
    }
    assert list(bits) == list(COMPRESSORS)
