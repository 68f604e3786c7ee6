"""The form in which layers decode: matrices side by side, as few vectors read them fastest, and few operations.

One position at a time, reading the matrices is half of the work, and starting operations is the other half. Nothing of
the model is changed: what is made here is a second copy of the matrices, for models in use.

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
BLOCK = 16  # integers that torch reads at a time, also behind the end of a row that is no multiple of them


class Product:
    """Linear maps of the same vectors, with all that corrects them, as one: [R, in] → [R, out], side by side."""

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


class RoundedProduct(Product):
    """The same of numbers of 16 bits, bfloat16, summed in fp32: vectors are rounded as the matrix is."""

    def __init__(self, linears: tuple[nn.Linear, ...]) -> None:
        super().__init__(linears)
        self._lay_out()

    def _lay_out(self) -> None:
        """Put the matrix into the form in which oneDNN reads it."""
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
    """The same of integers of 8 bits, each output with a step of its own; many vectors read them as bfloat16."""

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
    """Makes products of one precision, each once: layers that share matrices share what is made of them."""

    def __init__(self, precision: str = "fp32") -> None:
        self._kind = {"fp32": Product, "bf16": RoundedProduct, "int8": IntegerProduct}[precision]
        self._made: dict[tuple[int, ...], Product] = {}

    def of(self, *linears: nn.Linear) -> Product:
        """The product of linear maps side by side."""
        key = tuple(id(linear.weight) if _plain(linear) else id(linear) for linear in linears)
        if key not in self._made:
            self._made[key] = self._kind(linears)
        return self._made[key]


P = TypeVar("P", bound="Packable")


class Packable(nn.Module):
    """Base of modules that have a second form, `packed`, until they are trained, moved or given other weights."""

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
    """Bring all that is `Packable` into its second form."""
    products = Products(precision)
    for module in model.modules():
        if isinstance(module, Packable):
            module.pack(products)


def unpack(model: nn.Module) -> None:
    """Use all as it is, whose weights may change."""
    for module in model.modules():
        if isinstance(module, Packable):
            module.packed = None


def _plain(linear: nn.Linear) -> bool:
    """Whether nothing but matrix and vector, which are shared together, make what a linear map gives."""
    return type(linear) is nn.Linear and not linear._forward_hooks


def normalize(norm: Norm) -> Callable[[Tensor], Tensor]:
    """A norm in as few operations as there are: [R, D] → [R, D]. On a CPU, torch has RMSNorm as a row of six."""
    if not isinstance(norm, RMSNorm) or norm.weight.dtype != torch.float32:
        return norm
    width = norm.weight.numel()
    weight_D = norm.weight.detach() * math.sqrt(width)
    floor = norm.weight.new_tensor(math.sqrt(width * norm.eps))
    return lambda x_RD: x_RD / torch.hypot(torch.linalg.vector_norm(x_RD, dim=-1, keepdim=True), floor) * weight_D
