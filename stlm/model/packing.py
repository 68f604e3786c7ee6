"""The form in which layers decode: matrices side by side, laid out as few vectors read them fastest, and few operations.

One position at a time, reading the matrices is half of the work, and starting operations is the other half. Nothing of
the model is changed: what is made here is a second copy of the matrices, for models in use.

Shape letters: B batch, T positions, R = B * T of them, D width, H heads of queries, keys and values, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stlm.model.cache import KeyValueCache
from stlm.model.context import Context
from stlm.model.experts import ExpertLinear
from stlm.model.feed_forward import PlainFeedForward, SwiGLU
from stlm.model.normalization import Norm, RMSNorm
from stlm.model.positions import Placement
from stlm.model.residual import BranchScale

if TYPE_CHECKING:
    from stlm.model.blocks import Block


class Product:
    """Linear maps of the same vectors, with all that corrects them, as one: [R, in] → [R, out], outputs side by side."""

    @torch.no_grad()
    def __init__(self, linears: tuple[nn.Linear, ...]) -> None:
        weight = linears[0].weight
        eye = torch.eye(weight.size(1), device=weight.device, dtype=weight.dtype)
        biases = [linear(eye.new_zeros(1, eye.size(0))) for linear in linears]
        self.weight = torch.cat([linear(eye) - bias for linear, bias in zip(linears, biases, strict=True)], dim=1)
        bias = torch.cat(biases, dim=1)[0]
        self.bias = bias if bool(bias.any()) else None

    def __call__(self, x_RD: Tensor) -> Tensor:
        return torch.mm(x_RD, self.weight) if self.bias is None else torch.addmm(self.bias, x_RD, self.weight)

    def add_to(self, x_RD: Tensor, y_RC: Tensor, scale: float) -> Tensor:
        """x + scale * what becomes of y."""
        if self.bias is not None:
            x_RD = torch.add(x_RD, self.bias, alpha=scale)
        return torch.addmm(x_RD, y_RC, self.weight, alpha=scale)


class Products:
    """Makes products, each once: layers that share matrices share what is made of them."""

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], Product] = {}

    def of(self, *linears: nn.Linear) -> Product:
        """The product of linear maps side by side."""
        key = tuple(id(linear.weight) if _plain(linear) else id(linear) for linear in linears)
        if key not in self._made:
            self._made[key] = Product(linears)
        return self._made[key]


def _plain(linear: nn.Linear) -> bool:
    """Whether nothing but matrix and vector, which are shared together, make what a linear map gives."""
    return type(linear) is nn.Linear and not linear._forward_hooks


class PackedBlock:
    """What a block computes, within rounding, for models that are not trained any more: see `Block`."""

    def __init__(self, block: Block, products: Products) -> None:
        attention, feed_forward = block.attention, block.feed_forward
        self.parallel = block.parallel
        self.attention = attention
        self.feed_forward = feed_forward
        self.attention_norm, self.feed_forward_norm = normalize(block.attention_norm), normalize(block.feed_forward_norm)
        self.attention_scale, self.feed_forward_scale = block.attention_scale, block.feed_forward_scale
        self.heads = products.of(attention.query, attention.key, attention.value)
        self.output = products.of(attention.output)
        self.up: Product | None = None  # experts are left as they are
        if isinstance(feed_forward, SwiGLU):
            self.up = products.of(feed_forward.gate, feed_forward.up)
        elif isinstance(feed_forward, PlainFeedForward):
            self.up = products.of(feed_forward.up)
        if self.up is not None:
            assert not isinstance(feed_forward.down, ExpertLinear)
            self.down = products.of(feed_forward.down)

    def __call__(
        self, x_BTD: Tensor, placement: Placement, context: Context, cache: KeyValueCache | None = None
    ) -> Tensor:
        batch, length, _ = x_BTD.shape
        x_RD = x_BTD.flatten(0, 1)
        heads = self.heads(self.attention_norm(x_RD)).view(batch, length, -1, self.attention.head_width)
        placed = self.attention.place(heads.transpose(1, 2), placement)
        found_RC = self.attention.mix(*placed, placement, context, cache).reshape(batch * length, -1)
        y_RD = self._added(x_RD, self.output, found_RC, self.attention_scale)
        normed_RD = self.feed_forward_norm(x_RD if self.parallel else y_RD)
        if self.up is None:
            z_BTD = self.feed_forward(normed_RD.view(x_BTD.shape), context)
            return y_RD.view(x_BTD.shape) + self.feed_forward_scale(z_BTD)
        inner_RF = self.feed_forward.inner(self.up(normed_RD))
        return self._added(y_RD, self.down, inner_RF, self.feed_forward_scale).view(x_BTD.shape)

    @staticmethod
    def _added(x_RD: Tensor, product: Product, y_RC: Tensor, scale: BranchScale) -> Tensor:
        if scale.weight is not None:
            return x_RD + scale(product(y_RC))
        return product.add_to(x_RD, y_RC, scale.scale)


def normalize(norm: Norm) -> Callable[[Tensor], Tensor]:
    """A norm in as few operations as there are: [R, D] → [R, D]. On a CPU, torch has RMSNorm as a row of six."""
    if not isinstance(norm, RMSNorm) or norm.weight.dtype != torch.float32:
        return norm
    width = norm.weight.numel()
    weight_D = norm.weight.detach() * math.sqrt(width)
    floor = norm.weight.new_tensor(math.sqrt(width * norm.eps))
    return lambda x_RD: x_RD / torch.hypot(torch.linalg.vector_norm(x_RD, dim=-1, keepdim=True), floor) * weight_D
