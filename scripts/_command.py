"""Start a command without installation: put the code next to scripts/ on the path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from stlm.commands.program import run, start

__all__ = ["run", "start"]
