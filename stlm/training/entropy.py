"""Setup of entropy patching when a run begins: copy the byte model, and find the threshold on the training text."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from data_pipeline.loading.prepared_data import TrainLoader
from data_pipeline.loading.windows import Windows
from stlm.config import EntropyPatchingConfig, ModelConfig, changed_keys
from stlm.errors import CheckpointError, ConfigError
from stlm.model import EntropyPatching
from stlm.stlm import STLM
from stlm.training.distributed.connection import Distributed

SAMPLE_IDS = 1 << 15  # of training text; the mean patch length is then known within a few percent
KEY = "model.embedder.patching"


def begin_entropy_patching(
    model: STLM, loader: TrainLoader, batch_size: int, distributed: Distributed
) -> Iterator[str]:  # fmt: skip
    """Set the byte model and the threshold of a model with entropy patching, both of which are frozen.

    Yields lines for the log; nothing for another patching. Raises ConfigError where the byte model does not fit, or
    where no threshold gives the requested patch length.
    """
    config = getattr(model.config.embedder, "patching", None)
    if not isinstance(config, EntropyPatchingConfig):
        return
    patching = model.embedder.patching
    assert isinstance(patching, EntropyPatching)

    def begin() -> tuple[dict[str, Tensor], float]:
        tensors = read_byte_model(config, model)
        load(patching, tensors)
        threshold, length = find_threshold(patching, model, loader, batch_size, config.patch_length)
        return {**tensors, "threshold": torch.tensor([threshold])}, length

    tensors, length = distributed.on_rank_zero(begin)  # the other ranks need not see that folder
    load(patching, tensors)
    yield (
        f"a patch begins where {config.entropy_model} finds more than {float(patching.threshold):.4f} bits of entropy: "
        f"{length:.2f} bytes per patch on a sample"
    )


@torch.no_grad()
def load(patching: EntropyPatching, tensors: dict[str, Tensor]) -> None:
    """Set parameters by name."""
    parameters = dict(patching.named_parameters())
    for name, tensor in tensors.items():
        parameters[name].copy_(tensor)


def read_byte_model(config: EntropyPatchingConfig, model: STLM) -> dict[str, Tensor]:
    """Return the parameters of `entropy_model`, by their names in the patching.

    Raises ConfigError where that model does not fit the config.
    """
    key = f"{KEY}.entropy_model"
    if config.entropy_model is None:
        raise ConfigError(
            f"{key}: got null, expected the run of a byte model; train one with "
            "--set 'model.embedder={kind: byte}' 'model.head={kind: linear}', and name its run directory"
        )
    try:
        found = STLM.load(config.entropy_model)
    except CheckpointError as error:
        raise ConfigError(f"{key}: {error}") from error
    expected = config.byte_model(model.config)
    if found.config.context_length < model.config.context_length:
        raise ConfigError(
            f"{key}: {config.entropy_model} reads windows of {found.config.context_length} ids, expected at least "
            f"model.context_length = {model.config.context_length}; "
            f"model.context_length={found.config.context_length} would work"
        )
    for part in ("embedder", "head"):
        if getattr(found.config, part) != getattr(expected, part):
            raise ConfigError(
                f"{key}: {config.entropy_model} is a model whose {part} is {getattr(found.config, part)}, expected "
                f"{getattr(expected, part)}; a run with 'model.embedder={{kind: byte}}' and "
                "'model.head={kind: linear}' would work"
            )
    if changed := [name for name in changed_keys(expected, found.config) if name != "context_length"]:
        settings = " ".join(f"{KEY}.{name}={_value(found.config, name)}" for name in changed)
        raise ConfigError(
            f"{KEY}.{changed[0]}: got {_value(expected, changed[0])}, but {config.entropy_model} has "
            f"{_value(found.config, changed[0])}; {settings} would work"
        )
    return {f"model.{name}": tensor.detach() for name, tensor in found.named_parameters()}


def find_threshold(
    patching: EntropyPatching, model: STLM, loader: TrainLoader, batch_size: int, patch_length: float
) -> tuple[float, float]:
    """Return the threshold, in bits, whose patches have a mean length of `patch_length` bytes, and their actual mean
    length. Both are measured on the text of the first steps.

    Raises ConfigError where no threshold comes within 10 % of `patch_length`.
    """
    rows: list[Windows] = []
    while sum(row.ids.size for row in rows) < SAMPLE_IDS:
        step, row = divmod(len(rows), batch_size)
        rows.append(loader.rows(step + 1, row, row + 1))
    ids_BT = torch.cat([torch.from_numpy(row.ids) for row in rows])
    inputs_BT = torch.cat((torch.full_like(ids_BT[:, :1], model.tokenizer.start_id), ids_BT[:, :-1]), dim=1)
    documents = [torch.from_numpy(row.document_ids) for row in rows if row.document_ids is not None]
    documents_BT = torch.cat(documents) if documents else None
    entropy_BT = patching.entropy(inputs_BT, documents_BT)
    bits = entropy_BT.flatten().sort(descending=True).values

    def at(harder: int) -> tuple[float, float]:
        """Return the threshold half-way between the `harder`-th highest entropy and the next, and its patch length."""
        threshold = float(bits[harder - 1 : harder + 1].mean())
        begun = patching.place(entropy_BT > threshold, documents_BT).counts_B.sum()
        return threshold, bits.numel() / int(begun)

    # A lower threshold gives more patches: find the highest one whose patches are short enough.
    harder = bisect_left(range(1, bits.numel()), True, key=lambda harder: at(harder)[1] <= patch_length) + 1
    threshold, length = at(min(harder, bits.numel() - 1))
    if abs(length / patch_length - 1) > 0.1:
        raise ConfigError(
            f"{KEY}.entropy_model: it finds many bytes equally hard to guess, {float(bits[-1]):.3f} to "
            f"{float(bits[0]):.3f} bits of entropy, and no threshold comes closer to patches of {KEY}.patch_length = "
            f"{patch_length:g} bytes than {length:.2f}; train it longer"
        )
    return threshold, length


def _value(config: ModelConfig, key: str) -> str:
    """Return the setting under a dotted key, as JSON."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return json.dumps(value)
