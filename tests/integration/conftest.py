"""A copy of the project, a tiny corpus, and an uninterrupted run on two ranks."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_project import CONFIG, OPTIONS, read_metrics

from stlm.training.distributed.ranks import free_port

ROOT = Path(__file__).parents[2]
NOT_COPIED = {".git", ".venv", "data", "runs", "build", "dist", "tests", ".pytest_cache", ".ruff_cache", ".mypy_cache"}


@pytest.fixture(scope="session", autouse=True)
def environment():
    """Set the environment of every process in these tests: one thread, no variables of an outer launcher."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith(("SLURM_", "OMPI_", "PMIX_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
                patch.delenv(name)
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("STLM_VENV", sys.prefix)
        patch.setenv("PATH", f"{sys.prefix}/bin{os.pathsep}{os.environ['PATH']}")
        patch.delenv("PYTHONPATH", raising=False)
        yield


@pytest.fixture(scope="session")
def project(tmp_path_factory) -> Path:
    """Copy the project, with tiny.yaml, text/, and data/tiny, which is prepared from it."""
    if sys.prefix == sys.base_prefix:
        pytest.skip("needs a virtual environment: run.sh makes one")
    # Set up from here, so that no job in the copy installs it.
    ready = f'set -eu; ROOT="{ROOT}"; source "$ROOT/scripts/_setup.sh"; stlm_setup dev'
    subprocess.run(["bash", "-c", ready], check=True, stdin=subprocess.DEVNULL)

    def ignore(folder: str, names: list[str]) -> set[str]:
        left_out = NOT_COPIED if Path(folder) == ROOT else set()
        return {name for name in names if name in left_out or name == "__pycache__" or name.endswith(".egg-info")}

    copy = tmp_path_factory.mktemp("project") / "stlm"
    shutil.copytree(ROOT, copy, ignore=ignore)
    (copy / "tiny.yaml").write_text(CONFIG)
    (copy / "text").mkdir()
    draw = random.Random(5)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "thought", "of", "naïve", "fish"]
    texts = [" ".join(draw.choices(words, k=draw.randrange(5, 60))) for _ in range(80)]
    (copy / "text/tiny.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    command = ["scripts/preprocess.py", "--input", "text", "--output", "data/tiny", "--workers", "1"]
    subprocess.run([sys.executable, *command], cwd=copy, check=True)
    return copy


@pytest.fixture(scope="session")
def uninterrupted(project) -> list[dict]:
    """Return the metrics of an uninterrupted run of two ranks on one node, started by torchrun."""
    # Without `--` torchrun reads --run as an abbreviation of one of its own options.
    torchrun = ["torchrun", "--nproc_per_node", "2", "--master_port", str(free_port())]
    command = [*torchrun, "--", "scripts/pretrain.py", *OPTIONS, "--run", "runs/uninterrupted"]
    result = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "2 ranks on 1 node, started by torchrun, meeting at 127.0.0.1:" in result.stdout
    return read_metrics(project / "runs/uninterrupted")
