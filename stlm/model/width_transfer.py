"""One learning rate for every width: what was found at a narrow `base_width` holds for a wide model.

Maximal update parametrization (muP: Yang et al. 2022, arXiv 2203.03466, tables 3 and 8), for Adam. m is how many times
wider a module's inputs are than in the same model at the base width:

| what                                        | beside the model without                                       |
|---------------------------------------------|----------------------------------------------------------------|
| learning rate of matrices                   | / m; tables, norms and biases keep theirs                      |
| their weight decay                          | * m, so that learning rate times decay stays as it was         |
| initial values                              | as they are: 1 / sqrt(inputs) already is what is asked for     |
| logits                                      | / m                                                            |
| scores of attention                         | / sqrt(m of a head): in all 1 / K instead of 1 / sqrt(K)       |
| vectors read from a table                   | / sqrt(m), which takes back their factor sqrt(width)           |

What is as wide at both widths, such as the local layers of a byte patch model, has m = 1. So nothing is listed here by
name: the two models are compared module by module.
"""

from __future__ import annotations

from torch import Tensor, nn

from stlm.model.core.attention import GroupedQueryAttention
from stlm.model.core.experts import ExpertLinear
from stlm.model.embedders.token import Embedder
from stlm.model.heads.linear import Head


def transfer(model: nn.Module, base: nn.Module) -> None:
    """Scale logits, scores and vectors of `model` for what holds at the width of `base`, the same model there."""
    at_base = dict(base.named_modules())
    for name, module in model.named_modules():
        narrow = at_base[name]
        if isinstance(module, GroupedQueryAttention) and isinstance(narrow, GroupedQueryAttention):
            module.query_scale = (narrow.head_width / module.head_width) ** 0.5
        elif isinstance(module, Head) and isinstance(narrow, Head):
            module.logit_scale = narrow.output.in_features / module.output.in_features
        elif isinstance(module, Embedder) and isinstance(narrow, Embedder):
            module.read_scale = (narrow.table.embedding_dim / module.table.embedding_dim) ** 0.5


def learning_rate_scales(model: nn.Module, base: nn.Module) -> dict[Tensor, float]:
    """What the learning rate of each matrix is multiplied by; those that are left out keep it."""
    at_base = dict(base.named_modules())
    kept = {module.weight for module in model.modules() if isinstance(module, nn.Embedding)}
    kept |= {module.output.weight for module in model.modules() if isinstance(module, Head)}  # their logits are scaled
    scales: dict[Tensor, float] = {}
    for name, module in model.named_modules():
        narrow = at_base[name]
        if not isinstance(module, nn.Linear | ExpertLinear) or module.weight in kept:
            continue
        assert isinstance(narrow, nn.Linear | ExpertLinear)
        scales[module.weight] = narrow.in_features / module.in_features
    return scales
