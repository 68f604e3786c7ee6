"""Hidden states of a model's layers, recorded by hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from stlm.export.remote.positions import take_states
from stlm.model import Network


class HiddenStates:
    """Hidden states of the core: one record for each of its runs, with the states before the first layer and after each
    layer, the last replaced by the core's output."""

    def __init__(self) -> None:
        self.records: list[list[Tensor]] = []
        self.states: list[Tensor] = []

    def finish(self, place: Callable[[Tensor], Tensor], real_BN: Tensor | None = None) -> None:
        """Set `states`, [B, T, D] each, from the records; with `real_BN`, each record is of one row."""
        for layer in zip(*(record[:-2] + record[-1:] for record in self.records), strict=True):
            if real_BN is None:
                (states_BND,) = layer
            else:
                rows, place_BN = iter(layer), real_BN.long().cumsum(1) - 1
                empty = layer[0][0, :0]
                found = [next(rows)[0] if bool(own_N.any()) else empty for own_N in real_BN]
                states_BND = take_states(pad_sequence(found, batch_first=True), place_BN)
            self.states.append(place(states_BND))


@contextmanager
def record_hidden_states(network: Network, wanted: bool) -> Iterator[HiddenStates]:
    """Record the core's states inside the `with` block, if wanted."""
    hidden = HiddenStates()
    with ExitStack() as stack:
        if wanted:

            def begin(module: nn.Module, given: tuple[Any, ...]) -> None:
                hidden.records.append([given[0]])

            def note(module: nn.Module, given: tuple[Any, ...], found: Tensor) -> None:
                hidden.records[-1].append(found)

            hooks = [network.core.register_forward_pre_hook(begin), network.core.register_forward_hook(note)]
            blocks: Any = network.core.get_submodule("stack.blocks")
            hooks += [block.register_forward_hook(note) for block in blocks]
            for hook in hooks:
                stack.callback(hook.remove)
        yield hidden
