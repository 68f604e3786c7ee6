"""Preparation on several machines: `mpirun -n K bash scripts/preprocess.sh …`, or `srun`, with a shared file system.

Rank 0 prepares. It assigns jobs one by one to its own processes and to the other ranks, which only serve: each runs its
jobs on its own processes and returns the results. Rank 0 alone decides and prints, so an error on any rank is raised
there, once. If a rank is killed, mpirun or srun ends the others.

Ranks poll for messages instead of blocking, because a blocking MPI call keeps a core busy. Messages are JSON and name
functions from a fixed list: MPI does not authenticate connections, and mpi4py's pickles would run any code they
contain.
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
from data_pipeline.plurals import number_of
from data_pipeline.preparation.workers import Result, process_pool, result_of, submit
from data_pipeline.storage.atomic import WriteError
from data_pipeline.typed_json import from_plain, to_plain

_PAUSE_S = 0.01
_MOST_CORES = 1 << 13  # per machine

# The variables by which a launcher passes each process the number of processes and its rank.
_LAUNCHERS = (
    ("mpirun", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),  # Open MPI
    ("mpirun", "PMI_SIZE", "PMI_RANK"),  # MPICH, Intel MPI; also srun --mpi=pmi2
    ("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)


@contextmanager
def joined() -> Iterator[MPIRanks | None]:
    """Yield the ranks that were started together with this process; None if it was started alone.

    When the block ends on rank 0, the other ranks are dismissed. Raises DataError, on rank 0, if the ranks cannot
    connect.
    """
    launcher, size, rank = _launched()
    if size == 1:
        yield None
        return
    try:
        mpi = _connect(launcher, size)
    except DataError:
        if rank > 0:
            sys.exit()  # rank 0 reports it
        raise
    ranks = MPIRanks(mpi)
    try:
        yield ranks
    finally:
        if ranks.rank == 0:
            ranks.dismiss()


def _launched() -> tuple[str, int, int]:
    """Return the launcher that started this process, the number of processes, and the rank of this one."""
    for launcher, size, rank in _LAUNCHERS:
        if size in os.environ:
            return launcher, int(os.environ[size]), int(os.environ.get(rank, 0))
    return "", 1, 0


def _connect(launcher: str, size: int) -> Any:
    """Initialize and return mpi4py's MPI."""
    what = f"{launcher} started {number_of(size, 'process', 'processes')}"
    try:
        import mpi4py

        mpi4py.rc.initialize, mpi4py.rc.finalize = False, True
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(
            f"{what}, which connect through mpi4py, but it does not work here ({reason}); install an MPI library "
            f"on every node (on Debian openmpi-bin; on a cluster load its module), or start one process"
        ) from None
    if not MPI.Is_initialized():
        wired = any(name.startswith(("PMI_", "PMIX_")) for name in os.environ)
        if launcher == "srun" and "Open MPI" in MPI.Get_library_version() and not wired:
            raise DataError(
                f"{what} but does not tell Open MPI how they connect; add --mpi=pmix, or what "
                f"`srun --mpi=list` offers instead, or use mpirun within the allocation"
            )
        MPI.Init_thread()
    if MPI.COMM_WORLD.Get_size() != size:
        raise DataError(
            f"{what}, but MPI reports {MPI.COMM_WORLD.Get_size()}: {launcher} belongs to another MPI than the one that "
            f"mpi4py uses ({MPI.Get_library_version().splitlines()[0]}); start with the launcher of that one"
        )
    return MPI


