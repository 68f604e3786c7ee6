"""One learning rate for every width: a rate tuned at a narrow `base_width` suits a wide model.

Maximal update parametrization (muP: Yang et al. 2022, arXiv 2203.03466, tables 3 and 8), for Adam. m is the ratio of a
module's input width to that in the same model at the base width:

| quantity                                    | compared with the model without a base width                   |
|---------------------------------------------|----------------------------------------------------------------|
| learning rate of matrices                   | / m; tables, norms and biases keep theirs                      |
| their weight decay                          | * m, so that learning rate times decay is unchanged            |
| initial values                              | unchanged: 1 / sqrt(inputs) already is what muP requires       |
| logits                                      | / m                                                            |
| scores of attention                         | / sqrt(m of a head): in all 1 / K instead of 1 / sqrt(K)       |
| vectors read from a table                   | / sqrt(m), which cancels their factor sqrt(width)              |

Modules of equal width in both models, such as the local layers of a byte patch model, have m = 1. No module is listed
by name: the two models are compared module by module.
"""

from __future__ import annotations

from torch import Tensor, nn

from stlm.model.core.attention import GroupedQueryAttention
from stlm.model.core.feed_forward import ExpertLinear
from stlm.model.embedders.base import Embedder
from stlm.model.heads.base import Head


def transfer(model: nn.Module, base: nn.Module) -> None:
    """Set the muP scales of logits, scores and vectors of `model`; `base` is the same model at the base width."""
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
    """Return the factor of the learning rate of each matrix; other parameters keep theirs."""
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
