"""The small modules against plain, slow references."""

import math

import pytest
import torch

from stlm.config import GroupedQueryConfig, RMSNormConfig
from stlm.model.attention import GroupedQueryAttention, attend, windowed_attention
from stlm.model.cache import ROLL_BACK, KeyValueCache, visible
from stlm.model.context import Context
from stlm.model.feed_forward import default_gated_width
from stlm.model.normalization import RMSNorm
from stlm.model.positions import rotary_table, rotate


def reference_attention(q, k, v, mask):
    """Attention one query at a time, one head at a time, in float64."""
    B, N, T, K = q.shape
    group = N // k.size(1)
    out = torch.zeros(B, N, T, K, dtype=torch.float64)
    for b in range(B):
        for n in range(N):
            for t in range(T):
                keys = [s for s in range(k.size(2)) if mask[t, s]]
                scores = torch.stack([q[b, n, t].double() @ k[b, n // group, s].double() for s in keys]) / math.sqrt(K)
                out[b, n, t] = (scores.softmax(0)[:, None] * v[b, n // group, keys].double()).sum(0)
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("short", [0, 256])
def test_attention_equals_the_definition_for_grouped_heads(monkeypatch, kv_heads, short):
    monkeypatch.setattr("stlm.model.attention.SHORT", short)  # 0: torch's fused kernel; 256: the plain products
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 7, 8), torch.randn(2, kv_heads, 7, 8), torch.randn(2, kv_heads, 7, 8)
    mask = torch.ones(7, 7, dtype=torch.bool).tril()
    torch.testing.assert_close(attend(q, k, v).double(), reference_attention(q, k, v, mask), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("length", [5, 8, 9, 24, 31])
def test_windowed_attention_equals_a_dense_mask(length):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, length, 8) for _ in range(3))
    mask = visible(length, 0, length, 0, 8, q.device)
    assert mask.sum(1).max() == min(8, length)  # a query sees `window` keys, itself among them
    torch.testing.assert_close(windowed_attention(q, k, v, 8), attend(q, k, v, mask), atol=1e-6, rtol=1e-5)


def test_rotary_scores_depend_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(query_position, key_position):
        tables = [rotary_table(p, 1, 16, 10_000.0, q.device) for p in (query_position, key_position)]
        return (rotate(q, tables[0]) * rotate(k, tables[1])).sum()

    torch.testing.assert_close(score(7, 3), score(107, 103), atol=1e-5, rtol=1e-4)
    assert abs(score(7, 3) - score(8, 3)) > 1e-3
    assert torch.equal(rotate(q, rotary_table(0, 1, 16, 10_000.0, q.device)), q)


def test_rms_norm_by_hand():
    norm = RMSNorm(RMSNormConfig(eps=0.0), 2)
    norm.weight.data = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([3.0, 8.0]) / math.sqrt(12.5))


def test_ffn_width_is_eight_thirds_rounded_up_to_a_multiple_of_32():
    assert default_gated_width(512) == 1376 and default_gated_width(96) == 256 and default_gated_width(12) == 32


@pytest.mark.parametrize("window", [None, 3, 8])
def test_cached_attention_equals_one_pass(window):
    torch.manual_seed(0)
    attention = GroupedQueryAttention(GroupedQueryConfig(num_heads=4, num_kv_heads=2, window=window), 16)
    x = torch.randn(2, 200, 16)
    whole = attention(x, rotary_table(0, 200, 4, 10_000.0, x.device), Context())
    cache, pieces = KeyValueCache(window), []
    for piece in x.split([1, 1, 5, 60, 1, 100, 32], dim=1):
        table = rotary_table(cache.length, piece.size(1), 4, 10_000.0, x.device)
        pieces.append(attention(piece, table, Context(), cache))
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=0)


def test_a_windowed_cache_stays_small():
    cache = KeyValueCache(window=4)
    for _ in range(1000):
        keys, _, first = cache.append(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2))
    assert keys.size(2) == 4 and first == 996 and cache._keys.size(2) <= 2 * (4 + ROLL_BACK)


def test_grouped_attention_equals_multi_head_attention_with_repeated_heads():
    torch.manual_seed(0)
    grouped = GroupedQueryAttention(GroupedQueryConfig(num_heads=4, num_kv_heads=2), 16)
    full = GroupedQueryAttention(GroupedQueryConfig(num_heads=4), 16)
    full.load_state_dict(
        grouped.state_dict()
        | {
            f"{name}.weight": getattr(grouped, name).weight.unflatten(0, (2, 4)).repeat_interleave(2, 0).flatten(0, 1)
            for name in ("key", "value")
        }
    )
    x, table = torch.randn(2, 9, 16), rotary_table(0, 9, 4, 10_000.0, torch.device("cpu"))
    torch.testing.assert_close(grouped(x, table, Context()), full(x, table, Context()), atol=1e-6, rtol=1e-5)
