"""The optimizer and its parameter groups."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from stlm.config import TrainingConfig
from stlm.model.heads.base import Head
from stlm.stlm import STLM
from stlm.training.init_from import freeze
from stlm.training.optim.muon import Muon


def build_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """Build AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) or Muon, with its parameter groups.

    Matrices decay; vectors (norm weights) and embeddings do not. A base width adds groups with learning rates of their
    own. A tied parameter is one parameter, and counts as an embedding if either of its uses is one. Muon orthogonalises
    the matrices that decay, except the last one, which computes logits. The schedule sets the learning rate at every
    step. Also freezes `training.frozen_parts`.
    """
    if isinstance(model, STLM):
        freeze(model, training)
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]  # each tied one once
    exempt = {parameter for parameter in parameters if parameter.ndim < 2 or parameter in embeddings}
    scales = model.learning_rate_scales() if isinstance(model, STLM) else {}
    decayed: dict[float, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter not in exempt:
            decayed.setdefault(scales.get(parameter, 1.0), []).append(parameter)
    groups: list[dict[str, Any]] = [
        # Decay per step is learning rate times weight_decay at any scale (CompleteP: arXiv 2505.01618, table 1).
        {"params": members, "weight_decay": training.weight_decay / scale, "learning_rate_scale": scale}
        for scale, members in decayed.items()
    ]
    groups.append({"params": [p for p in parameters if p in exempt], "weight_decay": 0.0, "learning_rate_scale": 1.0})
    rates: dict[str, Any] = {
        "lr": training.learning_rate,
        "betas": (training.beta1, training.beta2),
        "eps": training.epsilon,
    }
    if training.optimizer == "muon":
        last = {module.output.weight for module in model.modules() if isinstance(module, Head)}
        inside = [group | {"params": [p for p in group["params"] if p not in last], "orthogonal": True}
                  for group in groups[:-1]]  # fmt: skip
        outside = [group | {"params": [p for p in group["params"] if p in last]} for group in groups[:-1]]
        return Muon([group for group in [*inside, *outside, groups[-1]] if group["params"]], **rates)
    # fused: one pass over memory; exists on CPU and CUDA
    return torch.optim.AdamW([group for group in groups if group["params"]], **rates, fused=True)
