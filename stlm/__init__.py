"""Super tiny language models: config, model, training on DeepSpeed, evaluation and generation.

The names below are imported on first use, so `import stlm` is cheap and needs neither torch nor deepspeed:

    from stlm import STLM
    print(STLM.load("runs/quickstart").generate("The module"))
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stlm.config import load_run_config
    from stlm.stlm import STLM

__version__ = "0.1.0"

__all__ = ["STLM", "load_run_config", "__version__"]


def __getattr__(name: str) -> object:
    if name == "STLM":
        from stlm.stlm import STLM

        return STLM
    if name == "load_run_config":
        from stlm.config import load_run_config

        return load_run_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it offers {', '.join(__all__)}")
