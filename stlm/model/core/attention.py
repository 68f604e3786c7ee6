"""Attention: layers that mix positions, and their kernels.

Shape letters: B batch, T positions, D width, N query heads, M key and value heads, K head width, W window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlm.config import GroupedQueryConfig, NormConfig
from stlm.model.context import Context
from stlm.model.core.blockwise import Visibility, blockwise_attention
from stlm.model.core.normalization import NORMS, Norm, soft_cap
from stlm.model.core.positions import Placement, rotate
from stlm.model.decoding.cache import KeyValueCache, visible
from stlm.model.registry import Registry

# Measured by benchmarks/attention.py on CPUs, in positions.
NARROW = 64  # windows below this are cut into blocks of their own width, all of them one product
LONGEST = {torch.bfloat16: 2048, torch.float16: 2048, torch.float32: 1024}  # of blockwise attention; above: fused
SHORT = 256  # keys: up to here, plain products beat the fused kernel
FEW = 16  # queries in decoding: up to here, they do not


class Attention(nn.Module):
    """Interface of every attention: [B, T, D] → [B, T, D], causal. `output` is the last matrix."""

    output: nn.Linear

    def new_cache(self) -> KeyValueCache:
        """Empty decoding state."""
        raise TypeError(f"{type(self).__name__} defines no new_cache()")

    def forward(
        self, x_BTD: Tensor, placement: Placement, context: Context, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Attend from each position. Documents cannot be combined with a cache, which holds one document."""
        raise TypeError(f"{type(self).__name__} defines no forward()")


ATTENTIONS: Registry[Attention] = Registry("core.attention")


@ATTENTIONS.register("grouped_query")
class GroupedQueryAttention(Attention):
    """Causal attention whose queries share keys and values in groups (Ainslie et al. 2023, arXiv 2305.13245).

    With as many key and value heads as query heads it is multi-head attention; with one, multi-query. With a window of
    W, a position sees itself and the W - 1 before it. Queries and keys may be normalized head by head before rotation,
    as in Qwen3 (arXiv 2505.09388, section 2; first by Dehghani et al. 2023, arXiv 2302.05442, section 2).
    """

    query_scale = 1.0  # of the scores, see width_transfer.py

    def __init__(self, config: GroupedQueryConfig, norm: NormConfig, width: int, layer: int) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads or config.num_heads
        self.window, self.logit_cap = config.window_of(layer), config.logit_cap
        self.head_width = config.head_width_of(width)
        bias = config.bias != "none"
        self.query = nn.Linear(width, self.num_heads * self.head_width, bias=bias)
        self.key = nn.Linear(width, self.num_kv_heads * self.head_width, bias=bias)
        self.value = nn.Linear(width, self.num_kv_heads * self.head_width, bias=bias)
        self.output = nn.Linear(self.num_heads * self.head_width, width, bias=config.bias == "all")
        self.query_norm = NORMS[norm.kind](norm, self.head_width) if config.qk_norm else None
        self.key_norm = NORMS[norm.kind](norm, self.head_width) if config.qk_norm else None
        self.gives_values = config.value_residual and layer == 0
        self.value_mix = ValueMix() if config.value_residual and layer > 0 else None

    def new_cache(self) -> KeyValueCache:
        return KeyValueCache(self.window)

    def forward(
        self, x_BTD: Tensor, placement: Placement, context: Context, cache: KeyValueCache | None = None
    ) -> Tensor:
        q_BNTK = self._placed(self._heads(self.query(x_BTD)), self.query_norm, placement)
        k_BMTK = self._placed(self._heads(self.key(x_BTD)), self.key_norm, placement)
        v_BMTK = self._heads(self.value(x_BTD))
        return self.output(self.mix(q_BNTK, k_BMTK, v_BMTK, placement, context, cache).flatten(2))

    def place(self, heads_BHTK: Tensor, placement: Placement) -> tuple[Tensor, Tensor, Tensor]:
        """Split the result of one product into queries, keys and values, normed and rotated for `mix`."""
        queries, rotated = self.num_heads, self.num_heads + self.num_kv_heads
        v_BMTK = heads_BHTK[:, rotated:]
        if self.query_norm is None:
            placed_BHTK = self._placed(heads_BHTK[:, :rotated], None, placement)
            return placed_BHTK[:, :queries], placed_BHTK[:, queries:], v_BMTK
        q_BNTK = self._placed(heads_BHTK[:, :queries], self.query_norm, placement)
        k_BMTK = self._placed(heads_BHTK[:, queries:rotated], self.key_norm, placement)
        return q_BNTK, k_BMTK, v_BMTK

    def mix(
        self,
        q_BNTK: Tensor,
        k_BMTK: Tensor,
        v_BMTK: Tensor,
        placement: Placement,
        context: Context,
        cache: KeyValueCache | None,
    ) -> Tensor:
        """Return each query head's weighted values, [B, T, N, K], before the last matrix."""
        if self.query_scale != 1.0:
            q_BNTK = q_BNTK * self.query_scale
        if self.gives_values:
            context.values = v_BMTK
        elif self.value_mix is not None:
            assert context.values is not None
            v_BMTK = self.value_mix(v_BMTK, context.values)
        if cache is not None and not cache.length:  # the first ids see only each other, with a cache or without
            cache.append(k_BMTK, v_BMTK)
            cache = None
        if cache is not None:
            keys, values, first_key = cache.append(k_BMTK, v_BMTK)
            mask = self._mask(q_BNTK.size(2), keys.size(2), first_key, cache, context)
            y_BNTK = attend(q_BNTK, keys, values, mask, placement.slopes_N, self.logit_cap, decoding=True)
        else:
            seen = Visibility(self.window, context.documents, placement.slopes_N, self.logit_cap)
            y_BNTK = causal_attention(q_BNTK, k_BMTK, v_BMTK, seen)
        return y_BNTK.transpose(1, 2)

    def _mask(
        self, num_queries: int, num_keys: int, first_key: int, cache: KeyValueCache, context: Context
    ) -> Tensor | None:
        """Mask of the cached keys that the newest queries see. None: all, as for a single query."""
        if num_queries == 1 and cache.begins_B is None:
            return None
        kind = self.window, num_keys
        if kind not in context.masks:
            context.masks[kind] = cache.visible(num_queries, num_keys, first_key)
        return context.masks[kind]

    def _heads(self, x_BTC: Tensor) -> Tensor:
        return x_BTC.unflatten(-1, (-1, self.head_width)).transpose(1, 2)

    def _placed(self, x_BNTK: Tensor, norm: Norm | None, placement: Placement) -> Tensor:
        if norm is not None:
            x_BNTK = norm(x_BNTK.float()).to(x_BNTK.dtype)
        return x_BNTK if placement.rotary is None else rotate(x_BNTK, placement.rotary)


