"""torch.compile for training: its requirements, checked before a run begins, and what is compiled."""

from __future__ import annotations

import os

import torch
from torch import nn

from stlm.errors import ConfigError, EngineError
from stlm.model.core.blocks import Block


def refuse_uncompilable(stage: int) -> None:
    """Raise ConfigError or EngineError where `training.compile` cannot work, or would have no use."""
    if stage == 3:
        raise ConfigError(
            "training.compile: got true with ZeRO stage 3, which fetches weights between all modules, so that no two "
            "of them become one program; training.compile=false would work, or another --ds_config"
        )
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        raise EngineError(
            "training.compile: got true, but TORCHDYNAMO_DISABLE=1 in the environment turns it off; unset it, or use "
            "training.compile=false"
        )
    from torch._inductor.cpp_builder import get_cpp_compiler  # takes a while to import

    try:
        get_cpp_compiler()
    except Exception as error:  # inductor's own classes
        raise EngineError(
            f"training.compile: got true, but there is no C++ compiler ({' '.join(str(error).split())}); install g++, "
            "name one in CXX, or use training.compile=false"
        ) from None
    from torch.utils._triton import has_triton

    if torch.cuda.is_available() and not has_triton():
        raise EngineError("training.compile: got true, which needs triton on a GPU; or use training.compile=false")


def compile_blocks(model: nn.Module) -> None:
    """Compile the blocks of a model, at the first step. Blocks of equal shape share one program, so the time this takes
    does not grow with the number of layers; torch keeps programs on disk, so the next start takes seconds."""
    for module in model.modules():
        if isinstance(module, Block):
            module.compile()
