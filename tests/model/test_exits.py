"""Early exits, drafts and roll-back, for every pair of embedder and head; layers that rows skip."""

import re
from dataclasses import replace

import pytest
import torch
from test_pairs import CONTEXT, PAIRS, random_ids

from data_pipeline.tokenizers import build_tokenizer
from stlm.config import (
    ExitsConfig,
    GroupedQueryConfig,
    LoopsConfig,
    ModelConfig,
    TransformerCoreConfig,
)
from stlm.errors import ConfigError
from stlm.generation import DecodingStats
from stlm.model import Context, row_keys
from stlm.model.row_random import uniform
from stlm.stlm import STLM

DEPTH = {"num_layers": 5, "exits": ExitsConfig(every=2), "layer_dropout": 0.6}
CORE = TransformerCoreConfig(attention=GroupedQueryConfig(num_heads=2), **DEPTH)
VARIANTS = {name: (*pair[:2], replace((*pair, CORE)[2], **DEPTH)) for name, pair in PAIRS.items()}
BYTES = PAIRS["byte+linear"][:2]
VARIANTS["loops"] = (*BYTES, replace(CORE, num_layers=4, loops=LoopsConfig(count=2, first=1, last=1, embeddings=True)))
REMEMBERS_NOTHING = [name for name, (_, head, _) in VARIANTS.items() if head.kind == "linear"]


@pytest.fixture(params=VARIANTS)
def model(request):
    return make(*VARIANTS[request.param])


@pytest.fixture
def bytes_model():
    return make(*BYTES)


def make(embedder, head, core=CORE, **settings):
    """Make a model whose exits often disagree."""
    config = ModelConfig(context_length=CONTEXT, width=32, embedder=embedder, head=head, core=replace(core, **settings))
    model = STLM.from_config(config, build_tokenizer("byte"), seed=3).eval()
    with torch.no_grad():
        for block in model.core.stack.blocks:
            block.feed_forward.down.weight *= 4.0
    return model


# ---------------------------------------------------------------------- predictions of an exit


@torch.no_grad()
def test_an_exit_predicts_like_a_model_of_as_many_layers(model):
    if model.config.core.loops.count > 1:
        pytest.skip("a shorter model would loop as well")
    ids = random_ids()
    said = dict(zip(model.depths, model.exit_logits(ids), strict=True))
    assert list(said) == [2, 4, 5]
    for depth, logits in said.items():
        core = replace(model.config.core, num_layers=depth, exits=ExitsConfig())
        shorter = STLM(replace(model.config, core=core), model.tokenizer)
        shorter.load_tensors({name: dict(model.named_parameters())[name] for name, _ in shorter.named_parameters()}, "")
        torch.testing.assert_close(logits, shorter(ids).logits, atol=1e-6, rtol=0)


@torch.no_grad()
def test_exits_are_causal_to_the_bit(bytes_model):
    ids = random_ids()
    changed = ids.clone()
    changed[:, 7] = (changed[:, 7] + 1) % 256
    for before, after in zip(bytes_model.exit_logits(ids), bytes_model.exit_logits(changed), strict=True):
        assert torch.equal(after[:, :8], before[:, :8])
        assert not torch.equal(after[:, 8], before[:, 8])


@torch.no_grad()
def test_in_training_each_row_tries_one_exit(model):
    """Each row tries the exit that its key draws, whatever the other rows; without keys, none."""
    model.core.stack.dropout.rates = [0.0] * 5
    ids, keys = random_ids(6), row_keys(1, 2, range(6))
    output = model(ids, row_keys_B=keys)
    assert set(output.exits.chosen.tolist()) == {0, 1}
    said = torch.stack(model.exit_logits(ids))
    torch.testing.assert_close(output.exits.logits, said[output.exits.chosen, torch.arange(6)], atol=1e-6, rtol=0)
    torch.testing.assert_close(output.logits, said[-1], atol=1e-6, rtol=0)
    assert model(ids).exits is None


# ---------------------------------------------------------------------- ids that wait for deeper layers


