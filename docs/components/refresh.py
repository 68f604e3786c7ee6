"""Fill in settings and costs on the pages of this folder, of docs/objectives and in docs/settings.md, from the code.

    python docs/components/refresh.py                    # writes the pages
    python docs/components/refresh.py core-exits         # one of them, and docs/settings.md
    python docs/components/refresh.py --check            # ends with 1 if a page is not up to date

A page holds prose, and two marked places that this script fills: the table of settings, from the config dataclass, and
the table of costs, measured on one small model with the component in it. Pages of objectives have the first alone. The
tables of README.md list the pages, each with its first sentence. docs/settings.md is written whole, by settings.py.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import functools
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
INDEX = FOLDER / "README.md"
sys.path.insert(0, str(FOLDER.parents[1]))

from data_pipeline.tokenizers import build_tokenizer
from stlm.config import ModelConfig, from_dict
from stlm.config.model.core.attention import AttentionConfig
from stlm.config.model.core.base import CoreConfig
from stlm.config.model.core.blocks import LoopsConfig, ResidualConfig
from stlm.config.model.core.feed_forward import FeedForwardConfig
from stlm.config.model.core.normalization import NormConfig
from stlm.config.model.core.positions import PositionsConfig
from stlm.config.model.core.sharing import SharingConfig
from stlm.config.model.embedders.base import EmbedderConfig
from stlm.config.model.embedders.ngrams import ByteNgramsConfig
from stlm.config.model.embedders.patching.rules import PatchingConfig
from stlm.config.model.exits import ExitsConfig
from stlm.config.model.heads.base import HeadConfig
from stlm.config.objectives import ObjectiveConfig
from stlm.config.yaml.fields import Component
from stlm.errors import ConfigError
from stlm.model import Account, account
from stlm.stlm import STLM

sys.path.insert(0, str(FOLDER))

from settings import PAGE, default_of, limits_of, settings_page

# Families, by the key under `model` that chooses among their kinds.
FAMILIES: dict[str, type[Component]] = {
    "embedder": EmbedderConfig,
    "embedder.patching": PatchingConfig,
    "core": CoreConfig,
    "core.attention": AttentionConfig,
    "core.feed_forward": FeedForwardConfig,
    "core.norm": NormConfig,
    "core.positions": PositionsConfig,
    "head": HeadConfig,
}
# Sections that are on or off rather than of a kind, with an example in which they are on.
SECTIONS: dict[str, tuple[type, dict[str, Any]]] = {
    "embedder.ngrams": (ByteNgramsConfig, {"table_size": 1024, "longest": 4}),
    "core.residual": (ResidualConfig, {"parallel": True}),
    "core.sharing": (SharingConfig, {"modules": {"feed_forward": "all"}, "lora_rank": 8}),
    "core.loops": (LoopsConfig, {"count": 2, "embeddings": True}),
    "core.exits": (ExitsConfig, {"every": 2}),
}
EXAMPLE = {"context_length": 240, "width": 256, "core": {"num_layers": 4}}
MARK = r"(<!-- {0} -->\n).*?(<!-- end -->)"


@dataclasses.dataclass(frozen=True)
class Page:
    """One component: the key that chooses it, its kind if it has one, and the settings of its example."""

    key: str
    kind: str | None
    config: type
    example: dict[str, Any]

    @property
    def path(self) -> Path:
        """The page's file in this folder: embedder-byte_patch.md, core-sharing.md."""
        return FOLDER / ("-".join([*self.key.split("."), *([self.kind] if self.kind else [])]) + ".md")

    def model(self) -> ModelConfig:
        """The example model with the component in it, and the first embedder and head that fit."""
        for embedder, head in itertools.product(["byte", *EmbedderConfig.kinds], HeadConfig.kinds):
            settings: dict[str, Any] = {
                **copy.deepcopy(EXAMPLE),
                "embedder": {"kind": embedder},
                "head": {"kind": head},
            }
            *parents, last = self.key.split(".")
            place: dict[str, Any] = settings
            for parent in parents:
                place = place.setdefault(parent, {})
            place[last] = {**(place.get(last, {}) if last == "core" else {}), **self.example}
            with contextlib.suppress(ConfigError):
                return from_dict(ModelConfig, settings, source=self.path.name)
        raise ValueError(f"{self.path.name}: no embedder and head fit {self.example}")


@dataclasses.dataclass(frozen=True)
class ObjectivePage:
    """One training objective."""

    kind: str
    config: type

    @property
    def path(self) -> Path:
        """The page's file, such as docs/objectives/next_token.md."""
        return FOLDER.parent / "objectives" / f"{self.kind}.md"


