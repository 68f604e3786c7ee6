"""README.md is accurate: its commands run, its output has the quoted shape, its paths and links exist.

Rules that make this testable: every command stands in a ```bash block. After the language, a block's
first line says what a block is for:

    ```bash            run in the default tests        ```bash slow      run by the slow test
    ```python          run, after the bash blocks above it
    ```yaml            read as a run config, and saved under the name in its first line, for the blocks below it
    ```text output     what the bash block before it prints, in this order: numbers may differ, `…` leaves lines out
    ```text tree       paths of this project, explained after two or more spaces
    ```text            shown, not checked (a sample, a drawing)

The blocks run from top to bottom in one copy of the project, as a person would, in the environment of the tests: the
default test runs those that are not slow and need no slow one before them, the slow test runs all. Only
`bash scripts/test.sh` is left out: this is it.
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

from stlm.training.distributed.ranks import free_port

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
NOT_COPIED = {".git", ".venv", "data", "runs", "build", "dist", ".pytest_cache", ".ruff_cache", ".mypy_cache"}


@dataclass(frozen=True)
class Block:
    language: str
    words: frozenset[str]
    text: str
    line: int


def blocks(markdown: str) -> list[Block]:
    found = []
    for match in re.finditer(r"^```(.+)\n((?:.*\n)*?)```$", markdown, re.MULTILINE):
        language, *words = match[1].split()
        found.append(Block(language, frozenset(words), match[2], markdown[: match.start()].count("\n") + 1))
    return found


def commands(block: Block) -> list[str]:
    """The commands of a bash block, continued lines joined, without comments."""
    joined = block.text.replace("\\\n", " ")
    return [" ".join(line.split("  #")[0].split()) for line in joined.splitlines() if line and not line.startswith("#")]


BLOCKS = blocks(README)
PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")),
    *sorted((ROOT / "docs").rglob("*.md")),
]


# --- running ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """Set up this environment and return its variables, so that nothing in the copy installs anything."""
    if sys.prefix == sys.base_prefix:
        pytest.skip("needs a virtual environment: scripts/test.sh makes one")
    variables = {**os.environ, "STLM_VENV": sys.prefix}
    script = f'set -eu; ROOT="{ROOT}"; source "$ROOT/scripts/_setup.sh"; stlm_setup dev'
    subprocess.run(["bash", "-c", script], env=variables, check=True, stdin=subprocess.DEVNULL)
    return {**variables, "PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Copy the project as in a fresh clone, with the environment where the set-up would create it."""

    def ignore(folder: str, names: list[str]) -> set[str]:
        at_the_top = NOT_COPIED if Path(folder) == ROOT else set()
        return {name for name in names if name in at_the_top or name == "__pycache__" or name.endswith(".egg-info")}

    target = tmp_path / "stlm"
    shutil.copytree(ROOT, target, ignore=ignore)
    (target / ".venv").symlink_to(sys.prefix)
    return target


def run(command: list[str], copy: Path, environment: dict[str, str], block: Block, text: str) -> str:
    finished = subprocess.run(command, cwd=copy, env=environment, input=text, capture_output=True, text=True)
    assert finished.returncode == 0, f"README.md:{block.line}: exit {finished.returncode}\n{finished.stderr[-4000:]}"
    return finished.stdout


def shape(line: str) -> str:
    """Return a line of output without numbers and spacing, which vary between runs and machines."""
    return " ".join(re.sub(r"\d+(?:[.,:]\d+)*", "0", line).split())


def missing_lines(quoted: str, printed: str) -> list[str]:
    """Return the lines of the quoted output whose shape does not follow, in order, in the printed one."""
    rest = iter([shape(line) for line in printed.splitlines()])
    return [line for line in quoted.splitlines() if shape(line) not in ("", "…") and shape(line) not in rest]


@pytest.mark.parametrize(
    ("quoted", "missing"),
    [
        ("step 10  loss 2.5\n…\ndone in 3 s\n", []),
        ("step 10  loss 2.5\nstep 20  gain 2.1\n", ["step 20  gain 2.1"]),
        ("done in 3 s\nstep 10  loss 2.5\n", ["step 10  loss 2.5"]),
    ],
)
def test_quoted_output_is_compared_by_shape_and_order(quoted: str, missing: list[str]) -> None:
    assert missing_lines(quoted, "step 1   loss 5.545\nstep 2   loss 5.1\n\ndone in 12 s\n") == missing


