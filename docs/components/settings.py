"""Write docs/settings.md, the reference of all settings, from the config dataclasses. refresh.py calls it."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from stlm.config import ON_REQUEST, RunConfig
from stlm.config.deepspeed import OWNED, OWNED_SECTIONS
from stlm.config.yaml.fields import Component, FreeSection

PAGE = Path(__file__).resolve().parents[1] / "settings.md"
TYPES = {int: "integer", float: "number", str: "text", bool: "true or false"}
LIMITS = {"minimum": "at least", "above": "above", "maximum": "at most", "below": "below"}
ON_RESUME = {True: "yes", ON_REQUEST: "`--allow-change`", False: "no"}

INTRO = """\
# Settings

This page lists every key of a run's configuration. `python docs/components/refresh.py` writes it from the code.

A preset or a YAML file sets keys in sections; `--set training.max_steps=200` sets one by its full name. A key that is
not set has its default. `null` means not set. Numbers without a unit are fractions, factors and numbers of layers. A
component is chosen by its `kind`, and has the settings of that kind.

The column *on resume* says whether a setting may differ when a run is resumed: "no" needs a new run, and
`--allow-change` is an option of `pretrain.py`.

- [The run](#the-run)
- [data](#data)
- [model](#model)
- [training](#training)
- [evals](#evals)
- [Keys of ds_configs/](#keys-of-ds_configs)

"""
DEEPSPEED = """\
## Keys of ds_configs/

A DeepSpeed configuration holds the keys that DeepSpeed owns ([ds_configs/](../ds_configs/README.md)). The following
belong to the run's configuration. They may be absent or `"auto"`; `bf16.enabled`, `fp16.enabled` and `torch_autocast`
may also state the precision.

| DeepSpeed's key | the run's key |
|---|---|
"""


def settings_page() -> str:
    """Return the text of docs/settings.md."""
    sections = "".join(_sections(RunConfig, "", {}))
    owned = {**OWNED, **{f"{section}.…": key for section, key in OWNED_SECTIONS.items()}}
    rows = (f"| `{key}` | {', '.join(_code(name) for name in owner.split(', '))} |\n" for key, owner in owned.items())
    return INTRO + sections + DEEPSPEED + "".join(rows)


def _sections(config: type, key: str, seen: dict[type, str], kind: str | None = None) -> Iterator[str]:
    """Yield the heading and table of a config dataclass, then those of its sections and components.

    `seen` maps the families and sections listed so far to their headings: each is listed once, at its first key.
    """
    hints = typing.get_type_hints(config)
    below, rows = [], []
    for field in dataclasses.fields(config):
        dotted, hint = f"{key}.{field.name}".strip("."), hints[field.name]
        inner = _inner(hint)
        rows.append(_row(dotted, field, hint, seen.get(inner) if inner else None))
        if inner and inner not in seen:
            seen[inner] = f"`{dotted}`" + (f" of kind {kind}" if kind else "")
            below.append((f"{dotted}[…]" if typing.get_origin(hint) is tuple else dotted, inner))
    heading = seen.get(config, f"`{key}`") if kind is None else f"`{key}: {{kind: {kind}}}`"
    yield f"{'##' if key.count('.') == 0 else '###'} {heading if key else 'The run'}\n\n{_about(config, key, kind)}\n\n"
    if rows:
        yield "| setting | type | default | unit | on resume | effect |\n|---|---|---|---|---|---|\n"
        yield "".join(rows) + "\n"
    for dotted, inner in below:
        if issubclass(inner, Component):
            for name, member in inner.kinds.items():
                yield from _sections(member, dotted, seen, name)
        else:
            yield from _sections(inner, dotted, seen)


def _inner(hint: Any) -> type | None:
    """Return the family or dataclass within a type; None for plain values."""
    hint = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else hint
    return hint if (dataclasses.is_dataclass(hint) and hint is not FreeSection) or _is_family(hint) else None


def _is_family(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Component)


def _about(config: type, key: str, kind: str | None) -> str:
    """Return the first paragraph of a config's docstring, with a link to its page where it has one."""
    text = " ".join((config.__doc__ or "").split("\n\n")[0].split())
    section, *names = [*key.split("."), *([kind] if kind else [])]
    page = f"components/{'-'.join(names)}.md" if section == "model" else f"objectives/{kind}.md"
    return f"{text} [More]({page})." if (PAGE.parent / page).is_file() else text


def _row(key: str, field: dataclasses.Field[Any], hint: Any, listed: str | None) -> str:
    """Return the row of a setting; `listed` is the heading under which its own settings are listed already."""
    effect = field.metadata["help"] + (f"; settings as for {listed}" if listed else "")
    needs = field.metadata.get("needs")
    effect += f" (only with `{key.rpartition('.')[0]}.{needs[0]}`)" if needs else ""
    cells = [f"`{key}`", ", ".join([_type(hint), *limits_of(field)]), "", "", "", effect]
    if _type(hint) != "section":
        resume = ON_RESUME[field.metadata.get("may_change", False)]
        cells[2:5] = default_of(field), field.metadata.get("unit", ""), resume
    return "| " + " | ".join(cells) + " |\n"


def _type(hint: Any) -> str:
    if _is_family(hint):
        return "component"
    if typing.get_origin(hint) is tuple:
        return "list of sections"
    if hint is FreeSection:
        return "section of free keys"
    if dataclasses.is_dataclass(hint):
        return "section"
    parts = typing.get_args(hint) or (hint,)
    parts = tuple(part for part in parts if part is not str or bool not in parts)  # its texts are listed as choices
    return " or ".join([TYPES[part] for part in parts if part in TYPES] + ["null"] * (type(None) in parts))


def default_of(field: dataclasses.Field[Any]) -> str:
    """Return the default in YAML."""
    value = field.default
    if value is dataclasses.MISSING:
        return "required"
    if isinstance(value, Component):
        return f"`{{kind: {value.kind}}}`"
    if dataclasses.is_dataclass(value):
        return "none" if isinstance(value, FreeSection) else "off"
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True).replace("\n...", "").strip()
    return f"`{text}`"


def limits_of(field: dataclasses.Field[Any]) -> list[str]:
    """Return the limits of a setting, in words."""
    limits = [f"{word} {field.metadata[name]:,.7g}" for name, word in LIMITS.items() if name in field.metadata]
    if "choices" in field.metadata:
        choices = [f"`{choice}`" for choice in field.metadata["choices"]]
        limits.append(f"{'one of' if len(choices) > 1 else 'or'} {', '.join(choices)}")
    return limits


def _code(text: str) -> str:
    return text if text == "…" else " and ".join(f"`{name}`" for name in text.split(" and "))
