"""Values and errors as bytes that carry data only: JSON, followed by tensors in the format of safetensors.

Unlike a pickle, such a message runs no code where it is read, whoever wrote it. An error is sent as the name of its
class, its message and its exit code. The name of a class outside this project becomes a plain StlmError.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from safetensors.torch import load, save

from data_pipeline.errors import DataError
from data_pipeline.typed_json import from_plain, to_plain
from stlm.errors import StlmError

_LENGTH_BYTES = 8  # the length of the JSON, before it


def encode(value: Any) -> bytes:
    """Encode None, booleans, numbers, strings, paths, tensors, and lists, tuples and dicts (string keys) of them.

    Raises TypeError for anything else.
    """
    tensors: dict[str, torch.Tensor] = {}

    def keep(value: Any) -> list[Any]:
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"ranks exchange plain values, paths and tensors, got {type(value).__name__}")
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous()
        return ["tensor", name]

    text = json.dumps(to_plain(value, keep)).encode()
    return len(text).to_bytes(_LENGTH_BYTES, "big") + text + (save(tensors) if tensors else b"")


def decode(message: bytes) -> Any:
    """Return the value that `encode` was given. Raises ValueError, or an error of safetensors, for other messages."""
    end = _LENGTH_BYTES + int.from_bytes(message[:_LENGTH_BYTES], "big")
    tensors = load(message[end:]) if len(message) > end else {}

    def find(kind: str, contents: Any) -> torch.Tensor:
        if kind != "tensor" or contents not in tensors:
            raise ValueError(f"a message holds {kind} {contents!r}, which no rank sends")
        return tensors[contents]

    return from_plain(json.loads(message[_LENGTH_BYTES:end]), find)


def describe_error(error: Exception) -> dict[str, Any]:
    """Describe an error by values that can be encoded. For one that is no user error, the message names its class."""
    if hasattr(error, "exit_code"):
        return {"name": type(error).__name__, "message": str(error), "exit_code": int(error.exit_code)}
    return {"name": StlmError.__name__, "message": f"{type(error).__name__}: {error}", "exit_code": 1}


def error_of(described: dict[str, Any]) -> Exception:
    """Return the error that `describe_error` was given."""
    kind = _known_errors().get(described["name"], StlmError)
    error = kind(str(described["message"]))
    if error.exit_code != described["exit_code"]:
        error.exit_code = int(described["exit_code"])
    return error


def _known_errors() -> dict[str, type[Any]]:
    """Return this project's error classes by name, as far as they are imported."""
    kinds: list[type[Any]] = [StlmError, DataError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return {kind.__name__: kind for kind in kinds if kind.__module__.partition(".")[0] in ("stlm", "data_pipeline")}
