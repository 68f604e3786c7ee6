"""Communication between ranks in addition to gradients: values, errors and sums; and the time that communication takes.

Values and errors go through the store by which the ranks met, so waiting for a rank that works long is not a collective
that could time out. Sums are collectives. With one rank, or before the ranks have met, each function returns the values
of this rank alone. Messages are data and never code (messages.py), so access to the store does not allow running code.
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
    """Call `function` on rank 0 only. Every rank returns its value, or raises its error.

    messages.py must be able to encode the value. The other ranks wait without a limit, not in a collective that could
    time out, and end at once if rank 0 dies. Their copy of an error has the attribute `told_by_rank_zero`.
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
    """Return rank 0's value on all ranks, or raise its error on all. `outcome`: given on rank 0 only."""
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
    dist.barrier()  # rank 0 hosts the store, so it must not leave before the others have read it
    if failure is not None:
        raise failure
    return value


def _told(failure: Exception) -> dict[str, Any]:
    """Describe a failure of this rank for the other ranks."""
    told = describe_error(failure)
    if not hasattr(failure, "exit_code"):
        told["message"] = f"rank {dist.get_rank() if dist.is_initialized() else 0} failed: {told['message']}"
    return told


def on_every_rank(function: Callable[[], T]) -> T:
    """Call `function` on each rank, and return that rank's value; if it fails on one, every rank raises that error.

    Used for checks of a rank's own node, so that no rank waits for one that has already ended with an error.
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
            raise failure from None  # a fault of the program shows its traceback on this rank
        raise
    return value  # type: ignore[return-value]


def gather(value: T) -> list[T]:
    """Return the values of all ranks, in rank order, on each of them. messages.py must be able to encode them."""
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
    """Limit the time that ranks wait for each other to `timeout_s`. In a hang, stacks are written to `folder`.

    torch's own timeouts, which DeepSpeed leaves at half an hour for some groups, are set to a later time in all groups,
    as they would not show where the ranks hang. Every rank calls this once the engine is made.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2 * timeout_s + 60), group)
    WATCHDOG.start(folder, dist.get_rank(), timeout_s, shared_store().clone())  # type: ignore[attr-defined]


def notice_board() -> dist.Store | None:
    """Return a separate connection to the ranks' store, for use in another thread; None for a single rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return shared_store().clone()  # type: ignore[attr-defined]


def shared_store() -> dist.Store:
    """Return the key-value store by which torch's ranks met; rank 0 hosts it."""
    return dist.distributed_c10d._get_default_store()


@watched("waiting for another rank")
def _wait_for(store: dist.Store, key: str) -> None:
    """Wait until the key is set, without a limit as long as rank 0 sends heartbeats."""
    beats = 0
    while True:
        try:
            return store.wait([key], timedelta(seconds=WATCHDOG.tick_s))
        except dist.DistStoreError:  # timed out
            if (heard := store.add(BEATS, 0)) != beats:
                beats = heard
                WATCHDOG.renew()


@watched("a sum over all ranks")
def sum_over_ranks(values: Sequence[float]) -> list[float]:
    """Sum each value over all ranks, in float64."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return list(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    with STOPWATCH.phase("communication"):
        dist.all_reduce(tensor)
        return tensor.tolist()


def of_every_rank(values: Sequence[float]) -> list[list[float]]:
    """Return the values of each rank, in rank order, on all ranks."""
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
    """Count the time of all collectives of `backend`, whose methods are torch's, as communication."""
    for name in COLLECTIVES:
        setattr(backend, name, timed(getattr(backend, name)))


def timed(collective: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a collective so that its time counts as communication, and for an asynchronous one the time of `wait`."""

    def call(*arguments: Any, **options: Any) -> Any:
        with STOPWATCH.phase("communication"):
            work = collective(*arguments, **options)
        return work if work is None else _TimedWork(work)

    return call


class _TimedWork:
    """Handle of an asynchronous collective. Waiting for it counts as communication."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def wait(self, *arguments: Any) -> Any:
        with STOPWATCH.phase("communication"):
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
