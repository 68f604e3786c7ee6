"""Positional encodings: rotary, learned, linear biases, or none.

Shape letters: B batch, T positions, D width, N heads, K head width, R ≤ K dimensions of a head that are rotated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from stlm.config import ALiBiConfig, AttentionConfig, LearnedPositionsConfig, PositionsConfig, RoPEConfig
from stlm.errors import ConfigError
from stlm.model.registry import Registry


class RotaryTable(NamedTuple):
    """Cosines and sines of T positions, [T, R] each, float32; the sines of the first half are negative. Where rows are
    at different positions, [B, 1, T, R]."""

    cosine: Tensor
    sine: Tensor


class Placement(NamedTuple):
    """Positional inputs of attention."""

    rotary: RotaryTable | None = None  # rotation of queries and keys
    slopes_N: Tensor | None = None  # reduction of a score, in each head, per position of distance


class Positions(nn.Module):
    """Interface of every kind of positions. One object serves all layers of a stack; a kind overrides what it needs.

    Its arguments: its config, the attention that it serves, the width of vectors, and the largest number of positions.
    """

    def __init__(
        self, config: PositionsConfig, attention: AttentionConfig, width: int, num_positions: int | None
    ) -> None:
        super().__init__()

    def enter(self, x_BTD: Tensor, first: int | Tensor, documents_BT: Tensor | None) -> Tensor:
        """Return the inputs of the first layer at positions first, first + 1, …; `first` may be per row, [B, 1]."""
        return x_BTD

    def placement(self, first: int | Tensor, length: int, device: torch.device) -> Placement:
        """Return the inputs of attention at positions first, first + 1, …; `first` may be per row, [B, 1]."""
        return Placement()


POSITIONS: Registry[Positions] = Registry("core.positions")


@POSITIONS.register("rope")
class RoPE(Positions):
    """Rotary positions (Su et al. 2021, arXiv 2104.09864): scores depend on distances alone.

    With a fraction below 1, only the first dimensions of each head are rotated (GPT-NeoX: Black et al. 2022, arXiv
    2204.06745, section 2.2).
    """

    def __init__(self, config: RoPEConfig, attention: AttentionConfig, width: int, num_positions: int | None) -> None:
        super().__init__(config, attention, width, num_positions)
        self.theta = config.theta
        self.rotary_width = config.rotary_width_of(attention.head_width_of(width))

    def placement(self, first: int | Tensor, length: int, device: torch.device) -> Placement:
        return Placement(rotary=rotary_table(first, length, self.rotary_width, self.theta, device))


@POSITIONS.register("learned")
class LearnedPositions(Positions):
    """A learned vector for each position, added once (GPT-2). With separate documents, each counts from 0."""

    def __init__(
        self, config: LearnedPositionsConfig, attention: AttentionConfig, width: int, num_positions: int | None
    ) -> None:
        super().__init__(config, attention, width, num_positions)
        assert num_positions is not None
        self.table = nn.Embedding(num_positions, width)

    def enter(self, x_BTD: Tensor, first: int | Tensor, documents_BT: Tensor | None) -> Tensor:
        end = int(first if isinstance(first, int) else first.max()) + x_BTD.size(1)
        if end > self.table.num_embeddings:
            raise ConfigError(
                f"model.core.positions.kind: got 'learned' and a text of {end} positions, expected at most the "
                f"{self.table.num_embeddings} of model.context_length; shorten the text, or train with kind: rope"
            )
        position = first + torch.arange(x_BTD.size(1), device=x_BTD.device)
        if documents_BT is not None:
            position = position - begin_of_document(documents_BT)
        return x_BTD + self.table(position)


@POSITIONS.register("none")
class NoPositions(Positions):
    """No positions: layers can count by the causal mask alone (Kazemnejad et al. 2023, arXiv 2305.19466)."""


@POSITIONS.register("alibi")
class ALiBi(Positions):
    """Linear biases: scores are reduced by slope * distance; the slopes of N heads are 2^(-8/N), 2^(-16/N), …, 2^-8
    (Press et al. 2021, arXiv 2108.12409, section 3)."""

    def __init__(self, config: ALiBiConfig, attention: AttentionConfig, width: int, num_positions: int | None) -> None:
        super().__init__(config, attention, width, num_positions)
        self.num_heads = attention.num_heads

    def placement(self, first: int | Tensor, length: int, device: torch.device) -> Placement:
        head = torch.arange(1, self.num_heads + 1, device=device, dtype=torch.float32)
        return Placement(slopes_N=2.0 ** (-8.0 * head / self.num_heads))


def rotary_table(
    first: int | Tensor, length: int, rotary_width: int, theta: float, device: torch.device
) -> RotaryTable:
    """Return cosines and sines [length, rotary_width] of positions first, first + 1, …; by row if `first` is [B, 1]."""
    frequency = theta ** (-torch.arange(0, rotary_width, 2, device=device, dtype=torch.float32) / rotary_width)
    position = first + torch.arange(length, device=device, dtype=torch.float32)
    angle = position[..., None] * frequency
    angle = angle if isinstance(first, int) else angle[:, None]
    cosine, sine = angle.cos(), angle.sin()
    return RotaryTable(torch.cat((cosine, cosine), dim=-1), torch.cat((-sine, sine), dim=-1))


def rotate(x_BNTK: Tensor, table: RotaryTable) -> Tensor:
    """Rotate each pair (r, r + R/2) by its position's angle. Computed in float32, returned in x's dtype."""
    rotary_width = table.cosine.size(-1)
    if rotary_width < x_BNTK.size(-1):
        rotated, rest = x_BNTK.split([rotary_width, x_BNTK.size(-1) - rotary_width], dim=-1)
        return torch.cat((rotate(rotated, table), rest), dim=-1)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        y_BNTK: Tensor = _Rotation.apply(x_BNTK, *table)
        return y_BNTK
    left_and_right = x_BNTK.unflatten(-1, (2, -1))
    exchanged_BNTK = left_and_right.flip(-2).flatten(-2)
    return torch.addcmul(x_BNTK * table.cosine, exchanged_BNTK, table.sine).to(x_BNTK.dtype)


class _Rotation(torch.autograd.Function):
    """Rotation of [B, N, T, R] by a table; its gradient is the rotation back by the same angles."""

    @staticmethod
    def forward(ctx: Any, x_BNTR: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
        ctx.save_for_backward(cosine, sine)
        return _rotated(x_BNTR, cosine, sine)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_BNTR: Tensor) -> tuple[Tensor, None, None]:
        cosine, sine = ctx.saved_tensors
        return _rotated(dy_BNTR, cosine, -sine), None, None


def _rotated(x_BNTR: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate with few passes over memory, half by half."""
    x, half = x_BNTR.float(), x_BNTR.size(-1) // 2
    y = x * cosine
    y[..., :half].addcmul_(x[..., half:], sine[..., :half])
    y[..., half:].addcmul_(x[..., :half], sine[..., half:])
    return y.to(x_BNTR.dtype)


def begin_of_document(documents_BT: Tensor) -> Tensor:
    """Return, for each position, that at which its document begins: [B, T]. A document's positions are contiguous."""
    position = torch.arange(documents_BT.size(1), device=documents_BT.device).expand_as(documents_BT)
    begins = torch.ones_like(documents_BT, dtype=torch.bool)
    begins[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return torch.where(begins, position, 0).cummax(dim=1).values
