"""Rounding of matrices for their inputs: GPTQ (Frantar et al. 2022, arXiv 2210.17323).

Rounding one column of W changes the layer's outputs for its inputs x. The columns not yet rounded are adjusted to
compensate for that change as far as possible, by the inverse of H, the sum of x x^T over a text (section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from stlm.model.core.feed_forward import ExpertLinear
from stlm.model.decoding.quantization import (
    Quantized,
    choose_steps,
    is_quantized,
    nearest_levels,
    round_to_nearest,
    spread,
    steps_of,
)
from stlm.model.heads.linear import TransposedLinear
from stlm.stlm import STLM

DAMPING = 0.01  # of the mean of H's diagonal, added to it (section 3.3)


def quantize(model: STLM, bits: int, batches: Iterable[tuple[Tensor, Tensor | None]]) -> dict[str, Quantized]:
    """Return the matrices of a model as integers, by name.

    `batches`: (ids, document ids or None), each [B, T], for calibration; empty: round to nearest. A matrix that several
    layers or experts share is rounded for the inputs of all of them. Tables that are only looked up have no inputs:
    each of their entries is rounded to nearest.
    """
    moments = input_moments(model, batches)
    return {
        name: round_to_nearest(parameter, bits) if parameter not in moments
        else round_for_inputs(parameter, moments[parameter], bits)
        for name, parameter in model.named_parameters() if is_quantized(parameter)
    }  # fmt: skip


@torch.no_grad()
def input_moments(model: STLM, batches: Iterable[tuple[Tensor, Tensor | None]]) -> dict[Tensor, Tensor]:
    """Return for each matrix that multiplies vectors x the sum of x x^T over a text, [C, C]."""
    moments: dict[Tensor, Tensor] = {}

    def add(weight: Tensor, module: nn.Module, arguments: tuple[Any, ...]) -> None:
        x_NC = arguments[0].float().flatten(0, -2)
        moments[weight] = moments.get(weight, 0.0) + x_NC.T @ x_NC

    multiply = (nn.Linear, ExpertLinear)
    hooks = [
        module.register_forward_pre_hook(partial(add, module.weight))
        for module in model.modules()
        if isinstance(module, multiply) and not isinstance(module, TransposedLinear)
    ]
    try:
        for ids_BT, documents_BT in batches:
            model(ids_BT.to(model.device), None if documents_BT is None else documents_BT.to(model.device))
    finally:
        for hook in hooks:
            hook.remove()
    return moments


def round_for_inputs(weight: Tensor, moments_CC: Tensor, bits: int) -> Quantized:
    """Round a tensor by GPTQ, column by column, the columns with the largest inputs first."""
    weight_RC = weight.detach().float().flatten(0, -2)
    ratios_RG, unit = choose_steps(weight_RC, bits)
    steps_RC = spread(steps_of(ratios_RG, unit), weight_RC.size(1))
    order = moments_CC.diagonal().argsort(descending=True, stable=True)
    pull_CC = _inverse_root(moments_CC[order][:, order])
    rest_RC, steps_RC, levels_RC = weight_RC[:, order], steps_RC[:, order], torch.empty_like(weight_RC)
    for c in range(weight_RC.size(1)):
        level_R1 = nearest_levels(rest_RC[:, c : c + 1], steps_RC[:, c : c + 1], bits)
        error_R1 = (rest_RC[:, c : c + 1] - level_R1 * steps_RC[:, c : c + 1]) / pull_CC[c, c]
        rest_RC[:, c + 1 :] -= error_R1 * pull_CC[c, c + 1 :]
        levels_RC[:, order[c]] = level_R1[:, 0]
    return Quantized(levels_RC.to(torch.int8).view(weight.shape), ratios_RG, unit)


def _inverse_root(moments_CC: Tensor) -> Tensor:
    """Return the upper triangular U with U^T U = H^-1, whose rows distribute an error (section 3.3, step 3)."""
    damped_CC = moments_CC.double()
    mean = damped_CC.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
    damped_CC = damped_CC + DAMPING * mean * torch.eye(len(damped_CC), dtype=torch.float64, device=damped_CC.device)
    inverse_CC = torch.cholesky_inverse(torch.linalg.cholesky(damped_CC))
    return torch.linalg.cholesky(inverse_CC, upper=True).float()
