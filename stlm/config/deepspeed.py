"""The DeepSpeed side of a run: `ds_configs/*.json`, checked before DeepSpeed sees it.

DeepSpeed silently accepts misspelt keys, reads keys that have no effect with another training loop, and fails at others
with a traceback. So every key that DeepSpeed 0.19 reads either works here, on any number of ranks, or is refused by
name with an alternative. Keys that the run config owns may only be "auto": the engine fills them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from stlm.config.deepspeed_keys import EFFECTIVE_AT, REFUSED, SECTIONS, STAGES, TOP_LEVEL, VALUES
from stlm.config.yaml.build import nearest, raise_problems
from stlm.config.yaml.tree import Node, Problem, describe, read_tree
from stlm.errors import ConfigError

AUTO = "auto"

# Keys that the run config owns: dotted DeepSpeed key -> the key that decides instead.
OWNED = {
    "train_batch_size": "training.batch_size",
    "train_micro_batch_size_per_gpu": "training.micro_batch_size",
    "gradient_accumulation_steps": "training.batch_size and training.micro_batch_size",
    "gradient_clipping": "training.gradient_clipping",
    "optimizer": "training.optimizer, training.learning_rate, …",
    "scheduler": "training.schedule, training.warmup_steps, …",
}
OWNED_SECTIONS = {"bf16": "training.precision", "fp16": "training.precision"}  # every key in them, but those of STATED

# Keys that may state a precision. It must agree with the run config's, or takes the place of its `auto`.
STATED: dict[str, dict[Any, str | None]] = {
    "bf16.enabled": {True: "bf16"},
    "fp16.enabled": {True: "fp16"},
    "torch_autocast.enabled": {True: None},  # in the precision of its dtype, or of the run config
    "torch_autocast.dtype": {"bfloat16": "bf16", "float16": "fp16"},
}


def load_deepspeed_config(path: str | Path) -> dict[str, Any]:
    """Load and check the DeepSpeed config of a JSON file. Its "auto" values are left for the engine to fill.

    Raises ConfigError with all problems at once: unknown or repeated keys, keys that the run config owns, "auto" where
    nobody would fill it, two precisions.
    """
    path = Path(path)
    if not path.is_file():
        found = sorted(str(other) for other in path.parent.glob("*.json"))
        hint = f"; this folder has {', '.join(found)}" if found else ""
        raise ConfigError(f"{path}: no such file, expected a DeepSpeed configuration in JSON{hint}")
    try:
        text = path.read_text(encoding="utf-8-sig")
        config = json.loads(text, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}:{error.lineno}: not readable as JSON: {error.msg} (column {error.colno})") from None
    except (ValueError, RecursionError) as error:  # not UTF-8; NaN and Infinity, which JSON does not have; too deep
        raise ConfigError(f"{path}: not readable as JSON: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    if not isinstance(config, dict):
        raise ConfigError(f'{path}: got {describe(config)}, expected an object: {{"zero_optimization": …}}')

    # JSON is YAML once its tabs are spaces (no JSON string holds a bare tab); read as a tree it has its line numbers.
    problems: list[Problem] = []
    tree = read_tree(text.replace("\t", " "), os.fspath(path), problems)
    if tree is not None:
        zero = config.get("zero_optimization")
        stage = zero.get("stage", 0) if isinstance(zero, dict) else 0
        _check(tree, "", stage, problems)
        stated = _stated(config)
        if len(set(stated.values())) > 1:
            says = " and ".join(f"{key} ({name})" for key, name in stated.items())
            problems.append(Problem(tree.place, f"got {says}, expected one precision; leave out one section"))
    raise_problems(problems)
    return config


def stated_precision(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the precision that a DeepSpeed config states, and the key that does; None if it states none."""
    return next(((name, key) for key, name in _stated(config).items()), None)


def _stated(config: Mapping[str, Any]) -> dict[str, str]:
    """Return the precisions that a config states: dotted key -> precision."""
    found = {}
    for key, meanings in STATED.items():
        section, name = key.split(".")
        content = config.get(section)
        value = content.get(name) if isinstance(content, dict) else None
        if isinstance(value, bool | str) and (meaning := meanings.get(value)) is not None:
            found[key] = meaning
    return found


def _check(node: Node, path: str, stage: Any, problems: list[Problem]) -> None:
    """Add the problems of a section and of its subsections."""
    for key, child in node.value.items():
        problem = _problem(f"{path}.{key}" if path else key, key, path, child, stage, problems)
        if problem is not None:
            problems.append(Problem(child.place, problem))


def _problem(dotted: str, key: str, path: str, child: Node, stage: Any, problems: list[Problem]) -> str | None:
    """Return the problem of a key itself, and add those of keys within it to `problems`."""
    known = SECTIONS[path] if path else TOP_LEVEL
    got = f"{dotted}: got {_shown(child.value)}"
    if (refusal := REFUSED.get(dotted)) is not None:
        value = _plain(child)
        if any(type(value) is type(harmless) and value == harmless for harmless in refusal.harmless):
            return None
        allowed = "".join(f"{json.dumps(harmless)} or " for harmless in refusal.harmless[:1])
        return f"{got}, expected {allowed}no such key: {refusal.instead}"
    if key not in known:
        return f"{dotted}: {_unknown(key, path, known)}"
    if dotted in STATED:
        allowed_values = [AUTO, *STATED[dotted]]
        if any(type(child.value) is type(value) and child.value == value for value in allowed_values):
            return None
        expected = " or ".join(describe(value) for value in STATED[dotted])
        return f'{got}, expected {expected}, "auto" or no such key: the run config decides it with training.precision'
    if owner := OWNED.get(dotted) or OWNED_SECTIONS.get(path):
        if child.value == AUTO:
            return None
        return f'{got}, expected "auto" or no such key: the run config decides it with {owner}'
    if dotted == "zero_optimization.stage":
        fits = type(child.value) is int and child.value in STAGES
        return None if fits else f"{got}, expected 0, 1, 2 or 3"
    if child.value == AUTO:
        return f'{got.removesuffix(_shown(AUTO))}"auto", expected a value: nothing here would fill it'
    if stage in STAGES and stage not in (effective := EFFECTIVE_AT.get(dotted, STAGES)):
        only = " and ".join(map(str, effective)) if len(effective) < 3 else "1, 2 and 3"
        return f"{got}, which has no effect at ZeRO stage {stage}, only at {only}; leave it out"
    if dotted in SECTIONS:
        if not isinstance(child.value, dict):
            return f"{got}, expected an object {{…}}"
        _check(child, dotted, stage, problems)
        return None
    if dotted in VALUES:
        is_right, expected = VALUES[dotted]
        return None if is_right(_plain(child)) else f"{got}, expected {expected}"
    return None


def _plain(node: Node) -> Any:
    """Return a value without its places."""
    if isinstance(node.value, dict):
        return {key: _plain(child) for key, child in node.value.items()}
    return [_plain(child) for child in node.value] if isinstance(node.value, list) else node.value


def _unknown(key: str, path: str, known: frozenset[str]) -> str:
    found = nearest(key, sorted(known))
    if not found and path:  # at home in another section?
        found = [f"the top level's {key}"] if key in TOP_LEVEL else []
    elif not found:
        found = [f"{section}.{key}" for section, keys in SECTIONS.items() if key in keys]
    hint = f"nearest: {', '.join(found)}" if found else f"expected one of {', '.join(sorted(known))}"
    return f"DeepSpeed has no such key; {hint}"


def _shown(value: Any) -> str:
    return "an object" if isinstance(value, dict) else describe(value)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")
