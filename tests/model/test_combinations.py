"""Invariants of every pair, repeated for combinations of independent parts."""

import math

import pytest
import torch
from joins import joins_and_leaves, some_ids

from data_pipeline.tokenizers import build_tokenizer
from stlm.config import ModelConfig, from_dict
from stlm.model import EntropyPatching, row_keys
from stlm.stlm import STLM

CONTEXT = 24
LOCAL = {"kind": "byte_patch", "width": 16, "window": 5}
VARIABLE = {"patch_length": 3.0, "span": 4}
HEAD = {"kind": "byte_patch", "window": 6}
EXPERTS = {"kind": "moe", "num_experts": 3, "hidden_width": 16, "shared_hidden_width": 8}
SHARED = {"modules": {"block": [[0, 2]], "attention.query_norm": "all"}, "lora_rank": 2}
NGRAMS = {"table_size": 20, "longest": 4}
DEPTH = {"exits": {"every": 2}, "layer_dropout": 0.4}
COMBINATIONS = {
    "learned patches, shared experts with corrections, loops, exits, muP": {
        "base_width": 16,
        "embedder": {**LOCAL, "patching": {"kind": "learned", **VARIABLE}, "ngrams": NGRAMS},
        "head": {**HEAD, "logit_cap": 3.0},
        "core": {
            "num_layers": 3,
            "feed_forward": EXPERTS,
            "attention": {"qk_norm": True, "num_kv_heads": 1, "value_residual": True},
            "sharing": SHARED,
            "loops": {"count": 2, "first": 1, "embeddings": True},
            **DEPTH,
        },
    },
    "patches of words, learned positions, experts, parallel residual, untied": {
        "embedder": {**LOCAL, "patching": {"kind": "space", **VARIABLE}, "num_layers": 2},
        "head": {**HEAD, "tied": False, "num_layers": 2},
        "core": {
            "num_layers": 3,
            "feed_forward": {**EXPERTS, "experts_per_token": 1},
            "attention": {"bias": "all", "value_residual": True},
            "norm": {"kind": "layer_norm"},
            "positions": {"kind": "learned"},
            "residual": {"parallel": True, "learned_scale": True},
            **DEPTH,
        },
    },
    "patches of hard bytes, ALiBi, windows, a loop of one layer, exits": {
        "base_width": 16,
        "embedder": {
            **LOCAL,
            "patching": {"kind": "entropy", **VARIABLE, "width": 16, "core": {"num_layers": 1}},
            "ngrams": NGRAMS,
        },
        "head": HEAD,
        "core": {
            "num_layers": 2,
            "attention": {"window": 3, "full_every": 2, "logit_cap": 2.0},
            "positions": {"kind": "alibi"},
            "loops": {"count": 3, "first": 1, "last": 1},
            **DEPTH,
        },
    },
    "fixed patches, learned positions, all blocks one, loops, muP": {
        "base_width": 64,
        "embedder": {**LOCAL, "patching": {"kind": "fixed", "patch_size": 3}},
        "head": HEAD,
        "core": {
            "num_layers": 2,
            "feed_forward": {"kind": "relu_squared", "bias": True},
            "positions": {"kind": "learned"},
            "sharing": {"modules": {"block": "all"}, "lora_rank": 2, "lora_alpha": 4.0},
            "loops": {"count": 2, "embeddings": True},
            **DEPTH,
        },
    },
    "factorised ids with bigrams, shared experts, windows, exits": {
        "embedder": {"kind": "token", "rank": 8, "ngrams": {"table_size": 20}},
        "head": {"kind": "linear", "logit_cap": 3.0},
        "core": {
            "num_layers": 4,
            "feed_forward": EXPERTS,
            "attention": {"window": 5, "full_every": 3, "value_residual": True},
            "positions": {"kind": "rope", "fraction": 0.5},
            "sharing": {"modules": {"feed_forward": "interior:1", "attention.value": [[1, 3]]}, "lora_rank": 2},
            "loops": {"count": 2, "first": 2, "embeddings": True},
            **DEPTH,
        },
    },
    "the published model with experts, corrections and exits": {
        "base_width": 16,
        "embedder": {"kind": "paper", "slots": 2, "width": 16, "num_heads": 2, "reconstruction_weight": 0.1},
        "head": {"kind": "paper", "num_heads": 2},
        "core": {"num_layers": 3, "feed_forward": EXPERTS, "sharing": {**SHARED, "modules": {"block": "all"}}, **DEPTH},
    },
}


@pytest.fixture(scope="module", params=COMBINATIONS)
def model(request):
    config = from_dict(ModelConfig, {"context_length": CONTEXT, "width": 32, **COMBINATIONS[request.param]})
    model = STLM.from_config(config, build_tokenizer("byte"), seed=3).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.any():  # parameters that begin at zero would hide mistakes
                parameter.normal_(0.0, 0.02, generator=torch.Generator().manual_seed(len(name)))
        patching = getattr(model.embedder, "patching", None)
        if isinstance(patching, EntropyPatching):
            patching.model.embedder.table.weight *= 30  # an untrained model would find all bytes equally likely
            patching.threshold.fill_(patching.entropy(random_ids()).median() + 1e-3)
    return model


