"""Muon: momentum that is orthogonalised before it is applied, for the matrices inside a model (Jordan 2024,
kellerjordan.github.io/posts/muon).

A matrix's momentum M = U S V^T becomes U V^T, nearly: every direction that it has is followed equally far. The root of
its mean square then depends on its shape, so it is scaled to 0.2, about what AdamW's updates have; one learning rate
and one weight decay serve both (Moonlight: Liu et al. 2025, arXiv 2502.16982, section 2.2).

Where ZeRO has cut the matrices over the ranks, each keeps the momentum of its own parts, gathers those of the others,
and takes its part of what comes out: equal to stage 0. Every rank orthogonalises every matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from stlm.training.optim.zero_shards import Shard

MOMENTUM = 0.95  # of Nesterov's kind
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic: steep at 0, so that five steps are enough
STEPS = 5
ROOT_MEAN_SQUARE = 0.2


class Muon(torch.optim.Optimizer):
    """Muon for the groups that have `orthogonal` set, AdamW for the others.

    Tensors of more than two dimensions are stacks of matrices. `shards` is filled by the engine where ZeRO hands over
    flat tensors: every rank has to call `step` then.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float
    ) -> None:  # fmt: skip
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "orthogonal": False})
        self.shards: dict[Tensor, Shard] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One update of everything that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            members = [parameter for parameter in group["params"] if parameter.grad is not None]
            if members:
                (self._orthogonal_step if group["orthogonal"] else self._adamw_step)(group, members)

    def _orthogonal_step(self, group: dict[str, Any], members: list[Tensor]) -> None:
        for parameter in members:
            entry = self.state[parameter]
            if not entry:
                entry.update(step=torch.tensor(0.0), momentum=torch.zeros_like(parameter))
            entry["step"] += 1
            gradient, momentum = parameter.grad.float(), entry["momentum"]  # type: ignore[union-attr]
            momentum.mul_(MOMENTUM).add_(gradient)
            ahead = gradient.add(momentum, alpha=MOMENTUM)
            shard = self.shards.get(parameter)
            if shard is None:
                update = scaled(orthogonalized(ahead))
            else:
                update = shard.own_part([scaled(orthogonalized(matrix)) for matrix in shard.join(ahead)])
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _adamw_step(self, group: dict[str, Any], members: list[Tensor]) -> None:
        for parameter in members:
            if not self.state[parameter]:
                zeros = {key: torch.zeros_like(parameter) for key in ("exp_avg", "exp_avg_sq")}
                self.state[parameter].update(step=torch.tensor(0.0, device=parameter.device), **zeros)
        entries = [self.state[parameter] for parameter in members]
        beta1, beta2 = group["betas"]
        adamw(
            members,
            [parameter.grad for parameter in members],  # type: ignore[misc]
            exp_avgs=[entry["exp_avg"] for entry in entries],
            exp_avg_sqs=[entry["exp_avg_sq"] for entry in entries],
            max_exp_avg_sqs=[],
            state_steps=[entry["step"] for entry in entries],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def orthogonalized(matrix: Tensor) -> Tensor:
    """[..., rows, columns] → the same with all singular values near 1 (0.7 to 1.2), by Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    tall = matrix.size(-2) > matrix.size(-1)
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value above 1
    for _ in range(STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def scaled(orthogonal: Tensor) -> Tensor:
    """An orthogonal matrix at the root mean square that AdamW's updates have."""
    return orthogonal * (ROOT_MEAN_SQUARE * max(orthogonal.shape[-2:]) ** 0.5)
