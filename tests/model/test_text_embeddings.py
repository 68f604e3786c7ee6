"""Text embeddings: means by hand, and for every pair of parts, padding and other texts change nothing."""

import numpy as np
import pytest
import torch
from test_pairs import CONTEXT, PAIRS, make

from stlm.model import Context
from stlm.model.network import mean_over_text

TEXTS = ["a", "One more, and one.", "", "ab cd", "é", "A text that is longer than the context is."]


@pytest.mark.parametrize("pair", PAIRS)
def test_a_text_has_one_vector_alone_and_among_others(pair):
    model = make(*PAIRS[pair])
    together = model.embed(TEXTS)
    alone = np.concatenate([model.embed([text]) for text in TEXTS])
    assert together.shape == (len(TEXTS), model.config.width) and np.isfinite(together).all()
    assert np.abs(together - alone).max() < 1e-5
    assert np.abs(together[1] - together[5]).max() > 1e-3  # and not because all texts have the same vector


@pytest.mark.parametrize("pair", PAIRS)
def test_padding_after_a_text_is_not_read(pair):
    model = make(*PAIRS[pair]).eval()
    ids = torch.tensor([list(b"One two"), list(b"xyz xyz")])
    lengths = torch.tensor([7, 3])
    others = ids.clone()
    others[1, 3:] = ord("q")
    with torch.no_grad():
        assert torch.equal(model.embed_ids(ids, lengths), model.embed_ids(others, lengths))


def states(model, inputs):
    """Return the core's output for ids read as they are."""
    x_BPD, patches = model.embedder(inputs, Context())
    context = Context() if patches is None else Context(used=patches.used_BP)
    return model.core(x_BPD, context)[0]


@torch.no_grad()
def test_the_mean_by_hand_is_over_the_text_without_the_start():
    model = make(*PAIRS["byte+linear"]).eval()
    inputs = torch.tensor([[model.start_id, *b"word"]])
    np.testing.assert_allclose(model.embed(["word"])[0], states(model, inputs)[1:].mean(0), atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(
    ("text", "behind", "slots"),
    [
        # patches of four begin at 0 (which has read the start alone), 4, 8 …
        ("wor", 4, [1]),  # 4 reads three letters and the end
        ("word", 4, [1]),  # 4 reads all
        ("words", 4, [1, 2]),  # 8 reads the s
        ("words an", 4, [1, 2]),
    ],
)
def test_patches_by_hand_read_a_text_to_its_end(text, behind, slots):
    model = make(*PAIRS["byte_patch+byte_patch"]).eval()
    inputs = torch.tensor([[model.start_id, *text.encode(), *[model.start_id] * behind]])
    np.testing.assert_allclose(model.embed([text])[0], states(model, inputs)[slots].mean(0), atol=1e-5)


def test_words_are_read_to_their_ends():
    """A patch of words begins after the end of the text, so the first and the last letter both count."""
    model = make(*PAIRS["byte_patch+byte_patch, patches of words"])
    first, last, other = model.embed(["cat", "car", "bat"])
    assert np.abs(first - last).max() > 1e-3 and np.abs(first - other).max() > 1e-3


def test_patches_that_end_within_the_text_count():
    y_BPD = torch.tensor([[[1.0], [2.0], [4.0], [torch.nan]]])  # a slot without a patch may hold anything
    starts = torch.tensor([[0, 2, 5, 9]])
    for length, reach, expected in [(0, 3, 1.0), (1, 0, 1.0), (1, 3, 2.0), (2, 3, 2.0), (3, 3, 3.0), (5, 3, 3.0)]:
        assert mean_over_text(y_BPD, starts, torch.tensor([length]), reach).item() == expected


def test_a_text_that_is_too_long_loses_its_end():
    for pair, longest in (("byte+linear", CONTEXT - 1), ("byte_patch+byte_patch", CONTEXT - 5)):
        model = make(*PAIRS[pair])
        assert model.longest_text == longest
        text = "abcdefgh" * CONTEXT
        np.testing.assert_array_equal(model.embed([text]), model.embed([text[:longest]]))


def test_a_vector_has_a_gradient():
    model = make(*PAIRS["byte_patch+byte_patch"])
    model.embed_ids(torch.tensor([list(b"word")]), torch.tensor([4])).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.core.parameters())
