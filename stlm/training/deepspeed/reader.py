"""Reader of DeepSpeed's checkpoints, native and universal, of any ZeRO stage and number of ranks.

It needs no engine and runs no code from the files: it accepts only tensors, plain values and four harmless classes of
DeepSpeed.
"""

from __future__ import annotations

import pickle
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.plurals import number_of
from stlm.config import TrainingConfig
from stlm.errors import ConversionError
from stlm.stlm import STLM
from stlm.training.deepspeed.internals import classes_in_checkpoints
from stlm.training.optim.optimizers import build_optimizer
from stlm.training.run.state import State

Values = dict[str, dict[str, Tensor]]  # "weights" or a moment → parameter name → tensor


def read_deepspeed(folder: Path, model: STLM, training: TrainingConfig) -> tuple[State, int, dict[str, Any]]:
    """Read a native or universal DeepSpeed checkpoint of `model`. Returns the state, the steps, and the progress that
    `write_deepspeed` saved with it (else an empty dict).

    `folder` is the one passed to `save_checkpoint`, or one of the checkpoints in it. Raises ConversionError where it is
    neither, incomplete, unsafe, or of another model.
    """
    folder = _newest(folder)
    files = sorted(folder.glob("*model_states.pt"))
    if not files:
        raise ConversionError(f"{folder} is not a DeepSpeed checkpoint: it has no *model_states.pt")
    if any("mp_rank_00" not in file.name for file in files):
        raise ConversionError(f"{folder} was saved with tensor or pipeline parallelism, which is not supported")
    by_rank = [_load(file) for file in sorted(files, key=_rank)]
    common = by_rank[0]
    values: Values
    if (folder / "zero").is_dir():
        values, updates = _universal(folder / "zero")
    elif common["optimizer"] is not None:
        values, updates = _whole(common, _orders(model, training))
    else:
        optimizer_files = sorted(folder.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank)
        if len(optimizer_files) != common["dp_world_size"]:
            ranks = number_of(len(optimizer_files), "rank")
            raise ConversionError(
                f"{folder} has the optimizer files of {ranks}, expected those of {common['dp_world_size']}"
            )
        values, updates = _sharded([_load(file)["optimizer_state_dict"] for file in optimizer_files], common)
    frozen: dict[str, Tensor] = {}
    for name, shape in (common.get("frozen_param_shapes") or {}).items():
        parts = [rank["frozen_param_fragments"][name].flatten() for rank in by_rank]
        frozen[name] = torch.cat(parts)[: shape.numel()].view(shape)
    values["weights"] = common["module"] | frozen | values.get("weights", {})
    named = {key: _fitted(tensors, model) for key, tensors in values.items()}
    parameters = named.pop("weights")
    for name, parameter in model.named_parameters():
        found = list(parameters[name].shape) if name in parameters else "missing"
        if found != list(parameter.shape):
            raise ConversionError(
                f"{folder} does not fit the model in the config: {name} has the shape {found}, expected "
                f"{list(parameter.shape)}"
            )
    return State(parameters, named, updates), int(common["global_steps"]), common.get("stlm") or {}


def _newest(folder: Path) -> Path:
    """Return the checkpoint that `latest` or `latest_universal` names, or the folder itself where it has neither."""
    for name in ("latest", "latest_universal"):
        if (folder / name).is_file():
            return folder / (folder / name).read_text(encoding="utf-8").strip()
    return folder


def _rank(file: Path) -> int:
    found = re.search(r"pp_rank_(\d+)_", file.name)
    return int(found[1]) if found else 0


