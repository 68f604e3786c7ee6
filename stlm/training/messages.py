"""Values and errors as bytes that carry data only: JSON, with tensors behind it in the format of safetensors.

Unlike a pickle, such a message runs no code where it is read, whoever wrote it. An error travels as the name of its
class, its message and its exit code; a name that is not one of this project's errors becomes a plain StlmError.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save

from data_pipeline.errors import DataError
from stlm.errors import StlmError

_LENGTH_BYTES = 8  # of the JSON, in front of it


def encode(value: Any) -> bytes:
    """None, booleans, numbers, strings, paths, tensors, and lists, tuples and dicts (with string keys) of them.

    Raises TypeError for anything else: what a rank sends is to be built of these.
    """
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(_plain(value, tensors)).encode()
    return len(text).to_bytes(_LENGTH_BYTES, "big") + text + (save(tensors) if tensors else b"")


def decode(message: bytes) -> Any:
    """The value that `encode` was given."""
    end = _LENGTH_BYTES + int.from_bytes(message[:_LENGTH_BYTES], "big")
    tensors = load(message[end:]) if len(message) > end else {}
    return _value(json.loads(message[_LENGTH_BYTES:end]), tensors)


def describe_error(error: Exception) -> dict[str, Any]:
    """The error as a value that can be encoded. What is not a user's mistake is given with its class."""
    if hasattr(error, "exit_code"):
        return {"name": type(error).__name__, "message": str(error), "exit_code": int(error.exit_code)}
    return {"name": StlmError.__name__, "message": f"{type(error).__name__}: {error}", "exit_code": 1}


def error_of(described: dict[str, Any]) -> Exception:
    """The error that `describe_error` was given."""
    kind = _known_errors().get(described["name"], StlmError)
    error = kind(str(described["message"]))
    if error.exit_code != described["exit_code"]:
        error.exit_code = int(described["exit_code"])
    return error


def _known_errors() -> dict[str, type[Any]]:
    """This project's errors by name: those that are loaded here."""
    kinds: list[type[Any]] = [StlmError, DataError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    return {kind.__name__: kind for kind in kinds if kind.__module__.partition(".")[0] in ("stlm", "data_pipeline")}


def _plain(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """What JSON has no form for becomes [kind, contents], and so does a list."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return ["path", str(value)]
    if isinstance(value, torch.Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().cpu().contiguous()
        return ["tensor", name]
    if type(value) in (list, tuple):
        return [type(value).__name__, [_plain(part, tensors) for part in value]]
    if type(value) is dict and all(type(key) is str for key in value):
        return {key: _plain(part, tensors) for key, part in value.items()}
    raise TypeError(f"ranks exchange plain values, paths and tensors, got {type(value).__name__}")


def _value(plain: Any, tensors: dict[str, torch.Tensor]) -> Any:
    match plain:
        case ["path", str(text)]:
            return Path(text)
        case ["tensor", str(name)]:
            return tensors[name]
        case ["list", list(parts)]:
            return [_value(part, tensors) for part in parts]
        case ["tuple", list(parts)]:
            return tuple(_value(part, tensors) for part in parts)
        case dict():
            return {key: _value(part, tensors) for key, part in plain.items()}
    return plain
