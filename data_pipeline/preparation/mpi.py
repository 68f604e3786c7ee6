"""The same work on several machines: `mpirun -n K bash scripts/preprocess.sh …`, or `srun`, and a shared file system.

Rank 0 prepares. It hands out one job after another, to processes of its own and to the other ranks, which do nothing
but serve: each runs what it is sent on processes of its own and sends back what came of it. Rank 0 alone decides and
prints, so an error anywhere is raised there, once. A rank that is killed ends the others: mpirun and srun see to it.

Messages are looked for now and then and never waited for: whoever waits inside MPI keeps a core busy. They are JSON,
and name functions of a list: MPI asks nobody who connects, and mpi4py's pickles would run whatever they hold.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.messages import from_plain, to_plain
from data_pipeline.plurals import number_of
from data_pipeline.preparation.workers import Result, process_pool, result_of, submit

_PAUSE_S = 0.01
_MOST_CORES = 1 << 13  # of a machine

# What a launcher sets in each process that it starts: how many there are, and which this one is.
_LAUNCHERS = (
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),  # Open MPI
    ("mpirun", "PMI_SIZE", "PMI_RANK"),  # MPICH, Intel MPI; also srun --mpi=pmi2
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


@contextmanager
def joined() -> Iterator[Ranks | None]:
    """The ranks that were started together with this process; None if it was started alone.

    When the block ends on rank 0, the others are dismissed. DataError, on rank 0, if the ranks cannot find each other.
    """
    launcher, size, rank = _launched()
    if size == 1:
        yield None
        return
    try:
        mpi = _connect(launcher, size)
    except DataError:
        if rank > 0:
            sys.exit()  # rank 0 says it
        raise
    ranks = Ranks(mpi)
    try:
        yield ranks
    finally:
        if ranks.rank == 0:
            ranks.dismiss()


def _launched() -> tuple[str, int, int]:
    """What started this process, with how many others, and its number among them."""
    for launcher, size, rank in _LAUNCHERS:
        if size in os.environ:
            return launcher, int(os.environ[size]), int(os.environ.get(rank, 0))
    return "", 1, 0


def _connect(launcher: str, size: int) -> Any:
    """mpi4py's MPI, initialised."""
    what = f"{launcher} started {number_of(size, 'process', 'processes')}"
    try:
        import mpi4py

        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{what}, which find each other by mpi4py, but it does not work here ({reason}); install an MPI library "
            f"on every node (on Debian openmpi-bin; on a cluster load its module), or start one process"
        ) from None
    if not MPI.Is_initialized():
        wired = any(name.startswith(("PMI_", "PMIX_")) for name in os.environ)
        if launcher == "srun" and "Open MPI" in MPI.Get_library_version() and not wired:
            raise DataError(
                f"{what} but does not tell Open MPI how they find each other; add --mpi=pmix, or what "
                f"`srun --mpi=list` offers instead, or use mpirun within the allocation"
            )
        MPI.Init_thread()
    if MPI.COMM_WORLD.Get_size() != size:
        raise DataError(
            f"{what}, but MPI counts {MPI.COMM_WORLD.Get_size()}: {launcher} belongs to another MPI than the one that "
            f"mpi4py uses ({MPI.Get_library_version().splitlines()[0]}); start with the launcher of that one"
        )
    return MPI


