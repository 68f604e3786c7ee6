"""Muon: momentum that is orthogonalised before it is applied, for the matrices inside a model (Jordan 2024,
kellerjordan.github.io/posts/muon).

A matrix's momentum M = U S V^T becomes approximately U V^T: the update is equally large in every direction. The root
mean square of U V^T depends on its shape, so the update is scaled to 0.2, close to AdamW's updates; one learning rate
and one weight decay then serve both (Moonlight: Liu et al. 2025, arXiv 2502.16982, section 2.2).

Where ZeRO shards the matrices over ranks, each rank keeps the momentum of its own parts, gathers the other parts,
orthogonalises every matrix, and keeps its part of the result. The result equals that of stage 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from stlm.training.optim.zero_shards import ZeroShard

MOMENTUM = 0.95  # Nesterov momentum
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of a quintic that is steep at 0, so that five steps suffice
STEPS = 5
ROOT_MEAN_SQUARE = 0.2


class Muon(torch.optim.Optimizer):
    """Muon for the groups that have `orthogonal` set, AdamW for the others.

    Tensors of more than two dimensions are stacks of matrices. The engine fills `shards` where ZeRO passes flat tensors
    to the optimizer; all ranks then have to call `step` together.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float
    ) -> None:  # fmt: skip
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "orthogonal": False})
        self.shards: dict[Tensor, ZeroShard] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
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
    """Bring all singular values of [..., rows, columns] near 1 (0.7 to 1.2), by Newton-Schulz iteration."""
    a, b, c = COEFFICIENTS
    tall = matrix.size(-2) > matrix.size(-1)
    x = matrix.mT if tall else matrix
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # no singular value above 1
    for _ in range(STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def scaled(orthogonal: Tensor) -> Tensor:
    """Scale an orthogonal matrix to the root mean square of AdamW's updates."""
    return orthogonal * (ROOT_MEAN_SQUARE * max(orthogonal.shape[-2:]) ** 0.5)
