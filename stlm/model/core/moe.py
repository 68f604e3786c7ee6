"""Mixture of experts: each position uses a few of many feed-forwards.

Shape letters: B batch, T positions, D width, E experts, C experts chosen for a position; G groups of S rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stlm.config import MoEConfig, SwiGLUConfig
from stlm.model.context import Context
from stlm.model.core.feed_forward import FEED_FORWARDS, ExpertLinear, FeedForward, SwiGLU


@FEED_FORWARDS.register("moe")
class MoE(FeedForward):
    """Mixture of E SwiGLUs, of which each position uses the C that the router finds most probable (Shazeer et al. 2017,
    arXiv 1701.06538), and a shared one if configured (DeepSeekMoE: Dai et al. 2024, arXiv 2401.06066, section 3.2).

    Outputs are weighted by the experts' probabilities, normalized to sum to 1; with C = 1, by the probability itself,
    from which the router learns (Switch: Fedus et al. 2021, arXiv 2101.03961, section 2.1).

    No position is dropped, and the choice for a position depends on its vector alone. A loss over each row keeps the
    experts balanced (DeepSeek-V3, arXiv 2412.19437, section 2.1.2): E * sum over experts of (the expert's share of the
    choices) * (its mean probability), which is 1 if all are used equally.

    Products of different shapes round differently, and the number of positions that choose an expert depends on all of
    them. So positions are sorted by expert, earlier ones first, and multiplied in groups of a fixed size S; each
    expert's last group is padded with zeros. Only earlier positions decide a position's place in its group, so its
    result is bit-equal whatever follows. (The contents of other rows move it to other places, which changes no bit if
    widths are multiples of 8.) The cost is a loop over about 5 E groups; about an eighth of their rows are zeros.
    """

    def __init__(self, config: MoEConfig, width: int) -> None:
        super().__init__()
        self.num_experts, self.num_chosen = config.num_experts, config.experts_per_token
        self.balance_weight = config.balance_weight
        hidden_width = config.hidden_width_of(width)
        self.router = nn.Linear(width, self.num_experts, bias=False)
        self.gate = ExpertLinear(self.num_experts, width, hidden_width)
        self.up = ExpertLinear(self.num_experts, width, hidden_width)
        self.down = ExpertLinear(self.num_experts, hidden_width, width)
        shared = config.shared_hidden_width
        self.shared = SwiGLU(SwiGLUConfig(hidden_width=shared), width) if shared else None

    def forward(self, x_BTD: Tensor, context: Context | None = None) -> Tensor:
        probability_BTE = self.router(x_BTD).softmax(-1, dtype=torch.float32)
        weight_BTC, chosen_BTC = probability_BTE.topk(self.num_chosen, dim=-1)
        if self.num_chosen > 1:
            weight_BTC = weight_BTC / weight_BTC.sum(-1, keepdim=True)
        if self.training and self.balance_weight and context is not None:
            imbalance = self._imbalance(probability_BTE, chosen_BTC, context.used)
            context.add("balance", self.balance_weight * context.length * imbalance)
        y_BTCD = self._through_experts(x_BTD, chosen_BTC)
        y_BTD = (y_BTCD * weight_BTC[..., None]).sum(2).to(x_BTD.dtype)
        return y_BTD if self.shared is None else y_BTD + self.shared(x_BTD)

    def _imbalance(self, probability_BTE: Tensor, chosen_BTC: Tensor, used_BT: Tensor | None) -> Tensor:
        """Return the balance loss summed over rows; 1 for a row that uses experts equally. Empty slots do not count."""
        share_BTE = F.one_hot(chosen_BTC, self.num_experts).float().mean(2)
        if used_BT is None:
            share_BE, mean_BE = share_BTE.mean(1), probability_BTE.mean(1)
        else:
            weight_BT1 = (used_BT / used_BT.sum(1, keepdim=True))[..., None]
            share_BE, mean_BE = (weight_BT1 * share_BTE).sum(1), (weight_BT1 * probability_BTE).sum(1)
        return self.num_experts * (share_BE * mean_BE).sum()

    def _through_experts(self, x_BTD: Tensor, chosen_BTC: Tensor) -> Tensor:
        """Return the outputs of each position's experts: [B, T, C, D]."""
        B, T, C = chosen_BTC.shape
        expert_n = chosen_BTC.transpose(0, 1).flatten()  # n counts choices: by position, then row, then rank
        size = group_size(expert_n.numel(), self.num_experts)
        order_n = expert_n.argsort(stable=True)
        count_E = expert_n.bincount(minlength=self.num_experts)
        groups_E = (count_E + size - 1) // size
        first_choice_E, first_place_E = count_E.cumsum(0) - count_E, (groups_E.cumsum(0) - groups_E) * size
        sorted_n = expert_n[order_n]
        rank_n = torch.arange(expert_n.numel(), device=expert_n.device) - first_choice_E[sorted_n]
        place_n = torch.empty_like(order_n).index_copy(0, order_n, first_place_E[sorted_n] + rank_n)

        experts = [expert for expert, groups in enumerate(groups_E.tolist()) for _ in range(groups)]
        x_nD = x_BTD.transpose(0, 1).unsqueeze(2).expand(-1, -1, C, -1).flatten(0, 2)
        x_GSD = x_nD.new_zeros(len(experts) * size, x_nD.size(1)).index_copy(0, place_n, x_nD)
        x_GSD = x_GSD.unflatten(0, (len(experts), size))
        y_GSD = self.down(F.silu(self.gate(x_GSD, experts)) * self.up(x_GSD, experts), experts)
        return y_GSD.flatten(0, 1)[place_n].unflatten(0, (T, B, C)).transpose(0, 1)


def group_size(num_choices: int, num_experts: int) -> int:
    """Return the group size, from shapes alone: about 1/4 of an expert's mean load, a multiple of 16 in 16 … 256."""
    return max(16, min(256, num_choices // (4 * num_experts) // 16 * 16))
