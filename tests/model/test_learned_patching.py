"""Learned patches: the router by hand, its loss, and the two paths by which the text's loss reaches it."""

import pytest
import torch
from test_pairs import CONTEXT, PAIRS, make, random_ids

from stlm.config import BytePatchEmbedderConfig, LearnedPatchingConfig, ModelConfig
from stlm.model import Context, Vocabulary, initialize
from stlm.model.embedders.patching.learned import LearnedPatching, ratio, routing_of, smooth, weigh

PAIR = PAIRS["byte_patch+byte_patch, patches that are learned"]
VOCABULARY = Vocabulary(tuple(bytes([byte]) for byte in range(256)))


def router(width, **settings):
    model = ModelConfig(context_length=CONTEXT, embedder=BytePatchEmbedderConfig(width=width))
    module = LearnedPatching(LearnedPatchingConfig(**settings), model, VOCABULARY)
    initialize(module, seed=1)
    return module


def test_probabilities_and_the_term_of_the_loss_by_hand():
    right, up, left = [1.0, 0.0], [0.0, 2.0], [-3.0, 0.0]
    states = torch.tensor([[right, right, up, left, right], [right, right, right, right, right]])
    context = Context()
    probability = router(2, patch_length=4.0, ratio_weight=0.5)(torch.zeros(2, 5).long(), states, context)
    torch.testing.assert_close(probability, torch.tensor([[1.0, 0.0, 0.5, 0.5, 1.0], [1.0, 0.0, 0.0, 0.0, 0.0]]))
    # F = 4/5, G = 3/5: 4/3 (3 * 12/25 + 1/5 * 2/5) = 152/75; and F = G = 1/5: 4/3 (3 * 1/25 + 16/25) = 76/75
    torch.testing.assert_close(ratio(probability, 4.0), torch.tensor([152 / 75, 76 / 75]).double())
    assert context.auxiliary["patch_ratio"].item() == pytest.approx(0.5 * 5 * (152 + 76) / 75)
    assert ratio(torch.tensor([[1.0, 0.0, 0.0, 0.0]]), 4.0).item() == pytest.approx(1.0)  # as requested


def test_a_document_begins_with_certainty():
    states = torch.ones(1, 6, 2)
    documents = torch.tensor([[0, 0, 1, 1, 1, 2]])
    probability = router(2)(torch.zeros(1, 6).long(), states, Context(documents))
    torch.testing.assert_close(probability, torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.0, 1.0]]))


def test_a_patch_without_a_slot_counts_against_the_router():
    """Two slots for eight positions: the patch wanted at position 1 gets none, and that at 4 does."""
    module = router(2, patch_length=5.0)
    module.num_slots, module.context_length = 2, 8
    probability = torch.tensor([[1.0, 0.9, 0.2, 0.1, 0.7, 0.3, 0.6, 0.0]])
    placed = module.place(probability >= 0.5)
    assert placed.start_BP.tolist() == [[0, 4]]
    routing = routing_of(probability, placed, None)
    torch.testing.assert_close(routing.sureness_BT, torch.tensor([[1.0, 0.1, 0.8, 0.9, 0.7, 0.7, 0.4, 1.0]]))
    torch.testing.assert_close(routing.probability_BP, torch.tensor([[1.0, 0.7]]))
    across = routing_of(probability, placed, torch.tensor([[0, 1]]))
    torch.testing.assert_close(across.probability_BP, torch.tensor([[1.0, 1.0]]))


@pytest.mark.parametrize("patches", [1, 2, 7, 16, 33])
def test_smoothing_equals_the_recurrence_and_looks_only_back(patches):
    torch.manual_seed(0)
    y, p, before = torch.randn(2, patches, 3), torch.rand(2, patches), torch.randn(2, 1, 3)
    z, expected = before[:, 0], []
    for i in range(patches):
        z = p[:, i, None] * y[:, i] + (1 - p[:, i, None]) * z
        expected.append(z)
    smoothed = smooth(y, p, before)
    torch.testing.assert_close(smoothed, torch.stack(expected, 1), atol=1e-6, rtol=0)
    for i in range(patches):
        y_i, p_i = y.clone(), p.clone()
        y_i[:, i:] += 1.0
        p_i[:, i:] *= 0.5
        assert torch.equal(smooth(y_i, p_i, before)[:, :i], smoothed[:, :i])


def test_weighing_leaves_the_value_and_gives_a_gradient():
    y = torch.randn(1, 4, 3)
    sureness = torch.tensor([[0.9, 0.5, 0.3, 0.7]], requires_grad=True)
    weighed = weigh(y, sureness)
    assert torch.equal(weighed, y)
    weighed.sum().backward()
    torch.testing.assert_close(sureness.grad, y.sum(2))


@pytest.mark.parametrize("way", ["smooth", "weigh"])
def test_the_loss_of_the_text_reaches_the_router_by_both_paths(way, monkeypatch):
    blocked = {"smooth": lambda y, *others: y, "weigh": lambda y, *others: y}
    blocked.pop(way)
    for name, identity in blocked.items():
        monkeypatch.setattr(f"stlm.model.heads.byte_patch.{name}", identity)
    model, ids = make(*PAIR), random_ids()
    torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten()).backward()
    for projection in (model.embedder.patching.query, model.embedder.patching.key):
        assert projection.weight.grad.abs().max() > 1e-6


def test_terms_are_those_of_each_row():
    model, ids = make(*PAIR), random_ids(3)
    whole = model(ids)
    rows = [model(row[None]) for row in ids]
    torch.testing.assert_close(whole.auxiliary["patch_ratio"], sum(row.auxiliary["patch_ratio"] for row in rows))
    torch.testing.assert_close(whole.measures["patch_length"], sum(row.measures["patch_length"] for row in rows))


def test_the_ratio_term_leads_to_the_requested_length():
    torch.manual_seed(0)
    module, states = router(8, patch_length=6.0), torch.randn(4, 200, 8) + 0.5
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(150):
        probability = module(torch.zeros(4, 200).long(), states, Context())
        optimizer.zero_grad()
        ratio(probability, 6.0).sum().backward()
        optimizer.step()
    assert 1 / (probability >= 0.5).double().mean().item() == pytest.approx(6.0, rel=0.25)
