"""Training on the DeepSpeed engine. Names are imported on first use, as `ranks` and `schedules` need no torch."""

import importlib

_HOMES = {
    "Trainer": "stlm.training.trainer",
    "build_loaders": "stlm.training.loaders",
    "build_optimizer": "stlm.training.optim.optimizers",
    "learning_rate_at": "stlm.training.optim.schedules",
    "find_ranks": "stlm.training.distributed.ranks",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value
