"""Import rules between packages, read from syntax trees, so that an import inside a function counts as well."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Each room and the rooms that it may import besides itself. A room is a package, or one file that is a room by
# itself. docs/architecture.md draws this table.
OPEN = {"stlm.config", "stlm.errors", "data_pipeline.plurals"}
BELOW_STLM = OPEN | {"stlm.model", "stlm.generation", "stlm.artifact", "stlm.checkpoints"}
BELOW_TRAINING = BELOW_STLM | {"stlm.stlm", "stlm.objectives"}
DATA = {"data_pipeline", "data_pipeline.config"}
ROOMS: dict[str, set[str]] = {
    "data_pipeline.config": set(),
    "data_pipeline.plurals": set(),
    "data_pipeline": {"data_pipeline.config", "data_pipeline.plurals"},
    "stlm.errors": set(),
    "stlm.config": {"stlm.errors", "data_pipeline.config", "data_pipeline.plurals"},
    "stlm.model": OPEN,
    "stlm.generation": OPEN,
    "stlm.artifact": OPEN | DATA | {"stlm.model"},
    "stlm.checkpoints": OPEN | DATA | {"stlm.artifact"},
    "stlm.stlm": BELOW_STLM | DATA,
    "stlm.objectives": BELOW_STLM | {"stlm.stlm"},
    "stlm.training": BELOW_TRAINING | DATA,
    "stlm.evals": BELOW_TRAINING | DATA,
    "stlm.export": BELOW_TRAINING | DATA,
    "stlm.chat": BELOW_TRAINING | DATA,
    "stlm.serving": BELOW_TRAINING | DATA | {"stlm.chat"},
    "stlm.description": BELOW_TRAINING | DATA | {"stlm.training", "stlm.evals"},
    "stlm.reporting": BELOW_TRAINING,
    "stlm.selfplay": BELOW_TRAINING | DATA | {"stlm.training"},
}
ROOMS["stlm"] = OPEN | {"stlm.stlm"}  # stlm/__init__.py: public names, nothing that only the scripts need
ROOMS["stlm.commands"] = ROOMS["benchmarks"] = set(ROOMS)
ROOMS["scripts"] = ROOMS["stlm.__main__"] = {"stlm.commands"}  # nothing else imports these

# External packages that the lower rooms may import; rooms that are not named here are free.
LIBRARIES: dict[str, set[str]] = {
    "data_pipeline.config": set(),
    "data_pipeline.plurals": set(),
    # datasets brings the hub and pyarrow; compression is in the standard library from Python 3.14 on
    "data_pipeline": {
        "backports",
        "compression",
        "datasets",
        "huggingface_hub",
        "matplotlib",
        "mpi4py",
        "numpy",
        "orjson",
        "babel",
        "charset_normalizer",
        "py3langid",
        "pyarrow",
        "rensa",
        "webencodings",
        "resiliparse",
        "sentencepiece",
        "tokenizers",
        "tqdm",
    },
    "stlm.errors": set(),
    "stlm.config": {"yaml"},
    "stlm.model": {"torch"},
    "stlm.generation": {"torch"},
}

# The only package that may import DeepSpeed. Its files import it inside functions only.
KNOWS_DEEPSPEED = "stlm/training/deepspeed/"


def room_of(module: str) -> str | None:
    """Return the room of a dotted name, the longest that matches; None outside the project."""
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in ROOMS), None)


def imports(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """Return line and dotted name of all imports of a file, in any form; `package` resolves relative imports."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = package.split(".")[: len(package.split(".")) - level + 1] if level else []
                source = ".".join([*base, *([module] if module else [])])
                # `from stlm import model` imports stlm.model; `from stlm.model import Batch` no module of that name.
                yield from ((node.lineno, f"{source}.{alias.name}") for alias in names)
            case ast.Attribute(value=ast.Name(id="torch"), attr="distributed"):
                yield node.lineno, "torch.distributed"
            case ast.Call(func=ast.Attribute(attr="import_module") | ast.Name(id="__import__" | "import_module")):
                name = node.args[0] if node.args else None
                yield node.lineno, name.value if isinstance(name, ast.Constant) else "a computed name"


