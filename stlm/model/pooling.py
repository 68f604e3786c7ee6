"""Text embeddings: the mean of the core's outputs at the positions that read a text.

Shape letters: B batch, T positions, P patches (T for token models), D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from stlm.model.embedders.patching.rules import Patches


def starts_of(patches: Patches | None, num_patches: int, inputs_BT: Tensor) -> Tensor:
    """Return the position at which each patch begins, [B, P]: its own for token models, T for slots without a patch."""
    numbers_BP = torch.arange(num_patches, device=inputs_BT.device).repeat(inputs_BT.size(0), 1)
    return numbers_BP if patches is None else torch.searchsorted(patches.index_BT.contiguous(), numbers_BP + 1)


def mean_over_text(y_BPD: Tensor, start_BP: Tensor, lengths_B: Tensor, reach: int) -> Tensor:
    """Return the mean over the patches that read a part of the text: [B, P, D] → fp32 [B, D].

    Position 0 reads the start symbol and positions 1 to `lengths` the text, so a patch has read some of it if the patch
    before begins before position `lengths`. The last one may begin up to `reach` positions after the text. If no patch
    has read any text, as for a text without ids, the result is the state after the start symbol.
    """
    lengths_B1 = lengths_B[:, None]
    counted_BP = F.pad((start_BP[:, :-1] < lengths_B1) & (start_BP[:, 1:] <= lengths_B1 + reach), (1, 0), value=False)
    counted_BP[:, 0] = ~counted_BP.any(1)
    y_BPD = y_BPD.float().masked_fill(~counted_BP[..., None], 0.0)
    return y_BPD.sum(1) / counted_BP.sum(1, keepdim=True)
