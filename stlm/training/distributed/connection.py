"""Connection of this process with the other ranks: joining and leaving them."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from stlm.errors import EngineError
from stlm.training.deepspeed.startup import start_process_group
from stlm.training.distributed.collectives import time_collectives
from stlm.training.distributed.lost import introduce
from stlm.training.distributed.ranks import Ranks, find_ranks

_connected: Ranks | None = None


def connect() -> Ranks:
    """Join the other ranks. Every rank calls it; a second call returns the same ranks.

    Raises EngineError where the ranks cannot meet or DeepSpeed cannot be imported.
    """
    global _connected
    if _connected is not None:
        return _connected
    ranks = find_ranks()
    if "OMP_NUM_THREADS" not in os.environ:  # ranks that share a machine share its cores
        torch.set_num_threads(max(1, _cores() // ranks.local_world_size))
    try:
        backend = start_process_group(ranks)
    except (dist.DistNetworkError, OSError) as error:
        raise EngineError(
            f"the ranks cannot meet at {ranks.address}:{ranks.port}: {str(error).splitlines()[0]}; "
            "if another run has that port, choose another: deepspeed --master_port, torchrun --master_port, MASTER_PORT"
        ) from error
    time_collectives(backend)
    introduce()
    _connected = ranks
    return ranks


def disconnect() -> None:
    """Leave the other ranks before the process ends. They cannot be joined again."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