def violations(path: str, source: str) -> list[str]:
    """Return the forbidden imports of the file at `path` (relative to the project root)."""
    module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
    room = room_of(module)
    # A folder outside the table belongs to no room, not to stlm/__init__.py.
    if room is None or (room == "stlm" and path != "stlm/__init__.py"):
        return [f"{path}: no package has this file: add its package to tests/test_imports.py and docs/architecture.md"]
    tree = ast.parse(source)
    at_the_top = {line for node in tree.body for line, _ in imports(ast.Module([node], []), package)
                  if isinstance(node, ast.Import | ast.ImportFrom)}  # fmt: skip
    found = []
    for line, name in imports(tree, package):
        library = name.split(".")[0]
        if library == "deepspeed":
            wrong = not path.startswith(KNOWS_DEEPSPEED) or line in at_the_top
        elif (target := room_of(name)) is not None:
            wrong = target != room and target not in ROOMS[room]
        else:
            known = LIBRARIES.get(room)
            wrong = known is not None and library not in known | set(sys.stdlib_module_names)
            wrong |= room in ("stlm.model", "stlm.generation") and name.startswith("torch.distributed")
        if wrong:
            found.append(f"{path}:{line}: {room} may not import {name}")
    return found


def files() -> list[Path]:
    folders = ("stlm", "data_pipeline", "scripts", "benchmarks")
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    assert violations(str(path.relative_to(ROOT)), path.read_text()) == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("data_pipeline/loading/prepared_data.py", "def f():\n    import torch"),
        ("data_pipeline/loading/prepared_data.py", "from stlm.errors import StlmError"),
        ("data_pipeline/config.py", "import numpy"),
        ("stlm/model/core/transformer.py", "from stlm.generation import sample"),
        ("stlm/model/core/transformer.py", "import torch\nx = torch.distributed.get_rank()"),
        ("stlm/model/core/transformer.py", "from torch import distributed"),
        ("stlm/model/core/transformer.py", "import numpy"),
        ("stlm/model/core/transformer.py", "from ...stlm import STLM"),
        ("stlm/model/core/transformer.py", "from stlm import STLM"),
        ("stlm/generation/sampling.py", "from data_pipeline.tokenizers import load_tokenizer"),
        ("stlm/config/presets.py", "import importlib\nimportlib.import_module('torch')"),
        ("stlm/config/presets.py", "from data_pipeline.preparation import pipeline as prepare"),
        ("stlm/stlm.py", "from stlm import training"),
        ("stlm/stlm.py", "from .objectives import OBJECTIVES"),
        ("stlm/objectives/next_token.py", "from data_pipeline.loading.prepared_data import PreparedData"),
        ("stlm/evals/likelihood.py", "from stlm.training.trainer import Trainer"),
        ("stlm/training/trainer.py", "def f():\n    import deepspeed"),
        ("stlm/training/distributed/connection.py", "def f():\n    import deepspeed"),
        ("stlm/training/deepspeed/engine.py", "import deepspeed"),
        ("stlm/training/deepspeed/engine.py", "from deepspeed.ops import op_builder"),
        ("stlm/commands/pretrain.py", "def main():\n    from deepspeed import init_distributed"),
        ("stlm/evals/report.py", "from stlm.commands.program import run"),
        ("scripts/pretrain.py", "from stlm.training.trainer import Trainer"),
        ("stlm/telepathy/reader.py", ""),
    ],
)
def test_the_rules_refuse(path: str, source: str) -> None:
    assert len(violations(path, source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("stlm/training/deepspeed/engine.py", "def f():\n    import deepspeed"),
        (
            "stlm/model/core/transformer.py",
            "from . import layers\nfrom ..config import ModelConfig\nimport torch.nn as nn",
        ),
        ("stlm/selfplay/spin.py", "from stlm.training import Trainer"),
        ("stlm/config/run.py", "import yaml\nfrom data_pipeline.config import DataConfig"),
        ("stlm/commands/pretrain.py", "from stlm import evals\nfrom stlm import training\nimport data_pipeline"),
    ],
)
def test_the_rules_allow(path: str, source: str) -> None:
    assert violations(path, source) == []


def run_python(code: str) -> None:
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stderr


