"""Dynamic chunking: patches that begin where a router finds a change, trained by the loss of the text.

H-Net (Hwang, Wang & Gu 2025, arXiv 2507.07955, section 2.2). A router compares each byte state with the one before it;
where they differ enough, a patch begins. That choice has no gradient, so the router learns in two other ways: each
position weights its patch's vector by the router's confidence, and each patch is mixed with those before it by its
probability. The byte patch head adds the residual of the byte states around the core.

Shape letters: B batch, T positions, P slots, d width of the byte states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlm.config import BytePatchEmbedderConfig, LearnedPatchingConfig, ModelConfig
from stlm.model.context import Context
from stlm.model.embedders.patching.rules import PATCHINGS, Patching, Placed, Routing
from stlm.model.registry import Vocabulary


class LearnedCache:
    """Decoding state of `LearnedPatching`: the last key."""

    def __init__(self) -> None:
        self.last_B1d: Tensor | None = None


@PATCHINGS.register("learned")
class LearnedPatching(Patching):
    """Rule by which a patch begins where p[t] = (1 - cos(query x[t], key x[t - 1])) / 2 is at least 0.5.

    Both projections begin as the identity. The first position of a window or document has p = 1. A term of the loss for
    each row keeps the share of positions that begin a patch away from 0 and 1:

        ratio = N / (N - 1) * ((N - 1) F G + (1 - F) (1 - G)),    F: share of positions with p >= 0.5,    G: mean p

    If F and G agree, it is least, 1, where one position in N = `patch_length` begins a patch.
    """

    learned = True

    def __init__(self, config: LearnedPatchingConfig, model: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__(config, model, vocabulary)
        assert isinstance(model.embedder, BytePatchEmbedderConfig)
        width = model.embedder.width
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.patch_length, self.ratio_weight = config.patch_length, config.ratio_weight

    def new_cache(self) -> LearnedCache:
        return LearnedCache()

    def forward(
        self, inputs_BT: Tensor, states_BTd: Tensor, context: Context, cache: LearnedCache | None = None
    ) -> Tensor:
        query_BTd, key_BTd = self.query(states_BTd).float(), self.key(states_BTd).float()
        last_B1d = cache.last_B1d if cache is not None else None
        before_BTd = torch.cat((key_BTd[:, :1] if last_B1d is None else last_B1d, key_BTd[:, :-1]), dim=1)
        if cache is not None:
            cache.last_B1d = key_BTd[:, -1:]
        probability_BT = (1 - F.cosine_similarity(query_BTd, before_BTd, dim=-1)) / 2

        begins_BT = torch.zeros_like(inputs_BT, dtype=torch.bool)
        begins_BT[:, 0] = last_B1d is None
        if context.documents is not None:
            begins_BT[:, 1:] = context.documents[:, 1:] != context.documents[:, :-1]
        probability_BT = probability_BT.masked_fill(begins_BT, 1.0)
        ratio_B = ratio(probability_BT, self.patch_length)
        context.add("patch_ratio", self.ratio_weight * inputs_BT.size(1) * ratio_B.sum())
        return probability_BT


def ratio(probability_BT: Tensor, patch_length: float) -> Tensor:
    """Return the loss term of each row, [B]: see `LearnedPatching`. Only the mean probability carries a gradient."""
    share_B = (probability_BT >= 0.5).double().mean(1)
    mean_B = probability_BT.double().mean(1)
    both_B = (patch_length - 1) * share_B * mean_B + (1 - share_B) * (1 - mean_B)
    return patch_length / (patch_length - 1) * both_B


def routing_of(probability_BT: Tensor, placed: Placed, documents_BP: Tensor | None) -> Routing:
    """Return the router's confidence in its choice at each position, and p where each patch begins."""
    sureness_BT = torch.where(placed.begun_BT, probability_BT, 1 - probability_BT)
    probability_BP = probability_BT.gather(1, placed.start_BP.clamp(min=0))
    if documents_BP is not None:  # no mixing across documents, even if one found no slot at its first position
        edge_BP = documents_BP != F.pad(documents_BP[:, :-1], (1, 0))
        probability_BP = probability_BP.masked_fill(edge_BP, 1.0)
    return Routing(sureness_BT, probability_BP)


def smooth(y_BPd: Tensor, probability_BP: Tensor, before_B1d: Tensor) -> Tensor:
    """Mix each patch with those before it: z[i] = p[i] y[i] + (1 - p[i]) z[i - 1], where z[-1] = `before_B1d`.

    This takes log2(P) passes over all patches (Hillis & Steele 1986); each doubles the number of patches that an
    element covers. The result of a patch does not depend on later ones, not even in rounding.
    """
    keep_BP1 = (1 - probability_BP)[..., None]
    z_BPd = probability_BP[..., None] * y_BPd.float()
    z_BPd = torch.cat((z_BPd[:, :1] + keep_BP1[:, :1] * before_B1d.float(), z_BPd[:, 1:]), dim=1)
    reach = 1
    while reach < y_BPd.size(1):
        z_BPd = z_BPd + keep_BP1 * F.pad(z_BPd[:, :-reach], (0, 0, reach, 0))
        keep_BP1 = keep_BP1 * F.pad(keep_BP1[:, :-reach], (0, 0, reach, 0))
        reach *= 2
    return z_BPd.to(y_BPd.dtype)


def weigh(y_BTd: Tensor, sureness_BT: Tensor) -> Tensor:
    """Return `y_BTd` with the gradient of its product with the router's confidence (straight-through)."""
    return y_BTd * (1 + (sureness_BT - sureness_BT.detach())).to(y_BTd.dtype)[..., None]
