"""Config of weight sharing between layers of a core. Layers are counted from 0.

    sharing:
      modules: {feed_forward: all}                          # one feed-forward for every layer
      modules: {feed_forward: interior:1}                   # the first and the last layer keep their own
      modules: {attention.output: [[0, 1], [2, 3]]}         # any module, any groups of layers
      modules: {block: [[0, 1]], attention_norm: all}       # a whole block except its norms; norms by their own name
      lora_rank: 64                                         # a correction of rank 64 for each layer

A module's name is its place in a block, down to single matrices (`feed_forward`, `attention.query`), or `block`. Norms
are shared only where they are named: they cost almost nothing, and let each layer use the shared weights differently.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from data_pipeline.plurals import number_of
from stlm.config.yaml.build import nearest
from stlm.config.yaml.fields import Conflict, FreeSection, setting

Groups: TypeAlias = tuple[tuple[int, ...], ...]  # each a group of layers
FORMS = "all, interior:K (all but K layers at either end), or groups of layers such as [[0, 1], [2, 3]]"


@dataclass(frozen=True)
class SharingConfig:
    """Weight tying between layers (Universal Transformer, arXiv 1807.03819; ALBERT, 1909.11942; MobiLlama, 2402.16840).

    The layers of a group hold one tensor for each weight of the named module; its gradient is the sum over its uses.
    """

    modules: FreeSection = field(
        default=FreeSection(), metadata={"help": "name of a module in a block → the layers that share it: " + FORMS}
    )
    lora_rank: int | None = setting(
        None,
        "rank of each layer's own correction to every shared matrix (LoRA, arXiv 2106.09685); null: none",
        unit="dimensions",
        minimum=1,
    )
    lora_alpha: float | None = setting(
        None, "the correction is multiplied by lora_alpha / lora_rank; null: by 1", above=0.0
    )

    def groups(self, num_layers: int) -> dict[str, Groups]:
        """Return the groups of layers that share each named module. The settings must pass `check`."""
        return {name: groups_of(written, num_layers) for name, written in self.modules.entries}

    def check(self, num_layers: int, names: Collection[str]) -> Iterator[Conflict]:
        """Yield the conflicts with the depth and with `names`, all matrices and norms of a block."""
        taken: dict[tuple[str, int], str] = {}  # (matrix or norm, layer) → the entry that shares it
        problems = 0
        for name, written in self.modules.entries:
            for message in _faults(name, written, num_layers, names, taken):
                problems += 1
                yield Conflict(f"modules.{name}", message, ("modules",))
        matrices = any(not is_norm(name) for name, _ in taken)
        if self.lora_rank is not None and not matrices and not problems:
            yield Conflict(
                "lora_rank",
                f"got {self.lora_rank} where no matrix is shared, expected null, or a module that layers share; "
                "model.core.sharing.modules.feed_forward=all would work",
                ("modules",),
            )
        if self.lora_alpha is not None and self.lora_rank is None:
            yield Conflict(
                "lora_alpha",
                f"got {self.lora_alpha:g}, which has no effect without lora_rank; "
                "expected null, or model.core.sharing.lora_rank=8",
                ("lora_rank",),
            )


def groups_of(written: Any, num_layers: int) -> Groups:
    """Return the groups of layers that a value of `modules` stands for. Raises ValueError where it is wrong."""
    if written == "all":
        if num_layers < 2:
            raise ValueError(
                "got 'all' in a core of one layer, expected at least 2; model.core.num_layers=2 would work"
            )
        return (tuple(range(num_layers)),)
    if isinstance(written, str) and written.startswith("interior:") and written[9:].isdecimal() and int(written[9:]):
        ends = int(written[9:])
        if num_layers - 2 * ends < 2:
            works = f"interior:{(num_layers - 2) // 2}" if num_layers >= 4 else "all"
            raise ValueError(
                f"got {written!r}, which leaves {max(0, num_layers - 2 * ends)} of {number_of(num_layers, 'layer')}, "
                f"expected at least 2 that share; {works} would work"
            )
        return (tuple(range(ends, num_layers - ends)),)
    if not isinstance(written, tuple) or not written or not all(isinstance(group, tuple) for group in written):
        shown = "a list that holds no groups" if isinstance(written, tuple) else repr(written)
        raise ValueError(f"got {shown}, expected {FORMS}")
    seen: set[int] = set()
    for group in written:
        for layer in group:
            if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < num_layers:
                raise ValueError(
                    f"got the layer {layer!r}, expected layers from 0 to {num_layers - 1} "
                    f"as model.core.num_layers = {num_layers}"
                )
            if layer in seen:
                raise ValueError(f"got the layer {layer} twice, expected groups that do not overlap")
            seen.add(layer)
        if len(group) < 2:
            raise ValueError(
                f"got the group {list(group)}, expected at least 2 layers that share; leave the others out"
            )
    return written


def members(name: str, names: Collection[str]) -> list[str]:
    """Return the matrices and norms of a block that an entry's name stands for; norms only by their own names."""
    if name in names:
        return [name]
    return [each for each in names if not is_norm(each) and (name == "block" or each.startswith(name + "."))]


def is_norm(name: str) -> bool:
    """Return True for a norm's place in a block, such as attention_norm or attention.query_norm."""
    return name.endswith("norm")


def _faults(
    name: str, written: Any, num_layers: int, names: Collection[str], taken: dict[tuple[str, int], str]
) -> Iterator[str]:
    """Yield the faults of one entry, and add what it shares to `taken`."""
    covered = members(name, names)
    if not covered:
        parts = {each.partition(".")[0] for each in names}
        known = ["block", *sorted(parts), *(each for each in names if "." in each)]
        found = nearest(name, known)
        hint = f"nearest: {', '.join(found)}" if found else f"expected one of {', '.join(known)}"
        yield f"no module of a block has this name; {hint}"
        return
    try:
        groups = groups_of(written, num_layers)
    except ValueError as error:
        yield str(error)
        return
    reported = set()
    for each in covered:
        for layer in (layer for group in groups for layer in group):
            other = taken.setdefault((each, layer), name)
            if other != name and other not in reported:
                reported.add(other)
                yield (
                    f"shares {each} of layer {layer}, which model.core.sharing.modules.{other} shares already; "
                    "expected each matrix of a layer in one group at most"
                )
