"""Perturbed text, windows beyond the context, and calibration, on models with known probabilities."""

import math
from random import Random

import numpy as np
import pytest
import torch
from test_corruptions import SENTENCES
from test_likelihood import BYTE, Unigram, letters, tiny_model

from stlm.config import ByteEmbedderConfig, GroupedQueryConfig, LearnedPositionsConfig, ModelConfig
from stlm.config import TransformerCoreConfig as Core
from stlm.errors import StlmError
from stlm.evals.items.reading import Item
from stlm.evals.tasks.corruptions import passages_of
from stlm.evals.tasks.extrapolation import bits_by_position, next_id_calibration
from stlm.evals.tasks.robustness import PERTURBATIONS, measure_robustness, perturbed
from stlm.model import Output
from stlm.stlm import STLM

TEXT = "The quick brown fox jumps over the lazy dog again. " * 20


class Stream:
    """Ids in memory."""

    def __init__(self, ids):
        self.ids = np.array(ids)

    def __len__(self):
        return len(self.ids)

    def read(self, start, stop):
        return self.ids[start:stop]


def test_perturbations_change_only_what_they_state():
    assert perturbed("clean", TEXT) == TEXT
    assert perturbed("no_spaces", "a b c") == "abc" and perturbed("double_spaces", "a b") == "a  b"
    assert perturbed("upper_case", "aB") == "AB" and perturbed("lower_case", "aB") == "ab"
    assert perturbed("full_width", "a b!") == "ａ ｂ！"
    for name in ("cyrillic", "full_width"):
        found = perturbed(name, TEXT)
        assert len(found) == len(TEXT) and not any(letter.isascii() and letter.isalpha() for letter in found)
    typos = perturbed("typos", TEXT, 3)
    assert typos == perturbed("typos", TEXT, 3) != perturbed("typos", TEXT, 4)
    wrong = sum(a != b for a, b in zip(typos.split(" "), TEXT.split(" "), strict=False))
    assert 0.1 * 220 < wrong < 0.3 * 220  # a letter in twenty, four letters a word
    text = "abcdefghij" * 2000
    assert len(perturbed("typos", text, 3)) == pytest.approx(len(text), abs=100)  # as many are lost as come twice
    whole = perturbed("typos", text, 3).count("abcdefghij")  # runs of ten letters without any
    assert whole == pytest.approx(2000 * 0.95**10, abs=40)
    assert perturbed("typos", "1 2 3 4 5" * 50) == "1 2 3 4 5" * 50
    assert all(PERTURBATIONS[name]("", Random(0)) == "" for name in PERTURBATIONS)


def test_robustness_of_a_model_that_knows_how_frequent_letters_are():
    model = letters(w=1 / 4, W=1 / 512)
    pairs = [Item("1", "", ("ww", "ab"), 0), Item("2", "", ("ab", "ww"), 0)]
    documents = [" ".join(SENTENCES)]
    text, values = measure_robustness(model, documents, pairs)
    found = values["perturbations"]
    assert set(found) == set(PERTURBATIONS) and values["items"] == 2 and values["bits_per_byte"] > 0
    assert found["clean"]["pairs"] == 0.5  # one of two
    assert found["upper_case"]["pairs"] == 0.5 and found["cyrillic"]["pairs"] == 0.5
    passage = sum(len(s) for s in SENTENCES[:4]) + 3  # two sentences are the context, two follow
    ws = SENTENCES[0].count("w") * 4
    rest = -math.log2((1 - 1 / 4 - 1 / 512) / 254)
    clean = (ws * 2 + (passage - ws) * rest) / passage
    assert values["passages"] == 3 and found["clean"]["bits_per_byte"] == pytest.approx(clean, rel=0.02)
    texts = [f"{passage.context} {passage.continuation}" for passage in passages_of(documents)]
    doubled = sum(len(text.replace(" ", "  ")) for text in texts) / sum(map(len, texts))  # bytes a clean character
    spaced = found["double_spaces"]
    assert spaced["bits_per_character"] == pytest.approx(doubled * spaced["bits_per_byte"])
    assert found["full_width"]["bits_per_character"] > 2.5 * found["full_width"]["bits_per_byte"]
    assert "cyrillic" in text
    with pytest.raises(StlmError, match="no passages"):
        measure_robustness(model, ["Short."], pairs)


