"""The packages of setup.py's extras, and the command that installs a missing one."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

# A copy of setup.py's extras, compared by a test: an installed package does not contain setup.py.
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
    """Return the command that installs these packages into the running Python, for messages.

    It names the packages, not this project: `pip install 'stlm[evals]'` would look up a project of that name in the
    index, and `pip install .` would replace an editable installation with a copy. In a checkout the command pins the
    tested versions.
    """
    known = {requirement.partition(">=")[0]: requirement for extra in EXTRAS.values() for requirement in extra}
    command = [sys.executable or "python", "-m", "pip", "install", *(known.get(name, name) for name in packages)]
    if _CONSTRAINTS.is_file():
        command += ["-c", str(_CONSTRAINTS)]
    return shlex.join(command)
