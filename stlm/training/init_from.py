"""Initial weights taken from another model, whole or in parts; and parts that are frozen."""

from __future__ import annotations

import torch

from stlm.config import TrainingConfig, changed_keys, value_at
from stlm.config.yaml.build import nearest
from stlm.errors import ConfigError
from stlm.model.core.lora import NAME as LORA
from stlm.stlm import STLM

KEY = "training.init_from"


@torch.no_grad()
def begin_from(model: STLM, training: TrainingConfig) -> str | None:
    """Copy the weights that `training.init_from` names. Returns a line for the log; None where it names none.

    Corrections (LoRA) that the source lacks keep their initial values, which change nothing. Corrections that the
    target lacks are merged first. Raises ConfigError where the parts do not fit, CheckpointError where there is no
    model.
    """
    corrected = model.config.lora.rank is not None
    if corrected and (training.init_from is None or "core" not in training.init_parts.split(",")):
        begin = "no training.init_from" if training.init_from is None else f"init_parts = {training.init_parts}"
        raise ConfigError(
            f"model.lora.rank: got {model.config.lora.rank} with {begin}, so that corrections would be learned to "
            "random weights, which stay as they are; expected training.init_from=RUN, which takes over all parts, or "
            "model.lora.rank=null"
        )
    if training.init_from is None:
        return None
    found = STLM.load(training.init_from)
    if found.config.lora.rank is not None and found.config.lora != model.config.lora:
        found = found.merged()
    parts = training.init_parts.split(",")
    if {"embedder", "head"} & set(parts) and found.tokenizer.fingerprint != model.tokenizer.fingerprint:
        raise ConfigError(
            f"{KEY}: the tokenizer of {training.init_from} is {found.tokenizer.spec} "
            f"({found.tokenizer.fingerprint[:12]}), and that of the data is {model.tokenizer.spec} "
            f"({model.tokenizer.fingerprint[:12]}); prepare the data with "
            f"scripts/preprocess.py --tokenizer-from {training.init_from}, or take over the core alone: "
            "training.init_parts=core"
        )
    for part in parts:
        source = dict(found.get_submodule(part).named_parameters(remove_duplicate=False))
        target = dict(model.get_submodule(part).named_parameters(remove_duplicate=False))
        wanted = {name: p for name, p in target.items() if name in source or f".{LORA}." not in name}
        shapes = {name: p.shape for name, p in wanted.items()}
        if shapes != {name: p.shape for name, p in source.items()}:
            raise ConfigError(_does_not_fit(part, model, found, training.init_from))
        for name, parameter in wanted.items():
            parameter.copy_(source[name])
    taken = "all weights" if len(parts) == 3 else f"the weights of {' and '.join(parts)}"
    return f"{taken} begin as those of {training.init_from}"


def freeze(model: STLM, training: TrainingConfig) -> None:
    """Freeze the parts that `training.frozen_parts` names. Raises ConfigError where nothing would learn."""
    for part in filter(None, training.frozen_parts.split(",")):
        try:
            model.get_submodule(part).requires_grad_(False)
        except AttributeError:
            names = [name for name, module in model.named_modules() if any(True for _ in module.parameters())]
            works = ", ".join(nearest(part, names) or names[1:4])
            raise ConfigError(f"training.frozen_parts: the model has no {part!r}; nearest: {works}") from None
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    reason = "corrections (model.lora) learn in the core alone" if model.config.lora.rank is not None else ""
    reason = reason or _tied(model) or "the rest of the model has no parameters"
    raise ConfigError(
        f"training.frozen_parts: got {training.frozen_parts!r}, after which nothing would learn: {reason}; "
        "training.frozen_parts= would work, which freezes nothing"
    )


def describe_freezing(model: STLM, training: TrainingConfig) -> str | None:
    """Return a line with the number of trainable parameters; None if all are trainable."""
    learning = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if learning == model.num_parameters():
        return None
    text = f"{learning:,} of {model.num_parameters():,} parameters learn"
    frozen = training.frozen_parts.split(",")
    tied = _tied(model) if ("head" in frozen) != ("embedder" in frozen) else ""
    return f"{text}; training.frozen_parts={training.frozen_parts}: {tied}" if tied else text


def _tied(model: STLM) -> str:
    """Return a sentence on the parameters that embedder and head share; empty where they share none."""
    heads = {parameter for _, parameter in model.head.named_parameters(remove_duplicate=False)}
    shared = [name for name, p in model.embedder.named_parameters(remove_duplicate=False) if p in heads]
    return f"the head is tied to embedder.{shared[0]}, which is frozen with either of them" if shared else ""


def _does_not_fit(part: str, model: STLM, found: STLM, path: str) -> str:
    keys = [key for key in changed_keys(found.config, model.config) if key.partition(".")[0] in (part, "width")]
    differing = [f"{key} = {value_at(found.config, key)} there, {value_at(model.config, key)} here" for key in keys[:4]]
    return (
        f"{KEY}: the {part} of {path} does not fit into this model: model.{'; model.'.join(differing) or part}; "
        f"--config {path} takes the settings of its run"
    )