def run_blocks(copy: Path, environment: dict[str, str], slow: bool) -> int:
    ran, skipping, printed = 0, False, ""
    for block in BLOCKS:
        if block.language == "bash":
            skipping = "slow" in block.words and not slow
        if block.language == "yaml":
            name = block.text.splitlines()[0].removeprefix("# ")
            (copy / name).write_text(block.text)
        if skipping:
            continue
        if block.language == "bash":
            lines = [line for line in block.text.splitlines() if not line.startswith("bash scripts/test.sh")]
            # DeepSpeed's launcher has one default port, on which another run may be listening.
            script = re.sub("^deepspeed ", f"deepspeed --master_port {free_port()} ", "\n".join(lines), flags=re.M)
            printed = run(["bash", "-euo", "pipefail", "-c", script], copy, environment, block, "")
            ran += 1
        elif block.language == "python":
            run([sys.executable, "-"], copy, environment, block, block.text)
            ran += 1
        elif "output" in block.words:
            missing = missing_lines(block.text, printed)
            assert not missing, f"README.md:{block.line} quotes lines that were not printed: {missing}\n{printed}"
    return ran


def test_the_quick_blocks_run(copy: Path, environment: dict[str, str]) -> None:
    assert run_blocks(copy, environment, slow=False) > 0


@pytest.mark.slow
def test_all_blocks_run_from_top_to_bottom(copy: Path, environment: dict[str, str]) -> None:
    assert run_blocks(copy, environment, slow=True) > 1


# --- reading ---------------------------------------------------------------------------------------------------------


def test_run_configs_are_valid(tmp_path: Path) -> None:
    from stlm.config import load_run_config

    for number, block in enumerate(block for block in BLOCKS if block.language == "yaml"):
        path = tmp_path / f"block_{number}.yaml"
        path.write_text(block.text)
        load_run_config(str(path))


def test_every_command_is_in_a_block_that_runs() -> None:
    """A command in running text occurs in one of the blocks, so that it runs as well."""
    in_blocks = {command for block in BLOCKS if block.language == "bash" for command in commands(block)}
    prose = re.sub(r"^```.+\n(?:.*\n)*?```$", "", README, flags=re.MULTILINE)
    in_prose = {" ".join(code.split()) for code in re.findall(r"`((?:bash|python|deepspeed|pip) [^`]*)`", prose)}
    assert in_prose <= in_blocks, in_prose - in_blocks
    assert {"bash scripts/quickstart.sh", "bash scripts/test.sh"} <= in_blocks


def paths_in_tree(page: Path) -> set[str]:
    """Return the paths in a page's tree, after checking that all exist."""
    (tree,) = (block for block in blocks(page.read_text()) if "tree" in block.words)
    named: set[str] = set()
    folders: list[str] = []  # folders that contain the current line
    for line in filter(str.strip, tree.text.splitlines()):
        indent, names = re.match(r"( *)(\S+(?: \S+)*)", line).groups()  # type: ignore[union-attr]
        folders = folders[: len(indent) // 2]
        for name in names.split():
            path = "".join(folders) + name
            assert (ROOT / path).is_dir() if name.endswith("/") else (ROOT / path).is_file(), f"there is no {path}"
            named.add(path.rstrip("/"))
        folders.append(names)
    return named


def test_readme_names_every_folder_and_every_script() -> None:
    folders = [path for folder in (ROOT, ROOT / "stlm") for path in folder.iterdir()
             if path.is_dir() and not path.name.startswith((".", "__")) and not path.name.endswith(".egg-info")
             and path.name not in NOT_COPIED]  # fmt: skip
    scripts = [path for path in (ROOT / "scripts").iterdir() if not path.name.startswith("_")]
    expected = {str(path.relative_to(ROOT)) for path in folders + scripts}
    assert expected - paths_in_tree(ROOT / "README.md") == set()


def test_the_architecture_page_names_every_module() -> None:
    modules = {
        str(path.relative_to(ROOT))
        for package in ("stlm", "data_pipeline")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py"
        and not (path.parent.name == "objectives" and (ROOT / "docs" / "objectives" / f"{path.stem}.md").is_file())
    }
    assert modules - paths_in_tree(ROOT / "docs" / "architecture.md") == set()


def anchors(markdown: str) -> set[str]:
    """Return the names by which GitHub links to headings."""
    headings = re.findall(r"^#+ (.+)$", markdown, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^(`{3,})\w(?:.*\n)*?\1$", "", page.read_text(), flags=re.MULTILINE)  # blocks hold no links
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists() and linked.is_relative_to(ROOT), f"{page.name} links to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(linked.read_text()), f"{page.name} links to {target}: no such heading"


def test_readme_links_to_every_page_at_the_top() -> None:
    linked = set(re.findall(r"\]\(([^)\s]+)\)", README))
    assert {"CONTRIBUTING.md", "CHANGELOG.md", "LICENSE"} <= linked


def test_hooks_run_what_the_script_runs() -> None:
    """Each hook of pre-commit is a line of scripts/test.sh."""
    hooks = re.findall(r"entry: (.+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert hooks == ["ruff check .", "ruff format --check .", "codespell"]
    assert set(hooks) <= set((ROOT / "scripts" / "test.sh").read_text().splitlines())
