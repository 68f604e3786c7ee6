"""Initial values of all parameters.

| parameter                                | initial value                                                     |
|------------------------------------------|-------------------------------------------------------------------|
| vectors of n-grams, those of loops, and  | 0: without effect at first                                        |
| the second factor of corrections (LoRA)  |                                                                   |
| embedding tables, and heads tied to them | normal, standard deviation 0.02                                   |
| untied heads                             | normal, 0.02: first loss close to ln V                            |
| other matrices                           | normal, 1 / sqrt(inputs): keeps the scale of its input            |
| the last matrix of each branch of a      | the same / sqrt(2 L), so that the sum of an L-layer stack's 2 L   |
| block: attention.output, feed_forward.down | branches stays of order 1 (GPT-2: Radford et al. 2019, section 2.3); |
|                                          | L counts the layers that are run, and a matrix that k of them use |
|                                          | is divided by sqrt(k) as well: its k outputs are correlated       |
| norm weights                             | 1                                                                 |
| biases                                   | 0                                                                 |
| mixes of values                          | 1/2 each: the mean of a layer's own and the first one's           |
| learned scales of branches               | model.core.residual.scale                                         |
| query and key of learned patches         | the identity: byte states are compared directly                   |
| thresholds of entropy                    | 0: until they are measured, every byte begins a patch             |

A value depends on the seed and the parameter's name alone, not on the order in which modules are built nor on the rest
of the model. A parameter without a rule here is an error that names it, so no component is initialized by accident.
"""

from __future__ import annotations

import hashlib
from collections import Counter

import torch
from torch import Tensor, nn

from stlm.errors import ConfigError
from stlm.model.core.attention import ValueMix
from stlm.model.core.blocks import BranchScale, LoopEmbeddings, TransformerStack
from stlm.model.core.feed_forward import ExpertLinear
from stlm.model.core.lora import Correction
from stlm.model.core.normalization import Norm
from stlm.model.core.sharing import CorrectedExperts, CorrectedLinear
from stlm.model.embedders.ngrams import NgramEmbedding
from stlm.model.embedders.patching.entropy import EntropyPatching
from stlm.model.embedders.patching.learned import LearnedPatching
from stlm.model.embedders.published import SlotStack

EMBEDDING_STD = 0.02


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Set every parameter of `model` from (seed, parameter name). Tied parameters are set once, by their first name.

    Raises ConfigError, and leaves the model unchanged, if a parameter has no rule.
    """
    constants, deviations = _constants(model), _standard_deviations(model)
    routers = [module for module in model.modules() if isinstance(module, LearnedPatching)]
    identities = {projection.weight for router in routers for projection in (router.query, router.key)}
    named = dict(model.named_parameters())
    _refuse_uncovered(model, [name for name, p in named.items() if p not in constants and p not in deviations])
    for name, parameter in named.items():
        if parameter in constants:
            parameter.fill_(constants[parameter])
        elif parameter in identities:
            nn.init.eye_(parameter)
        else:
            parameter.copy_(_normal(seed, name, parameter, deviations[parameter]))


def _refuse_uncovered(model: nn.Module, names: list[str]) -> None:
    """Raise ConfigError that lists parameters without a rule by name and module; do nothing if there are none."""
    if not names:
        return
    lines = []
    for name in names:
        module = type(model.get_submodule(name.rpartition(".")[0]))
        shape = "x".join(map(str, model.get_parameter(name).shape)) or "a single number"
        lines.append(f"  {name} ({shape}), of {module.__module__}.{module.__qualname__}")
    raise ConfigError(
        "no rule gives an initial value to:\n" + "\n".join(lines) + "\nexpected a rule for every parameter: add one "
        "and a line of the table to stlm/model/initialization.py; or hold matrices in nn.Linear, tables in nn.Embedding"
    )


def _constants(model: nn.Module) -> dict[Tensor, float]:
    """Return the parameters whose entries begin at one value. A rule covers only the named parameter of a module."""
    constants: dict[Tensor, float] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear | Norm):
            rules = {"bias": 0.0, "weight": 1.0} if isinstance(module, Norm) else {"bias": 0.0}
            own = dict(module.named_parameters(recurse=False))
            constants |= {own[name]: value for name, value in rules.items() if name in own}
        elif isinstance(module, ValueMix):
            constants[module.weight] = 0.5
        elif isinstance(module, BranchScale) and module.weight is not None:
            constants[module.weight] = module.scale
    return constants


def _standard_deviations(model: nn.Module) -> dict[Tensor, float]:
    """Return the standard deviation of every matrix; later rules override earlier ones."""
    deviations: dict[Tensor, float] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear | ExpertLinear):
            deviations[module.weight] = module.in_features**-0.5
    for module in model.modules():
        if isinstance(module, TransformerStack | SlotStack):
            lasts = module.last_of_branches()
            uses = Counter(last.weight for last in lasts)
            for last in lasts:
                deviations[last.weight] = (last.in_features * 2 * module.depth * uses[last.weight]) ** -0.5
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) or name == "head.output":
            deviations[module.weight] = EMBEDDING_STD
    for module in model.modules():
        if isinstance(module, NgramEmbedding):
            deviations[module.tables.weight] = 0.0
        elif isinstance(module, LoopEmbeddings):
            deviations[module.weight] = 0.0
        elif isinstance(module, CorrectedLinear | CorrectedExperts):
            deviations[module.lora_b.weight] = 0.0
        elif isinstance(module, Correction):
            deviations[module.b.weight] = 0.0
        elif isinstance(module, EntropyPatching):
            deviations[module.threshold] = 0.0
    return deviations


def _normal(seed: int, name: str, like: Tensor, deviation: float) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.empty(like.shape, dtype=torch.float32).normal_(0.0, deviation, generator=generator)
