"""What setup.py's extras install, and the command that installs a package that is missing."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

# As in setup.py, which a test compares with this: an installed package does not carry setup.py with it.
EXTRAS = {
    "html": ("resiliparse>=1.0",),
    "clean": ("py3langid>=0.4", "babel>=2.14", "rensa>=0.5,<0.6"),
    "report": ("matplotlib>=3.10",),
    "export": ("transformers>=5.24", "gguf>=0.17", "onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.20"),
    "serve": ("fastapi>=0.115", "uvicorn>=0.34", "prometheus-client>=0.22"),
    "wandb": ("wandb>=0.31",),
    "evals": (
        "lm-eval>=0.4.9", "scikit-learn>=1.6", "scipy>=1.14", "pydivsufsort>=0.0.18", "pyphen>=0.14", "sacrebleu>=2.4",
    ),
}  # fmt: skip
_CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"


def how_to_install(*packages: str) -> str:
    """The command that installs these packages into the running Python, for messages.

    It names the packages, not this project: `pip install 'stlm[evals]'` would ask the index for a project of that name,
    and `pip install .` would put a copy in the place of an editable installation. In a checkout the tested versions are
    taken.
    """
    known = {requirement.partition(">=")[0]: requirement for extra in EXTRAS.values() for requirement in extra}
    command = [sys.executable or "python", "-m", "pip", "install", *(known.get(name, name) for name in packages)]
    if _CONSTRAINTS.is_file():
        command += ["-c", str(_CONSTRAINTS)]
    return shlex.join(command)
