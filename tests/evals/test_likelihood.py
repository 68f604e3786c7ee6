"""Likelihoods of continuations: known models, every batching against one row at a time, and long texts."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data_pipeline.tokenizers import build_tokenizer
from stlm.config import (
    BytePatchEmbedderConfig,
    BytePatchHeadConfig,
    GroupedQueryConfig,
    ModelConfig,
    TransformerCoreConfig,
)
from stlm.evals import Row, log_likelihoods
from stlm.evals.likelihood import _encode
from stlm.model import Output
from stlm.stlm import STLM

BYTE = build_tokenizer("byte")


class Unigram:
    """A model that gives each id the same probability everywhere: as in `probabilities`, or else uniform."""

    device = torch.device("cpu")
    embedder = SimpleNamespace(ragged=True)

    def __init__(self, probabilities, context=64, tokenizer=BYTE):
        self.tokenizer, self.config = tokenizer, ModelConfig(context_length=context)
        rest = (1 - sum(probabilities.values())) / (tokenizer.vocab_size - len(probabilities))
        probability_V = torch.full((tokenizer.vocab_size,), rest)
        for id, probability in probabilities.items():
            probability_V[id] = probability
        self.logits_V = probability_V.log()

    def eval(self):
        return self

    def __call__(self, ids_BT, wanted_BT=None):
        logits_BTV = self.logits_V.expand(*ids_BT.shape, -1)
        return Output(logits_BTV if wanted_BT is None else logits_BTV[wanted_BT], {}, {})


def letters(**probabilities):
    return Unigram({ord(letter): probability for letter, probability in probabilities.items()})


class Pairs:
    """A tokenizer of single letters and of the pair "bc", whose vocabulary is a, b, c, bc and the end."""

    vocab_size, end_of_text_id = 5, 4
    bytes_per_id = np.array([1, 1, 1, 2, 0])

    def encode(self, text):
        ids = {"a": 0, "b": 1, "c": 2, "!": 3}
        return np.array([ids[letter] for letter in text.replace("bc", "!")])


def tiny_model(patched=False, context=48):
    parts = {}
    if patched:
        parts = {"embedder": BytePatchEmbedderConfig(width=16, num_heads=2, window=8),
                 "head": BytePatchHeadConfig(num_heads=2, window=8)}  # fmt: skip
    core = TransformerCoreConfig(num_layers=1, attention=GroupedQueryConfig(num_heads=2))
    config = ModelConfig(context_length=context, width=32, core=core, **parts)
    return STLM.from_config(config, BYTE, seed=1).eval()


@torch.no_grad()
def one_by_one(model, row):
    """Return ln P(continuation
    context), with a separate pass for each id."""
    ids = torch.tensor([[BYTE.end_of_text_id, *(row.context + row.continuation).encode()]])
    log_probabilities = model(ids).logits[0].double().log_softmax(-1).gather(1, ids[0, :, None])[:, 0]
    return log_probabilities[1 + len(row.context.encode()) :].sum().item()


def found_of(model, rows):
    return [likelihood.log_probability for likelihood in log_likelihoods(model, [rows]).by_question[0]]


def test_only_the_continuation_counts():
    model = letters(a=1 / 2, b=1 / 4)
    assert found_of(model, [Row("bbb", "ab"), Row("", "aaa")]) == pytest.approx([math.log(1 / 8)] * 2)


def test_greedy_is_the_most_probable_id_in_every_place_and_ties_are_shared():
    def greedy(model, text):
        return log_likelihoods(model, [[Row("b", text)]]).by_question[0][0].greedy

    assert greedy(letters(a=1 / 2, b=1 / 4), "aa") == 1
    assert greedy(letters(a=1 / 2, b=1 / 4), "ab") == 0
    assert greedy(letters(a=3 / 8, b=3 / 8), "ab") == pytest.approx(1 / 4)


def test_an_id_across_the_border_belongs_to_the_continuation():
    encoded = _encode(Pairs(), 0, [Row("ab", "ca"), Row("ab", "ac")])
    assert [ids.tolist() for ids in encoded.ids] == [[4, 0, 3, 0], [4, 0, 1, 0, 2]]
    assert encoded.starts == [2, 3]  # "bc" is scored with the first; "b" is context to the second
    assert encoded.prefix == 2
    model = Unigram({0: 1 / 2, 1: 1 / 4, 2: 1 / 16, 3: 1 / 8}, tokenizer=Pairs())
    assert found_of(model, [Row("ab", "ca"), Row("ab", "ac")]) == pytest.approx([math.log(1 / 16), math.log(1 / 32)])


@pytest.mark.parametrize("patched", [False, True])
def test_batches_and_shared_beginnings_equal_one_row_at_a_time(patched, monkeypatch):
    model = tiny_model(patched)
    questions = [[Row("The zebra that you saw", f" {word}.") for word in ("ran", "é", "jumped far")],
                 [Row("", "Sphinx of black quartz."), Row("", "Sphinx of quartz black.")],
                 [Row("How quick the daft", " zebra"), Row("How quick a daft", " zebra")],
                 [Row("Alone in the world", " he is")]]  # fmt: skip
    expected = [[one_by_one(model, row) for row in rows] for rows in questions]
    steps = []
    monkeypatch.setattr(model, "step", lambda *args, step=model.step: steps.append(tuple(args[0].shape)) or step(*args))
    for limit in (1, 300, 1 << 14):
        monkeypatch.setattr("stlm.evals.likelihood._IDS_PER_BATCH", limit)
        found = log_likelihoods(model, questions)
        for question, numbers in zip(found.by_question, expected, strict=True):
            assert [one.log_probability for one in question] == pytest.approx(numbers, abs=1e-4)
    assert found.num_cut == 0
    assert steps, "beginnings were read once"


def test_shared_prefixes_are_read_once(monkeypatch):
    model, steps = tiny_model(), []
    monkeypatch.setattr(model, "step", lambda *args, step=model.step: steps.append(tuple(args[0].shape)) or step(*args))
    shots = "One and one is two. "
    rows = [[Row(f"{shots}{a}nd {a} is", word) for word in (" far", " few", " no")] for a in "ab"]
    found = log_likelihoods(model, rows)
    # The end of text and the shots for all, "and a is " for each question, and all but the last letter of each choice.
    assert steps == [(1, 21), (2, 9), (6, 2)]
    for question, likelihoods in zip(rows, found.by_question, strict=True):
        expected = [one_by_one(model, row) for row in question]
        assert [one.log_probability for one in likelihoods] == pytest.approx(expected, abs=1e-4)


def test_only_requested_logits_are_computed(monkeypatch):
    model, made = tiny_model(), []
    monkeypatch.setattr(model.head, "predict", lambda x, old=model.head.predict: made.append(len(x)) or old(x))
    log_likelihoods(model, [[Row("The zebra that you saw", " ran")], [Row("", "é")]])
    assert made == [6]


def test_long_contexts_are_cut_equally_and_counted():
    model = tiny_model()
    rows = [Row("x" * 40 + "The zebra", " ran"), Row("x" * 40 + "The zebra", " jumped")]
    found = log_likelihoods(model, [rows, [Row("short", " one")]])
    assert found.num_cut == 1
    kept = ("x" * 40 + "The zebra").encode()[-(48 - len(" jumped")) :]  # as much as the longest choice leaves
    for row, likelihood in zip(rows, found.by_question[0], strict=True):
        ids = torch.tensor([[*kept, *row.continuation.encode()]])
        log_probabilities = model(ids).logits[0].double().log_softmax(-1).gather(1, ids[0, :, None])[len(kept) :]
        assert likelihood.log_probability == pytest.approx(log_probabilities.sum().item(), abs=1e-4)


def test_choices_longer_than_the_model_are_scored_whole():
    model = letters(a=1 / 2, b=1 / 4)
    found = log_likelihoods(model, [[Row("bb", "a" * 100), Row("bb", "b")]])
    assert found.num_cut == 1
    assert [one.log_probability for one in found.by_question[0]] == pytest.approx(
        [100 * math.log(1 / 2), math.log(1 / 4)]
    )


@torch.no_grad()
def test_windows_of_a_choice_that_is_too_long_overlap_by_half():
    """Read from the choice alone in windows of 48 ids, every 24: each id after the first 48 has 24 to 47 before it."""
    model, text = tiny_model(), "Sphinx of black quartz, judge my vow; how vexingly quick daft zebras jump"
    ids = torch.tensor([list(text.encode())])
    expected = 0.0
    for place in range(len(text)):
        start = max(0, -(-(place + 1 - 48) // 24) * 24)
        logits_V = model(ids[:, start : place + 1]).logits[0, -1].double()
        expected += logits_V.log_softmax(-1)[ids[0, place]].item()
    found = log_likelihoods(model, [[Row("left out", text), Row("left out", "b")]]).by_question[0][0]
    assert found.log_probability == pytest.approx(expected, abs=1e-4)
