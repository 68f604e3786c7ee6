"""Beam search against an enumeration of all texts."""

import itertools

import pytest
import torch

from stlm.generation import beam_search

GENERATOR = torch.Generator().manual_seed(4)
FOLLOW = 2 * torch.randn(5, 5, generator=GENERATOR)  # logits after each id; 4 ends the text
FOLLOW[:, 4] -= 2
BANNED = torch.tensor([False, False, True, False, False])


class Markov:
    """A model that predicts the next id from a table; its state is the ids read by each row."""

    def begin(self, batch_size, ids=None):
        return FOLLOW[ids[:, -1]], [row.tolist() for row in ids]

    def step(self, ids, state):
        for row, id in zip(state, ids[:, 0].tolist(), strict=True):
            row.append(id)
        return FOLLOW[ids]

    def join(self, parts):
        ((state, rows),) = parts
        return [list(state[row]) for row in rows.tolist()]


def brute_force(start, length):
    """Return all texts of at most `length` ids, ended or cut off, and their log-probabilities; the likeliest first."""
    log = FOLLOW.double().masked_fill(BANNED, -torch.inf).log_softmax(-1)
    found = []
    for n in range(length + 1):
        for ids in itertools.product((0, 1, 3), repeat=n):
            path = [start, *ids, *([4] if n < length else [])]
            found.append((list(ids), sum(log[a, b].item() for a, b in itertools.pairwise(path))))
    return sorted(found, key=lambda text: -text[1])


def search(num_beams, length, context_length=50):
    return beam_search(
        Markov(), [1, 0], num_beams=num_beams, max_new_ids=length, context_length=context_length, stop_id=4,
        banned_V=BANNED,
    )  # fmt: skip


@pytest.mark.parametrize("length", [1, 2, 4])
@pytest.mark.parametrize("context_length", [2, 4, 50])
def test_enough_beams_find_the_likeliest_texts(length, context_length):
    expected = brute_force(0, length)
    found = search(200, length, context_length)
    scores = {tuple(ids): score for ids, score in expected}  # some have equal probability, in any order
    assert {tuple(text.ids): text.log_probability for text in found} == pytest.approx(scores)
    assert [text.log_probability for text in found] == pytest.approx([score for _, score in expected])


def test_more_beams_are_no_worse():
    scores = [search(beams, 5)[0].log_probability for beams in (1, 2, 3, 100)]
    assert scores == sorted(scores) and scores[-1] == pytest.approx(brute_force(0, 5)[0][1])
    assert scores[0] < scores[-1]
