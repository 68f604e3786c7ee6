"""Super tiny language models: config, model, training on DeepSpeed, evaluation and generation.

The names below are imported on first use, so `import stlm` is cheap and needs neither torch nor deepspeed:

    from stlm import STLM
    print(STLM.load("runs/quickstart").generate("The module"))
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "STLM": "stlm.stlm",
    "Trainer": "stlm.training",
    "build_loaders": "stlm.training",
    "build_optimizer": "stlm.training",
    "load_run_config": "stlm.config",
    "load_deepspeed_config": "stlm.config",
    "StlmError": "stlm.errors",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # the next access no longer comes here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
