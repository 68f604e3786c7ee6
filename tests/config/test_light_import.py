"""Importing `stlm` and its config loads neither torch nor deepspeed nor numpy."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_importing_stlm_and_its_config_imports_nothing_heavy():
    code = (
        "import sys, stlm, stlm.config, stlm.errors\n"
        "stlm.load_run_config('quickstart')\n"
        "print([name for name in ('torch', 'deepspeed', 'numpy', 'datasets') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"
