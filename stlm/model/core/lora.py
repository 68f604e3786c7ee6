"""Low-rank corrections of a frozen model (LoRA: Hu et al. 2021, arXiv 2106.09685), and merging them into its matrices.

A matrix keeps its module and its name, so that a model with corrections can load the weights of one without. Layers
that share a matrix share its correction, so that every correction can be merged.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stlm.config import LoRAConfig
from stlm.errors import ConfigError
from stlm.model.core.sharing import CorrectedLinear

NAME = "lora"  # of the correction, below the matrix that it belongs to


class Correction(nn.Module):
    """Correction scale * B A x: A [rank, inputs], B [outputs, rank]. B begins at zero, and so does the correction."""

    def __init__(self, linear: nn.Linear, config: LoRAConfig) -> None:
        super().__init__()
        assert config.rank is not None
        self.a = nn.Linear(linear.in_features, config.rank, bias=False)
        self.b = nn.Linear(config.rank, linear.out_features, bias=False)
        self.scale = config.scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.b(self.a(x))

    def matrix(self) -> Tensor:
        """Return the matrix [outputs, inputs] that merging adds to the weight."""
        return self.scale * (self.b.weight @ self.a.weight)


def correct(model: nn.Module, core: nn.Module, config: LoRAConfig) -> None:
    """Freeze a model, and add a trainable correction to each target matrix of the core. Raises ConfigError
    if a configured target names no matrix; by default, only if none does."""
    model.requires_grad_(False)
    corrections: dict[Tensor, Correction] = {}
    own = [one for one in core.modules() if isinstance(one, CorrectedLinear)]  # corrections of shared matrices
    left_out = {linear for one in own for linear in (one.lora_a, one.lora_b)}
    targets = dict.fromkeys(config.targets.split(","), False)  # whether a matrix was found there
    for name, linear in list(core.named_modules()):
        if linear in left_out:
            continue
        here = [target for target in targets if f".{target}." in f".{name}."]
        if isinstance(linear, nn.Linear) and here:
            targets |= dict.fromkeys(here, True)
            correction = corrections.get(linear.weight)
            if correction is None:
                correction = corrections[linear.weight] = Correction(linear, config)
            linear.add_module(NAME, correction)
            linear.register_forward_hook(_add)
    missing = [target for target, found in targets.items() if not found]
    if missing and (config.targets != LoRAConfig.targets or not any(targets.values())):  # defaults need not all exist
        kinds = sorted({name.rpartition(".")[2] for name, one in core.named_modules() if type(one) is nn.Linear})
        raise ConfigError(
            f"model.lora.targets: the core has no matrix in {missing[0]!r}, expected some of attention, feed_forward, "
            f"{', '.join(kinds)}, or the name of a layer such as stack.blocks.0"
        )


def _add(linear: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + linear.get_submodule(NAME)(inputs[0])


@torch.no_grad()
def merged_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters, by name, of an equivalent model without corrections."""
    parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name in [name for name in parameters if name.endswith(f".{NAME}.a.weight")]:
        path = name.removesuffix(f".{NAME}.a.weight")
        correction = model.get_submodule(f"{path}.{NAME}")
        assert isinstance(correction, Correction)
        parameters[f"{path}.weight"] += correction.matrix()
    return {name: tensor for name, tensor in parameters.items() if f".{NAME}." not in name}
