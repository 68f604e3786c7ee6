"""docs/adding_a_component.md and docs/adding_an_objective.md work literally in a copy of the project, and every step is
necessary.

The words after a block's language say what is done with it:

    ```python append FILE      append to the file, after two empty lines
    ```yaml create FILE        a new file
    ```diff FILE               lines with + replace those with -, which are found together with their neighbours
    ```bash                    run
"""

from __future__ import annotations

import json
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
PYTEST = "python -m pytest"


@dataclass(frozen=True)
class Block:
    words: tuple[str, ...]  # language, action, file
    text: str


def blocks(guide: str) -> list[Block]:
    page = (ROOT / "docs" / f"{guide}.md").read_text(encoding="utf-8")
    found = re.findall(r"^(`{3,})(\w.*)\n((?:.*\n)*?)\1$", page, re.MULTILINE)
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


def follow(guide: str, root: Path) -> str:
    """Apply and run all blocks of a page; return what the commands print."""
    printed = ""
    for block in blocks(guide):
        if block.words != ("bash",):
            apply(block, root)
            continue
        done = run(block.text, root)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        printed += done.stdout
    return printed


def follow_and_list(guide: str, root: Path) -> set[str]:
    """Follow a guide, whose commands pass tests, and return the files written that it does not name."""
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    assert re.search(r"\d+ passed", follow(guide, root))
    written = {
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_file() and before.get(path) != path.read_bytes() and "__pycache__" not in path.parts
    }
    named = {block.words[-1] for block in blocks(guide) if block.words != ("bash",)}
    assert named <= written
    return {name for name in written - named if not name.startswith(("data/", "runs/", "."))}


def test_the_guide_adds_a_component_that_trains(copy: Path) -> None:
    assert follow_and_list("adding_a_component", copy) == {"docs/components/README.md", "docs/settings.md"}
    metrics = (copy / "runs" / "geglu" / "metrics.jsonl").read_text()
    assert '"step": 2' in metrics


BY_HAND = """
import torch
from data_pipeline.loading.loaders import open_data
from stlm.config import load_run_config
from stlm.stlm import STLM
from stlm.training.loaders import build_loaders

config = load_run_config("runs/smoothed")
data = open_data(config.data)
ids = torch.from_numpy(build_loaders(config, data).train.rows(1, 0, config.training.batch_size).ids)
logits = STLM.from_config(config.model, data.tokenizer, seed=config.seed)(ids).logits.double()
nats = -logits.log_softmax(-1)
right = nats.gather(2, ids[..., None]).mean().item()
print(right, config.training.objective.smoothing * (nats.mean().item() - right))
"""


def test_the_guide_adds_an_objective_that_trains(copy: Path) -> None:
    assert follow_and_list("adding_an_objective", copy) == {"docs/settings.md"}
    lines = (copy / "runs" / "smoothed" / "metrics.jsonl").read_text().splitlines()
    first = next(json.loads(line) for line in lines if json.loads(line)["split"] == "train")
    assert first["step"] == 1
    done = run(f"python -c '{BY_HAND}'", copy)
    assert [first["loss"], first["smoothing_loss"]] == pytest.approx([*map(float, done.stdout.split())], rel=1e-4)


@pytest.mark.parametrize(
    "left_out, failing",
    [
        (
            {
                "tests/model/component_examples.py",
                "docs/components/core-feed_forward-geglu.md",
                "tests/objectives/test_objectives.py",
                "docs/objectives/label_smoothing.md",
            },
            [
                "test_every_entry_has_a_config_and_an_example",
                "test_every_part_has_a_page_and_every_page_a_part[components",
                "test_every_objective_has_an_example",
                "test_every_part_has_a_page_and_every_page_a_part[objectives",
            ],
        ),
        (
            {"stlm/model/core/feed_forward.py", "stlm/objectives/label_smoothing.py"},
            [
                "test_every_entry_has_a_config_and_an_example",
                "test_sums_do_not_depend_on_how_rows_are_divided[label_smoothing",
            ],
        ),
    ],
    ids=["examples and pages", "modules"],
)
def test_every_step_of_the_guides_is_necessary(copy: Path, left_out: set[str], failing: list[str]) -> None:
    """Both pages are followed in one copy."""
    files = [block for guide in ("adding_a_component", "adding_an_objective") for block in blocks(guide)]
    files = [block for block in files if block.words != ("bash",)]
    assert left_out <= {block.words[-1] for block in files}
    for block in files:
        if block.words[-1] not in left_out:
            apply(block, copy)
    names = " or ".join(name.partition("[")[0] for name in failing)
    tests = "tests/model/test_components.py tests/objectives/test_objectives.py tests/test_component_pages.py"
    done = run(f"{PYTEST} -q -k '{names}' {tests}", copy)
    assert done.returncode == 1, done.stdout[-4000:] + done.stderr[-4000:]
    for name in failing:
        assert re.search(rf"^FAILED .*::{re.escape(name)}", done.stdout, re.MULTILINE), f"{name}\n{done.stdout[-4000:]}"
