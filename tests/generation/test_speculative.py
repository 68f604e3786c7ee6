"""Speculative decoding and early exit, on a model with known probabilities."""

import pytest
import torch

from stlm.generation import (
    DecodingStats,
    EarlyExit,
    Sampler,
    Sampling,
    generate_ids,
    probabilities,
    speculate_with_layers,
    speculate_with_ngrams,
)
from stlm.generation.speculative import ngram_draft

GENERATOR = torch.Generator().manual_seed(7)
SHALLOW, DEEP = (
    1.5 * torch.randn(5, 5, generator=GENERATOR) for _ in range(2)
)  # logits after each id, of 4 and a stop
STOP = 4


class State:
    def __init__(self, read=()):
        self.read, self.waiting = list(read), []

    def snapshot(self):
        return State(self.read)


class Table:
    """Predicts the next id from tables: one for the first two layers, one for all eight. Records its calls."""

    depths = (2, 8)

    def __init__(self):
        self.said = []

    def begin(self, batch_size, ids=None):
        state = State()
        if ids is not None and ids.numel():
            return self.step(ids, state)[:, -1], state
        return DEEP[3].expand(batch_size, -1), state

    def step(self, ids, state):
        assert not state.waiting, "steps and drafts do not mix"
        state.read += ids[0].tolist()
        self.said.append(("step", ids.size(1)))
        return DEEP[ids]

    def draft(self, ids, state):
        state.waiting += ids[0].tolist()
        return SHALLOW[ids]

    def verify(self, state):
        self.said.append(("verify", len(state.waiting)))
        return DEEP[torch.tensor([state.waiting])]

    def keep(self, state, number):
        state.read += state.waiting[:number]
        state.waiting.clear()

    def deepen(self, state, stage):
        self.said.append(("deepen", len(state.waiting)))
        newest = state.waiting[-1]
        state.waiting.clear()
        return DEEP[torch.tensor([[newest]])]


def sampler_of(prompt=(), max_new_ids=3, banned=None, **rules):
    return Sampler(Sampling(**rules), prompt, torch.zeros(5, dtype=torch.bool) if banned is None else banned,
                 max_new_ids, STOP)  # fmt: skip


def by_layers(*args, **options):
    return drafting_by(speculate_with_layers, *args, **options)


def by_ngrams(*args, **options):
    return drafting_by(speculate_with_ngrams, *args, **options)


def drafting_by(function, model, prompt, sampler, num_drafts, context_length=100, stats=None):
    options = {"context_length": context_length, "stop_id": STOP, "num_drafts": num_drafts}
    return function(model, prompt, sampler, **options, stats=stats or DecodingStats())


def shares(draw, times):
    """Return the share of each text of up to three ids, with its end."""
    counts = torch.zeros(5, 5, 5)
    for seed in range(times):
        a, b, c, *_ = [*draw(seed), STOP, STOP, STOP]
        counts[a, b, c] += 1
    return counts / times


PROMPT = [
    0,
    1,
    2,
    3,
    0,
    1,
    0,
    2,
    2,
    3,
    3,
    1,
    0,
    0,
    3,
    2,
    1,
    1,
    3,
]  # all pairs, so that every drawn id has a continuation


@pytest.mark.parametrize("drafting", [by_layers, by_ngrams])
@pytest.mark.parametrize("rules", [{}, {"temperature": 0.7, "top_k": 3}, {"top_p": 0.8, "temperature": 1.5}])
def test_drafts_leave_the_distribution_as_it_is(rules, drafting):
    """Compared with probabilities worked out by hand: chi-square over all texts, within 5 standard deviations."""
    times, stats = 1500, DecodingStats()
    found = shares(
        lambda seed: drafting(Table(), PROMPT, sampler_of(PROMPT, seed=seed, **rules), num_drafts=2, stats=stats), times
    )
    assert stats.accepted > 100 and stats.drafted - stats.accepted > 100
    follow = probabilities(DEEP, Sampling(**rules))
    expected = torch.zeros(5, 5, 5)
    for a in range(5):
        for b in range(5):
            for c in range(5):
                if a == STOP:
                    expected[a, b, c] = follow[3, a] * (b == c == STOP)
                elif b == STOP:
                    expected[a, b, c] = follow[3, a] * follow[a, b] * (c == STOP)
                else:
                    expected[a, b, c] = follow[3, a] * follow[a, b] * follow[b, c]
    assert expected.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert not found[expected == 0].any()
    possible = expected > 0
    chi_square = (times * (found - expected)[possible] ** 2 / expected[possible]).sum().item()
    degrees = int(possible.sum()) - 1
    assert abs(chi_square - degrees) < 5 * (2 * degrees) ** 0.5
    shallow = probabilities(SHALLOW, Sampling(**rules))
    assert (shallow - follow).abs().max() > 0.2, "the drafts would show"


