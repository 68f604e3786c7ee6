"""Parameters, FLOPs and memory of a model, measured on a pass rather than computed by formulas.

A new component needs no line here. The pass uses fake tensors, which have shapes and no values, and so takes no memory
and no arithmetic. Where shapes depend on values, as those of experts do, the pass is a real one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from stlm.model.core.attention import Attention
from stlm.model.decoding.cache import KeyValueCache

FP32 = 4  # bytes


def count_parameters(model: nn.Module) -> int:
    """Return the number of unique parameters, embedding included; a shared tensor counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Part:
    """Counts of one kind of layer. A tied parameter belongs to the part of its first name."""

    name: str  # "embedder", "core attention", "core feed_forward", "core norm", "head", …
    parameters: int  # unique
    effective: int  # each counted as often as a pass uses it: shared layers, loops, a tied head
    forward_flops: float  # per id


@dataclass(frozen=True)
class Account:
    """Counts of a model. A multiplication and an addition are two FLOPs; only matrix products are counted."""

    parts: tuple[Part, ...]
    parameters: int
    effective: int
    embedding: int  # parameters of embedding tables
    trained: int  # parameters that are not frozen
    rows: int  # sequences in the pass that was measured
    forward_flops: float  # per id
    backward_flops: float  # per id
    activation_bytes: dict[str, int]  # kept for the backward pass of `rows` sequences: "fp32", "bf16"
    cache_bytes: int  # keys and values that decoding holds after a full context, fp32
    simulated: bool  # measured with fake tensors


@torch.enable_grad()
def account(make: Callable[[], nn.Module], vocab_size: int, context_length: int, rows: int) -> Account:
    """Measure the model that `make` builds, in training on `rows` sequences of `context_length` ids.

    The model has `embedder`, `core`, `head`, and a forward that takes ids and whose output has `logits`. If fake
    tensors do not suffice, it is built a second time for a real pass over one row, which is as slow as the model.
    """
    try:
        with FakeTensorMode():
            return _measure(make(), torch.zeros(rows, context_length, dtype=torch.long), simulated=True)
    except (DataDependentOutputException, DynamicOutputShapeException):
        ids_1T = torch.randint(0, vocab_size, (1, context_length), generator=torch.Generator().manual_seed(1))
        return _measure(make(), ids_1T, simulated=False)


def optimizer_bytes(account: Account, stage: int, ranks: int) -> dict[str, int]:
    """Return one rank's bytes in training under a ZeRO stage (Rajbhandari et al. 2020, arXiv 1910.02054, section 5).

    Weights, gradients and Adam's two moments are fp32 in every precision. From stage 1 on, DeepSpeed holds a second,
    partitioned copy of the weights. Communication buffers, and at stage 3 the gathered layer, come on top.
    """
    whole, trained = FP32 * account.parameters, FP32 * account.trained
    return {
        "weights": _share(whole, ranks if stage == 3 else 1),
        "master weights": _share(trained, ranks) if stage else 0,
        "gradients": _share(trained, ranks if stage >= 2 else 1),
        "moments": _share(2 * trained, ranks if stage else 1),
    }


