"""Import of DeepSpeed, and the start of its process group. Nothing is compiled, so no machine needs a compiler."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist

from data_pipeline.extras import how_to_install
from stlm.errors import EngineError
from stlm.training.deepspeed.internals import build_no_shared_memory_operator, communication_backend
from stlm.training.distributed.ranks import Ranks, rank_environment
from stlm.training.distributed.rendezvous import ALONE, init_method


def load_deepspeed() -> Any:
    """Import DeepSpeed, and let it log warnings and errors only."""
    try:
        import deepspeed
    except ImportError as error:
        raise EngineError(
            f"training needs DeepSpeed, which cannot be imported ({error}): {how_to_install('deepspeed')}"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")  # how DeepSpeed calls torch
    build_no_shared_memory_operator()
    return deepspeed


def start_process_group(ranks: Ranks) -> Any:
    """Make torch's and DeepSpeed's process group of these ranks, unless it is there.

    Returns the object that carries all of DeepSpeed's communication, with the methods of torch's collectives.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    deepspeed = load_deepspeed()
    if not dist.is_initialized():
        with rank_environment(ranks):
            deepspeed.init_distributed(
                ALONE if ranks.world_size == 1 else None, verbose=False, init_method=init_method(ranks),
                rank=ranks.rank, world_size=ranks.world_size,
            )  # fmt: skip
    return communication_backend()
