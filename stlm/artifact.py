"""Model artifacts: one small file with entropy-coded integer matrices and everything needed to use the model.

    "STLMfile", version, sizes and sha256 of what follows     64 bytes
    description                                               JSON, compressed: config, tokenizer, names and shapes
    tokenizer                                                 its files, compressed
    vectors                                                   fp32
    steps of all groups, then the levels of each matrix       integers in an asymmetric numeral system

Each array of integers is coded with its own frequencies, which precede it, by constriction (Bamler 2022, arXiv
2201.01741). The same model gives the same bytes. Nothing in the file can run code.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import struct
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.tokenizers import Tokenizer, load_tokenizer
from stlm.errors import CheckpointError
from stlm.model.decoding.quantization import GROUP, RATIOS, Quantized, largest_level

MAGIC = b"STLMfile"
VERSION = 1
_HEAD = struct.Struct("<8sIIQ8x32s")  # magic, version, bytes of the description, bytes of all that follows, its sha256
_LARGEST_TEXT = 1 << 26  # bytes of a description or of a tokenizer once decompressed

Tensors = Mapping[str, Quantized | Tensor]


class Artifact(NamedTuple):
    """Contents of a file."""

    description: dict[str, Any]  # config.json of a model directory
    tokenizer: Tokenizer
    tensors: dict[str, Tensor]  # fp32, by name


def encode_artifact(description: dict[str, Any], tokenizer: Tokenizer, tensors: Tensors, bits: int) -> bytes:
    """Return the bytes of the file. `tensors`: matrices quantized to `bits` bits, and the others as they are."""
    vectors = {name: tensor.detach().cpu() for name, tensor in tensors.items() if isinstance(tensor, Tensor)}
    matrices = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Quantized)}
    ratios = [matrix.ratios.cpu().numpy().ravel() - 1 for matrix in matrices.values()]
    top = largest_level(bits)
    levels = [
        pack((matrix.levels.int() + top).byte().cpu().numpy().ravel(), 2 * top + 1) for matrix in matrices.values()
    ]
    steps = pack(np.concatenate([np.empty(0, np.uint8), *ratios]), RATIOS)
    tokenizer_text = _tokenizer_text(tokenizer)
    described = {
        "description": description,
        "bits": bits,
        "tokenizer_bytes": len(tokenizer_text),
        "vectors": {name: list(tensor.shape) for name, tensor in vectors.items()},
        "steps_bytes": len(steps),
        "matrices": {
            name: {"shape": list(matrix.levels.shape), "unit": matrix.unit, "bytes": len(packed)}
            for (name, matrix), packed in zip(matrices.items(), levels, strict=True)
        },
    }  # fmt: skip
    text = lzma.compress(json.dumps(described, separators=(",", ":")).encode())
    parts = [tensor.float().numpy().astype("<f4").tobytes() for tensor in vectors.values()]
    body = b"".join([text, tokenizer_text, *parts, steps, *levels])
    return _HEAD.pack(MAGIC, VERSION, len(text), len(body), hashlib.sha256(body).digest()) + body


def read_artifact(path: Path) -> Artifact:
    """Read a model from its file. Raises CheckpointError if it is not an artifact, truncated, or damaged."""
    return decode_artifact(path.read_bytes(), path)


def decode_artifact(data: bytes, path: Path) -> Artifact:
    """Decode a model from the bytes of its file; error messages name `path`. Raises as `read_artifact`."""
    if len(data) < _HEAD.size or data[: len(MAGIC)] != MAGIC:
        raise CheckpointError(
            f"{path}: is not an artifact; expected a file that convert_checkpoint.py --to artifact wrote, or a run, "
            "a checkpoint or a model directory"
        )
    _, version, text_bytes, body_bytes, digest = _HEAD.unpack_from(data)
    if version != VERSION:
        raise CheckpointError(f"{path}: has format version {version}; this version of stlm reads version {VERSION}")
    body = memoryview(data)[_HEAD.size :]
    if len(body) != body_bytes:
        raise CheckpointError(
            f"{path}: has {len(data):,} bytes instead of {_HEAD.size + body_bytes:,}; copy or convert it again"
        )
    if hashlib.sha256(body).digest() != digest:
        raise CheckpointError(f"{path}: has changed: its sha256 is not the recorded one; copy or convert it again")
    try:
        return _read_body(body, text_bytes)
    except (AttributeError, AssertionError, EOFError, LookupError, TypeError, ValueError, lzma.LZMAError) as error:
        raise CheckpointError(f"{path}: cannot be read ({error!r}); convert the model again") from None


def _read_body(body: memoryview, text_bytes: int) -> Artifact:
    described = json.loads(_decompress(body[:text_bytes]))
    place = text_bytes

    def take(size: int) -> memoryview:
        nonlocal place
        place += size
        if size < 0 or place > len(body):
            raise ValueError(f"{size} bytes are missing at the end")
        return body[place - size : place]

    tokenizer = _read_tokenizer(take(described["tokenizer_bytes"]))
    tensors = {}
    for name, shape in described["vectors"].items():
        values = np.frombuffer(take(4 * int(np.prod(shape))), dtype="<f4")
        tensors[name] = torch.from_numpy(values.astype(np.float32)).view(shape)
    matrices, top = described["matrices"], largest_level(described["bits"])
    grids = {name: _grid(matrix["shape"]) for name, matrix in matrices.items()}
    steps = unpack(take(described["steps_bytes"]), sum(rows * groups for rows, groups in grids.values()), RATIOS)
    first = 0
    for name, matrix in matrices.items():
        rows, groups = grids[name]
        ratios = torch.from_numpy(steps[first : first + rows * groups]).add(1).view(rows, groups)
        first += rows * groups
        levels = torch.from_numpy(unpack(take(matrix["bytes"]), int(np.prod(matrix["shape"])), 2 * top + 1))
        levels = (levels.int() - top).to(torch.int8).view(matrix["shape"])
        quantized = Quantized(levels, ratios, matrix["unit"])
        tensors[name] = quantized.value()
    return Artifact(described["description"], tokenizer, tensors)


def _grid(shape: list[int]) -> tuple[int, int]:
    """Return the number of rows of a tensor, and of groups in each."""
    return int(np.prod(shape[:-1])), -(-shape[-1] // GROUP)


# ---------------------------------------------------------------------- integers


def pack(values: NDArray[np.uint8], size: int) -> bytes:
    """Encode integers in 0 … size - 1 as a table of frequencies, a byte each, and the words of their code."""
    coder, table = _coder(), _frequencies(values, size)
    if len(values):
        coder.encode_reverse(values.astype(np.int32), _model(table))
    return table.tobytes() + coder.get_compressed().astype("<u4").tobytes()


def unpack(packed: memoryview, count: int, size: int) -> NDArray[np.uint8]:
    """Decode the `count` integers that `pack` encoded."""
    table = np.frombuffer(packed[:size], dtype=np.uint8)
    words = np.frombuffer(packed[size:], dtype="<u4").astype(np.uint32)
    if not count:
        return np.empty(0, np.uint8)
    return _coder(words).decode(_model(table), count).astype(np.uint8)


def _frequencies(values: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Count each integer; counts are scaled to 255 for the most frequent one, and to at least 1 for all that occur."""
    counts = np.bincount(values, minlength=size)
    scaled = np.rint(counts * (255 / max(1, counts.max())))
    return np.where(counts, np.maximum(scaled, 1), 0).astype(np.uint8)