def _share(bytes: int, ranks: int) -> int:
    return -(-bytes // ranks)


# ---------------------------------------------------------------------- the pass


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, out_shape: Any, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(
    gradient: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


CPU_ATTENTION = {  # torch's counter knows the kernels of GPUs only
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def _measure(model: Any, ids_BT: Tensor, simulated: bool) -> Account:
    model.train()
    saved = {}
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counter:
        with (hooks := _Saved(model)):
            loss = _loss(model, ids_BT)
        saved["fp32"] = hooks.bytes()
        forward = counter.get_total_flops()
        flops = {name.partition(".")[2]: sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
        uses = _uses(loss)
        loss.backward()
        backward = counter.get_total_flops() - forward
    with (hooks := _Saved(model)), torch.autocast("cpu", torch.bfloat16):
        _loss(model, ids_BT)
    saved["bf16"] = hooks.bytes()
    parts = tuple(_parts(model, uses, flops, ids_BT.numel()))
    return Account(
        parts=parts,
        parameters=count_parameters(model),
        effective=sum(part.effective for part in parts),
        embedding=sum(module.weight.numel() for module in model.embedder.modules() if isinstance(module, nn.Embedding)),
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        rows=ids_BT.size(0),
        forward_flops=forward / ids_BT.numel(),
        backward_flops=backward / ids_BT.numel(),
        activation_bytes=saved,
        cache_bytes=_cache_bytes(model, ids_BT[:1]),
        simulated=simulated,
    )


def _loss(model: Any, ids_BT: Tensor) -> Tensor:
    """Return the loss of next-token prediction plus the auxiliary terms of parts."""
    output = model(ids_BT)
    return sum(output.auxiliary.values(), F.cross_entropy(output.logits.float().flatten(0, 1), ids_BT.flatten()))


class _Saved(AbstractContextManager[Any]):
    """Context manager that records the tensors autograd saves for the backward pass."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self._kept: list[Tensor] = []  # kept alive, so that no storage is freed and its address reused
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)

    def _keep(self, tensor: Tensor) -> Tensor:
        self._kept.append(tensor.detach())
        return tensor

    def __enter__(self) -> _Saved:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    def bytes(self) -> int:
        """Return the bytes of all recorded tensors except weights; shared storage counts once."""
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in self._kept}
        return sum(size for storage, size in storages.items() if storage not in self._weights)


def _uses(loss: Tensor) -> Counter[Tensor]:
    """Count how often the pass that ended in `loss` used each parameter: the edges of the graph that lead to it."""
    uses: Counter[Tensor] = Counter()
    seen, waiting = {loss.grad_fn}, [loss.grad_fn]
    while waiting:
        node = waiting.pop()
        assert node is not None
        for following, _ in node.next_functions:
            if following is None:
                continue
            if hasattr(following, "variable"):
                uses[following.variable] += 1
            elif following not in seen:
                seen.add(following)
                waiting.append(following)
    return uses


def _parts(model: nn.Module, uses: Counter[Tensor], flops: dict[str, int], ids: int) -> Iterator[Part]:
    unique: Counter[str] = Counter()
    effective: dict[str, float] = defaultdict(float)
    names: Counter[Tensor] = Counter(parameter for _, parameter in model.named_parameters(remove_duplicate=False))
    first = {parameter: name for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        part = part_of(name)
        unique[part] += parameter.numel() if first[parameter] == name else 0
        # The uses of a tensor with several names, as in tied heads and shared layers, are divided equally among them.
        effective[part] += parameter.numel() * max(uses[parameter], names[parameter]) / names[parameter]
    work: Counter[str] = Counter()
    for name, count in flops.items():
        if name in ("embedder", "head") or (name and _layer_part(name) == name):
            work[part_of(name)] += count
    work["core other"] = flops.get("core", 0) - sum(count for part, count in work.items() if part.startswith("core"))
    for part in sorted({*unique, *(part for part, count in work.items() if count)}, key=_order):
        yield Part(part, unique[part], round(effective[part]), work[part] / ids)


def part_of(name: str) -> str:
    """Return the kind of layer that a name belongs to: core.stack.blocks.3.attention.query → core attention."""
    place = name.split(".")
    if place[0] != "core":
        return place[0]
    kind = (_layer_part(name) or ".".join(place[:2])).rpartition(".")[2]
    if kind.endswith("norm"):
        return "core norm"
    return f"core {kind}" if _layer_part(name) else "core other"


def _layer_part(name: str) -> str:
    """Return a layer's part: core.stack.blocks.3.attention.query → core.stack.blocks.3.attention; "" outside layers."""
    place = name.split(".")
    number = next((index for index, each in enumerate(place) if each.isdecimal()), len(place))
    return ".".join(place[: number + 2]) if place[0] == "core" and number + 1 < len(place) else ""


def _order(part: str) -> tuple[bool, bool, str]:
    """Sort key: embedder first, head last; the core's parts by name, "core other" last among them."""
    return part == "head", part != "embedder", part.replace("other", "~")


@torch.no_grad()
def _cache_bytes(model: Any, ids_1T: Tensor) -> int:
    """Bytes of all attention caches after the ids. A hook reruns each attention on the same vectors with a cache."""
    total = 0

    def run_with_cache(module: Attention, inputs: tuple[Any, ...], output: Tensor) -> None:
        nonlocal total
        cache: KeyValueCache = module.new_cache()
        x_BTD, placement, context = inputs[:3]
        module.forward(x_BTD, placement, context, cache)
        total += cache.nbytes

    handles = [part.register_forward_hook(run_with_cache) for part in model.modules() if isinstance(part, Attention)]
    model(ids_1T)
    for handle in handles:
        handle.remove()
    return total