class Ranks:
    """All ranks of an MPI job, as rank 0 and each of the others see them."""

    def __init__(self, mpi: Any) -> None:
        """Called by all ranks at once."""
        self._mpi = mpi
        self._comm = mpi.COMM_WORLD
        self._outbox: list[Any] = []  # messages on their way
        self._pool: ProcessPoolExecutor | None = None  # this rank's processes, once there is work
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()
        cores = np.zeros(self.size, np.int64)
        self._comm.Gather(np.array(_share_of_cores(self._comm.Split_type(mpi.COMM_TYPE_SHARED)), np.int64), cores)
        self._workers: list[int] = cores.tolist()  # rank 0: the processes of each rank

    def use_workers(self, number: int | None) -> None:
        """Rank 0: let each rank use that many processes; None: one for each core that it may use."""
        if number is not None:
            self._workers = [number] * self.size

    def run(
        self, function: Callable[..., Result], jobs: Sequence[tuple[Any, ...]], size: int
    ) -> Iterator[tuple[int, Result]]:
        """Rank 0: see `workers.Team`. The ranks are there already, so all of them are called, whatever the size."""
        waiting = deque(enumerate(jobs))
        free = list(self._workers)
        mine: dict[Future[Result], int] = {}
        while waiting or free != self._workers:
            while waiting and any(free):
                index, job = waiting.popleft()
                rank = free.index(max(free))  # so a few jobs are spread over all ranks
                free[rank] -= 1
                if rank == 0:
                    mine[self._submit(self._workers[0], function, job)] = index
                else:
                    self._send(rank, ("run", self._workers[rank], index, function, job))
            for future in _finished(mine):
                free[0] += 1
                yield mine.pop(future), result_of(future)
            for rank, (index, result, error) in self._arrived():
                free[rank] += 1
                if error is not None:
                    raise DataError(error[1]) if error[0] == DataError.__name__ else RuntimeError(error[1])
                yield index, result

    def check_shared(self, path: Path) -> None:
        """Rank 0: DataError if a rank does not see this file."""
        for rank in range(1, self.size):
            self._send(rank, ("look", path.absolute()))
        unanswered = self.size - 1
        while unanswered:
            time.sleep(_PAUSE_S)
            for rank, (host, sees) in self._arrived():
                unanswered -= 1
                if not sees:
                    raise DataError(
                        f"rank {rank} on {host} does not see {path}, which rank 0 wrote on {socket.gethostname()}; "
                        f"choose a folder that all nodes share with --output"
                    )

    def serve(self) -> None:
        """The other ranks: do what rank 0 sends until it says that there is no more."""
        running: dict[Future[Any], int] = {}
        while True:
            for _, message in self._arrived():
                match message:
                    case ("run", workers, index, function, job):
                        try:
                            running[self._submit(workers, function, job)] = index
                        except DataError as error:
                            self._send(0, (index, None, (DataError.__name__, str(error))))
                    case ("look", path):
                        self._send(0, (socket.gethostname(), path.exists()))
                    case None:
                        self._close_pool()
                        self._send(0, None)
                        return
            for future in _finished(running):
                self._send(0, (running.pop(future), *self._outcome(future)))

    def dismiss(self) -> None:
        """Rank 0: let the others go, and wait until they have finished what they had begun."""
        for rank in range(1, self.size):
            self._send(rank, None)
        self._close_pool()
        serving = self.size - 1
        while serving:
            time.sleep(_PAUSE_S)
            serving -= sum(message is None for _, message in self._arrived())

    def _outcome(self, future: Future[Any]) -> tuple[Any, tuple[str, str] | None]:
        """The result of a job, and the error if there was one: its class, and what it says."""
        try:
            return result_of(future), None
        except DataError as error:
            return None, (DataError.__name__, str(error))
        except BaseException as error:
            text = "".join(traceback.format_exception(error))
            return None, (RuntimeError.__name__, f"on rank {self.rank}, {socket.gethostname()}:\n{text}")

    def _submit(self, workers: int, function: Callable[..., Result], job: tuple[Any, ...]) -> Future[Result]:
        self._pool = self._pool or process_pool(workers)
        return submit(self._pool, function, job)

    def _close_pool(self) -> None:
        """Drop the jobs that were not begun, and finish the others."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _send(self, rank: int, message: Any) -> None:
        self._outbox = [request for request in self._outbox if not request.test()[0]]
        self._outbox.append(self._comm.Isend(encode(message), rank))

    def _arrived(self) -> Iterator[tuple[int, Any]]:
        """Messages that are there, each with the rank that sent it."""
        status = self._mpi.Status()
        while self._comm.Iprobe(status=status):
            message = bytearray(status.Get_count(self._mpi.BYTE))
            self._comm.Recv(message, source=status.Get_source(), tag=status.Get_tag())
            yield status.Get_source(), decode(bytes(message))


def _finished(running: dict[Future[Any], int]) -> list[Future[Any]]:
    """The jobs that are done, after at most a short while."""
    if not running:
        time.sleep(_PAUSE_S)
        return []
    return list(wait(running, timeout=_PAUSE_S, return_when=FIRST_COMPLETED).done)


def _share_of_cores(node: Any) -> int:
    """How many processes a rank should use, at least one: the cores it may use, each divided by the ranks that may.

    node: the communicator of the ranks of one machine. Launchers may give each rank cores of its own, or all to all.
    """
    mine = np.zeros(_MOST_CORES, np.uint8)
    mine[[core for core in os.sched_getaffinity(0) if core < _MOST_CORES]] = 1
    everyone = np.zeros((node.Get_size(), _MOST_CORES), np.uint8)
    node.Allgather(mine, everyone)
    share = float((1 / everyone.sum(axis=0, dtype=np.int64)[mine > 0]).sum())
    granted = int(os.environ.get("SLURM_CPUS_PER_TASK", mine.sum()))
    return max(1, min(round(share), granted))


# ---------------------------------------------------------------------- messages


# The functions that one rank may ask another to call. What they work on is in files, as their jobs are small.
JOBS = (
    "data_pipeline.preparation.workers:call",
    "data_pipeline.preparation.recognition:_sha256",
    "data_pipeline.preparation.gathering:gather",
    "data_pipeline.cleaning.decontamination:find",
    "data_pipeline.cleaning.near_duplicates:sign",
    "data_pipeline.preparation.encoding:encode_piece",
    "data_pipeline.preparation.encoding:write_planned",
    "data_pipeline.preparation.statistics:describe_source",
    "data_pipeline.loading.verify:_problem",
)


def encode(message: Any) -> bytes:
    """A message of plain values, dataclasses of this package and functions of JOBS. TypeError for anything else."""
    return json.dumps(to_plain(message, _named)).encode()


def decode(message: bytes) -> Any:
    """What `encode` was given. ValueError for anything else."""
    return from_plain(json.loads(message), _of_name)


def _named(value: Any) -> list[Any]:
    name = f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', type(value).__qualname__)}"
    if name in JOBS:
        return ["job", name]
    if dataclasses.is_dataclass(value) and type(value).__module__.startswith("data_pipeline."):
        parts = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return [name, to_plain(parts, _named)]
    if isinstance(value, (np.integer, np.floating, np.bool_)):
        return ["number", value.item()]
    raise TypeError(f"ranks exchange plain values, dataclasses and the functions of JOBS, got {name}")


def _of_name(kind: str, contents: Any) -> Any:
    if kind == "number" and isinstance(contents, (bool, int, float)):
        return contents
    if kind == "job" and contents in JOBS:
        return _find(contents)
    cls = _find(kind) if kind.startswith("data_pipeline.") else None
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls)):
        raise ValueError(f"a message holds {kind}, which no rank sends")
    parts = from_plain(contents, _of_name)
    if set(parts) != {field.name for field in dataclasses.fields(cls)}:
        raise ValueError(f"a message holds {kind} with other fields than it has here; all ranks need the same code")
    value = object.__new__(cls)
    for name, part in parts.items():
        object.__setattr__(value, name, part)  # they may be frozen, and were checked where they were made
    return value


def _find(name: str) -> Any:
    """A class or function of this package; every rank has imported those that messages are made of."""
    module, _, attribute = name.partition(":")
    return vars(sys.modules[module]).get(attribute) if module in sys.modules else None
