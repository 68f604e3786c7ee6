"""Check that all nodes have the same code, settings and data, before the first step.

Nodes may read these from disks of their own. Without the check, an older checkout on one node, or other data under the
same path, would go unnoticed: the ranks would train on different things.
"""

from __future__ import annotations

import hashlib
import json
import socket
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import data_pipeline
from data_pipeline.plurals import number_of
from stlm.config import RunConfig, dump_run_config
from stlm.errors import EngineError
from stlm.training.distributed.connection import Distributed

SHOWN = 12  # digits of a fingerprint


def fingerprints(config: RunConfig, deepspeed_config: Mapping[str, Any] | None, data: str) -> dict[str, str]:
    """Return fingerprints, by name, of everything that must agree on all ranks. `data`: the fingerprint of the data."""
    return {
        "code": _of_code(),
        "torch": str(torch.__version__),
        "deepspeed": version("deepspeed"),
        "settings": _of(dump_run_config(config).encode()),
        "DeepSpeed's configuration": _of(json.dumps(deepspeed_config, sort_keys=True, default=str).encode()),
        "data": data,
    }


def refuse_differences(distributed: Distributed, mine: dict[str, str]) -> None:
    """Raise EngineError, on all ranks, if fingerprints differ from those of rank 0. Every rank calls it."""
    everyone = distributed.gather((socket.gethostname(), mine))
    distributed.on_rank_zero(lambda: _compare(everyone))


def _compare(everyone: list[tuple[str, dict[str, str]]]) -> None:
    host, expected = everyone[0]
    lines = []
    for what, value in expected.items():
        others = [(rank, node, found[what]) for rank, (node, found) in enumerate(everyone) if found[what] != value]
        if others:
            rank, node, found = others[0]
            more = f", and {number_of(len(others) - 1, 'more rank')}" if len(others) > 1 else ""
            lines.append(
                f"  {what}: {value[:SHOWN]} at rank 0 on {host}, {found[:SHOWN]} at rank {rank} on {node}{more}"
            )
    if lines:
        raise EngineError(
            "the nodes differ:\n" + "\n".join(lines) + "\ncopy the same files to all of them, or share a folder"
        )


def _of_code() -> str:
    """Return a hash of the .py and .yaml files of both packages, and of the script that was started."""
    digest = hashlib.sha256()
    for name, path in code_files():
        digest.update(f"{name}\0".encode() + path.read_bytes() + b"\0")
    script = getattr(sys.modules["__main__"], "__file__", None)
    if script is not None and Path(script).is_file():  # not "<stdin>"
        digest.update(Path(script).read_bytes())
    return digest.hexdigest()


def code_files() -> Iterator[tuple[str, Path]]:
    """Yield the .py and .yaml files of both packages, in order, each with its name as seen from above its package."""
    for root in (Path(__file__).parents[2], Path(str(data_pipeline.__file__)).parent):
        for path in sorted(path for path in root.rglob("*") if path.suffix in (".py", ".yaml")):
            yield str(path.relative_to(root.parent)), path


def _of(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