class MPIRanks:
    """All ranks of an MPI job, as seen by rank 0 and by each of the others."""

    def __init__(self, mpi: Any) -> None:
        """Collect the processes of each rank. This is a collective call of all ranks."""
        self._mpi = mpi
        self._comm = mpi.COMM_WORLD
        self._outbox: list[Any] = []  # messages being sent
        self._pool: ProcessPoolExecutor | None = None  # this rank's processes, started with the first job
        self.rank: int = self._comm.Get_rank()
        self.size: int = self._comm.Get_size()
        cores = np.zeros(self.size, np.int64)
        self._comm.Gather(np.array(_share_of_cores(self._comm.Split_type(mpi.COMM_TYPE_SHARED)), np.int64), cores)
        self._workers: list[int] = cores.tolist()  # rank 0: the processes of each rank

    def use_workers(self, number: int | None) -> None:
        """Set the number of processes of each rank, on rank 0; None: one per available core."""
        if number is not None:
            self._workers = [number] * self.size

    def run(
        self, function: Callable[..., Result], jobs: Sequence[tuple[Any, ...]], size: int
    ) -> Iterator[tuple[int, Result]]:
        """Run jobs on all ranks, from rank 0: see `workers.Team`. All ranks are used, whatever the size, as they
        already run.
        """
        waiting = deque(enumerate(jobs))
        free = list(self._workers)
        mine: dict[Future[Result], int] = {}
        while waiting or free != self._workers:
            while waiting and any(free):
                index, job = waiting.popleft()
                rank = free.index(max(free))  # spreads a few jobs over all ranks
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
        """Raise DataError, on rank 0, if a rank does not see this file."""
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
        """Run the jobs that rank 0 sends, on the other ranks, until it dismisses them."""
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
        """Dismiss the other ranks, from rank 0, and wait until they have finished their running jobs."""
        for rank in range(1, self.size):
            self._send(rank, None)
        self._close_pool()
        serving = self.size - 1
        while serving:
            time.sleep(_PAUSE_S)
            serving -= sum(message is None for _, message in self._arrived())

    def _outcome(self, future: Future[Any]) -> tuple[Any, tuple[str, str] | None]:
        """Return the result of a job, and its error if any: class and message."""
        try:
            return result_of(future), None
        except (DataError, WriteError) as error:
            return None, (DataError.__name__, str(error))
        except BaseException as error:
            text = "".join(traceback.format_exception(error))
            return None, (RuntimeError.__name__, f"on rank {self.rank}, {socket.gethostname()}:\n{text}")

    def _submit(self, workers: int, function: Callable[..., Result], job: tuple[Any, ...]) -> Future[Result]:
        self._pool = self._pool or process_pool(workers)
        return submit(self._pool, function, job)

    def _close_pool(self) -> None:
        """Cancel the jobs that have not started, and wait for the others."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _send(self, rank: int, message: Any) -> None:
        self._outbox = [request for request in self._outbox if not request.test()[0]]
        self._outbox.append(self._comm.Isend(encode(message), rank))

    def _arrived(self) -> Iterator[tuple[int, Any]]:
        """Yield the messages that have arrived, each with its sender's rank."""
        status = self._mpi.Status()
        while self._comm.Iprobe(status=status):
            message = bytearray(status.Get_count(self._mpi.BYTE))
            self._comm.Recv(message, source=status.Get_source(), tag=status.Get_tag())
            yield status.Get_source(), decode(bytes(message))


def _finished(running: dict[Future[Any], int]) -> list[Future[Any]]:
    """Return the finished jobs, after a short wait at most."""
    if not running:
        time.sleep(_PAUSE_S)
        return []
    return list(wait(running, timeout=_PAUSE_S, return_when=FIRST_COMPLETED).done)


def _share_of_cores(node: Any) -> int:
    """Return the number of processes for a rank, at least one: the sum over its cores of 1 / the ranks that share each.

    node: the communicator of the ranks of one machine. Launchers give each rank its own cores, or all cores to all
    ranks.
    """
    mine = np.zeros(_MOST_CORES, np.uint8)
    mine[[core for core in os.sched_getaffinity(0) if core < _MOST_CORES]] = 1
    everyone = np.zeros((node.Get_size(), _MOST_CORES), np.uint8)
    node.Allgather(mine, everyone)
    share = float((1 / everyone.sum(axis=0, dtype=np.int64)[mine > 0]).sum())
    granted = int(os.environ.get("SLURM_CPUS_PER_TASK", mine.sum()))
    return max(1, min(round(share), granted))


# ---------------------------------------------------------------------- messages


# The functions that one rank may ask another to call. Their data is in files, so that jobs are small.
JOBS = (
    "data_pipeline.preparation.workers:call",
    "data_pipeline.preparation.settings:_sha256",
    "data_pipeline.preparation.gathering:gather",
    "data_pipeline.cleaning.decontamination:find",
    "data_pipeline.cleaning.near_duplicates:sign",
    "data_pipeline.preparation.encoding:encode_piece",
    "data_pipeline.preparation.encoding:write_planned",
    "data_pipeline.preparation.statistics:describe_source",
    "data_pipeline.loading.verify:_problem",
)


def encode(message: Any) -> bytes:
    """Encode plain values, dataclasses of this package and functions of JOBS. Raises TypeError for another."""
    return json.dumps(to_plain(message, _named)).encode()


def decode(message: bytes) -> Any:
    """Return the message that `encode` was given. Raises ValueError for anything else."""
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
        object.__setattr__(value, name, part)  # works if frozen; the sender has checked the values
    return value


def _find(name: str) -> Any:
    """Return a class or function of this package; every rank has imported those that messages contain."""
    module, _, attribute = name.partition(":")
    return vars(sys.modules[module]).get(attribute) if module in sys.modules else None
