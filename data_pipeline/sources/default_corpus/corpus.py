"""The default corpus: English prose that is present on every machine with this project's requirements.

It is read from the docstrings of the standard library and of a fixed list of installed packages, and from Python's
language reference (`pydoc_data.topics`). Files are parsed, never imported. The same versions give the same documents in
the same order on every machine.
"""

from __future__ import annotations

import ast
import gc
import importlib.util
import os
import platform
import re
import sysconfig
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from data_pipeline.sources.default_corpus.prose import paragraphs

# Increased when the same packages begin to give other documents.
CORPUS_VERSION = 1

STANDARD_LIBRARY = "python"

# Import name → distribution. Only packages that this project's requirements always install.
PACKAGES = {
    STANDARD_LIBRARY: "",
    "torch": "torch",
    "deepspeed": "deepspeed",
    "sympy": "sympy",
    "pandas": "pandas",
    "networkx": "networkx",
    "numpy": "numpy",
    "huggingface_hub": "huggingface-hub",
    "datasets": "datasets",
    "tensorboard": "tensorboard",
    "pydantic": "pydantic",
    "mpmath": "mpmath",
    "werkzeug": "werkzeug",
    "PIL": "pillow",
    "fsspec": "fsspec",
    "click": "click",
    "grpc": "grpcio",
    "jinja2": "jinja2",
    "setuptools": "setuptools",
    "absl": "absl-py",
    "packaging": "packaging",
    "anyio": "anyio",
    "markdown": "markdown",
    "pyarrow": "pyarrow",
    "psutil": "psutil",
    "dill": "dill",
    "filelock": "filelock",
    "tqdm": "tqdm",
}

_SKIPPED_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "testing",
        "_vendor",
        "_vendored",
        "vendor",
        "idlelib",
        "lib2to3",
    }
    | {"pydoc_data", "turtledemo", "ensurepip", "__pycache__"}
)
_TOPICS = Path("pydoc_data", "topics.py")
_LONGEST_DOCUMENT = 16_384  # characters, unless one docstring alone is longer
_SHORTEST_DOCUMENT = 200
_LONGEST_UNIT = 8 << 20  # bytes of source code per unit


def installed_versions() -> dict[str, str | None]:
    """Return the version of every package that the corpus is read from; None if one is not installed."""
    from importlib import metadata  # imported here because it is slow, and every worker imports this file

    versions: dict[str, str | None] = {STANDARD_LIBRARY: platform.python_version()}
    for name, distribution in PACKAGES.items():
        if distribution:
            try:
                versions[name] = metadata.version(distribution)
            except metadata.PackageNotFoundError:
                versions[name] = None
    return versions


def corpus_units() -> list[tuple[str, tuple[str, ...], int]]:
    """Divide the corpus into units: a package, some of its files (relative paths), and their size in bytes."""
    units: list[tuple[str, tuple[str, ...], int]] = []
    for package, version in installed_versions().items():
        names: list[str] = []
        total = 0
        for name, size in _files(package) if version else ():
            if names and total + size > _LONGEST_UNIT:
                units.append((package, tuple(names), total))
                names, total = [], 0
            names.append(name)
            total += size
        if names:
            units.append((package, tuple(names), total))
    return units


def _files(package: str) -> list[tuple[str, int]]:
    """Return the relative path and size of a package's Python files, without tests and copies of other packages."""
    folder = _folder(package)
    found: list[tuple[str, int]] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS]
        for path in (Path(parent, name) for name in names if name.endswith(".py")):
            found.append((path.relative_to(folder).as_posix(), path.stat().st_size))
    if package == STANDARD_LIBRARY:
        found.append((_TOPICS.as_posix(), (folder / _TOPICS).stat().st_size))
    return sorted(found)


def read_unit(package: str, files: tuple[str, ...]) -> Iterator[str]:
    """Yield the documents in some files of a package: the prose of a module, in one document or, if it is long, in
    several.

    A paragraph that differs from an earlier one of the same unit only in digits, case or punctuation is boilerplate and
    left out.
    """
    folder = _folder(package)
    seen: set[str] = set()
    for name in files:
        docstrings = _topics(folder / name) if Path(name) == _TOPICS else _docstrings(folder / name)
        for document in _documents(docstrings, seen):
            if len(document) >= _SHORTEST_DOCUMENT:
                yield document


def _documents(docstrings: list[str], seen: set[str]) -> Iterator[str]:
    document: list[str] = []
    size = 0
    for docstring in docstrings:
        fresh = [text for text in paragraphs(docstring) if _first_time(text, seen)]
        length = sum(len(text) + 2 for text in fresh)
        if document and size + length > _LONGEST_DOCUMENT:
            yield "\n\n".join(document)
            document, size = [], 0
        document += fresh
        size += length
    if document:
        yield "\n\n".join(document)


def _first_time(text: str, seen: set[str]) -> bool:
    key = re.sub(r"[^a-z]+", "", text.lower())
    if key in seen:
        return False
    seen.add(key)
    return True


def _docstrings(path: Path) -> list[str]:
    """Return all docstrings of a file in order, and the texts passed to functions that add docstrings later."""
    found: list[str] = []
    with _no_garbage_collection():
        _collect(_parse(path), found)
    return found


def _collect(node: ast.AST, found: list[str]) -> None:
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            found.append(docstring)
    for name in ("body", "orelse", "handlers", "finalbody"):
        children = getattr(node, name, None)
        if isinstance(children, list):
            for child in children:
                if isinstance(child, ast.Expr) and isinstance(child.value, ast.Call):
                    found += [text for text in map(_string, child.value.args) if "\n" in text]
                elif not isinstance(child, (ast.Expr, ast.Assign, ast.Return)):
                    _collect(child, found)


def _topics(path: Path) -> list[str]:
    """Return the articles of Python's language reference: the values of the one dictionary in pydoc_data/topics.py."""
    dictionaries = [node for node in ast.walk(_parse(path)) if isinstance(node, ast.Dict)]
    return [_string(value) for dictionary in dictionaries for value in dictionary.values]


def _string(node: ast.AST) -> str:
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def _parse(path: Path) -> ast.Module:
    """Return the syntax tree of a file; an empty one if it is not Python of this version (templates, old examples)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError, RecursionError):
            return ast.Module(body=[], type_ignores=[])


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Disable garbage collection: a syntax tree has many small objects without cycles, and searching them dominates the
    time.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _folder(package: str) -> Path:
    if package == STANDARD_LIBRARY:
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    return Path(next(iter(spec.submodule_search_locations)))


def describe() -> dict[str, Any]:
    """Return the identification of the corpus for the settings of prepared data."""
    return {"kind": "default corpus", "version": CORPUS_VERSION, "packages": installed_versions()}