@torch.no_grad()
def test_rows_that_join_and_leave_equal_each_alone(model):
    ids = some_ids(CONTEXT, seed=1)
    alone = model(ids).logits
    for row, read, logits in joins_and_leaves(model, ids, seed=1):
        expected = alone[row, read + 1 : read + 1 + len(logits)]
        torch.testing.assert_close(logits[: len(expected)], expected, atol=1e-5, rtol=0)


def random_ids(batch=2):
    return torch.randint(32, 127, (batch, CONTEXT), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def test_causality_is_bit_equal(model):
    ids = random_ids()
    before = model(ids).logits
    for t in range(CONTEXT):
        changed = ids.clone()
        changed[:, t] = 32 + (changed[:, t] - 31) % 95
        after = model(changed).logits
        assert torch.equal(after[:, : t + 1], before[:, : t + 1]), f"id {t} reaches back"
        assert t == CONTEXT - 1 or not torch.equal(after[:, t + 1], before[:, t + 1])


@torch.no_grad()
def test_nothing_passes_between_documents(model):
    ids, documents = random_ids(), torch.zeros(2, CONTEXT, dtype=torch.long)
    documents[:, 10:] = 1
    documents[:, 17:] = 2
    before = model(ids, documents).logits
    for t in range(16):  # the last id of a document is read where the next one begins
        changed = ids.clone()
        changed[:, t] = 32 + (changed[:, t] - 31) % 95
        after = model(changed, documents).logits
        assert torch.equal(after[:, : t + 1], before[:, : t + 1])
        end = 10 if t < 9 else 17
        assert torch.equal(after[:, end:], before[:, end:]) or t == 9


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * (CONTEXT - 1), [2, 3, 1, 7, 4, 6]])
def test_steps_equal_forward(model, pieces):
    ids = random_ids()
    first, state = model.begin(2)
    steps = [first[:, None], *(model.step(piece, state) for piece in ids[:, :-1].split(pieces, dim=1))]
    torch.testing.assert_close(torch.cat(steps, 1), model(ids).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_only_wanted_logits_are_made(model):
    ids, wanted = random_ids(), torch.rand(2, CONTEXT, generator=torch.Generator().manual_seed(7)) < 0.4
    torch.testing.assert_close(model(ids, wanted_BT=wanted).logits, model(ids).logits[wanted], atol=1e-5, rtol=0)
    ids, wanted = ids[:, 1:], wanted[:, 1:]  # with the start symbol, as many positions as there are
    few, all_of_them = (model.step(ids, model.begin(2)[1], *some) for some in ((wanted,), ()))
    torch.testing.assert_close(few, all_of_them[wanted], atol=1e-5, rtol=0)


@torch.no_grad()
def test_likelihood_equals_brute_force_over_single_bytes(model):
    text = "naïve text"
    ids = [model.tokenizer.end_of_text_id, *text.encode()]
    total = 0.0
    for t in range(1, len(ids)):
        total += math.log(model(torch.tensor([[*ids[:t], 0]])).logits[0, t].double().softmax(-1)[ids[t]])
    assert model.log_likelihood(text) == pytest.approx(total, abs=1e-4)


@torch.no_grad()
def test_drafts_are_verified_exactly_and_those_rejected_leave_no_trace(model):
    if len(model.depths) > 1:
        ids = random_ids()[:1]
        expected = model(ids).logits
        _, state = model.begin(1)
        for t in range(5):
            model.draft(ids[:, t : t + 1] if t < 2 else 255 - ids[:, t : t + 1], state)
        torch.testing.assert_close(model.verify(state)[:, :2], expected[:, 1:3], atol=1e-5, rtol=0)
        model.keep(state, 2)
        torch.testing.assert_close(model.step(ids[:, 2:-1], state), expected[:, 3:], atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_of_a_batch_train_alone(model):
    """Rows do not affect each other, with random draws and terms of the loss included."""
    model.train()
    ids, keys = random_ids(4), row_keys(1, 1, range(4))
    documents = torch.arange(CONTEXT).expand(4, -1) // 9
    whole = model(ids, documents, keys)
    parts = [model(ids[n : n + 2], documents[n : n + 2], keys[n : n + 2]) for n in (0, 2)]
    model.eval()
    torch.testing.assert_close(torch.cat([part.logits for part in parts]), whole.logits, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.cat([part.exits.logits for part in parts]), whole.exits.logits, atol=1e-5, rtol=0)
    for name, nats in whole.auxiliary.items():
        torch.testing.assert_close(sum(part.auxiliary[name] for part in parts), nats, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_save_and_load_give_the_same_model(model, tmp_path):
    model.save(tmp_path / "model")
    loaded = STLM.load(tmp_path / "model")
    assert torch.equal(loaded(random_ids()).logits, model(random_ids()).logits)
    assert loaded.num_parameters() == model.num_parameters()
