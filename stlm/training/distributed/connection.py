"""Connection of this process with the ranks that train together: joining them, values, errors and sums.

Values and errors go through the store by which the ranks met, so waiting for a rank that works long is not a collective
that could time out. Sums are collectives. With one rank, each method returns the values of this rank alone. Messages
are data and never code (messages.py), so access to the store does not allow running code.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from stlm.errors import EngineError, LostRank
from stlm.training.deepspeed.startup import start_process_group
from stlm.training.distributed.lost import describe_process, find_lost_ranks
from stlm.training.distributed.messages import decode, describe_error, encode, error_of
from stlm.training.distributed.ranks import Ranks, find_ranks
from stlm.training.distributed.signals import StopSignals
from stlm.training.distributed.stopping import AgreedStop, Interruptible
from stlm.training.distributed.stopwatch import Stopwatch
from stlm.training.distributed.watchdog import BEATS, Watchdog

T = TypeVar("T")


class Distributed:
    """This process among the ranks that train together. All ranks call the same methods in the same order.

    `join` makes it once in a process, and it is passed to everything that needs the ranks. It also holds the stopwatch
    of the steps, the watchdog against hangs, and the signals that ask the run to stop.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.stopwatch = Stopwatch()
        self.watchdog = Watchdog()
        self.signals = StopSignals()
        self.interruptible = Interruptible(self.signals, self.sum_over_ranks, self._clone_store)
        self._store = None if self.world_size == 1 else _new_store(ranks.rank)
        self._turns = count()  # of the exchanges of values
        self._reported: BaseException | None = None  # the newest error that another rank reports
        self._processes = self.gather(describe_process())

    @classmethod
    def join(cls) -> Distributed:
        """Join the other ranks. A second call in a process returns a new object for the same ranks.

        Raises EngineError where the ranks cannot meet or DeepSpeed cannot be imported.
        """
        ranks = find_ranks()
        if "OMP_NUM_THREADS" not in os.environ and not dist.is_initialized():
            torch.set_num_threads(max(1, _cores() // ranks.local_world_size))  # ranks of a machine share its cores
        try:
            backend = start_process_group(ranks)
        except (dist.DistNetworkError, OSError) as error:
            raise EngineError(
                f"the ranks cannot meet at {ranks.address}:{ranks.port}: {str(error).splitlines()[0]}; if another run "
                "has that port, choose another: deepspeed --master_port, torchrun --master_port, MASTER_PORT"
            ) from error
        joined = cls(ranks)
        joined.stopwatch.time_collectives(backend)
        return joined

    @property
    def rank(self) -> int:
        return self.ranks.rank

    @property
    def world_size(self) -> int:
        return self.ranks.world_size

    def leave(self) -> None:
        """Leave the other ranks before the process ends. They cannot be joined again."""
        if dist.is_initialized():
            dist.destroy_process_group()

    # ---------------------------------------------------------------------- values and errors

    def on_rank_zero(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0 only. Every rank returns its value, or raises its error, which rank 0 reports.

        messages.py must be able to encode the value. The other ranks wait without a limit, not in a collective that
        could time out, and end at once if rank 0 dies.
        """
        if self.world_size == 1:
            return function()
        if self.rank != 0:
            return self._from_rank_zero(None)
        with self.watchdog.busy():
            try:
                value, failure = function(), None
            except Exception as error:
                value, failure = None, error
        return self._from_rank_zero((value, failure))

    def on_every_rank(self, function: Callable[[], T]) -> T:
        """Call `function` on each rank, and return that rank's value; if it fails on one, every rank raises that error.

        Used for checks of a rank's own node, so that no rank waits for one that has already ended with an error.
        """
        value, failure = None, None
        try:
            value = function()
        except Exception as error:
            failure = error
        failures = self.gather((socket.gethostname(), None if failure is None else self._describe(failure)))

        def raise_first() -> None:
            for rank, (host, described) in enumerate(failures):
                if described is not None:
                    place = "" if rank == 0 else f"rank {rank} on {host}: "
                    raise error_of({**described, "message": f"{place}{described['message']}"})

        try:
            self.on_rank_zero(raise_first)
        except Exception:
            if failure is not None and not hasattr(failure, "exit_code"):
                raise failure from None  # a fault of the program shows its traceback on this rank
            raise
        return value  # type: ignore[return-value]

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in rank order, on each of them. messages.py must be able to encode them."""
        if self._store is None:
            return [value]
        key = str(next(self._turns))
        self._store.set(f"{key}/{self.rank}", encode(value))  # type: ignore[arg-type]
        if self.rank != 0:
            return self._from_rank_zero(None)
        values = []
        for rank in range(self.world_size):
            self._wait_for(f"{key}/{rank}")
            values.append(decode(self._store.get(f"{key}/{rank}")))
        return self._from_rank_zero((values, None))

    def reported_by_another(self, error: BaseException) -> bool:
        """Return True if another rank reports this error, so that this rank need not."""
        return error is self._reported

    @contextmanager
    def naming_lost_ranks(self) -> Iterator[None]:
        """Turn an error caused by the loss of another rank into LostRank, inside this context."""
        try:
            yield
        except RuntimeError as error:
            found = find_lost_ranks(error, self._processes, self.rank, self._store)
            if found is None:
                raise
            message, reporter = found
            lost = LostRank(message)
            if reporter != self.rank:
                self._reported = lost
            raise lost from error

    def _from_rank_zero(self, outcome: tuple[Any, Exception | None] | None) -> Any:
        """Return rank 0's value on all ranks, or raise its error on all. `outcome`: given on rank 0 only."""
        assert self._store is not None
        key = str(next(self._turns))
        with self.watchdog.watching("waiting for rank 0"):
            if outcome is not None:
                value, failure = outcome
                described = None if failure is None else self._describe(failure)
                self._store.set(key, encode([value, described]))  # type: ignore[arg-type]
            else:
                self._wait_for(key)
                value, described = decode(self._store.get(key))
                failure = None if described is None else error_of(described)
                self._reported = failure or self._reported
            dist.barrier()  # rank 0 hosts the store, so it must not leave before the others have read it
        if failure is not None:
            raise failure
        return value

    def _describe(self, failure: Exception) -> dict[str, Any]:
        """Describe a failure of this rank for the other ranks."""
        described = describe_error(failure)
        if not hasattr(failure, "exit_code"):
            described["message"] = f"rank {self.rank} failed: {described['message']}"
        return described

    def _wait_for(self, key: str) -> None:
        """Wait until the key is set, without a limit as long as rank 0 sends heartbeats."""
        assert self._store is not None
        beats = 0
        with self.watchdog.watching("waiting for another rank"):
            while True:
                try:
                    return self._store.wait([key], timedelta(seconds=self.watchdog.tick_s))
                except dist.DistStoreError:  # timed out
                    if (heard := self._store.add(BEATS, 0)) != beats:
                        beats = heard
                        self.watchdog.renew()

    # ---------------------------------------------------------------------- sums

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Sum each value over all ranks, in float64."""
        if self.world_size == 1:
            return list(values)
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        tensor = torch.tensor(values, dtype=torch.float64, device=device)
        with self.watchdog.watching("a sum over all ranks"), self.stopwatch.phase("communication"):
            dist.all_reduce(tensor)
            return tensor.tolist()

    def of_every_rank(self, values: Sequence[float]) -> list[list[float]]:
        """Return the values of each rank, in rank order, on all ranks."""
        number = len(values)
        flat = [0.0] * (self.world_size * number)
        flat[self.rank * number : (self.rank + 1) * number] = values
        flat = self.sum_over_ranks(flat)
        return [flat[start : start + number] for start in range(0, len(flat), number)]

    # ---------------------------------------------------------------------- hangs and requests to stop

    def watch_for_hangs(self, folder: Path, timeout_s: float) -> None:
        """Limit the time that ranks wait for each other to `timeout_s`. In a hang, stacks are written to `folder`.

        torch's own timeouts, which DeepSpeed leaves at half an hour for some groups, are set to a later time in all
        groups, as they would not show where the ranks hang. Called once the engine is made.
        """
        if (store := self._clone_store()) is None:
            return
        for group in list(dist.distributed_c10d._world.pg_map):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=2 * timeout_s + 60), group)
        self.watchdog.start(folder, self.rank, timeout_s, store)

    def agreed_stop(self) -> AgreedStop:
        """Return a callable for long work that contains collectives: True once a rank was asked to stop."""
        return AgreedStop(self.signals, self.rank, self.sum_over_ranks)

    def _clone_store(self) -> dist.Store | None:
        """Return a separate connection to the ranks' store, for use in another thread; None for a single rank."""
        return None if self._store is None else self._store.clone()  # type: ignore[attr-defined]


def _new_store(rank: int) -> dist.Store:
    """Return a part of the store by which torch's ranks met, which no earlier object of this process has used."""
    store = dist.distributed_c10d._get_default_store()
    return dist.PrefixStore(f"stlm/{store.add(f'stlm/joined/{rank}', 1)}", store)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