def _load(path: Path) -> Any:
    """Read a file of torch.save without running code from it. Raises ConversionError where that is not possible."""
    try:
        with torch.serialization.safe_globals([*classes_in_checkpoints()]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ConversionError(
            f"{path} holds {found[1] if found else 'something'}, which is not a tensor and could run code; "
            "the file was not read"
        ) from None
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        raise ConversionError(f"{path}: cannot be read ({str(error).splitlines()[0]})") from None


def _universal(folder: Path) -> tuple[Values, int]:
    values: Values = defaultdict(dict)
    updates = 0
    for file in sorted(folder.glob("*/*.pt")):
        if file.stem == "step":
            updates = int(_load(file))
        else:
            value = _load(file)
            value = value["param"] if isinstance(value, dict) else value  # stage 3: as it is, and flat
            values["weights" if file.stem == "fp32" else file.stem][file.parent.name] = value
    if "optimizer_state_dict" in (shared := _load(folder / "optimizer_state.pt")):  # stage 3 has the step there
        updates = int(shared["optimizer_state_dict"]["state"][0]["step"])
    return values, updates


def _sharded(by_rank: Sequence[Mapping[str, Any]], common: Mapping[str, Any]) -> tuple[Values, int]:
    """Read stages 1 to 3: join each parameter's pieces in the order of ranks."""
    pieces: dict[str, dict[str, list[Tensor]]] = defaultdict(lambda: defaultdict(list))
    updates = 0
    for saved in by_rank:
        if "fp32_flat_groups" in saved:
            groups, base = saved["fp32_flat_groups"], saved["optimizer_state_dict"]["state"]
            places = [list(_parts(shapes, len(by_rank))) for shapes in common["param_shapes"]]
        else:
            groups, base = saved["single_partition_of_fp32_groups"], saved["base_optimizer_state"]
            base = base["state"] if isinstance(base, dict) else base
            mappings = saved["param_slice_mappings"]
            places = [[(name, at.start, at.numel) for name, at in group.items()] for group in mappings]
        for number, flat in enumerate(groups):
            updates = int(base[number].get("step", updates))
            moments = {key: value for key, value in base[number].items() if torch.is_tensor(value) and value.ndim}
            for key, tensor in {"weights": flat, **moments}.items():
                for name, start, size in places[number]:
                    pieces[key][name].append(tensor[start : start + size])
    shapes = {name: shape for group in common["param_shapes"] for name, shape in group.items()}
    whole = {
        key: {name: torch.cat(parts)[: shapes[name].numel()].view(shapes[name]) for name, parts in named.items()}
        for key, named in pieces.items()
    }
    return whole, updates


def _parts(shapes: Mapping[str, torch.Size], ranks: int) -> Iterator[tuple[str, int, int]]:
    """Yield (name, start, size) of a group's parameters in a rank's flat tensor at stage 3."""
    start = 0
    for name, shape in shapes.items():
        size = -(-shape.numel() // ranks)
        yield name, start, size
        start += size


def _orders(model: STLM, training: TrainingConfig) -> list[list[list[str]]]:
    """Return the likely groupings of parameters by optimizers, since stage 0 stores numbers instead of names."""
    named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    names = {parameter: name for name, parameter in named}
    ours = [[names[p] for p in group["params"]] for group in build_optimizer(model, training).param_groups]
    matrices, vectors = ([name for name, p in named if (p.ndim > 1) == wanted] for wanted in (True, False))
    return [ours, [[name for name, _ in named]], [matrices, vectors]]


def _whole(common: Mapping[str, Any], orders: Sequence[Sequence[Sequence[str]]]) -> tuple[Values, int]:
    """Read stage 0: the state of torch's own optimizer, and with a bf16 or fp16 block the weights in fp32.

    Raises ConversionError where none of `orders` fits.
    """
    saved = common["optimizer"]
    inner = saved.get("optimizer_state_dict", saved)
    state = [entry for _, entry in sorted(inner["state"].items())]
    updates = int(state[0]["step"]) if state else 0
    module = common["module"]
    for groups in orders:
        order = [name for group in groups for name in group]
        if any(name not in module for name in order):
            continue
        shapes = {name: module[name].shape for name in order}
        if "fp32_groups_flat" in saved:  # a group is one tensor
            held = list(groups)
            sizes = [sum(shapes[name].numel() for name in group) for group in groups]
            if [flat.numel() for flat in saved["fp32_groups_flat"]] != sizes:
                continue
            weights = saved["fp32_groups_flat"]
        else:
            held = [[name] for name in order]
            if [len(group["params"]) for group in inner["param_groups"]] != list(map(len, groups)):
                continue
            weights = [part for group in saved.get("fp32_groups", ()) for part in group]
        entries = [dict(entry) for entry in state]  # Muon's groups have different moments
        for entry, weight in zip(entries, weights, strict=False):
            entry["weights"] = weight
        values: Values = defaultdict(dict)
        fits = len(entries) in (0, len(held))
        for names, entry in zip(held, entries, strict=False):
            numels = [shapes[name].numel() for name in names]
            for key, tensor in entry.items():
                if key == "step":
                    continue
                if fits := fits and tensor.numel() == sum(numels):
                    parts = tensor.flatten().split(numels)
                    values[key] |= {name: part.view(shapes[name]) for name, part in zip(names, parts, strict=True)}
        if fits:
            return values, updates
    raise ConversionError(
        "the optimizer's parameter groups are unknown, expected those of this project, one group, or one of matrices "
        "and one of vectors; save at ZeRO stage 1, which stores the names of parameters"
    )


def _fitted(tensors: Mapping[str, Tensor], model: STLM) -> dict[str, Tensor]:
    """Return the model's own tensors, in fp32, without the name prefix of a module around it."""
    parameters = dict(model.named_parameters())
    first = next(iter(parameters))
    prefix = next((name.removesuffix(first) for name in tensors if name.endswith(first)), "")
    found = {name: tensors[prefix + name].float() for name in parameters if prefix + name in tensors}
    return {
        name: tensor.view(parameters[name].shape) if tensor.ndim == 1 and tensor.numel() == parameters[name].numel()
        else tensor
        for name, tensor in found.items()
    }  # fmt: skip
