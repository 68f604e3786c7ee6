"""Reader and writer of a RunConfig: presets, files, run directories, `--set` overrides."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from stlm.config.model.embedders.base import EmbedderConfig
from stlm.config.schema import RunConfig
from stlm.config.yaml.build import build, nearest, raise_problems, spell_out, to_dict
from stlm.config.yaml.fields import FreeSection
from stlm.config.yaml.tree import Dumper, Node, Problem, describe, read_tree
from stlm.errors import ConfigError

PRESETS = Path(__file__).parent.parent / "presets"
CONFIG_NAME = "config.yaml"


def preset_names() -> list[str]:
    """Return the names of the presets that come with the package, `quickstart` first, then by size."""

    def order(name: str) -> tuple[bool, float, str]:
        size = name.partition("m-")[0]
        return name != "quickstart", int(size) if size.isdigit() else float("inf"), name

    return sorted((path.stem for path in PRESETS.glob("*.yaml")), key=order)


def list_presets() -> str:
    """Return a line for each preset: its name and its description, which is the first line of its file."""
    names = preset_names()
    width = max(map(len, names))
    firsts = ((PRESETS / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0] for name in names)
    return "\n".join(
        f"  {name:<{width}}  {first.removeprefix('# ')}" for name, first in zip(names, firsts, strict=True)
    )


def load_run_config(source: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Load the RunConfig of a preset, a YAML file or a run directory, with `key=value` overrides on top.

    A file may have `base: NAME`, a preset or a file in the same folder, and then holds only the differences. Keys that
    are not set have their defaults. Values are read as YAML, so `model.head={kind: linear}` replaces a whole component.
    Raises ConfigError with all problems at once, each with its file and line or its `--set`.
    """
    path = _locate(source)
    problems: list[Problem] = []
    root = _read_with_bases(path, problems)
    for override in overrides:
        _apply(override, root, problems)
    config = build(RunConfig, root, problems, saved=path.name == CONFIG_NAME and Path(source).is_dir())
    raise_problems(problems)
    return config


def data_folder(source: str | Path, overrides: Iterable[str] = ()) -> str | None:
    """Return the first folder of prepared data that a config names; None if it names none, or has errors."""
    root = _tree(source, overrides)
    mixture = _node(root, "data", "mixture")
    parts = mixture.value if mixture is not None and isinstance(mixture.value, list) else []
    nodes = [_node(root, "data", "dir"), *(_node(part, "dir") for part in parts[:1])]
    return next((node.value for node in nodes if node is not None and isinstance(node.value, str)), None)


def following(
    tokenizer: str, source: str | Path, overrides: Iterable[str] = (), preset_is_chosen: bool = True
) -> dict[str, str]:
    """Return the overrides that adapt a config to data of this tokenizer, without changing what the user has chosen.

    The tokenizer is adapted unless a file or an override sets it; embedder and head unless these set them, or, with
    `preset_is_chosen`, the preset does. Empty if the config fits, or has errors. Raises ConfigError where the chosen
    embedder reads bytes only.
    """
    root = _tree(source, overrides)
    if root is None:
        return {}
    followed: dict[str, str] = {}
    named = _node(root, "data", "tokenizer")
    if _value(named, "byte") != tokenizer and not _is_chosen(named, preset_is_chosen=False):
        followed["data.tokenizer"] = json.dumps(tokenizer)
    kind = _value(_node(root, "model", "embedder", "kind"), "byte")
    embedder = EmbedderConfig.kinds.get(kind) if isinstance(kind, str) else None
    reads_bytes = isinstance(embedder, type) and issubclass(embedder, EmbedderConfig) and embedder.byte_ids
    if tokenizer == "byte" or not reads_bytes or not followed:
        return followed
    if any(_is_chosen(_node(root, "model", name), preset_is_chosen) for name in ("embedder", "head")):
        raise ConfigError(
            f"model.embedder.kind: got {kind!r}, which reads bytes, but the data was prepared with {tokenizer!r}; "
            "model.embedder={kind: token} with model.head={kind: linear} would work, or data prepared with "
            "--tokenizer byte"
        )
    followed["model.embedder"] = "{kind: token}"
    if _value(_node(root, "model", "head", "kind"), "linear") != "linear":
        followed["model.head"] = "{kind: linear}"
    return followed


def _tree(source: str | Path, overrides: Iterable[str]) -> Node | None:
    """Read the tree of a config with its overrides; None if it has errors, which `load_run_config` reports."""
    problems: list[Problem] = []
    try:
        root = _read_with_bases(_locate(source), problems)
    except ConfigError:
        return None
    for override in overrides:
        _apply(override, root, problems)
    return None if problems else root


def _node(root: Node | None, *keys: str) -> Node | None:
    for key in keys:
        root = root.value.get(key) if root is not None and isinstance(root.value, dict) else None
    return root


def _value(node: Node | None, default: str) -> Any:
    return default if node is None or node.value is None else node.value