def _coder(words: NDArray[np.uint32] | None = None) -> Any:
    import constriction

    coder = constriction.stream.stack.AnsCoder
    return coder() if words is None else coder(words)


def _model(table: NDArray[np.uint8]) -> Any:
    import constriction

    return constriction.stream.model.Categorical(table.astype(np.float64), perfect=False)


# ---------------------------------------------------------------------- texts


def _tokenizer_text(tokenizer: Tokenizer) -> bytes:
    """Return the files that a tokenizer saves, as compressed JSON of Latin-1 strings."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        files = {path.name: path.read_bytes().decode("latin-1") for path in sorted(Path(folder).iterdir())}
    return lzma.compress(json.dumps(files, ensure_ascii=False, separators=(",", ":")).encode(), preset=9)


def _read_tokenizer(text: memoryview) -> Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        for name, content in json.loads(_decompress(text)).items():
            if Path(name).name != name:
                raise ValueError(f"a tokenizer file has the name {name!r}")
            Path(folder, name).write_bytes(content.encode("latin-1"))
        return load_tokenizer(folder)


def _decompress(text: memoryview) -> bytes:
    found = lzma.LZMADecompressor()
    content = found.decompress(bytes(text), max_length=_LARGEST_TEXT)
    if not found.eof:
        raise ValueError(f"a text of more than {_LARGEST_TEXT:,} bytes")
    return content
