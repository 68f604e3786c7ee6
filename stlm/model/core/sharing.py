"""Weight tying as a plan: layers that hold one tensor between them, each with a correction of its own if wanted.

What is shared are tensors, not modules: every layer keeps its own modules, so that its attention window, its norms and
its corrections may differ, and a shared tensor is one parameter under the name of its first layer. It is stored,
updated, decayed and saved once; its gradient is the sum over all layers that use it.
"""

from __future__ import annotations

from collections.abc import Collection

import torch.nn.functional as F
from torch import Tensor, nn

from stlm.config import SharingConfig
from stlm.errors import ConfigError
from stlm.model.core.experts import ExpertLinear


def share(blocks: nn.ModuleList, sharing: SharingConfig) -> None:
    """Tie the blocks of a stack as planned, and give every shared matrix its layer's own correction.

    ConfigError where modules of a group have tensors of different shapes.
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
    """Places of the modules whose own tensors an entry of the plan shares: those with matrices.

    What has vectors alone, such as norms and scales, stays a layer's own unless it is named itself.
    """
    root = "" if name == "block" else name
    found = []
    for path, module in block.get_submodule(root).named_modules(prefix=root):
        own = list(module.parameters(recurse=False))
        if any(parameter.ndim > 1 for parameter in own) or (own and path == name):
            found.append(path)
    return found


def _tie(block: nn.Module, other: nn.Module, path: str, key: str, layers: tuple[int, int]) -> None:
    """Let `other` hold the very parameters that `block` has at `path`."""
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
    """Put a module with a correction in the place of one that multiplies by a matrix, or by those of experts."""
    module = block.get_submodule(path)
    parent, _, name = path.rpartition(".")
    if isinstance(module, nn.Linear):
        setattr(block.get_submodule(parent), name, CorrectedLinear(module, rank, alpha))
    elif isinstance(module, ExpertLinear):
        setattr(block.get_submodule(parent), name, CorrectedExperts(module, rank, alpha))


class CorrectedLinear(nn.Linear):
    """W x + (alpha / rank) B A x: a shared W, and A [rank, inputs] and B [outputs, rank] of this layer alone.

    B begins at zero, so a model begins as the one without corrections (LoRA: Hu et al. 2021, arXiv 2106.09685, section
    4.1; on layers that share: Bae et al. 2024, arXiv 2410.20672). A and B decay as matrices do, which draws a layer
    towards what is shared.
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
    """The same for the matrices of experts, each with an A and a B of its own: [G, S, in] → [G, S, out]."""

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
    """Settings of a language model by which it ties other tensors than a file with these names: one line for each."""
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
        works = "what was saved with it" if lacking else "model.core.sharing={}"
        lines.append(f"model.core.sharing.modules: shares {shared[0]}, which the file has apart; {works} would work")
    elif lacking:
        lines.append(
            f"model.core.sharing.modules: does not share {lacking[0]}, which the file lacks in a layer that it has; "
            "what was saved with it would work"
        )
    return lines


LORA = ".lora_"  # in the names of corrections


def _layer(name: str) -> str:
    """The layer of the core that a parameter belongs to, as "3"; empty where it belongs to none."""
    prefix, _, rest = name.partition("core.stack.blocks.")
    return "" if prefix else rest.partition(".")[0]
