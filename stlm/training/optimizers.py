"""The optimizer and its parameter groups."""

from __future__ import annotations

import torch
from torch import nn

from stlm.config import TrainingConfig


def build_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with two groups.

    Matrices decay; vectors (norm weights) and embeddings do not. A tied parameter is one parameter, and an embedding if
    either of its uses is one. The learning rate is set at every step, from the schedule.
    """
    embeddings = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]  # each tied one once
    exempt = {parameter for parameter in parameters if parameter.ndim < 2 or parameter in embeddings}
    groups = [
        {"params": [p for p in parameters if p not in exempt], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p in exempt], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=training.learning_rate,
        betas=(training.beta1, training.beta2),
        eps=training.epsilon,
        fused=True,  # one pass over memory; exists on CPU and CUDA
    )