def _is_chosen(node: Node | None, preset_is_chosen: bool) -> bool:
    """Return True if a file or an override sets this node, or, with `preset_is_chosen`, a preset does."""
    if node is None:
        return False
    if preset_is_chosen or not node.place.startswith(tuple(_display(path) for path in PRESETS.glob("*.yaml"))):
        return True
    return isinstance(node.value, dict) and any(_is_chosen(part, preset_is_chosen) for part in node.value.values())


def dump_run_config(config: RunConfig) -> str:
    """Write the config as YAML with all fields; `load_run_config` reads it back equal."""
    return yaml.dump(to_dict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=2**31)


def changed_keys(old: Any, new: Any, but: tuple[bool | str, ...] = (True,)) -> list[str]:
    """Return the dotted keys in which two configs differ, except settings whose `may_change` is in `but`. By default
    these are the keys in which a resumed run must not differ."""
    keys = []
    for field in dataclasses.fields(old):
        before, after = getattr(old, field.name), getattr(new, field.name)
        if before == after or field.metadata.get("may_change", False) in but:
            continue
        if type(before) is not type(after) and dataclasses.is_dataclass(before):
            keys.append(f"{field.name}.kind")
        elif dataclasses.is_dataclass(before) and not isinstance(before, FreeSection):
            keys += [f"{field.name}.{key}" for key in changed_keys(before, after, but)]
        else:
            keys.append(field.name)
    return keys


def _locate(source: str | Path) -> Path:
    """Return the YAML file of a preset name, a file or a run directory; a preset's name wins over a path."""
    presets = preset_names()
    if str(source) in presets:
        return PRESETS / f"{source}.yaml"
    path = Path(source)
    if path.is_dir():
        if not (path / CONFIG_NAME).is_file():
            raise ConfigError(f"{path}: got a directory without {CONFIG_NAME}, expected a run directory or a YAML file")
        return path / CONFIG_NAME
    if path.is_file():
        return path
    if path.suffix or len(path.parts) > 1:
        expected = f"a YAML file, a run directory, or a preset: {', '.join(presets)}"
        raise ConfigError(f"{path}: no such file; expected {expected}")
    found = nearest(str(source), presets)
    hint = f"nearest: {', '.join(found)}; " if found else ""
    raise ConfigError(f"unknown preset {str(source)!r}; {hint}expected a path, or one of\n{list_presets()}")


def _read_with_bases(path: Path, problems: list[Problem], above: tuple[Path, ...] = ()) -> Node:
    """Read the tree of a file, merged over that of its base; `above` are the files that are based on it."""
    name = _display(path)
    root = read_tree(_read_text(path), name, problems) or Node({}, name)
    spell_out(RunConfig, root)
    base = root.value.pop("base", None) if isinstance(root.value, dict) else None
    if base is None:
        return root
    above = (*above, path.resolve())
    try:
        if not isinstance(base.value, str):
            raise ConfigError(
                f"got {describe(base.value)}, expected the name of a preset, or a file in the same folder"
            )
        is_path = Path(base.value).suffix or len(Path(base.value).parts) > 1
        below = _locate(path.parent / base.value if is_path else base.value)
        if below.resolve() in above:
            raise ConfigError(f"got {base.value!r}, which is based on this file itself, expected another")
        return _laid_over(root, _read_with_bases(below, problems, above))
    except ConfigError as error:
        problems.append(Problem(base.place, f"base: {error}"))
        return root


def _laid_over(above: Node, below: Node) -> Node:
    """Merge `above` over `below`; a component of another kind replaces the whole component."""
    if not isinstance(below.value, dict) or not isinstance(above.value, dict | type(None)):
        return above
    if above.value is None:
        return below  # an empty section sets nothing
    kinds = [node.value["kind"].value for node in (above, below) if "kind" in node.value]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        return above
    value = dict(below.value)
    for key, child in above.value.items():
        value[key] = _laid_over(child, value[key]) if key in value else child
    return Node(value, above.place)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: got a byte that is not UTF-8 at offset {error.start}, expected YAML text") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None


def _display(path: Path) -> str:
    """Format a path for messages: relative, unless it is outside the working directory."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative


def _apply(override: str, root: Node, problems: list[Problem]) -> None:
    """Set one `a.b=value` in the tree, with the override itself as the place."""
    place = f"--set {override}"
    dotted, equals, text = override.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        problems.append(Problem(place, f"got {override!r}, expected section.key=value"))
        return
    value = read_tree(text, place, problems, override=True)
    if value is None:
        return
    if len(keys) == 1 and value.value is None:  # it would reset all that the file sets there
        problems.append(Problem(place, f"{dotted.strip()}: got nothing, expected section.key=value"))
        return
    node = root
    for depth, key in enumerate(keys):
        if node.value is None:
            node.value = {}  # an empty file or section sets nothing
        if not isinstance(node.value, dict):
            parent = ".".join(keys[:depth]) or "the file"
            problems.append(Problem(place, f"{parent}: got {describe(node.value)}, expected a section of keys"))
            return
        if depth == len(keys) - 1:
            node.value[key] = value
        else:
            node = node.value.setdefault(key, Node({}, place, override=True))
    spell_out(RunConfig, root)