@torch.no_grad()
@pytest.mark.parametrize("rounds", [[(3, 1), (1, 1), (5, 4), (4, 2)], [(8, 8), (8, 1), (8, 5)]])
def test_drafts_are_verified_and_cut_back(model, rounds):
    """Over rounds of (drafted, kept), all predictions equal those of the whole sequence read at once."""
    ids = random_ids(1)
    first, _, whole = model.exit_logits(ids)
    _, state = model.begin(1)
    model.step(ids[:, :2], state)
    read = 2
    for drafted, kept in rounds:
        noise = torch.randint(0, 256, (1, drafted), generator=torch.Generator().manual_seed(read))
        tried = torch.cat((ids[:, read : read + kept], noise[:, kept:]), dim=1)  # ids that are not kept differ
        said = [model.draft(tried[:, [n]], state) for n in range(drafted)]
        verified = model.verify(state)
        model.keep(state, kept)
        here = slice(read + 1, read + 1 + kept)
        torch.testing.assert_close(verified[:, :kept], whole[:, here], atol=1e-5, rtol=0)
        if model.head.new_cache() is None:  # a draft with memory follows the first exits' predictions
            torch.testing.assert_close(torch.cat(said, 1)[:, :kept], first[:, here], atol=1e-5, rtol=0)
        read += kept
        assert state.lengths == [read] and state.waiting is None
    rest = model.step(ids[:, read:-1], state)
    torch.testing.assert_close(rest, whole[:, read + 1 :], atol=1e-5, rtol=0)


@torch.no_grad()
def test_self_speculation_gives_the_same_text(model):
    """Texts exceed the context, with any number of drafts, and some drafts are accepted and some rejected."""
    options = {"max_new_ids": 2 * CONTEXT, "temperature": 0}
    expected = model.generate("ab", **options)
    for num_drafts in (3, 64):
        stats = DecodingStats()
        assert model.generate("ab", speculative="self", num_drafts=num_drafts, stats=stats, **options) == expected
        assert CONTEXT < stats.ids < 2 * CONTEXT
        if model.config.embedder.kind == "token":
            assert 0 < stats.accepted < stats.drafted


@torch.no_grad()
@pytest.mark.parametrize("name", REMEMBERS_NOTHING)
def test_ids_that_stopped_early_are_remembered_exactly(name):
    """Each id goes to its own exit; each prediction equals that exit's prediction on the whole sequence."""
    model = make(*VARIANTS[name])
    ids = random_ids(2)
    said = model.exit_logits(ids)
    _, state = model.begin(2)
    for t, stage in enumerate([0, 0, 1, 0, 2, 2, 0, 1, 1, 0, 0, 0, 2, 0, 1, 2]):
        logits = model.draft(ids[:, [t]], state)
        for deeper in range(1, stage + 1):
            logits = model.deepen(state, deeper)
        torch.testing.assert_close(logits, said[stage][:, [t + 1]], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("threshold", "deep"), [(1e-6, 0), (1.0, 20)])
def test_layers_after_the_exit_are_not_run(bytes_model, threshold, deep):
    """Only the prompt passes the later layers if the exit always suffices; if it never does, all ids do."""
    calls = [0] * 5
    for layer, block in enumerate(bytes_model.core.stack.blocks):
        block.register_forward_hook(lambda *_, layer=layer: calls.__setitem__(layer, calls[layer] + 1))
    bytes_model.config = replace(bytes_model.config, context_length=1000)
    stats = DecodingStats()
    options = {"max_new_ids": 21, "temperature": 0}
    text = bytes_model.generate("ab", exit_threshold=threshold, stats=stats, **options)
    assert stats.ids == 20 and calls == [1 + 20, 1 + 20, *([1 + deep] * 3)]  # the first id comes with the prompt
    assert stats.mean_depth == (2 if deep == 0 else 5)
    assert (text == bytes_model.generate("ab", **options)) == (deep > 0)


