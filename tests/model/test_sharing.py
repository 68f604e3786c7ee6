"""Layers that share weights or run again: compared with models written out by hand, and invariants of every model."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from safetensors.torch import load_file
from test_pairs import CONTEXT, random_ids

from data_pipeline.tokenizers import build_tokenizer
from stlm.config import (
    AttentionConfig,
    ByteEmbedderConfig,
    FeedForwardConfig,
    GroupedQueryConfig,
    LinearHeadConfig,
    LoopsConfig,
    ModelConfig,
    MoEConfig,
    ResidualConfig,
    SharingConfig,
    TransformerCoreConfig,
)
from stlm.config.model.core.sharing import is_norm
from stlm.config.yaml.fields import FreeSection
from stlm.errors import CheckpointError, ConfigError
from stlm.model import Context
from stlm.model.core.blocks import Block
from stlm.model.core.normalization import Norm
from stlm.model.core.sharing import CorrectedLinear, share
from stlm.stlm import STLM

DEPTH = 4


def shared(**modules):
    """Return a sharing plan; a dot in a name is written as two underscores."""
    return SharingConfig(FreeSection.of({name.replace("__", "."): layers for name, layers in modules.items()}))


def corrected(sharing, rank=2, alpha=None):
    return dataclasses.replace(sharing, lora_rank=rank, lora_alpha=alpha)


FFN = shared(feed_forward="all")
PLANS = {
    "feed-forward of all layers": {"sharing": FFN},
    "feed-forward of the interior": {"sharing": shared(feed_forward="interior:1")},
    "attention in pairs": {"sharing": shared(attention=[[0, 1], [2, 3]])},
    "projections": {"sharing": shared(attention__query="all", attention__output=[[0, 3]])},
    "whole layers, norms too": {"sharing": shared(block="all", attention_norm="all", feed_forward_norm="interior:1")},
    "corrected": {"sharing": corrected(shared(block="interior:1"), rank=3, alpha=6.0)},
    "corrected experts": {"sharing": corrected(FFN, rank=8), "feed_forward": MoEConfig(num_experts=3, hidden_width=16)},
    "the whole stack twice": {"loops": LoopsConfig(count=2)},
    "a loop inside, with embeddings": {"loops": LoopsConfig(count=3, first=1, last=2, embeddings=True)},
    "a loop of shared layers": {"sharing": corrected(FFN), "loops": LoopsConfig(count=2, last=1, embeddings=True)},
}


@pytest.fixture(params=PLANS)
def model(request):
    return make(**PLANS[request.param])


def make(seed=3, tied=True, **core):
    config = ModelConfig(
        context_length=CONTEXT, width=32, embedder=ByteEmbedderConfig(), head=LinearHeadConfig(tied=tied),
        core=TransformerCoreConfig(num_layers=DEPTH, **core),
    )  # fmt: skip
    return STLM.from_config(config, build_tokenizer("byte"), seed=seed).eval()


def disturb(model):
    """Move every parameter away from zero and one, so that each one has an influence."""
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter += 0.1 * noise
    return model


def written_out(model):
    """Return the same function with a separate block for every layer run: no weight is used twice."""
    plain = copy.deepcopy(model)
    stack = plain.core.stack
    blocks = [copy.deepcopy(stack.blocks[layer]) for layer, _ in stack.order]
    for place, (_, number) in enumerate(stack.order):
        if number is not None and stack.loop_embeddings is not None:
            blocks[place].register_parameter(
                "added", torch.nn.Parameter(stack.loop_embeddings.weight[number].detach().clone())
            )
            blocks[place].register_forward_pre_hook(lambda block, inputs: (inputs[0] + block.added, *inputs[1:]))
    stack.blocks = torch.nn.ModuleList(blocks)
    stack.order = LoopsConfig().order(len(blocks))
    stack.loop_embeddings = None
    return plain


def test_a_model_with_shared_weights_is_one_with_equal_weights(model):
    """Logits equal those with every use written out; the gradient of a weight is the sum over its uses."""
    plain = written_out(disturb(model))
    layers = [layer for layer, _ in model.core.stack.order]
    for each in (model, plain):
        each(random_ids()).logits.logsumexp(-1).sum().backward()
    torch.testing.assert_close(plain(random_ids()).logits, model(random_ids()).logits, atol=1e-5, rtol=0)

    assert len(set(plain.parameters())) > len(set(model.parameters()))
    uses = {parameter: [] for parameter in model.parameters()}
    for name, parameter in model.core.stack.blocks.named_parameters(remove_duplicate=False):
        layer, _, rest = name.partition(".")
        for place in (place for place, each in enumerate(layers) if each == int(layer)):
            uses[parameter].append(plain.core.stack.blocks[place].get_parameter(rest).grad)
    if model.core.stack.loop_embeddings is not None:
        added = [block.added.grad for block in plain.core.stack.blocks if hasattr(block, "added")]
        torch.testing.assert_close(
            model.core.stack.loop_embeddings.weight.grad, torch.stack(added), atol=1e-4, rtol=1e-4
        )
    assert max(map(len, uses.values())) > 1
    for parameter, gradients in uses.items():
        if gradients:
            torch.testing.assert_close(parameter.grad, sum(gradients), atol=1e-4, rtol=1e-4)


def test_exactly_the_planned_modules_are_shared():
    """Exactly the planned modules are shared; norms only where they are named."""

    def layers_with_own(model, path):
        parameters = [id(block.get_parameter(path)) for block in model.core.stack.blocks]
        return [parameters.index(parameter) for parameter in parameters]

    model = make(sharing=shared(block="interior:1", attention_norm=[[0, 3]]))
    for path in ("attention.query", "attention.value", "attention.output", "feed_forward.down"):
        assert layers_with_own(model, path + ".weight") == [0, 1, 1, 3]
    assert layers_with_own(model, "attention_norm.weight") == [0, 1, 2, 0]
    assert layers_with_own(model, "feed_forward_norm.weight") == [0, 1, 2, 3]
    model = make(sharing=shared(attention__output=[[0, 2], [1, 3]]))
    assert layers_with_own(model, "attention.output.weight") == [0, 1, 0, 1]
    assert layers_with_own(model, "attention.query.weight") == [0, 1, 2, 3]


def test_shared_tensors_are_counted_and_saved_once(model, tmp_path):
    model.save(tmp_path / "model")
    loaded = STLM.load(tmp_path / "model")
    saved = load_file(tmp_path / "model/model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == model.num_parameters() == loaded.num_parameters()
    assert model.num_parameters() == sum(p.numel() for p in {p.data_ptr(): p for p in model.parameters()}.values())
    for each in (model, loaded):
        names = {}
        for name, parameter in each.named_parameters(remove_duplicate=False):
            names.setdefault(parameter.data_ptr(), []).append(name)
        assert sorted(saved) == sorted(group[0] for group in names.values())
    assert torch.equal(loaded(random_ids()).logits, model(random_ids()).logits)


@torch.no_grad()
def test_corrections_begin_at_zero_and_belong_to_one_layer():
    for sharing in (shared(block="interior:1"), FFN):
        plain, model = make(sharing=sharing), make(sharing=corrected(sharing))
        ids = random_ids()
        assert torch.equal(model(ids).logits, plain(ids).logits)  # exactly equal
        linears = [name for name, module in model.named_modules() if isinstance(module, CorrectedLinear)]
        assert len(linears) == (2 * 7 if sharing is not FFN else 4 * 3)  # every linear of every layer that shares
    block = model.core.stack.blocks[2]
    assert block.feed_forward.gate.lora_a.weight.std().item() == pytest.approx(32**-0.5, rel=0.2)
    block.feed_forward.gate.lora_b.weight.fill_(1.0)
    assert not torch.equal(model(ids).logits, plain(ids).logits)
    x = torch.randn(1, 3, 32)
    for number, other in enumerate(model.core.stack.blocks):
        assert torch.equal(other.feed_forward.gate(x), plain.core.stack.blocks[0].feed_forward.gate(x)) == (number != 2)


def test_alpha_over_rank_scales_the_correction():
    linear = CorrectedLinear(torch.nn.Linear(3, 2), rank=2, alpha=6.0)
    assert sorted(name for name, _ in linear.named_parameters()) == ["bias", "lora_a.weight", "lora_b.weight", "weight"]
    x = torch.randn(5, 3)
    merged = linear.weight + 3.0 * linear.lora_b.weight @ linear.lora_a.weight
    torch.testing.assert_close(linear(x), x @ merged.T + linear.bias)
    assert make(sharing=corrected(FFN)).core.stack.blocks[0].feed_forward.up.scale == 1.0  # null: scale 1


@torch.no_grad()
def test_loops_begin_without_their_embeddings():
    loops = LoopsConfig(count=2, first=1)
    plain, model = make(loops=loops), make(loops=dataclasses.replace(loops, embeddings=True))
    assert torch.equal(model(random_ids()).logits, plain(random_ids()).logits)
    assert not torch.equal(make().forward(random_ids()).logits, plain(random_ids()).logits)
    assert plain.num_parameters() == make().num_parameters() == model.num_parameters() - 2 * 32


def test_every_layer_that_is_run_has_a_cache_and_counts_as_depth():
    model = make(loops=LoopsConfig(count=3, first=1, last=2))
    assert len(model.core.new_cache()) == 8
    outer, inner = (model.core.stack.blocks[layer].feed_forward.down for layer in (0, 1))
    assert outer.weight.std().item() == pytest.approx((outer.in_features * 2 * 8) ** -0.5, rel=0.05)
    assert inner.weight.std().item() == pytest.approx((inner.in_features * 2 * 8 * 3) ** -0.5, rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize("core", [{"sharing": shared(block="all")}, {"loops": LoopsConfig(count=4)}], ids=str)
def test_the_size_of_residual_updates_does_not_depend_on_sharing(core):
    """Updates are as large as without sharing, for any number of layers that use a matrix."""

    def added(seed, **core):
        model = make(seed, **core)
        x, _ = model.embedder(random_ids(8), Context())
        return (model.core.stack(x, Context()) - x).square().mean().sqrt().item()

    assert sum(added(seed, **core) for seed in range(5)) == pytest.approx(sum(map(added, range(5))), rel=0.3)


def test_module_names_of_configs_match_the_modules(block_config):
    """Checked for every registered attention and feed-forward: the names that a share map may use without torch."""
    block = Block(block_config, 32, layer=0)
    own = {name for name, module in block.named_modules() if list(module.parameters(recurse=False))}
    assert own == set(block_config.modules())
    assert {name for name in own if isinstance(block.get_submodule(name), Norm)} == set(filter(is_norm, own))


@pytest.fixture(
    params=[
        *(TransformerCoreConfig(attention=kind()) for kind in AttentionConfig.kinds.values()),
        *(TransformerCoreConfig(feed_forward=kind()) for kind in FeedForwardConfig.kinds.values()),
        TransformerCoreConfig(
            attention=GroupedQueryConfig(qk_norm=True, bias="all"), feed_forward=MoEConfig(shared_hidden_width=8)
        ),
    ],
    ids=lambda config: f"{config.attention.kind}, {config.feed_forward.kind}",
)
def block_config(request):
    return request.param


def test_scales_and_mixes_of_values_stay_a_layers_own():
    model = make(
        attention=GroupedQueryConfig(value_residual=True),
        residual=ResidualConfig(learned_scale=True),
        sharing=shared(block="all"),
    )
    first, second = model.core.stack.blocks[:2]
    assert first.attention.value.weight is second.attention.value.weight
    assert first.attention_scale.weight is not second.attention_scale.weight
    assert first.attention.value_mix is None and second.attention.value_mix is not None


def test_modules_of_different_shapes_do_not_share():
    blocks = copy.deepcopy(make().core.stack.blocks)
    wider = dataclasses.replace(make().config, width=64)
    blocks[2] = STLM.from_config(wider, build_tokenizer("byte")).core.stack.blocks[2]
    share(blocks, shared(feed_forward=[[0, 1]]))
    with pytest.raises(ConfigError, match=r"model\.core\.sharing\.modules\.feed_forward: got layers 1 and 2, whose "):
        share(blocks, shared(feed_forward=[[1, 2]]))


@pytest.mark.parametrize(
    ("saved", "model", "line"),
    [
        ({}, {"sharing": FFN}, r"sharing\.modules: shares core.stack.blocks.1.feed_forward.gate.weight, which the "
         r"file stores separately; model\.core\.sharing=\{\} would work"),
        ({"sharing": FFN}, {}, r"sharing\.modules: does not share core.stack.blocks.1.feed_forward.gate"),
        ({"sharing": corrected(FFN)}, {"sharing": FFN}, r"sharing\.lora_rank: the file has corrections"),
        ({"sharing": FFN}, {"sharing": corrected(FFN)}, r"sharing\.lora_rank: the file has no corrections; null"),
        ({"tied": False}, {}, r"head\.tied: got true, .* false would work"),
        ({}, {"tied": False}, r"head\.tied: got false, .* true would work"),
    ],
)  # fmt: skip
def test_tensors_that_were_tied_otherwise_name_the_setting(saved, model, line):
    with pytest.raises(CheckpointError, match=r"does not fit this model.*\n  model\.(core\.)?" + line):
        make(**model).load_tensors(dict(make(**saved).named_parameters()), "a file")
    make(**saved).load_tensors(dict(make(**saved).named_parameters()), "a file")


# Invariants of every model.


@torch.no_grad()
def test_causality_is_bit_equal(model):
    ids = random_ids()
    before = disturb(model)(ids).logits
    for t in range(CONTEXT):
        changed = ids.clone()
        changed[:, t] = (changed[:, t] + 1) % 256
        after = model(changed).logits
        assert torch.equal(after[:, : t + 1], before[:, : t + 1])
        assert not (after[:, t + 1 :] == before[:, t + 1 :]).all(-1).any()


@torch.no_grad()
@pytest.mark.parametrize("pieces", [[1] * CONTEXT, [2, 3, 1, 7, 4, 1, 6]])
def test_steps_equal_forward(model, pieces):
    ids = random_ids()
    first, state = disturb(model).begin(2)
    steps = [first[:, None], *(model.step(piece, state) for piece in ids.split(pieces, dim=1))]
    torch.testing.assert_close(torch.cat(steps, 1)[:, :CONTEXT], model(ids).logits, atol=1e-5, rtol=0)


def test_every_parameter_gets_a_gradient(model):
    """Corrections begin where only their second factor has a gradient."""
    model(random_ids()).logits.logsumexp(-1).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == [name for name, _ in model.named_parameters() if name.endswith(".lora_a.weight")]
