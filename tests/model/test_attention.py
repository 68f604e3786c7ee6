"""Attention and its cache against plain, slow references."""

import math

import pytest
import torch

from stlm.config import GroupedQueryConfig, RMSNormConfig
from stlm.model.context import Context
from stlm.model.core.attention import GroupedQueryAttention, attend, windowed_attention
from stlm.model.core.positions import Placement, rotary_table
from stlm.model.decoding.cache import ROLL_BACK, KeyValueCache, visible

SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.0])


def attention_of(width=16, layer=0, **settings):
    return GroupedQueryAttention(GroupedQueryConfig(**settings), RMSNormConfig(), width, layer)


def reference_attention(q, k, v, mask, slopes=None, cap=None):
    """Compute attention one query at a time, one head at a time, in float64."""
    B, N, T, K = q.shape
    group, first = N // k.size(1), k.size(2) - T
    out = torch.zeros(B, N, T, K, dtype=torch.float64)
    for b in range(B):
        for n in range(N):
            for t in range(T):
                keys = [s for s in range(k.size(2)) if mask[b, t, s]]
                scores = torch.stack([q[b, n, t].double() @ k[b, n // group, s].double() for s in keys]) / math.sqrt(K)
                if cap is not None:
                    scores = cap * torch.tanh(scores / cap)
                if slopes is not None:
                    scores = scores - slopes[n].double() * torch.tensor([first + t - s for s in keys])
                out[b, n, t] = (scores.softmax(0)[:, None] * v[b, n // group, keys].double()).sum(0)
    return out


@pytest.fixture(params=[0, 256])
def short(request, monkeypatch):
    """Return 0 for torch's fused kernel where it applies, or 256 for plain matrix products."""
    monkeypatch.setattr("stlm.model.core.attention.SHORT", request.param)


@pytest.mark.parametrize("slopes, cap", [(None, None), (SLOPES, None), (None, 0.7), (SLOPES, 0.7)])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_equals_the_definition(short, kv_heads, slopes, cap):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, kv_heads, 7, 8), torch.randn(2, kv_heads, 7, 8)
    mask = torch.ones(2, 7, 7, dtype=torch.bool).tril()
    expected = reference_attention(q, k, v, mask, slopes, cap)
    torch.testing.assert_close(attend(q, k, v, None, slopes, cap).double(), expected, atol=1e-6, rtol=1e-5)
    last = attend(q[:, :, -2:], k, v, mask[0, -2:], slopes, cap)  # fewer queries than keys, as with a cache
    torch.testing.assert_close(last.double(), expected[:, :, -2:], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("slopes, cap", [(None, None), (SLOPES, 0.7)])
@pytest.mark.parametrize("length", [5, 8, 9, 24, 31])
def test_windowed_attention_equals_the_definition(length, slopes, cap):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, length, 8), torch.randn(2, 2, length, 8), torch.randn(2, 2, length, 8)
    mask = visible(length, 0, length, 0, 8, q.device)
    assert mask.sum(1).max() == min(8, length)  # a query sees `window` keys, including itself
    documents = torch.stack((torch.zeros(length), torch.arange(length) // 6))
    for given in (None, documents):
        same = torch.ones(2, 1, 1) if given is None else given[:, :, None] == given[:, None, :]
        expected = reference_attention(q, k, v, mask & same.bool(), slopes, cap)
        torch.testing.assert_close(
            windowed_attention(q, k, v, 8, given, slopes, cap).double(), expected, atol=1e-6, rtol=1e-5
        )


@pytest.mark.parametrize("slopes", [None, SLOPES])
@pytest.mark.parametrize("window", [None, 3, 8])
def test_cached_attention_equals_one_pass(window, slopes):
    torch.manual_seed(0)
    attention = attention_of(num_heads=4, num_kv_heads=2, window=window)
    x = torch.randn(2, 200, 16)
    whole = attention(x, Placement(rotary_table(0, 200, 4, 10_000.0, x.device), slopes), Context())
    cache, pieces = KeyValueCache(window), []
    for piece in x.split([1, 1, 5, 60, 1, 100, 32], dim=1):
        table = rotary_table(cache.length, piece.size(1), 4, 10_000.0, x.device)
        pieces.append(attention(piece, Placement(table, slopes), Context(), cache))
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=0)


def test_a_windowed_cache_stays_small():
    cache = KeyValueCache(window=4)
    for _ in range(1000):
        keys, _, first = cache.append(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    assert keys.size(2) == 4 and first == 996 and cache._keys.size(2) <= 2 * (4 + ROLL_BACK)


def test_grouped_attention_equals_multi_head_attention_with_repeated_heads():
    torch.manual_seed(0)
    grouped = attention_of(num_heads=4, num_kv_heads=2)
    full = attention_of(num_heads=4)
    full.load_state_dict(
        grouped.state_dict()
        | {
            f"{name}.weight": getattr(grouped, name).weight.unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1)
            for name in ("key", "value")
        }
    )
    x, placement = torch.randn(2, 9, 16), Placement(rotary_table(0, 9, 4, 10_000.0, torch.device("cpu")))
    torch.testing.assert_close(grouped(x, placement, Context()), full(x, placement, Context()), atol=1e-6, rtol=1e-5)


def test_every_nth_layer_has_global_attention():
    config = GroupedQueryConfig(window=8, full_every=3)
    assert [config.window_of(layer) for layer in range(7)] == [8, 8, None, 8, 8, None, 8]


def test_later_layers_mix_their_values_with_those_of_the_first():
    torch.manual_seed(0)
    first, later = (attention_of(num_heads=1, bias="all", value_residual=True, layer=layer) for layer in (0, 1))
    x, y, context = torch.randn(2, 1, 16), torch.randn(2, 1, 16), Context()
    later.value_mix.weight.data = torch.tensor([0.3, 0.9])
    first(x, Placement(), context)
    expected = later.output(0.3 * later.value(y) + 0.9 * first.value(x))  # a single position sees only itself
    torch.testing.assert_close(later(y, Placement(), context), expected)