def objective_pages() -> Iterator[ObjectivePage]:
    """Yield the page of every training objective."""
    for kind, config in ObjectiveConfig.kinds.items():
        yield ObjectivePage(kind, config)


def pages() -> Iterator[Page]:
    """Yield the page of every component."""
    for key, family in FAMILIES.items():
        for kind, config in family.kinds.items():
            yield Page(key, kind, config, {"kind": kind})
    for key, (section, example) in SECTIONS.items():
        yield Page(key, None, section, example)


def settings_table(page: Page | ObjectivePage) -> str:
    """Return the table of settings, with their defaults and limits."""
    section = f"model.{page.key}" if isinstance(page, Page) else "training.objective"
    lines = ["| setting | default | what it is |", "|---|---|---|"]
    for field in dataclasses.fields(page.config):
        name = f"`{section}.{field.name}`"
        limits = f" ({', '.join(limits_of(field))})" if limits_of(field) else ""
        lines.append(f"| {name} | {default_of(field)} | {field.metadata['help']}{limits} |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else "It has no settings.\n"


def cost_table(page: Page) -> str:
    """Return the parameters and work of the example model, part by part."""
    model = page.model()
    measured = account_of(model)
    shown = f"width {model.width}, {model.core.num_layers} layers, windows of {model.context_length} bytes"
    lines = [f"In a model of bytes with {shown}:", "", "| part | parameters | used | MFLOPs per byte, forward |"]
    lines.append("|---|---:|---:|---:|")
    for part in measured.parts:
        work = part.forward_flops / 1e6
        lines.append(f"| {part.name} | {part.parameters:,} | {part.effective:,} | {work:.2f} |")
    whole = f"{measured.parameters:,} | {measured.effective:,} | {measured.forward_flops / 1e6:.2f}"
    return "\n".join([*lines, f"| **all** | {whole} |"]) + "\n"


@functools.cache
def account_of(model: ModelConfig) -> Account:
    """Measure a model, once for all pages with an equal example."""
    tokenizer = build_tokenizer("byte")
    return account(lambda: STLM.from_config(model, tokenizer), tokenizer.vocab_size, model.context_length, 1)


def refreshed(page: Page | ObjectivePage, text: str) -> str:
    """Return the page's text with current tables. ValueError where a marked place is missing."""
    tables = {"settings": settings_table(page)}
    if isinstance(page, Page):
        tables["cost"] = cost_table(page)
    for name, table in tables.items():
        text, found = re.subn(
            MARK.format(name), lambda match, table=table: match[1] + table + match[2], text, flags=re.S
        )
        if found != 1:
            raise ValueError(f"{page.path.name}: expected one place <!-- {name} --> … <!-- end -->, found {found}")
    return text


def index(text: str) -> str:
    """Return the text of README.md with the table of each family as the pages are now."""
    for key in FAMILIES:
        lines = [f"| `model.{key}.kind` | |", "|---|---|"]
        for page in pages():
            if page.key == key and page.kind:
                lines.append(f"| [{page.kind}]({page.path.name}) | {summary(page)} |")
            elif not page.kind and page.key.rpartition(".")[0] == key:
                lines.append(f"| [{page.key.rpartition('.')[2]}]({page.path.name}), a section | {summary(page)} |")
        table = "\n".join([*lines, ""])
        text = re.sub(MARK.format(f"index {key}"), lambda m, table=table: m[1] + table + m[2], text, flags=re.S)
    return text


def summary(page: Page) -> str:
    """Return the first sentence of a page, without the setting with which it begins."""
    first = page.path.read_text(encoding="utf-8").split("\n\n")[1].replace("\n", " ")
    return re.sub(r"^`[^`]*` ", "", first).partition(". ")[0].removesuffix(".")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="PAGE", help="names of pages, such as core-exits (default: all)")
    parser.add_argument("--check", action="store_true", help="write nothing; say which pages are not up to date")
    options = parser.parse_args()
    known = {page.path.stem: page for page in (*pages(), *objective_pages())}
    if unknown := sorted(set(options.names) - set(known)):
        parser.error(f"got {', '.join(unknown)}, expected some of {', '.join(known)}")
    chosen = [known[name] for name in options.names or known]
    fresh = {page.path: refreshed(page, page.path.read_text(encoding="utf-8")) for page in chosen}
    fresh[INDEX] = index(INDEX.read_text(encoding="utf-8"))
    fresh[PAGE] = settings_page()
    stale = [path for path, text in fresh.items() if path.read_text(encoding="utf-8") != text]
    for path in () if options.check else stale:
        path.write_text(fresh[path], encoding="utf-8")
    if stale:
        print(("not up to date: " if options.check else "written: ") + ", ".join(path.name for path in stale))
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
