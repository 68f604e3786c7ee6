"""The short form of benchmarks/elastic.py: a run killed and resumed at another size follows the same curve."""

from __future__ import annotations

import subprocess
import sys

import pytest
from tiny_run import ROOT


@pytest.mark.slow
def test_resized_runs_follow_the_curve_within_tolerance():
    """The exit code is 0 only where each difference is within its tolerance, which is 0 for equal settings."""
    ways = [
        "1 rank",
        "1 -> 2 ranks",
        "2 ranks, ZeRO 2 -> 0",
        "ZeRO 3 on 2 -> ZeRO 2 on 1",
        "Muon, ZeRO 3 on 2 -> 0 on 1",
    ]
    script = [sys.executable, ROOT / "benchmarks/elastic.py", "--steps", "30", "--kill-at", "5"]
    done = subprocess.run([*script, "--only", *ways], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith(tuple(ways))]
    assert len(rows) == len(ways)
    assert rows[0].split()[3:5] == ["0.0e+00", "all"]
