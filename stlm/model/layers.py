"""The small modules that every part is made of: RMSNorm, rotary positions, attention, SwiGLU, a stack of blocks.

Shape letters: B batch, T positions, D width, N heads, K head width, F feed-forward width, W window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlm.model.cache import KeyValueCache, visible
from stlm.model.context import Context

SHORT = 256  # keys: up to here, plain products beat the fused kernel on a CPU
RotaryTable = tuple[Tensor, Tensor]  # cosine and sine, [T, K] each, float32


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.size(-1),), self.weight, self.eps)


def rotary_table(first: int, length: int, head_width: int, theta: float, device: torch.device) -> RotaryTable:
    """Cosines and sines [length, head_width] of positions first, first + 1, … (Su et al. 2021, arXiv 2104.09864)."""
    frequency = theta ** (-torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width)
    position = torch.arange(first, first + length, device=device, dtype=torch.float32)
    angle = torch.outer(position, frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x_BNTK: Tensor, table: RotaryTable) -> Tensor:
    """Turn each pair (k, k + K/2) by its position's angle. Computed in float32, returned in x's dtype."""
    cosine, sine = table
    left, right = x_BNTK.chunk(2, dim=-1)
    return (x_BNTK * cosine + torch.cat((-right, left), dim=-1) * sine).to(x_BNTK.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions: [B, T, D] → [B, T, D].

    Queries share keys and values in groups (Ainslie et al. 2023, arXiv 2305.13245): `num_kv_heads` = `num_heads` is
    multi-head attention, 1 is multi-query. With a `window` of W, a position sees itself and the W - 1 before it. Not
    for documents beside a cache, whose positions are of one document.
    """

    def __init__(self, width: int, num_heads: int, num_kv_heads: int, window: int | None = None) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.window = num_heads, num_kv_heads, window
        self.head_width = width // num_heads
        self.query = nn.Linear(width, num_heads * self.head_width, bias=False)
        self.key = nn.Linear(width, num_kv_heads * self.head_width, bias=False)
        self.value = nn.Linear(width, num_kv_heads * self.head_width, bias=False)
        self.output = nn.Linear(num_heads * self.head_width, width, bias=False)

    def forward(
        self,
        x_BTD: Tensor,
        table: RotaryTable,
        context: Context,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        documents_BT = context.documents
        q_BNTK = rotate(self._heads(self.query(x_BTD), self.num_heads), table)
        k_BNTK = rotate(self._heads(self.key(x_BTD), self.num_kv_heads), table)
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


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)): [B, T, D] → [B, T, D] (Shazeer 2020, arXiv 2002.05202)."""

    def __init__(self, width: int, ffn_width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, ffn_width, bias=False)
        self.up = nn.Linear(width, ffn_width, bias=False)
        self.down = nn.Linear(ffn_width, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x_BTD)) * self.up(x_BTD))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, attention: Attention, feed_forward: SwiGLU, width: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width)
        self.attention = attention
        self.feed_forward_norm = RMSNorm(width)
        self.feed_forward = feed_forward

    def forward(
        self,
        x_BTD: Tensor,
        table: RotaryTable,
        context: Context,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), table, context, cache)
        return x_BTD + self.feed_forward(self.feed_forward_norm(x_BTD))


class TransformerStack(nn.Module):
    """`num_layers` blocks in a row: [B, T, D] → [B, T, D]. The core is one; so are local byte models, with a window."""

    def __init__(
        self,
        width: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        ffn_width: int | None = None,
        rope_theta: float = 10_000.0,
        window: int | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_kv_heads or num_heads
        ffn_width = ffn_width or default_ffn_width(width)
        self.head_width, self.rope_theta, self.window = width // num_heads, rope_theta, window
        self.blocks = nn.ModuleList(
            Block(Attention(width, num_heads, num_kv_heads, window), SwiGLU(width, ffn_width), width)
            for _ in range(num_layers)
        )

    def new_cache(self) -> list[KeyValueCache]:
        """One empty cache for each layer."""
        return [KeyValueCache(self.window) for _ in self.blocks]

    def last_of_branches(self) -> list[nn.Linear]:
        """The last matrix of every attention and feed-forward: what is added to the residual stream."""
        lasts: list[nn.Linear] = []
        for block in self.blocks:
            assert isinstance(block, Block)
            lasts += [block.attention.output, block.feed_forward.down]
        return lasts

    def forward(self, x_BTD: Tensor, context: Context, cache: list[KeyValueCache] | None = None) -> Tensor:
        first = cache[0].length if cache else 0
        table = rotary_table(first, x_BTD.size(1), self.head_width, self.rope_theta, x_BTD.device)
        for layer, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, table, context, cache[layer] if cache else None)
        return x_BTD


def default_ffn_width(width: int) -> int:
    """8/3 of the width, rounded up to a multiple of 32: SwiGLU then has the parameters of a plain 4x feed-forward."""
    return -(-8 * width // (3 * 32)) * 32