def graph(folders: tuple[str, ...] = ("stlm", "data_pipeline")) -> dict[str, set[str]]:
    """Return each module with the modules that it imports anywhere, also for annotations only."""
    paths = {dotted(path): path for path in files() if path.relative_to(ROOT).parts[0] in folders}
    found = {}
    for module, path in paths.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        names = [name for _, name in imports(ast.parse(path.read_text()), package)]
        targets = {name if name in paths else name.rpartition(".")[0] for name in names}
        found[module] = targets & paths.keys() - {module}
    return found


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def circles(imported: dict[str, set[str]]) -> list[list[str]]:
    """Return groups of modules that import each other, directly or indirectly."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for name in imported[waiting.pop()] - seen:
                seen.add(name)
                waiting.append(name)
        return seen

    reach = {module: reached(module) for module in imported}
    groups = {tuple(sorted(other for other in reach if other in reach[module] and module in reach[other]))
              for module in reach if module in reach[module]}  # fmt: skip
    return sorted(map(list, groups))


def test_there_are_no_import_cycles() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [["b", "c"]]
    assert circles(graph()) == []


def test_packages_of_data_pipeline_import_those_before_them() -> None:
    order = ["storage", "tokenizers", "sources", "cleaning", "preparation", "loading", "report"]

    def level(module: str) -> int:
        package = [*module.split("."), ""][1]
        return order.index(package) if package in order else -1

    for module, targets in graph(("data_pipeline",)).items():
        assert max(map(level, targets), default=-1) <= level(module), f"{module} imports {sorted(targets)}"


def test_no_two_classes_have_one_name() -> None:
    homes: dict[str, list[str]] = {}
    for path in files():
        if path.relative_to(ROOT).parts[0] in ("stlm", "data_pipeline"):
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef):
                    homes.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    assert {name: paths for name, paths in homes.items() if len(paths) > 1} == {}


def test_folders_of_the_library_are_small() -> None:
    """A folder has at most 16 modules, so that its listing is readable at a glance."""
    folders = {path.parent for path in files() if path.relative_to(ROOT).parts[0] in ("stlm", "data_pipeline")}
    sizes = {str(folder.relative_to(ROOT)): len([*folder.glob("[!_]*.py")]) for folder in folders}
    assert {folder: size for folder, size in sizes.items() if size > 16} == {}


def test_models_work_without_deepspeed() -> None:
    """A saved model loads, evaluates and generates where DeepSpeed is not installed."""
    run_python(
        "import sys; sys.modules['deepspeed'] = None\n"
        "import stlm, stlm.config, stlm.model, stlm.generation, stlm.objectives, stlm.stlm, stlm.training, stlm.evals"
    )


def test_configs_are_read_without_torch_or_numpy() -> None:
    """Errors in a config file are reported at once, also on machines that only prepare data or submit jobs."""
    run_python("import sys; sys.modules['torch'] = sys.modules['numpy'] = None\nimport stlm.config, stlm.errors")


def test_preparing_data_needs_no_torch() -> None:
    run_python(
        "import sys; sys.modules['torch'] = None\n"
        "import data_pipeline.preparation.pipeline, data_pipeline.loading.prepared_data"
    )


@pytest.mark.slow
def test_a_wheel_holds_every_module_and_its_commands_work(tmp_path: Path) -> None:
    source = tmp_path / "source"  # a copy: building leaves its own files in the source folder, and includes old ones
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for package in ("stlm", "data_pipeline"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(source)]
    subprocess.run(command, check=True)
    (wheel,) = tmp_path.glob("stlm-*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        str(path.relative_to(source))
        for package in ("stlm", "data_pipeline")
        for path in (source / package).rglob("*")
        if path.is_file()
    }
    assert packed == expected
    assert "stlm/presets/quickstart.yaml" in packed

    # Once installed, it provides the commands, which find everything they need in the package.
    installed = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(installed)]
    subprocess.run([*pip, str(wheel)], check=True)
    environment = os.environ | {"PYTHONPATH": str(installed), "TORCH_EXTENSIONS_DIR": str(tmp_path / "extensions")}

    def stlm(*arguments: str) -> str:
        command = [str(installed / "bin" / "stlm"), *arguments]
        finished = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stdout + finished.stderr
        return finished.stdout

    assert "\n  pretrain            train a model\n" in stlm()
    assert stlm("generate", "--help").startswith("usage: stlm generate ")
    assert re.search(r"^ok +two steps +prepared, trained with ZeRO 2 and saved", stlm("doctor"), re.MULTILINE)
    assert "quickstart: byte_patch" in stlm("describe", "quickstart")