@pytest.mark.parametrize(
    ("options", "settings", "message"),
    [
        ({"speculative": "self"}, {"exits": ExitsConfig()}, r"speculative='self': .*model\.core\.exits\.every=1 would"),
        (
            {"exit_threshold": 0.5},
            {"exits": ExitsConfig()},
            r"exit_threshold=0\.5: .*model\.core\.exits\.every=1",
        ),
        ({"exit_threshold": 0.0}, {}, r"exit_threshold: got 0, expected above 0 and at most 1"),
        ({"exit_threshold": 1.5}, {}, r"exit_threshold: got 1\.5"),
        ({"speculative": "other"}, {}, r"speculative: got 'other', expected 'auto', 'self'"),
        ({"speculative": "self", "num_drafts": 65}, {}, r"num_drafts: got 65, expected 1 to 64"),
        ({"speculative": "self", "exit_threshold": 0.5}, {}, r"expected at most one of them"),
    ],
)
def test_unsupported_decoding_is_refused_by_name(options, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(*BYTES, **settings).generate("ab", **options)


def test_patches_have_no_threshold():
    with pytest.raises(ConfigError, match=r"model\.head\.kind = byte_patch; expected model\.head\.kind=linear"):
        make(*PAIRS["byte_patch+byte_patch"][:2]).generate("ab", exit_threshold=0.5)


# ---------------------------------------------------------------------- rows of a decoding state


@torch.no_grad()
def test_rows_of_a_state_are_picked(model):
    """Beams: rows are reordered and duplicated, and continue independently."""
    ids = random_ids(2)
    _, state = model.begin(2)
    model.step(ids[:, :9], state)
    picked = state.select(torch.tensor([1, 0, 1]))
    follow = torch.randint(0, 256, (3, 8), generator=torch.Generator().manual_seed(8))
    whole = torch.cat((ids[[1, 0, 1], :9], follow, follow[:, :1]), dim=1)
    said = torch.cat([model.step(follow[:, [n]], picked) for n in range(8)], dim=1)
    torch.testing.assert_close(said, model(whole).logits[:, 10:], atol=1e-5, rtol=0)
    rest = model.step(ids[:, 9:-1], state)  # the old state is unchanged
    torch.testing.assert_close(rest, model(ids).logits[:, 10:], atol=1e-5, rtol=0)
    alone = picked.select(torch.tensor([2]))
    said = model.step(ids[:1, :4], alone)
    again = torch.cat((whole[2:, :17], ids[:1, :5]), dim=1)
    torch.testing.assert_close(said, model(again).logits[:, 18:], atol=1e-5, rtol=0)


# ---------------------------------------------------------------------- layers that rows skip


@torch.no_grad()
def test_rows_skip_the_layers_that_their_keys_draw(bytes_model):
    """The output of a row depends only on its own remaining layers, not on other rows."""
    ids, keys = random_ids(8), row_keys(1, 5, range(8))
    together = bytes_model(ids, row_keys_B=keys).logits
    rates = [0.6 * (2 ** (layer / 4) - 1) for layer in range(5)]
    skipped = torch.stack([uniform(keys, 1 + layer) < rate for layer, rate in enumerate(rates)])
    assert skipped.any(1).tolist() == [False, *skipped.any(1).tolist()[1:]] and skipped.any() and not skipped[4].all()
    for row in range(8):
        alone = bytes_model(ids[[row]], row_keys_B=keys[[row]]).logits
        torch.testing.assert_close(together[[row]], alone, atol=1e-6, rtol=0)
        x, _ = bytes_model.embedder(bytes_model._shifted(ids[[row]]), Context())
        for layer in range(5):
            if not skipped[layer, row]:
                x = bytes_model.core.stack(x, Context(), None, slice(layer, layer + 1))
        torch.testing.assert_close(alone, bytes_model.head(bytes_model.core.finish(x), None, None, Context()))
    assert not torch.allclose(together, bytes_model(ids).logits)


def test_the_last_layer_is_skipped_at_the_rate_of_the_config():
    keys = row_keys(3, 0, range(4000))
    draws = torch.stack([uniform(keys, number) for number in range(3)])
    assert draws.min() >= 0 and draws.max() < 1
    assert (draws < 0.6).double().mean(1).tolist() == pytest.approx([0.6] * 3, abs=0.025)
    assert torch.corrcoef(draws).triu(1).abs().max() < 0.05


def test_draws_are_those_of_splitmix64():
    """The first output for key 0 is 0xe220a8397b1dcdaf, as in published tables."""
    assert uniform(torch.tensor([0]), 0).item() == (0xE220A8397B1DCDAF >> 11) / 2**53
    assert uniform(torch.tensor([0]), 1).item() == (0x6E789E6AA1B965F4 >> 11) / 2**53


def test_keys_depend_on_seed_step_and_row_alone():
    whole = row_keys(1, 2, range(8))
    assert torch.equal(whole, torch.cat((row_keys(1, 2, range(3)), row_keys(1, 2, range(3, 8)))))
    others = torch.cat((whole, row_keys(2, 2, range(8)), row_keys(1, 3, range(8))))
    assert len(set(others.tolist())) == 24


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"exits": ExitsConfig(every=5)}, r"got 5, .* 5, the number of layers run; model\.core\.exits\.every=2"),
        (
            {"num_layers": 1, "layer_dropout": 0.0, "exits": ExitsConfig(every=1)},
            r"got 1, .*; model\.core\.num_layers=2 would work",
        ),
        ({"exits": ExitsConfig(loss_weight=0.5)}, r"no effect without exits; model\.core\.exits\.every=2 would work"),
        ({"num_layers": 1, "exits": ExitsConfig()}, r"got 0\.6, which has no effect on a single layer.*; 0 would work"),
    ],
)
def test_settings_that_do_not_fit_the_depth_are_named(settings, message):
    config = ModelConfig(core=replace(CORE, **settings))
    (conflict,) = config.check()
    assert conflict.key.startswith(("core.exits.", "core.layer_dropout"))
    assert re.search(message, conflict.message)
