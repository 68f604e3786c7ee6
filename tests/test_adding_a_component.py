"""docs/adding_a_component.md is followed to the letter, in a copy of the project; and no step of it may be left out.

Its blocks say behind their language what is done with them:

    ```python append FILE      put at the end of the file, two empty lines in between
    ```yaml create FILE        a new file
    ```diff FILE               lines with + take the place of those with -, where these and their neighbours stand
    ```bash                    run
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COPIED = ["data_pipeline", "docs", "ds_configs", "scripts", "stlm", "tests", "pyproject.toml"]
GUIDE = (ROOT / "docs" / "adding_a_component.md").read_text(encoding="utf-8")
PYTEST = "python -m pytest"


@dataclass(frozen=True)
class Block:
    words: tuple[str, ...]  # language, what is done, the file
    text: str


def blocks() -> list[Block]:
    found = re.findall(r"^(`{3,})(\w.*)\n((?:.*\n)*?)\1$", GUIDE, re.MULTILINE)
    return [Block(tuple(words.split()), text) for _, words, text in found]


def apply(block: Block, root: Path) -> None:
    """Change the file that a block is for."""
    match block.words:
        case (_, "create", name):
            assert not (root / name).exists()
            (root / name).write_text(block.text, encoding="utf-8")
        case (_, "append", name):
            (root / name).write_text(f"{(root / name).read_text(encoding='utf-8')}\n\n{block.text}", encoding="utf-8")
        case ("diff", name):
            lines = block.text.splitlines(keepends=True)
            before = "".join(line[1:] for line in lines if line[0] != "+")
            after = "".join(line[1:] for line in lines if line[0] != "-")
            text = (root / name).read_text(encoding="utf-8")
            assert text.count(before) == 1, f"{name} has this {text.count(before)} times:\n{before}"
            (root / name).write_text(text.replace(before, after), encoding="utf-8")
        case words:
            raise AssertionError(f"what is to be done with a block of {words}?")


def run(commands: str, root: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(["bash", "-euc", commands], cwd=root, env=environment, capture_output=True, text=True)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    root = tmp_path / "stlm"
    root.mkdir()
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, root / name)
    return root


def test_the_guide_adds_a_component_that_trains(copy: Path) -> None:
    ran = ""
    for block in blocks():
        if block.words != ("bash",):
            apply(block, copy)
            continue
        done = run(block.text, copy)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        ran += done.stdout
    assert re.search(r"\d+ passed", ran)  # the tests
    metrics = (copy / "runs" / "geglu" / "metrics.jsonl").read_text()
    assert '"step": 2' in metrics


@pytest.mark.parametrize(
    "left_out, failing",
    [
        ("append stlm/model/core/feed_forward.py", "test_every_entry_has_a_config_and_an_example"),
        ("diff tests/model/component_examples.py", "test_every_entry_has_a_config_and_an_example"),
        ("create docs/components/core-feed_forward-geglu.md", "test_every_part_has_a_page"),
    ],
    ids=["module", "example", "page"],
)
def test_a_step_that_is_left_out_is_missed(copy: Path, left_out: str, failing: str) -> None:
    for block in blocks():
        if block.words != ("bash",) and not " ".join(block.words).endswith(left_out):
            apply(block, copy)
    done = run(f"{PYTEST} -q -k {failing} tests/model/test_components.py tests/model/test_pairs.py "
               "tests/test_component_pages.py", copy)  # fmt: skip
    assert done.returncode == 1 and f"::{failing}" in done.stdout, done.stdout[-4000:] + done.stderr[-4000:]