def test_both_sentences_of_a_pair_are_changed_by_the_same_draws():
    """Two identical sentences therefore stay tied."""
    model, sentence = letters(w=1 / 4), "who was where when winter went away with us " * 4
    pairs = [Item(str(n), "", (sentence, sentence), 0) for n in range(5)]
    _, values = measure_robustness(model, [" ".join(SENTENCES)], pairs)
    assert [found["pairs"] for found in values["perturbations"].values()] == [0.5] * len(PERTURBATIONS)


class Forgetful(Unigram):
    """Knows every id within its context and none beyond it."""

    def __call__(self, ids_BT, wanted_BT=None):
        logits_BTV = torch.nn.functional.one_hot(ids_BT, self.tokenizer.vocab_size) * 100.0
        logits_BTV[:, self.config.context_length :] = 0
        return Output(logits_BTV, {}, {})


def test_the_curve_shows_the_end_of_the_context():
    model = Forgetful({}, context=16)
    _, values = bits_by_position(model, Stream(np.full(70, ord("a"))))
    assert (values["context_length"], values["longest"], values["windows"]) == (16, 64, 1)
    assert [part["bits_per_byte"] for part in values["curve"]] == pytest.approx([0, 0, 0, 0, 8, 8])
    assert [(part["start"], part["stop"]) for part in values["curve"][-2:]] == [(16, 32), (32, 64)]
    assert values["bits_per_byte"] == pytest.approx(0)
    with pytest.raises(StlmError, match="has 63 ids, expected 64"):
        bits_by_position(model, Stream(np.zeros(63, int)))


def test_learned_positions_end_with_the_context():
    core = Core(num_layers=1, attention=GroupedQueryConfig(num_heads=2), positions=LearnedPositionsConfig())
    config = ModelConfig(context_length=16, width=32, embedder=ByteEmbedderConfig(), core=core)
    learned = STLM.from_config(config, BYTE, seed=1).eval()
    stream = Stream(np.frombuffer(TEXT.encode(), np.uint8))
    assert bits_by_position(learned, stream)[1]["longest"] == 16
    turned = tiny_model(context=16)
    _, values = bits_by_position(turned, stream)
    ids = torch.from_numpy(stream.read(0, 64).astype(np.int64))[None]
    first = -turned(ids).logits[0].log_softmax(-1)[0, ids[0, 0]].item() / math.log(2)
    assert values["longest"] == 64 and values["windows"] == len(TEXT) // 64 > 1
    assert values["curve"][0]["stop"] == 2 and first > 0


def test_calibration_of_a_model_with_constant_confidence():
    model = letters(a=1 / 2)
    text, values = next_id_calibration(model, Stream(np.frombuffer(b"abab" * 32, np.uint8)))
    assert values["top_1"] == 0.5 and values["calibration_error"] == pytest.approx(0, abs=1e-6)
    assert values["bins"] == [{"confidence": pytest.approx(0.5), "accuracy": 0.5, "ids": 128}]
    _, values = next_id_calibration(model, Stream(np.frombuffer(b"bbbb" * 32, np.uint8)))
    assert values["calibration_error"] == pytest.approx(0.5) and "50.00 %" not in text


class Alternating(Unigram):
    """A model that gives "a" alternating probabilities of 0.65 and 0.68."""

    def __call__(self, ids_BT, wanted_BT=None):
        logits_BTV = self.logits_V.expand(*ids_BT.shape, -1).clone()
        logits_BTV[:, 1::2] = letters(a=0.68).logits_V
        return Output(logits_BTV, {}, {})


def test_calibration_of_the_next_id_has_fifteen_bins():
    model = Alternating({ord("a"): 0.65})
    _, values = next_id_calibration(model, Stream(np.frombuffer(b"ab" * 64, np.uint8)))  # right where it is less sure
    assert values["bins"] == [
        {"confidence": pytest.approx(0.65), "accuracy": 1, "ids": 64},
        {"confidence": pytest.approx(0.68), "accuracy": 0, "ids": 64},
    ]
    assert values["calibration_error"] == pytest.approx((0.35 + 0.68) / 2)
