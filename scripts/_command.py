"""What every script shares: it works without installation, and a user's mistake is one line and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # importing this file first makes `import stlm` find the code beside it


def run(main: Callable[[], int | None]) -> NoReturn:
    """Call `main` and exit with what it returns (None: 0).

    Exit codes: 0 done, 2 the user's mistake, 3 stopped by a signal, 1 anything else, which shows its traceback.
    """
    try:
        code = main() or 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 3
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if not hasattr(error, "exit_code"):
            raise
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
    sys.exit(code)
