"""Muon: momentum that is orthogonalised before it is applied, for the matrices inside a model (Jordan 2024,
kellerjordan.github.io/posts/muon).

A matrix's momentum M = U S V^T becomes approximately U V^T: the update is equally large in every direction. The root
mean square of U V^T depends on its shape, so the update is scaled to 0.2, close to AdamW's updates; one learning rate
and one weight decay then serve both (Moonlight: Liu et al. 2025, arXiv 2502.16982, section 2.2).

Where ZeRO shards the matrices over ranks, each rank keeps the momentum of its own parts, gathers the other parts,
orthogonalises every matrix, and keeps its part of the result. The result equals that of stage 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from stlm.training.optim.zero_shards import ZeroShard

MOMENTUM = 0.95  # Nesterov momentum
# Of odd quintics a x + b x^3 + c x^5, one a step. Each is the closest to 1, in the largest error, over the interval to
# which those before it have brought singular values from [0.002, 1]: the composition is then the closest too (Polar
# Express: Amsel et al. 2025, arXiv 2505.16932, theorem 3.1). Four such steps bring singular values as near to 1 as five
# with the coefficients of Jordan (2024).
COEFFICIENTS = (
    (8.4268, -24.9361, 18.4925),
    (4.1116, -3.0591, 0.5750),
    (3.7146, -2.7781, 0.5429),
    (2.7819, -2.0749, 0.4635),
)
BATCH = 1 << 24  # numbers that are orthogonalised as one batch, at most
ROOT_MEAN_SQUARE = 0.2


class Muon(torch.optim.Optimizer):
    """Muon for the groups that have `orthogonal` set, AdamW for the others.

    Tensors of more than two dimensions are stacks of matrices. The engine sets `dtype`, and fills `shards` where ZeRO
    passes flat tensors to the optimizer; all ranks then have to call `step` together.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], eps: float
    ) -> None:  # fmt: skip
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "orthogonal": False})
        self.shards: dict[Tensor, ZeroShard] = {}
        self.dtype = torch.float32  # of the products that orthogonalize; momentum and weights are always fp32

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            members = [parameter for parameter in group["params"] if parameter.grad is not None]
            if members:
                (self._orthogonal_step if group["orthogonal"] else self._adamw_step)(group, members)

    def _orthogonal_step(self, group: dict[str, Any], members: list[Tensor]) -> None:
        matrices: list[list[Tensor]] = []  # of each member; whole, though the member may be a shard
        for parameter in members:
            ahead, shard = self._ahead(parameter), self.shards.get(parameter)
            matrices.append([ahead] if shard is None else shard.join(ahead))
        updates = iter(orthogonalize_all([matrix for each in matrices for matrix in each], self.dtype))
        for parameter, each in zip(members, matrices, strict=True):
            whole = [scaled(next(updates)) for _ in each]
            shard = self.shards.get(parameter)
            update = whole[0] if shard is None else shard.own_part(whole)
            parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"])

    def _ahead(self, parameter: Tensor) -> Tensor:
        """Add the gradient to the momentum; return the Nesterov momentum."""
        entry = self.state[parameter]
        if not entry:
            entry.update(step=torch.tensor(0.0), momentum=torch.zeros_like(parameter))
        entry["step"] += 1
        gradient, momentum = parameter.grad.float(), entry["momentum"]  # type: ignore[union-attr]
        momentum.mul_(MOMENTUM).add_(gradient)
        return gradient.add(momentum, alpha=MOMENTUM)

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


def orthogonalize_all(matrices: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Orthogonalize matrices, and stacks of them, those of one shape (or its transpose) as one batch."""
    places: dict[tuple[int, int], list[int]] = {}
    for place, matrix in enumerate(matrices):
        short, long = sorted(matrix.shape[-2:])
        places.setdefault((short, long), []).append(place)
    found = list(matrices)
    for shape, members in places.items():
        wide = [_wide(matrices[place]).reshape(-1, *shape) for place in members]
        for batch in _batches(list(zip(members, wide, strict=True))):
            together = orthogonalized(torch.cat([each for _, each in batch]).to(dtype)).float()
            parts = together.split([len(each) for _, each in batch])
            for place, update in zip([place for place, _ in batch], parts, strict=True):
                whole = matrices[place]
                found[place] = update.view(_wide(whole).shape).mT if _is_tall(whole) else update.view(whole.shape)
    return found


def _batches(members: list[tuple[int, Tensor]]) -> Iterator[list[tuple[int, Tensor]]]:
    batch: list[tuple[int, Tensor]] = []
    for member in members:
        if batch and sum(each.numel() for _, each in [*batch, member]) > BATCH:
            yield batch
            batch = []
        batch.append(member)
    yield batch


def _is_tall(matrix: Tensor) -> bool:
    return matrix.size(-2) > matrix.size(-1)


def _wide(matrix: Tensor) -> Tensor:
    return matrix.mT if _is_tall(matrix) else matrix


def orthogonalized(wide_XRC: Tensor) -> Tensor:
    """Bring the singular values of matrices with no more rows than columns near 1 (0.67 to 1.33)."""
    x_XRC = wide_XRC / (wide_XRC.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)  # none above 1, for all rounding
    for a, b, c in COEFFICIENTS:
        square_XRR = x_XRC @ x_XRC.mT
        factor_XRR = torch.baddbmm(square_XRR, square_XRR, square_XRR, beta=b, alpha=c)
        x_XRC = torch.baddbmm(x_XRC, factor_XRR, x_XRC, beta=a)
    return x_XRC


def scaled(orthogonal: Tensor) -> Tensor:
    """Scale an orthogonal matrix to the root mean square of AdamW's updates."""
    return orthogonal * (ROOT_MEAN_SQUARE * max(orthogonal.shape[-2:]) ** 0.5)
