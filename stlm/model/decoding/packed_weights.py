"""Packed weights for decoding: concatenated matrices in the layout fastest for few vectors, and few operations.

When positions are decoded one at a time, half of the time is reading matrices and half is launching operations. The
model is not changed: packed weights are a second copy of its matrices, for inference.

Shape letters: B batch, T positions, R = B * T of them, D width, H heads of queries, keys and values, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlm.model.core.normalization import Norm, RMSNorm

PRECISIONS = ("fp32", "bf16", "int8")
FEW = 4  # vectors: up to here, a product reads its matrix fastest as integers
BLOCK = 16  # integers that torch reads at a time, even past the end of a row that is no multiple of them


class Product:
    """Several linear maps of the same vectors as one, corrections included: [R, in] → [R, out], concatenated."""

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
        """Return x + scale * (the product of y)."""
        if self.bias is not None:
            x_RD = torch.add(x_RD, self.bias, alpha=scale)
        return torch.addmm(x_RD, y_RC, self.weight, alpha=scale)


class RoundedProduct(Product):
    """Product in bfloat16: matrix and vectors are rounded to 16 bits, and sums are fp32."""

    def __init__(self, linears: tuple[nn.Linear, ...]) -> None:
        super().__init__(linears)
        self._lay_out()

    def _lay_out(self) -> None:
        """Convert the matrix to oneDNN's layout."""
        self.ready = self.weight.device.type == "cpu" and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.weight = self.weight.bfloat16()
        if self.ready:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight.t().contiguous())

    def __call__(self, x_RD: Tensor) -> Tensor:
        y_RC = self._times(x_RD.bfloat16()).float()
        return y_RC if self.bias is None else y_RC + self.bias

    def add_to(self, x_RD: Tensor, y_RC: Tensor, scale: float) -> Tensor:
        if self.bias is not None:
            x_RD = torch.add(x_RD, self.bias, alpha=scale)
        return torch.add(x_RD, self._times(y_RC.bfloat16()), alpha=scale)

    def _times(self, x_RD: Tensor) -> Tensor:
        if self.ready:
            return torch.ops.mkldnn._linear_pointwise(x_RD, self.weight, None, "none", [], "")
        return torch.mm(x_RD, self.weight)


class IntegerProduct(RoundedProduct):
    """Product with 8-bit integers and a step for each output; for more than `FEW` vectors, in bfloat16."""

    def _lay_out(self) -> None:
        steps_C = (self.weight.abs().amax(0) / 127).clamp(min=torch.finfo(torch.float32).tiny).bfloat16()
        levels_DC = (self.weight / steps_C.float()).round().clamp(-127, 127)
        self.weight = levels_DC * steps_C.float()
        self.padding = (0, -levels_DC.size(0) % BLOCK)
        self.levels_CD, self.steps_C = F.pad(levels_DC.t(), self.padding).contiguous().to(torch.int8), steps_C
        super()._lay_out()

    def _times(self, x_RD: Tensor) -> Tensor:
        if x_RD.size(0) <= FEW:
            return torch.ops.aten._weight_int8pack_mm(F.pad(x_RD, self.padding), self.levels_CD, self.steps_C)
        return super()._times(x_RD)


class Products:
    """Factory of products of one precision; layers that share matrices share products."""

    def __init__(self, precision: str = "fp32") -> None:
        self._kind = {"fp32": Product, "bf16": RoundedProduct, "int8": IntegerProduct}[precision]
        self._made: dict[tuple[int, ...], Product] = {}

    def of(self, *linears: nn.Linear) -> Product:
        """Return the product of concatenated linear maps."""
        key = tuple(id(linear.weight) if _plain(linear) else id(linear) for linear in linears)
        if key not in self._made:
            self._made[key] = self._kind(linears)
        return self._made[key]


P = TypeVar("P", bound="Packable")


class Packable(nn.Module):
    """Base of modules with a packed form, `packed`, valid until they are trained, moved or given other weights."""

    packed: Any = None

    def pack(self, products: Products) -> None:
        """Set `packed`."""
        raise TypeError(f"{type(self).__name__} defines no pack()")

    def train(self: P, mode: bool = True) -> P:
        if mode:
            self.packed = None
        return super().train(mode)

    def _apply(self: P, *args: Any, **options: Any) -> P:
        self.packed = None
        return super()._apply(*args, **options)


def pack(model: nn.Module, precision: str = "fp32") -> None:
    """Pack all `Packable` modules of a model."""
    products = Products(precision)
    for module in model.modules():
        if isinstance(module, Packable):
            module.pack(products)


def unpack(model: nn.Module) -> None:
    """Drop the packed forms of a model, so that its weights may change."""
    for module in model.modules():
        if isinstance(module, Packable):
            module.packed = None


def _plain(linear: nn.Linear) -> bool:
    """Return whether a linear map is its matrix and bias alone, without hooks or corrections."""
    return type(linear) is nn.Linear and not linear._forward_hooks


def normalize(norm: Norm) -> Callable[[Tensor], Tensor]:
    """Return a norm with fewer operations: [R, D] → [R, D]. On a CPU, torch runs RMSNorm as six operations."""
    if not isinstance(norm, RMSNorm) or norm.weight.dtype != torch.float32:
        return norm
    width = norm.weight.numel()
    weight_D = norm.weight.detach() * math.sqrt(width)
    floor = norm.weight.new_tensor(math.sqrt(width * norm.eps))
    return lambda x_RD: x_RD / torch.hypot(torch.linalg.vector_norm(x_RD, dim=-1, keepdim=True), floor) * weight_D
