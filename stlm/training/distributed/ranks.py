"""Rank of this process, as set by its launcher, and its rows of a batch.

Does not need torch, so that user errors are reported, by one rank only, before torch is imported.
"""

from __future__ import annotations

import os
import re
import socket
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

from data_pipeline.plurals import number_of
from stlm.config import TrainingConfig
from stlm.errors import ConfigError, EngineError


@dataclass(frozen=True)
class Ranks:
    """Position of this process among the ranks that train together."""

    rank: int
    world_size: int
    local_rank: int  # on this node
    local_world_size: int
    address: str  # where rank 0 listens
    port: int
    source: str  # the launcher, for people

    def __str__(self) -> str:
        if self.world_size == 1:
            return f"1 rank, started by {self.source}"
        nodes = -(-self.world_size // self.local_world_size)
        on = number_of(nodes, "node")
        ranks = number_of(self.world_size, "rank")
        return f"{ranks} on {on}, started by {self.source}, meeting at {self.address}:{self.port}"


def find_ranks(environment: Mapping[str, str] | None = None) -> Ranks:
    """Read the ranks from the environment set by deepspeed, torchrun, Open MPI or Slurm's srun; else one rank, which
    needs no address.

    Where Open MPI started ranks on several nodes and MASTER_ADDR is not set, rank 0 sends its address by mpi4py. Raises
    EngineError where that fails, or where the launcher's variables contradict each other.
    """
    env = os.environ if environment is None else environment
    if "RANK" in env or "WORLD_SIZE" in env:
        source = "torchrun" if "TORCHELASTIC_RUN_ID" in env else "deepspeed" if "CROSS_SIZE" in env else "RANK"
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if name not in env]
        if missing:
            raise EngineError(
                f"got {' and '.join(n for n in names if n in env)} in the environment without {', '.join(missing)}; "
                "set all five, or start with `deepspeed scripts/pretrain.py …`"
            )
        local = env.get("LOCAL_WORLD_SIZE") or env.get("LOCAL_SIZE") or env["WORLD_SIZE"]
        variables = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        return _ranks(env, variables, local, env["MASTER_ADDR"], env["MASTER_PORT"], source)
    if "OMPI_COMM_WORLD_SIZE" in env:
        size, local = env["OMPI_COMM_WORLD_SIZE"], env["OMPI_COMM_WORLD_LOCAL_SIZE"]
        if "MASTER_ADDR" not in env and size != local:  # several nodes: rank 0 sends its address
            address, port = _told_by_mpi()
        else:
            address = env.get("MASTER_ADDR", "127.0.0.1")
            port = env.get("MASTER_PORT") or _shared_port(env.get("PMIX_NAMESPACE", ""))
        variables = ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK")
        return _ranks(env, variables, local, address, port, "Open MPI")
    if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:  # a task of srun, not the batch script itself
        port = env.get("MASTER_PORT") or _shared_port(f"{env.get('SLURM_JOB_ID')}.{env.get('SLURM_STEP_ID')}")
        local = re.split(r"\D", env.get("SLURM_STEP_TASKS_PER_NODE", env["SLURM_STEP_NUM_TASKS"]))[0]
        here = local == env["SLURM_STEP_NUM_TASKS"]  # all tasks on one node meet on its loopback interface
        nodelist = "127.0.0.1" if here else env.get("SLURM_STEP_NODELIST", "127.0.0.1")
        address = env.get("MASTER_ADDR") or first_host(nodelist)
        variables = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        return _ranks(env, variables, local, address, port, "Slurm")
    return Ranks(0, 1, 0, 1, "127.0.0.1", 0, "python")


