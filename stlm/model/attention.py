"""Attention: what a layer brings from other positions, and the ways in which a machine computes it.

Shape letters: B batch, T positions, D width, N query heads, M key and value heads, K head width, W window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlm.config import GroupedQueryConfig
from stlm.model.cache import KeyValueCache, visible
from stlm.model.context import Context
from stlm.model.positions import RotaryTable, rotate
from stlm.model.registry import Registry

SHORT = 256  # keys: up to here, plain products beat the fused kernel on a CPU


class Attention(nn.Module):
    """Interface of every attention: [B, T, D] → [B, T, D], causal. `output` is the last matrix."""

    output: nn.Linear

    def new_cache(self) -> KeyValueCache:
        """Empty decoding state."""
        raise TypeError(f"{type(self).__name__} defines no new_cache()")

    def forward(
        self, x_BTD: Tensor, rotary: RotaryTable, context: Context, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Documents and a cache do not go together: what a cache remembers is of one document."""
        raise TypeError(f"{type(self).__name__} defines no forward()")


ATTENTIONS: Registry[Attention] = Registry("core.attention")


@ATTENTIONS.register("grouped_query")
class GroupedQueryAttention(Attention):
    """Causal attention whose queries share keys and values in groups (Ainslie et al. 2023, arXiv 2305.13245).

    As many key and value heads as query heads is multi-head attention, one is multi-query. With a window of W, a
    position sees itself and the W - 1 before it.
    """

    def __init__(self, config: GroupedQueryConfig, width: int) -> None:
        super().__init__()
        num_heads, num_kv_heads = config.num_heads, config.num_kv_heads or config.num_heads
        self.num_heads, self.num_kv_heads, self.window = num_heads, num_kv_heads, config.window
        self.head_width = config.head_width_of(width)
        self.query = nn.Linear(width, num_heads * self.head_width, bias=False)
        self.key = nn.Linear(width, num_kv_heads * self.head_width, bias=False)
        self.value = nn.Linear(width, num_kv_heads * self.head_width, bias=False)
        self.output = nn.Linear(num_heads * self.head_width, width, bias=False)

    def new_cache(self) -> KeyValueCache:
        return KeyValueCache(self.window)

    def forward(
        self, x_BTD: Tensor, rotary: RotaryTable, context: Context, cache: KeyValueCache | None = None
    ) -> Tensor:
        documents_BT = context.documents
        q_BNTK = rotate(self._heads(self.query(x_BTD), self.num_heads), rotary)
        k_BNTK = rotate(self._heads(self.key(x_BTD), self.num_kv_heads), rotary)
        v_BNTK = self._heads(self.value(x_BTD), self.num_kv_heads)
        if cache is not None:
            y_BNTK = self._attend_to_cache(q_BNTK, k_BNTK, v_BNTK, cache)
        elif self.window is not None and self.window < x_BTD.size(1):
            y_BNTK = windowed_attention(q_BNTK, k_BNTK, v_BNTK, self.window, documents_BT)
        elif documents_BT is not None:
            length = x_BTD.size(1)
            causal_TT = visible(length, 0, length, 0, None, x_BTD.device)
            same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
            y_BNTK = attend(q_BNTK, k_BNTK, v_BNTK, (causal_TT & same_BTT)[:, None])
        else:
            y_BNTK = attend(q_BNTK, k_BNTK, v_BNTK)
        return self.output(y_BNTK.transpose(1, 2).flatten(2))

    def _heads(self, x_BTC: Tensor, num_heads: int) -> Tensor:
        return x_BTC.unflatten(-1, (num_heads, self.head_width)).transpose(1, 2)

    def _attend_to_cache(self, q_BNTK: Tensor, k_BNTK: Tensor, v_BNTK: Tensor, cache: KeyValueCache) -> Tensor:
        first_query = cache.length
        keys, values, first_key = cache.append(k_BNTK, v_BNTK)
        mask = visible(q_BNTK.size(2), first_query, keys.size(2), first_key, self.window, q_BNTK.device)
        return attend(q_BNTK, keys, values, mask)


def attend(q_BNTK: Tensor, k_BMSK: Tensor, v_BMSK: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of N query heads to M key/value heads, N a multiple of M: [B, N, T, K].

    `mask` is True where a query may see a key and broadcasts to [B, M, T, S]; None means causal, with T = S. On a CPU,
    torch's fused kernel is slower than two plain products until the keys are many (benchmarks/attention.py).
    """
    if q_BNTK.device.type != "cpu" or k_BMSK.size(2) > SHORT:
        return F.scaled_dot_product_attention(
            q_BNTK, k_BMSK, v_BMSK, attn_mask=mask, is_causal=mask is None, enable_gqa=q_BNTK.size(1) != k_BMSK.size(1)
        )
    if mask is None:
        mask = visible(q_BNTK.size(2), 0, k_BMSK.size(2), 0, None, q_BNTK.device)
    q_BMGTK = q_BNTK.unflatten(1, (k_BMSK.size(1), -1)) * q_BNTK.size(-1) ** -0.5
    scores_BMGTS = q_BMGTK.flatten(2, 3) @ k_BMSK.transpose(-1, -2)
    scores_BMGTS = scores_BMGTS.unflatten(2, q_BMGTK.shape[2:4]).masked_fill(~mask.unsqueeze(-3), -torch.inf)
    weights_BMGTS = scores_BMGTS.softmax(-1, dtype=torch.float32).to(v_BMSK.dtype)
    return (weights_BMGTS.flatten(2, 3) @ v_BMSK).unflatten(2, q_BMGTK.shape[2:4]).flatten(1, 2)


def windowed_attention(
    q_BNTK: Tensor, k_BNTK: Tensor, v_BNTK: Tensor, window: int, documents_BT: Tensor | None = None
) -> Tensor:
    """Causal attention to the last `window` positions at a cost of T * 2W rather than T * T.

    With `documents_BT`, only to those of the same document.

    The sequence is cut into blocks of W; a block's queries see their own block and the one before it, which hold every
    key within reach (as in Longformer's chunks, Beltagy et al. 2020, arXiv 2004.05150, appendix A).
    """
    B, T = q_BNTK.size(0), q_BNTK.size(2)
    blocks = -(-T // window)
    padding = (0, 0, 0, blocks * window - T)
    # [B, blocks, N, W, K]
    q, k, v = (F.pad(x, padding).unflatten(2, (blocks, window)).transpose(1, 2) for x in (q_BNTK, k_BNTK, v_BNTK))
    k, v = (torch.cat((F.pad(x[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0)), x), dim=3) for x in (k, v))  # previous block first
    mask = visible(window, window, 2 * window, 0, window, q.device).repeat(blocks, 1, 1)
    mask[0, :, :window] = False  # the first block has none before it
    mask = mask[:, None].repeat(B, 1, 1, 1)
    if documents_BT is not None:
        own_BbW = F.pad(documents_BT, (0, blocks * window - T)).unflatten(1, (blocks, window))
        seen_BbS = torch.cat((F.pad(own_BbW[:, :-1], (0, 0, 1, 0)), own_BbW), dim=2)
        mask = mask & (own_BbW[..., None] == seen_BbS[..., None, :]).flatten(0, 1)[:, None]
    y = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), mask)
    return y.unflatten(0, (B, blocks)).transpose(1, 2).flatten(2, 3)[:, :, :T]
