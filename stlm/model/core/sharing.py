"""Weight sharing between layers, by a plan, with an optional low-rank correction (LoRA) for each layer.

Tensors are shared, not modules: every layer keeps its own modules, so its attention window, norms and corrections may
differ. A shared tensor is one parameter under the name of its first layer: stored, updated, decayed and saved once. Its
gradient is the sum over all layers that use it.
"""

from __future__ import annotations

from collections.abc import Collection

import torch.nn.functional as F
from torch import Tensor, nn

from stlm.config import SharingConfig
from stlm.errors import ConfigError
from stlm.model.core.feed_forward import ExpertLinear


def share(blocks: nn.ModuleList, sharing: SharingConfig) -> None:
    """Tie the blocks of a stack as planned, and give every shared matrix its layer's own correction.

    Raises ConfigError if modules of a group have tensors of different shapes.
    """
    for name, groups in sharing.groups(len(blocks)).items():
        for first, *others in groups:
            for path in _shared_modules(blocks[first], name):
                for other in others:
                    _tie(blocks[first], blocks[other], path, f"model.core.sharing.modules.{name}", (first, other))
                if sharing.lora_rank is not None:
                    for layer in (first, *others):
                        _correct(blocks[layer], path, sharing.lora_rank, sharing.lora_alpha or sharing.lora_rank)


def _shared_modules(block: nn.Module, name: str) -> list[str]:
    """Return the paths of the modules whose own tensors an entry of the plan shares: those with matrices.

    Modules with vectors alone, such as norms and scales, are not shared unless named.
    """
    root = "" if name == "block" else name
    found = []
    for path, module in block.get_submodule(root).named_modules(prefix=root):
        own = list(module.parameters(recurse=False))
        if any(parameter.ndim > 1 for parameter in own) or (own and path == name):
            found.append(path)
    return found


def _tie(block: nn.Module, other: nn.Module, path: str, key: str, layers: tuple[int, int]) -> None:
    """Replace the parameters of `other` at `path` by those of `block`."""
    source, target = block.get_submodule(path), other.get_submodule(path)
    for name, parameter in source.named_parameters(recurse=False):
        shape = getattr(target, name).shape
        if shape != parameter.shape:
            raise ConfigError(
                f"{key}: got layers {layers[0]} and {layers[1]}, whose {path}.{name} are {list(parameter.shape)} and "
                f"{list(shape)}, expected layers of one shape; put them into different groups"
            )
        setattr(target, name, parameter)


def _correct(block: nn.Module, path: str, rank: int, alpha: float) -> None:
    """Replace a linear module, or linear maps of experts, by one with a correction."""
    module = block.get_submodule(path)
    parent, _, name = path.rpartition(".")
    if isinstance(module, nn.Linear):
        setattr(block.get_submodule(parent), name, CorrectedLinear(module, rank, alpha))
    elif isinstance(module, ExpertLinear):
        setattr(block.get_submodule(parent), name, CorrectedExperts(module, rank, alpha))


class CorrectedLinear(nn.Linear):
    """Linear map W x + (alpha / rank) B A x: W is shared; A [rank, inputs] and B [outputs, rank] are the layer's own.

    B begins at zero, so a model begins as the one without corrections (LoRA: Hu et al. 2021, arXiv 2106.09685, section
    4.1; on shared layers: Bae et al. 2024, arXiv 2410.20672). Weight decay applies to A and B, which draws a layer
    towards the shared matrix.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.lora_a = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_b = nn.Linear(rank, linear.out_features, bias=False)
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias) + self.scale * self.lora_b(self.lora_a(x))


class CorrectedExperts(ExpertLinear):
    """Linear maps of experts with corrections, an A and a B for each expert: [G, S, in] → [G, S, out]."""

    def __init__(self, linear: ExpertLinear, rank: int, alpha: float) -> None:
        num_experts, out_features, in_features = linear.weight.shape
        super().__init__(num_experts, in_features, out_features)
        self.weight = linear.weight
        self.lora_a = ExpertLinear(num_experts, in_features, rank)
        self.lora_b = ExpertLinear(num_experts, rank, out_features)
        self.scale = alpha / rank

    def forward(self, x_GSi: Tensor, experts: list[int]) -> Tensor:
        return super().forward(x_GSi, experts) + self.scale * self.lora_b(self.lora_a(x_GSi, experts), experts)


def other_ties(model: nn.Module, saved: Collection[str]) -> list[str]:
    """Return a line for each setting by which `model` ties other tensors than a file with the names `saved`."""
    first = {parameter: name for name, parameter in model.named_parameters()}
    names = {name: first[parameter] for name, parameter in model.named_parameters(remove_duplicate=False)}
    apart = [name for name in names if name != names[name] and name in saved]  # one here, two there
    absent = [name for name in names if name == names[name] and name not in saved]
    lines = []
    if "head.output.weight" in apart:
        lines.append("model.head.tied: got true, but the file has a head.output.weight of its own; false would work")
    if "head.output.weight" in absent:
        lines.append("model.head.tied: got false, but the file has no head.output.weight; true would work")
    corrected = any(LORA in name for name in saved)
    if corrected != any(LORA in name for name in names):
        has, works = ("has", "the rank that was saved with it") if corrected else ("has no", "null")
        lines.append(f"model.core.sharing.lora_rank: the file {has} corrections; {works} would work")
    layers = {_layer(name) for name in saved} - {""}
    lacking = [name for name in absent if _layer(name) in layers and LORA not in name]
    if shared := [name for name in apart if _layer(name)]:
        works = "the setting saved with it" if lacking else "model.core.sharing={}"
        lines.append(
            f"model.core.sharing.modules: shares {shared[0]}, which the file stores separately; {works} would work"
        )
    elif lacking:
        lines.append(
            f"model.core.sharing.modules: does not share {lacking[0]}, which the file lacks in a layer that it has; "
            "the setting saved with it would work"
        )
    return lines


LORA = ".lora_"  # in the names of corrections


def _layer(name: str) -> str:
    """Return the number of the core's layer that a parameter belongs to, as "3"; "" outside the layers."""
    prefix, _, rest = name.partition("core.stack.blocks.")
    return "" if prefix else rest.partition(".")[0]