@contextmanager
def rank_environment(ranks: Ranks) -> Iterator[None]:
    """Set the environment variables that torch and DeepSpeed read, inside this context; DeepSpeed would otherwise ask
    MPI.

    Afterwards all but LOCAL_RANK are restored, so that a process started later does not take itself for a rank.
    """
    values = {
        "RANK": str(ranks.rank),
        "WORLD_SIZE": str(ranks.world_size),
        "MASTER_ADDR": ranks.address,
        "MASTER_PORT": str(ranks.port),
    }
    os.environ["LOCAL_RANK"] = str(ranks.local_rank)  # stays: ZeRO 3 reads it at every step; alone it has no effect
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def free_port() -> int:
    """Return a free TCP port of this machine."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def first_host(nodelist: str) -> str:
    """Return the first name of Slurm's compressed list: "node[03-05,9],login" gives "node03"."""
    match = re.match(r"([^,\[]+)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodelist)
    if match is None:
        raise EngineError(f"got SLURM_STEP_NODELIST={nodelist!r}, expected host names; set MASTER_ADDR")
    prefix, number, suffix = match.groups(default="")
    return prefix + number + suffix


@dataclass(frozen=True)
class BatchSplit:
    """Division of a step's rows over ranks and micro-batches. Rank r has rows [r * rows, (r + 1) * rows)."""

    rows: int  # of each rank
    micro_batch_size: int  # rows of one forward
    accumulation: int  # forwards of each rank

    @classmethod
    def of(cls, training: TrainingConfig, world_size: int) -> BatchSplit:
        """Return the split. Raises ConfigError, with numbers that work, where ranks or micro-batches do not divide the
        batch."""
        batch, ranks = training.batch_size, number_of(world_size, "rank")
        if batch % world_size:
            below, above = batch // world_size * world_size, -(-batch // world_size) * world_size
            sizes = " or ".join(str(size) for size in (below, above) if size)
            fitting = [n for n in range(1, batch + 1) if batch % n == 0]
            nearest = sorted(sorted(fitting, key=lambda n: abs(n - world_size))[:2])
            raise ConfigError(
                f"training.batch_size: got {batch} on {ranks}, expected a multiple of the ranks; "
                f"training.batch_size={sizes} would work, or {' or '.join(map(str, nearest))} ranks"
            )
        rows = batch // world_size
        micro = training.micro_batch_size or rows
        if rows % micro:
            fitting = [n for n in range(1, rows + 1) if rows % n == 0]
            nearest = sorted(sorted(fitting, key=lambda n: abs(n - micro))[:2])
            raise ConfigError(
                f"training.micro_batch_size: got {micro}, expected a divisor of the {number_of(rows, 'row')} of a rank "
                f"(training.batch_size = {batch} on {ranks}); {' or '.join(map(str, nearest))} would work"
            )
        return cls(rows, micro, rows // micro)


def _ranks(
    env: Mapping[str, str], variables: tuple[str, str, str], local: str, address: str, port: str, source: str
) -> Ranks:
    """Build Ranks from the variables for rank, world size and local rank.

    Raises EngineError where one is no number or out of range.
    """
    try:
        rank, world_size, local_rank = (int(env[name]) for name in variables)
        ranks = Ranks(rank, world_size, local_rank, int(local), address, int(port), source)
    except (KeyError, ValueError) as error:
        raise EngineError(
            f"expected numbers in the environment for {', '.join(variables)} and the port: {error}"
        ) from None
    if not 0 < ranks.port < 1 << 16:
        raise EngineError(f"got the port {port}, expected 1 to {(1 << 16) - 1}")
    if not 0 <= rank < world_size:
        raise EngineError(f"got {variables[0]}={rank} with {variables[1]}={world_size}, expected 0 to {world_size - 1}")
    return ranks


@cache
def _told_by_mpi() -> tuple[str, str]:
    """Return rank 0's address and a free port there, sent to all ranks by MPI. MPI is finalized at once, as a process
    that ends while it uses MPI and the other ranks would wait for each other."""
    try:
        import mpi4py

        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise EngineError(
            f"Open MPI started ranks on several nodes, which find each other by mpi4py, but it does not work here "
            f"({' '.join(str(error).split())}); add `-x MASTER_ADDR=<host of rank 0> -x MASTER_PORT=29500` to mpirun"
        ) from None
    place = bytearray(f"{_own_address()} {free_port()}".ljust(64), "ascii")
    MPI.COMM_WORLD.Bcast(place)  # sends bytes; `bcast` would send a pickle
    MPI.Finalize()
    address, port = place.decode("ascii").split()
    return address, port


def _own_address() -> str:
    """Return this machine's address on the network towards other machines."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("198.51.100.1", 9))  # sends nothing, only looks up the route
        except OSError:
            return "127.0.0.1"
        return probe.getsockname()[0]


def _shared_port(name: str) -> str:
    """Return a port that all ranks of one job derive from its name."""
    return str(20000 + zlib.crc32(name.encode()) % 10000)
