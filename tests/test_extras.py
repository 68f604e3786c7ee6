"""The advice on missing packages: one spelling, which fetches and replaces no other package."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import setuptools

from data_pipeline.extras import EXTRAS, how_to_install

ROOT = Path(__file__).parents[1]


def test_extras_are_those_of_setup_py(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    assert {name: list(requirements) for name, requirements in EXTRAS.items()} == {
        name: requirements for name, requirements in given["extras_require"].items() if name != "dev"
    }


@pytest.mark.parametrize("packages", [*((name,) for name in ("rensa", "scipy", "deepspeed")), ("fastapi", "uvicorn")])
def test_the_command_installs_the_packages_alone(packages):
    command = shlex.split(how_to_install(*packages))
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert command[-2:] == ["-c", str(ROOT / "constraints.txt")]
    assert [re.split(r"[<>=]", word)[0] for word in command[4:-2]] == list(packages)
    pinned = (ROOT / "constraints.txt").read_text().lower()
    assert all(f"\n{package}==" in pinned for package in packages)


def test_limits_of_versions_are_kept():
    assert "'rensa>=0.5,<0.6'" in how_to_install("rensa")


def test_no_other_advice_is_given():
    """`pip install 'stlm[…]'` installs someone else's package; `pip install .` replaces an editable installation."""
    wrong = []
    for folder in ("stlm", "data_pipeline", "scripts", "benchmarks", "docs", "."):
        for path in sorted((ROOT / folder).glob("*" if folder == "." else "**/*")):
            if path.suffix not in (".py", ".sh", ".md", ".sbatch") or path.name == "extras.py":
                continue
            for line in path.read_text(encoding="utf-8").splitlines():
                for found in re.finditer(r"pip install (?P<what>.*)", line):
                    what = found["what"]
                    editable = re.match(r"-e ['\"]?\.\[[a-z,]+\]['\"]? -c constraints\.txt", what)
                    if editable is None and re.match(r"(-e )?['\"]?(\.|stlm)", what):
                        wrong.append(f"{path.relative_to(ROOT)}: {line.strip()}")
                    if editable is None and path.suffix == ".py" and path.name != "setup.py":
                        wrong.append(f"{path.relative_to(ROOT)}: say it by how_to_install: {line.strip()}")
    assert wrong == []
