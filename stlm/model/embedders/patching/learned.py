"""Patches that begin where the model itself finds something new: dynamic chunking, trained by the loss of the text.

H-Net (Hwang, Wang & Gu 2025, arXiv 2507.07955, section 2.2). A router compares each byte state with the one before it;
where they are unlike, a patch begins. That choice is a step without a slope, so the router learns on two other ways: by
how sure it is, each position weighs what it reads of its patch; and by its probability, each patch is mixed with those
before it. The residual of the byte states around the core is the byte patch head's.

Shape letters as elsewhere: B batch, T positions, P slots, d width of the byte states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlm.config import BytePatchEmbedderConfig, LearnedPatchingConfig, ModelConfig
from stlm.model.context import Context
from stlm.model.embedders.patching.rules import PATCHINGS, Patching, Placed, Routing
from stlm.model.vocabulary import Vocabulary


class LearnedCache:
    """Decoding state of `LearnedPatching`: the last key."""

    def __init__(self) -> None:
        self.last_B1d: Tensor | None = None


@PATCHINGS.register("learned")
class LearnedPatching(Patching):
    """A patch begins with probability p[t] = (1 - cos(query x[t], key x[t - 1])) / 2, that is: from 0.5 on it does.

    Both projections begin as the identity. The first position, of a window and of a document, has p = 1. What keeps
    patches from being all or none is a term of the loss, for each row

        ratio = N / (N - 1) * ((N - 1) F G + (1 - F) (1 - G)),    F: share of positions with p >= 0.5,    G: mean p

    which, as far as F and G agree, is least where one position in N = `patch_length` begins a patch; it is 1 there.
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
    """The term of each row, [B]: see `LearnedPatching`. Its slope is that of the mean probability alone."""
    share_B = (probability_BT >= 0.5).double().mean(1)
    mean_B = probability_BT.double().mean(1)
    both_B = (patch_length - 1) * share_B * mean_B + (1 - share_B) * (1 - mean_B)
    return patch_length / (patch_length - 1) * both_B


def routing_of(probability_BT: Tensor, placed: Placed, documents_BP: Tensor | None) -> Routing:
    """What the head needs: how sure the router is of what happens at each position, and p where each patch begins."""
    sureness_BT = torch.where(placed.begun_BT, probability_BT, 1 - probability_BT)
    probability_BP = probability_BT.gather(1, placed.start_BP.clamp(min=0))
    if documents_BP is not None:  # a document may find no slot at its first position; nothing is mixed across its edge
        edge_BP = documents_BP != F.pad(documents_BP[:, :-1], (1, 0))
        probability_BP = probability_BP.masked_fill(edge_BP, 1.0)
    return Routing(sureness_BT, probability_BP)


def smooth(y_BPd: Tensor, probability_BP: Tensor, before_B1d: Tensor) -> Tensor:
    """Each patch mixed with those before it: z[i] = p[i] y[i] + (1 - p[i]) z[i - 1], where z[-1] = `before_B1d`.

    In log2(P) passes over all patches (Hillis & Steele 1986): after each, an element is the recurrence over twice as
    many patches. What is computed for a patch depends on no later one, not by one bit.
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
    """`y_BTd` itself, but with the gradient of its product with how sure the router is (straight through)."""
    return y_BTd * (1 + (sureness_BT - sureness_BT.detach())).to(y_BTd.dtype)[..., None]
