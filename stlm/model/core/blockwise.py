"""Causal attention in blocks of queries, each with the keys up to its end: for CPUs.

Torch's fused kernel for CPUs multiplies small tiles, far below the rate of large matrix products. Here each block of
queries is two products and a softmax over exactly the keys that it may see, and the gradient is written out, so that
nothing above the diagonal is computed or stored. benchmarks/attention.py compares the two.

Shape letters: B batch, N query heads, M key and value heads, G = N / M, P = B * M, T positions, K head width, Q queries
of a block, R = G * Q, S keys that the block sees.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from stlm.model.core.normalization import soft_cap

BLOCK = 64  # queries


class Visibility(NamedTuple):
    """The keys that each query sees, and changes of scores before the softmax.

    A query sees itself and the positions before it; with a `window`, the last `window` positions; with `documents_BT`,
    those of its own document. Scores stay within ± `cap`, and fall by `slopes_N` per position of distance.
    """

    window: int | None = None
    documents_BT: Tensor | None = None
    slopes_N: Tensor | None = None
    cap: float | None = None


class Span(NamedTuple):
    """Queries [start, end), and the keys [first, end) that at least one of them sees."""

    first: int
    start: int
    end: int


def spans(length: int, window: int | None) -> Iterator[Span]:
    """Cut a sequence into blocks of queries."""
    for start in range(0, length, BLOCK):
        first = 0 if window is None else max(0, start - window + 1)
        yield Span(first, start, min(start + BLOCK, length))


def blockwise_attention(q_BNTK: Tensor, k_BMTK: Tensor, v_BMTK: Tensor, seen: Visibility) -> Tensor:
    """Return the weighted values of every query: [B, N, T, K]. N is a multiple of M.

    The weights of all blocks, T * T / 2 numbers a head, are kept for the gradient.
    """
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # the compiler fuses its own gradient better
        y_BNTK: Tensor = _Blockwise.apply(q_BNTK, k_BMTK, v_BMTK, *seen)
        return y_BNTK
    return _forward(q_BNTK, k_BMTK, v_BMTK, seen, [], [])


def _forward(
    q_BNTK: Tensor, k_BMTK: Tensor, v_BMTK: Tensor, seen: Visibility, weights: list[Tensor], capped: list[Tensor]
) -> Tensor:
    """Compute the output, and append each block's weights and, with a cap, its scores to the lists."""
    B, N, T, K = q_BNTK.shape
    M = k_BMTK.size(1)
    y_BMGTK = q_BNTK.new_empty(B, M, N // M, T, K)
    q_BMGTK = (q_BNTK * K**-0.5).unflatten(1, (M, -1))
    k_PTK, v_PTK = k_BMTK.flatten(0, 1), v_BMTK.flatten(0, 1)
    for span in spans(T, seen.window):
        first, start, end = span
        scores_PRS = q_BMGTK[:, :, :, start:end].reshape(B * M, -1, K) @ k_PTK[:, first:end].mT
        scores_BMGQS = soft_cap(scores_PRS, seen.cap).view(B, M, -1, end - start, end - first)
        if seen.cap is not None:
            capped.append(scores_BMGQS.clone())
        _restrict(scores_BMGQS, span, seen)
        weights_PRS = torch.softmax(scores_BMGQS, -1).view_as(scores_PRS)
        y_BMGTK[:, :, :, start:end] = (weights_PRS @ v_PTK[:, first:end]).view(B, M, -1, end - start, K)
        weights.append(weights_PRS)
    return y_BMGTK.flatten(1, 2)


def _restrict(scores_BMGQS: Tensor, span: Span, seen: Visibility) -> None:
    """Lower the scores by distance, and set those of keys that a query does not see to -inf, in place."""
    first, start, end = span
    key_S = torch.arange(first, end, device=scores_BMGQS.device)
    query_Q1 = torch.arange(start, end, device=scores_BMGQS.device)[:, None]
    if seen.slopes_N is not None:
        slopes_MG11 = seen.slopes_N.view(scores_BMGQS.size(1), -1, 1, 1)
        scores_BMGQS.sub_((slopes_MG11 * (query_Q1 - key_S)).to(scores_BMGQS.dtype))
    hidden = key_S > query_Q1
    if seen.window is not None:
        hidden = hidden | (key_S <= query_Q1 - seen.window)
    elif seen.documents_BT is None:  # keys before the block are seen by all its queries
        scores_BMGQS[..., start - first :].masked_fill_(hidden[:, start - first :], -math.inf)
        return
    if seen.documents_BT is not None:
        own_BQ1, keys_B1S = seen.documents_BT[:, start:end, None], seen.documents_BT[:, None, first:end]
        hidden = (hidden | (own_BQ1 != keys_B1S))[:, None, None]
    scores_BMGQS.masked_fill_(hidden, -math.inf)


class _Blockwise(torch.autograd.Function):
    """The gradient of softmax attention, block by block (Dao et al. 2022, arXiv 2205.14135, appendix B.4)."""

    @staticmethod
    def forward(
        ctx: Any,
        q_BNTK: Tensor,
        k_BMTK: Tensor,
        v_BMTK: Tensor,
        window: int | None,
        documents_BT: Tensor | None,
        slopes_N: Tensor | None,
        cap: float | None,
    ) -> Tensor:
        seen = Visibility(window, documents_BT, slopes_N, cap)
        weights: list[Tensor] = []
        capped: list[Tensor] = []
        y_BNTK = _forward(q_BNTK, k_BMTK, v_BMTK, seen, weights, capped)
        ctx.save_for_backward(q_BNTK, k_BMTK, v_BMTK, *weights, *capped)
        ctx.window, ctx.cap = window, cap
        return y_BNTK

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_BNTK: Tensor) -> tuple[Tensor | None, ...]:
        q_BNTK, k_BMTK, v_BMTK, *saved = ctx.saved_tensors
        B, N, T, K = q_BNTK.shape
        M = k_BMTK.size(1)
        q_BMGTK, dy_BMGTK = (q_BNTK * K**-0.5).unflatten(1, (M, -1)), dy_BNTK.unflatten(1, (M, -1))
        k_PTK, v_PTK = k_BMTK.flatten(0, 1), v_BMTK.flatten(0, 1)
        dq_BMGTK = q_BNTK.new_empty(B, M, N // M, T, K)
        dk_PTK, dv_PTK = torch.zeros_like(k_PTK), torch.zeros_like(v_PTK)
        for number, (first, start, end) in enumerate(spans(T, ctx.window)):
            weights_PRS = saved[number]
            q_PRK = q_BMGTK[:, :, :, start:end].reshape(B * M, -1, K)
            dy_PRK = dy_BMGTK[:, :, :, start:end].reshape(B * M, -1, K)
            dv_PTK[:, first:end] += weights_PRS.mT @ dy_PRK
            dweights_PRS = dy_PRK @ v_PTK[:, first:end].mT
            dscores_PRS = torch._softmax_backward_data(dweights_PRS, weights_PRS, -1, weights_PRS.dtype)
            if ctx.cap is not None:
                scores_PRS = saved[len(saved) // 2 + number].view_as(dscores_PRS)
                dscores_PRS = dscores_PRS * (1 - (scores_PRS / ctx.cap).square())
            dq_BMGTK[:, :, :, start:end] = (dscores_PRS @ k_PTK[:, first:end]).view(B, M, -1, end - start, K)
            dk_PTK[:, first:end] += dscores_PRS.mT @ q_PRK
        dq_BMGTK *= K**-0.5
        return dq_BMGTK.flatten(1, 2), dk_PTK.view_as(k_BMTK), dv_PTK.view_as(v_BMTK), None, None, None, None
