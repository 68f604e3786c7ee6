"""Quantization-aware last phase of training, for a model that will be stored in few bits.

The gradient is computed at the rounded matrices and applied to the exact ones: the straight-through estimator (Bengio
et al. 2013, arXiv 1308.3432; Courbariaux et al. 2015, arXiv 1511.00363, section 2.3). The matrices are replaced during
a step's forward and backward passes, so the model's code does not change.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from stlm.config import TrainingConfig
from stlm.errors import ConfigError
from stlm.model.decoding.quantization import is_quantized, round_to_nearest


@contextmanager
def rounded(model: nn.Module, training: TrainingConfig, used_up: float) -> Iterator[None]:
    """Replace all matrices by rounded ones inside this context, in the last `quantization_steps` of a run.

    `used_up`: fraction of the run that ends with this step.
    """
    bits, steps = training.quantization_bits, round(used_up * training.max_steps, 6)
    if bits is None or steps <= training.max_steps - training.quantization_steps:
        yield
        return
    exact = {parameter: parameter.detach().clone() for parameter in model.parameters() if is_quantized(parameter)}
    with torch.no_grad():
        for parameter in exact:
            parameter.copy_(round_to_nearest(parameter, bits).value())
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, values in exact.items():
                parameter.copy_(values)


def check_stage(training: TrainingConfig, stage: int) -> None:
    """Raise ConfigError where ranks hold parts of matrices, which cannot be rounded separately."""
    if training.quantization_bits is not None and stage == 3:
        raise ConfigError(
            f"training.quantization_bits: got {training.quantization_bits} with ZeRO stage 3, whose ranks hold parts "
            "of matrices, expected stage 0, 1 or 2: --ds_config ds_configs/zero2.json would work"
        )
