"""What ranks tell each other beside their gradients: values, errors, sums; and how long all of it takes.

Values and errors go through the table by which the ranks met, so that waiting for a rank that works for long is no
collective that could time out; sums are collectives. With one rank, or before the ranks have met, all of it is what one
rank has to say. Messages are data and never code (messages.py): who reaches that table can run nothing on a rank.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from stlm.training.distributed.messages import decode, describe_error, encode, error_of
from stlm.training.distributed.stopwatch import STOPWATCH
from stlm.training.distributed.watchdog import BEATS, WATCHDOG, watched

T = TypeVar("T")

_turns = count()


def on_rank_zero(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 only; every rank gets its value, or raises its error.

    The value is one that messages.py can encode. The other ranks wait as long as it takes, without a collective that
    could time out, and end at once if rank 0 dies. Their copy of an error has the attribute `told_by_rank_zero`.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return function()
    if dist.get_rank() != 0:
        return _from_rank_zero(None)
    with WATCHDOG.busy():
        try:
            value, failure = function(), None
        except Exception as error:
            value, failure = None, error
    return _from_rank_zero((value, failure))


@watched("waiting for rank 0")
def _from_rank_zero(outcome: tuple[Any, Exception | None] | None) -> Any:
    """The value that rank 0, which alone knows the outcome, gives to all; or its error, raised everywhere."""
    store = shared_store()
    key = f"stlm/{next(_turns)}"
    if outcome is not None:
        value, failure = outcome
        told = None if failure is None else _told(failure)
        store.set(key, encode([value, told]))  # type: ignore[arg-type]
    else:
        _wait_for(store, key)
        value, told = decode(store.get(key))
        failure = None if told is None else error_of(told)
        if failure is not None:
            failure.told_by_rank_zero = True  # type: ignore[attr-defined]
    dist.barrier()  # rank 0 keeps the store: it must not leave before the others have read it
    if failure is not None:
        raise failure
    return value


def _told(failure: Exception) -> dict[str, Any]:
    """What the other ranks get to know of a failure of this one."""
    told = describe_error(failure)
    if not hasattr(failure, "exit_code"):
        told["message"] = f"rank {dist.get_rank() if dist.is_initialized() else 0} failed: {told['message']}"
    return told


def on_every_rank(function: Callable[[], T]) -> T:
    """Call `function` on each rank, and return its own value there; if it fails on one, every rank raises that error.

    For what a rank finds out about its own node: none is left waiting for one that has ended with a mistake.
    """
    value, failure = None, None
    try:
        value = function()
    except Exception as error:
        failure = error
    failures = gather((socket.gethostname(), None if failure is None else _told(failure)))

    def tell() -> None:
        for rank, (host, told) in enumerate(failures):
            if told is not None:
                place = "" if rank == 0 else f"rank {rank} on {host}: "
                raise error_of({**told, "message": f"{place}{told['message']}"})

    try:
        on_rank_zero(tell)
    except Exception:
        if failure is not None and not hasattr(failure, "exit_code"):
            raise failure from None  # our own fault shows its traceback here
        raise
    return value  # type: ignore[return-value]


def gather(value: T) -> list[T]:
    """The values of all ranks, in their order, on each of them; of the kinds that messages.py can encode."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    store = shared_store()
    key = f"stlm/{next(_turns)}"
    store.set(f"{key}/{dist.get_rank()}", encode(value))  # type: ignore[arg-type]

    if dist.get_rank() != 0:
        return _from_rank_zero(None)
    values = []
    for rank in range(dist.get_world_size()):
        _wait_for(store, f"{key}/{rank}")
        values.append(decode(store.get(f"{key}/{rank}")))
    return _from_rank_zero((values, None))


def watch_for_hangs(folder: Path, timeout_s: float) -> None:
    """Let no rank wait for the others longer than `timeout_s`; the stacks of a hang go into `folder`.

    torch's own patience, which DeepSpeed leaves at half an hour for some of its groups, ends later in all of them: it
    would not say where the ranks hang. Every rank calls this, when the engine is made.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2 * timeout_s + 60), group)
    WATCHDOG.start(folder, dist.get_rank(), timeout_s, shared_store().clone())  # type: ignore[attr-defined]


def notice_board() -> dist.Store | None:
    """A connection of its own to the table by which the ranks met, for another thread; None for a single rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return shared_store().clone()  # type: ignore[attr-defined]


def shared_store() -> dist.Store:
    """What torch's ranks met by: a table that rank 0 keeps."""
    return dist.distributed_c10d._get_default_store()


@watched("waiting for another rank")
def _wait_for(store: dist.Store, key: str) -> None:
    """Return when the key is set, however long that takes, while rank 0 works."""
    beats = 0
    while True:
        try:
            return store.wait([key], timedelta(seconds=WATCHDOG.tick_s))
        except dist.DistStoreError:  # the time is over
            if (heard := store.add(BEATS, 0)) != beats:
                beats = heard
                WATCHDOG.renew()


@watched("a sum over all ranks")
def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Each value summed over all ranks, in float64."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    with STOPWATCH.phase("communication"):
        dist.all_reduce(tensor)
        return tensor.tolist()


def of_every_rank(values: Sequence[float]) -> list[list[float]]:
    """The values of each rank, in the order of the ranks, on all of them."""
    if not dist.is_initialized():
        return [list(values)]
    rank, number = dist.get_rank(), len(values)
    flat = [0.0] * (dist.get_world_size() * number)
    flat[rank * number : (rank + 1) * number] = values
    flat = sum_over_ranks(flat)
    return [flat[start : start + number] for start in range(0, len(flat), number)]


# ---------------------------------------------------------------------- time


COLLECTIVES = (
    "all_gather", "all_gather_coalesced", "all_gather_into_tensor", "all_reduce", "all_reduce_coalesced",
    "all_to_all", "all_to_all_single", "barrier", "broadcast", "reduce", "reduce_scatter", "reduce_scatter_tensor",
)  # fmt: skip


def time_collectives(backend: Any) -> None:
    """Let the stopwatch see what is sent through an object whose methods are torch's collectives."""
    for name in COLLECTIVES:
        setattr(backend, name, timed(getattr(backend, name)))


def timed(collective: Callable[..., Any]) -> Callable[..., Any]:
    """The same collective, its time counted as communication, and that of waiting for it, where it goes on beside."""

    def call(*arguments: Any, **options: Any) -> Any:
        with STOPWATCH.phase("communication"):
            work = collective(*arguments, **options)
        return work if work is None else _TimedWork(work)

    return call


class _TimedWork:
    """What a collective that goes on beside the step hands out: waiting for it is communication."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self, *arguments: Any) -> Any:
        with STOPWATCH.phase("communication"):
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