@pytest.mark.parametrize("drafting", [by_layers, by_ngrams])
@pytest.mark.parametrize("num_drafts", [1, 2, 5, 50])
@pytest.mark.parametrize("context_length", [1, 2, 7, 100])
def test_drafts_do_not_change_the_likeliest_text(num_drafts, context_length, drafting):
    banned, stats = torch.tensor([False, True, False, False, True]), DecodingStats()
    rules = {"temperature": 0, "repetition_penalty": 1.3, "frequency_penalty": 0.05}  # avoids a repeating text

    def sampler():
        return sampler_of([0, 1, 2], max_new_ids=40, banned=banned, **rules)

    expected = list(generate_ids(Table(), [0, 1, 2], sampler(), context_length=context_length, stop_id=STOP))
    assert list(drafting(Table(), [0, 1, 2], sampler(), num_drafts, context_length, stats)) == expected
    assert len(expected) == 40 and stats.accepted <= stats.drafted


def test_copies_continue_the_longest_repetition():
    assert ngram_draft([1, 2, 3, 9, 2, 3, 8, 1, 2, 3], 4) == [9, 2, 3, 8]
    assert ngram_draft([1, 2, 3, 9, 2, 3], 1) == [9]
    assert ngram_draft([1, 2, 3, 4], 4) == [] == ngram_draft([1, 1, 1], 0)


def test_copying_saves_passes():
    """Only drafts across the end of a repeating text are wrong."""
    model, stats = Table(), DecodingStats()
    drawn = list(by_ngrams(model, [0], sampler_of([0], max_new_ids=60, temperature=0), 4, stats=stats))
    passes = sum(name == "step" for name, _ in model.said)
    assert len(drawn) == 60 or len(set(drawn)) < 5
    assert passes < 30 and stats.accepted > 30


def test_copies_that_are_always_wrong_become_rarer():
    """Among five ids pairs recur at once, but the next id never follows the copied pattern."""

    class Never(Table):
        def step(self, ids, state):
            logits = super().step(ids, state).clone()
            for place in range(ids.size(1)):
                copied = ngram_draft(state.read[: len(state.read) - ids.size(1) + place + 1], 1)
                logits[0, place] = torch.tensor([0.0, 1.0, 2.0, 3.0, -9.0])
                logits[0, place, copied] = -5.0
            return logits

    model, stats = Never(), DecodingStats()
    drawn = list(by_ngrams(model, PROMPT, sampler_of(PROMPT, max_new_ids=60, temperature=0), 1, stats=stats))
    assert len(drawn) == 60 and stats.accepted == 0
    assert 3 <= stats.drafted <= 6  # after 1, 3, 7, 15 and 31 passes without drafts


def test_statistics_are_counted():
    model, stats = Table(), DecodingStats()
    drawn = list(by_layers(model, [0], sampler_of([0], max_new_ids=30, temperature=0), 4, stats=stats))
    rounds = [number for name, number in model.said if name == "verify"]
    assert stats.ids == len(drawn) - 1  # the first comes with the prompt
    assert stats.drafted == sum(rounds) and max(rounds) == 4
    assert stats.layers == 2 * sum(rounds) + 6 * len(rounds)
    assert str(stats).endswith(f"; {stats.accepted} of {stats.drafted} drafts accepted")


def test_a_confident_exit_is_used():
    """Ids with a confident first exit wait; the next unconfident id is computed together with them."""
    sure = SHALLOW.softmax(-1).amax(-1)
    threshold = sure[:4].median().item() + 1e-6  # two of four are
    model, stats = Table(), DecodingStats()
    state = model.begin(1)[1]
    subject = EarlyExit(model, threshold, stats)
    ids, waited = [0, 1, 2, 3, 3, 2, 1, 0, 0], 0
    for id in ids:
        logits = subject.step(torch.tensor([[id]]), state)[0, 0]
        waited += 1
        if sure[id] >= threshold:
            assert torch.equal(logits, SHALLOW[id])
        else:
            assert torch.equal(logits, DEEP[id])
            assert model.said[-1] == ("deepen", waited)
            waited = 0
    quick = sum(sure[id].item() >= threshold for id in ids)
    assert 0 < quick < len(ids)
    assert (stats.ids, stats.layers) == (len(ids), 2 * quick + 8 * (len(ids) - quick))