class ValueMix(nn.Module):
    """Mix of a layer's values and the first layer's: a * values + b * first; a and b are learned and begin at 1/2
    (value residual learning: Zhou et al. 2024, arXiv 2410.17897, section 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), 0.5))

    def forward(self, values: Tensor, first_values: Tensor) -> Tensor:
        return self.weight[0] * values + self.weight[1] * first_values


def causal_attention(q_BNTK: Tensor, k_BMTK: Tensor, v_BMTK: Tensor, seen: Visibility) -> Tensor:
    """Attention of a whole sequence to itself: [B, N, T, K]. N query heads are a multiple of M key and value heads."""
    length, (window, documents_BT, slopes_N, cap) = q_BNTK.size(2), seen
    if window is not None and window >= length:
        window = None
    blockwise = q_BNTK.device.type == "cpu" and not torch.compiler.is_exporting()
    if window is not None and (window < NARROW or not blockwise):
        return windowed_attention(q_BNTK, k_BMTK, v_BMTK, window, documents_BT, slopes_N, cap)
    fused = cap is None and window is None and length > LONGEST.get(q_BNTK.dtype, 0)
    if blockwise and not fused:
        return blockwise_attention(q_BNTK, k_BMTK, v_BMTK, Visibility(window, documents_BT, slopes_N, cap))
    if documents_BT is None:
        return attend(q_BNTK, k_BMTK, v_BMTK, None, slopes_N, cap)
    causal_TT = visible(length, 0, length, 0, None, q_BNTK.device)
    same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    return attend(q_BNTK, k_BMTK, v_BMTK, (causal_TT & same_BTT)[:, None], slopes_N, cap)


def attend(
    q_BNTK: Tensor,
    k_BMSK: Tensor,
    v_BMSK: Tensor,
    mask: Tensor | None = None,
    slopes_N: Tensor | None = None,
    cap: float | None = None,
    decoding: bool = False,
) -> Tensor:
    """Attention of N query heads to M key/value heads, N a multiple of M: [B, N, T, K]. The last query and the last key
    are at the same position.

    `mask` is True where a query may see a key and broadcasts to [B, M, T, S]; None means causal, with T = S, or a
    single query that sees all. Scores are kept within ± `cap`, then reduced by `slopes_N` times the distance. Torch's
    fused kernel has no cap. On a CPU it is slower than two plain products until the keys are many
    (benchmarks/attention.py), except for a single query and for few queries that are read with a cache (`decoding`).
    """
    alone = q_BNTK.size(2) == 1
    few = decoding and mask is not None and q_BNTK.size(2) <= FEW and q_BNTK.size(2) < k_BMSK.size(2)
    if cap is None and (alone or few or q_BNTK.device.type != "cpu" or k_BMSK.size(2) > SHORT):
        if slopes_N is not None:
            mask, bias_NTS = _causal(q_BNTK, k_BMSK, mask), _bias(slopes_N, q_BNTK, k_BMSK).to(q_BNTK.dtype)
            mask = bias_NTS.masked_fill(~mask, -torch.inf)
        grouped, causal = q_BNTK.size(1) != k_BMSK.size(1), mask is None and not alone
        if grouped and alone and slopes_N is None:  # a group's queries see the same keys: treat them as one head's
            q_BMGK = q_BNTK.view(q_BNTK.size(0), k_BMSK.size(1), -1, q_BNTK.size(3))
            return F.scaled_dot_product_attention(q_BMGK, k_BMSK, v_BMSK, attn_mask=mask).view(q_BNTK.shape)
        return F.scaled_dot_product_attention(
            q_BNTK, k_BMSK, v_BMSK, attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )
    mask = _causal(q_BNTK, k_BMSK, mask)
    q_BMGTK = q_BNTK.unflatten(1, (k_BMSK.size(1), -1)) * q_BNTK.size(-1) ** -0.5
    scores_BMGTS = (q_BMGTK.flatten(2, 3) @ k_BMSK.transpose(-1, -2)).unflatten(2, q_BMGTK.shape[2:4])
    scores_BMGTS = soft_cap(scores_BMGTS, cap)
    if slopes_N is not None:
        scores_BMGTS = scores_BMGTS + _bias(slopes_N, q_BNTK, k_BMSK).unflatten(0, q_BMGTK.shape[1:3])
    scores_BMGTS = scores_BMGTS.masked_fill(~mask.unsqueeze(-3), -torch.inf)
    weights_BMGTS = scores_BMGTS.softmax(-1, dtype=torch.float32).to(v_BMSK.dtype)
    return (weights_BMGTS.flatten(2, 3) @ v_BMSK).unflatten(2, q_BMGTK.shape[2:4]).flatten(1, 2)


def _causal(q_BNTK: Tensor, k_BMSK: Tensor, mask: Tensor | None) -> Tensor:
    T, S = q_BNTK.size(2), k_BMSK.size(2)
    return visible(T, S - T, S, 0, None, q_BNTK.device) if mask is None else mask


def _bias(slopes_N: Tensor, q_BNTK: Tensor, k_BMSK: Tensor) -> Tensor:
    """Return -slope * distance: [N, T, S], float32; 0 at a query's own position."""
    T, S = q_BNTK.size(2), k_BMSK.size(2)
    distance_TS = torch.arange(S - T, S, device=slopes_N.device)[:, None] - torch.arange(S, device=slopes_N.device)
    return -slopes_N[:, None, None] * distance_TS


