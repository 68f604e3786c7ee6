"""The shared set-up of the shell scripts: its steps, what it does not repeat, and what it never changes.

The Python it is given here is a shell script that notes what it is asked to do (make an environment, run pip) and
passes everything else on to the real one: no network, no minutes.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[2] / "scripts" / "_setup.sh"

STUB = f"""#!/usr/bin/env bash
case "$*" in
    "-m venv "*) echo venv >> "$LOG"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
    "-m pip "*)  echo "pip ${{@: -3:1}}" >> "$LOG"; sleep "${{PIP_SECONDS:-0}}"; exit "${{PIP_EXIT:-0}}" ;;
    *) exec {sys.executable} "$@" ;;
esac
"""


class Project:
    """A project folder with only the files that the set-up reads, and a log of the set-up's actions."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "project"
        self.log = folder / "log"
        self.python = folder / "stub-python"
        (self.root / "scripts").mkdir(parents=True)
        shutil.copy(SETUP, self.root / "scripts")
        for name in ("setup.py", "pyproject.toml", "constraints.txt"):
            (self.root / name).write_text(f"# {name}\n")
        self.python.write_text(STUB)
        self.python.chmod(0o755)
        self.log.touch()

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        script = 'set -euo pipefail; ROOT=$1; source "$1/scripts/_setup.sh"; stlm_setup "${@:2}"; command -v python'
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("STLM_")}
        return subprocess.Popen(
            ["bash", "-c", script, "bash", str(self.root), *words],
            env={**inherited, "STLM_PYTHON": str(self.python), "LOG": str(self.log), **environment},
            text=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def setup(self, *words: str, **environment: str) -> tuple[int, str, str]:
        process = self.start(*words, **environment)
        out, err = process.communicate(timeout=60)
        return process.returncode, out.strip(), err

    def done(self) -> list[str]:
        """Return the actions since the last call."""
        lines = self.log.read_text().splitlines()
        self.log.write_text("")
        return lines


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


def test_each_step_runs_once_and_again_only_after_a_change(project: Project) -> None:
    code, python, said = project.setup()
    assert (code, python) == (0, f"{project.root}/.venv/bin/python"), said
    assert project.done() == ["venv", f"pip {project.root}"]

    assert project.setup() == (0, python, "")
    assert project.done() == []

    assert project.setup("dev")[0] == 0
    assert project.done() == [f"pip {project.root}[dev]"]
    assert project.setup() == (0, python, "")
    assert project.setup("dev") == (0, python, "")
    assert project.done() == []

    (project.root / "constraints.txt").write_text("numpy==1\n")
    assert project.setup()[0] == 0
    assert project.done() == [f"pip {project.root}[dev]"], "extras that were there stay"


def test_a_killed_setup_is_begun_again_from_nothing(project: Project) -> None:
    for attempt in ("the first installation", "an upgrade"):
        (project.root / "setup.py").write_text(f"# {attempt}\n")
        process = project.start(PIP_SECONDS="60")
        while "pip" not in project.log.read_text():
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        project.done()
        debris = project.root / ".venv" / "half-written"
        debris.touch()

        assert project.setup()[0] == 0
        assert project.done() == ["venv", f"pip {project.root}"], attempt
        assert not debris.exists()


def test_a_failed_upgrade_leaves_the_environment_unchanged(project: Project) -> None:
    assert project.setup()[0] == 0
    (project.root / "setup.py").write_text("# changed\n")
    code, _, said = project.setup("dev", PIP_EXIT="1")
    assert code == 2 and said.splitlines()[-1].startswith("error: set-up: pip failed")
    project.done()
    assert project.setup()[0] == 0
    assert project.done() == [f"pip {project.root}"], "neither the environment made anew nor an extra left behind"


def test_two_at_once_wait_for_each_other(project: Project) -> None:
    both = [project.start("dev", PIP_SECONDS="1") for _ in range(2)]
    said = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert project.done() == ["venv", f"pip {project.root}[dev]"]
    assert sum("waiting for another set-up" in text for text in said) == 1


def test_a_moved_environment_is_recreated(project: Project, tmp_path: Path) -> None:
    assert project.setup()[0] == 0
    project.done()
    project.root = project.root.rename(tmp_path / "moved here")
    code, python, _ = project.setup()
    assert (code, python) == (0, f"{project.root}/.venv/bin/python")
    assert project.done() == ["venv", f"pip {project.root}"]


def test_an_environment_of_the_user_is_used_and_never_emptied(project: Project, tmp_path: Path) -> None:
    given = tmp_path / "given"
    (given / "bin").mkdir(parents=True)
    shutil.copy(project.python, given / "bin" / "python")
    (given / "mine").touch()
    assert project.setup(STLM_VENV=str(given), PIP_EXIT="1")[0] == 2
    assert project.setup(STLM_VENV=str(given))[:2] == (0, f"{given}/bin/python")
    assert project.done() == [f"pip {project.root}"] * 2

    letters = tmp_path / "letters"
    letters.mkdir()
    (letters / "to my aunt").touch()
    code, _, said = project.setup(STLM_VENV=str(letters))
    assert code == 2 and len(said.splitlines()) == 1 and "STLM_VENV" in said
    assert [path.name for path in letters.iterdir() if not path.name.startswith("stlm-setup")] == ["to my aunt"]


def test_a_missing_python_is_named_in_one_line_with_the_command(project: Project, tmp_path: Path) -> None:
    old = tmp_path / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    assert project.setup(STLM_PYTHON=str(old)) == (
        2, "", f"error: set-up: STLM_PYTHON={old} is not Python 3.10 or later\n"
    )  # fmt: skip

    bare = tmp_path / "bare"  # a PATH without any Python
    bare.mkdir()
    for command in ("bash", "cat", "cksum", "flock", "grep", "id", "ls", "mkdir", "tr"):
        (bare / command).symlink_to(str(shutil.which(command)))
    code, _, said = project.setup(STLM_PYTHON="", PATH=str(bare))
    assert code == 2 and len(said.splitlines()) == 1
    assert said.startswith("error: set-up: no Python 3.10 or later on PATH; install it")
