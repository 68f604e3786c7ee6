"""Norms and feed-forwards by hand; experts compared with a loop over positions."""

import math

import pytest
import torch

from stlm.config import GELUConfig, LayerNormConfig, MoEConfig, ReLUSquaredConfig, RMSNormConfig
from stlm.config.model.core.feed_forward import gated_width
from stlm.model.context import Context
from stlm.model.core.feed_forward import GELU, ReLUSquared
from stlm.model.core.moe import MoE, group_size
from stlm.model.core.normalization import LayerNorm, RMSNorm


def test_rms_norm_by_hand():
    norm = RMSNorm(RMSNormConfig(eps=0.0), 2)
    norm.weight.data = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([3.0, 8.0]) / math.sqrt(12.5))


def test_layer_norm_by_hand():
    norm = LayerNorm(LayerNormConfig(eps=0.75), 2)
    norm.weight.data, norm.bias.data = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 5.0])
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([-0.5, 6.0]))  # variance 1/4, + 3/4
    assert LayerNorm(LayerNormConfig(bias=False), 2).bias is None


def test_plain_feed_forwards_by_hand():
    for module, activation in (
        (ReLUSquared(ReLUSquaredConfig(hidden_width=3), 2), lambda x: x.clamp(min=0) ** 2),
        (GELU(GELUConfig(hidden_width=3), 2), lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2),
        (
            GELU(GELUConfig(hidden_width=3, approximate=True), 2),
            lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
        ),
    ):
        x = 3 * torch.randn(5, 2)
        expected = activation(x @ module.up.weight.T) @ module.down.weight.T
        torch.testing.assert_close(module(x), expected, atol=1e-6, rtol=1e-6)


def test_gated_width_is_eight_thirds_rounded_up_to_a_multiple_of_32():
    assert gated_width(512) == 1376 and gated_width(96) == 256 and gated_width(12) == 32
    assert MoEConfig(experts_per_token=2).hidden_width_of(384) == 512  # two of them cost as much as one of 1024


def experts(**settings):
    moe = MoE(MoEConfig(hidden_width=16, **settings), 8)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    return moe


@pytest.mark.parametrize("chosen, shared", [(1, None), (2, None), (3, 5)])
def test_experts_equal_a_loop_over_positions(chosen, shared):
    moe = experts(num_experts=3, experts_per_token=chosen, shared_hidden_width=shared)
    x = torch.randn(2, 70, 8, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros_like(x)
    for b in range(2):
        for t in range(70):
            probabilities = (moe.router.weight @ x[b, t]).softmax(0)
            best = probabilities.argsort(descending=True)[:chosen]
            weights = probabilities[best] / (probabilities[best].sum() if chosen > 1 else 1)
            for weight, e in zip(weights, best, strict=True):
                hidden = torch.nn.functional.silu(moe.gate.weight[e] @ x[b, t]) * (moe.up.weight[e] @ x[b, t])
                expected[b, t] += weight * (moe.down.weight[e] @ hidden)
            if shared:
                expected[b, t] += moe.shared(x[b, t])
    torch.testing.assert_close(moe(x), expected, atol=1e-4, rtol=1e-4)


def test_an_experts_output_does_not_depend_on_its_load():
    """Bit-equal over many groups, whether the later positions and other rows choose one expert or many."""
    moe = experts(num_experts=4, experts_per_token=2)
    x = torch.randn(3, 200, 8, generator=torch.Generator().manual_seed(0))
    whole = moe(x)
    assert group_size(3 * 200 * 2, 4) > 16  # and the groups are not the smallest ones
    for t in (1, 64, 150, 199):
        crowded = x.clone()
        crowded[:, t:] = x[0, 0]
        assert torch.equal(moe(crowded)[:, :t], whole[:, :t])
    others = x.clone()
    others[1:] = x[0, 0]
    assert torch.equal(moe(others)[0], whole[0])


def test_the_balance_term_of_equally_used_experts_is_one_for_each_row():
    moe = experts(num_experts=2, experts_per_token=1, balance_weight=0.5).train()
    moe.router.weight.data = torch.tensor([[1.0], [-1.0]]) * torch.eye(1, 8)  # chosen by the sign of the first number
    even, skewed = torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)
    even[0, :, 0], skewed[0, :, 0] = torch.tensor([9.0, -9.0, 9.0, -9.0]), 9.0

    def balance(x, used=None):
        context = Context(used=used)
        context.length = 40
        moe(x, context)
        return context.auxiliary["balance"]

    torch.testing.assert_close(balance(even), torch.tensor(0.5 * 40 * 1.0))
    torch.testing.assert_close(balance(skewed), torch.tensor(0.5 * 40 * 2.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(balance(torch.cat((even, skewed))), balance(even) + balance(skewed))
    half = torch.tensor([[True, True, False, False]])  # positions that stand for no text do not count
    assert balance(torch.cat((even[:, :2], skewed[:, :2]), 1), half) == balance(even)
    assert balance(torch.cat((skewed[:, :2], even[:, :2]), 1), half) == balance(skewed)
    moe.eval()
    context = Context()
    moe(even, context)
    assert context.auxiliary == {}  # a term of the loss belongs to training