def windowed_attention(
    q_BNTK: Tensor,
    k_BMTK: Tensor,
    v_BMTK: Tensor,
    window: int,
    documents_BT: Tensor | None = None,
    slopes_N: Tensor | None = None,
    cap: float | None = None,
) -> Tensor:
    """Causal attention to the last `window` positions at a cost of T * 2W rather than T * T.

    With `documents_BT`, only to positions of the same document; `slopes_N` and `cap` as in `attend`.

    The sequence is cut into blocks of W. A block's queries see their own block and the one before, which contain every
    key within reach (as in Longformer's chunks, Beltagy et al. 2020, arXiv 2004.05150, appendix A).
    """
    B, T = q_BNTK.size(0), q_BNTK.size(2)
    blocks = -(-T // window)
    padding = (0, 0, 0, blocks * window - T)
    # [B, blocks, N, W, K]
    q, k, v = (F.pad(x, padding).unflatten(2, (blocks, window)).transpose(1, 2) for x in (q_BNTK, k_BMTK, v_BMTK))
    k, v = (torch.cat((F.pad(x[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0)), x), dim=3) for x in (k, v))  # previous block first
    mask = visible(window, window, 2 * window, 0, window, q.device).repeat(blocks, 1, 1)
    mask[0, :, :window] = False  # the first block has none before it
    mask = mask[:, None].repeat(B, 1, 1, 1)
    if documents_BT is not None:
        own_BbW = F.pad(documents_BT, (0, blocks * window - T)).unflatten(1, (blocks, window))
        seen_BbS = torch.cat((F.pad(own_BbW[:, :-1], (0, 0, 1, 0)), own_BbW), dim=2)
        mask = mask & (own_BbW[..., None] == seen_BbS[..., None, :]).flatten(0, 1)[:, None]
    y = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask, slopes_N, cap)
    return y.unflatten(0, (B, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :T]
