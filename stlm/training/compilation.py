"""Requirements of torch.compile, checked before a run begins."""

from __future__ import annotations

import os

import torch

from stlm.errors import ConfigError, EngineError


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
