"""The command python -m benchmarks lists all benchmarks, and refuses unknown names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_benchmark_is_listed_with_what_it_measures():
    listed = {line.split()[0]: line.split()[1:] for line in run().stdout.splitlines() if line[:1].isalpha()}
    shared = {"__main__", "cost_model", "nanogpt", "results", "workers"}
    names = {path.stem for path in (ROOT / "benchmarks").glob("*.py")} - shared
    assert {name for name in names if listed.get(name)} == names
    assert not shared & set(listed)


def test_a_misspelt_name_lists_the_names():
    answer = run("attention", "train")
    assert answer.returncode == 2 and answer.stdout == ""
    assert answer.stderr.startswith("error: there is no benchmark 'train'; there are architectures, attention,")


def test_options_reach_the_benchmark():
    answer = run("attention", "--rounds", "none")
    assert answer.returncode == 1
    assert "invalid int value: 'none'" in answer.stderr and "error: failed: attention" in answer.stderr
