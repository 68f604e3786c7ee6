"""DIR/report.html: a one-page overview of prepared data, to check before training.

All contents come from manifest.json. The page needs no other file and no network.
"""

from __future__ import annotations

import html
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.plurals import number_of
from data_pipeline.preparation.work_folder import locked
from data_pipeline.report.plots import byte_plot, length_plot
from data_pipeline.report.summary import splits_of, warnings_of
from data_pipeline.sources.problems import PROBLEMS
from data_pipeline.storage.atomic import write_errors_as, write_text
from data_pipeline.storage.manifest import MANIFEST_FILE, SPLITS, Manifest

REPORT_FILE = "report.html"

# Visible symbols for control characters, which a page cannot show.
_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\t\n"} | {0x7F: "\u2421"}


@write_errors_as(DataError)
def write_report(directory: str | os.PathLike[str]) -> Path:
    """Write DIR/report.html from DIR/manifest.json and return its path.

    Raises DataError if there is no prepared data or it has no statistics, PlotsMissing if matplotlib is not installed.
    """
    path = Path(directory) / REPORT_FILE
    page = report(Manifest.load(directory), str(directory))
    with locked(Path(directory), wait=True):
        write_text(path, page)
    return path


def report(manifest: Manifest, name: str) -> str:
    """Return the page about one manifest. name: of the data. Raises as `write_report` does."""
    if not manifest.statistics:
        raise DataError(
            f"{Path(name) / MANIFEST_FILE} holds no statistics: the data was prepared by an earlier version; "
            f"prepare it again for a report"
        )
    sections = (
        ("Splits", _splits(manifest)),
        ("Sources", _sources(manifest)),
        ("Lengths and bytes", _plots(manifest)),
        ("Left out", _left_out(manifest)),
        ("Changed", _edits(manifest)),
        ("Problems", _problems(manifest)),
        ("Samples", _samples(manifest)),
        ("Settings", _settings(manifest)),
    )
    body = "\n".join(f"<section><h2>{title}</h2>\n{content}</section>" for title, content in sections if content)
    return _PAGE.format(title=_text(name), style=_STYLE, head=_head(manifest, name), body=body)


def _head(manifest: Manifest, name: str) -> str:
    documents, size, ids = (
        sum(manifest.total(split, what) for split in SPLITS) for what in ("documents", "bytes", "ids")
    )
    removed = sum(rule["documents"] for rule in manifest.cleaning["removed"].values())
    tiles = (
        (f"{documents:,}", "documents"),
        (_bytes(size), "of text"),
        (f"{ids:,}", "ids"),
        (f"{size / max(ids, 1):.3f}", "bytes per id"),
        (f"{removed:,}", "documents left out"),
    )
    tokenizer = manifest.tokenizer
    return (
        f"<h1>{_text(name)}</h1>\n"
        f"<p class=quiet>tokenizer {_text(tokenizer['spec'])} · {tokenizer['vocab_size']:,} ids, "
        f"{_text(tokenizer['dtype'])} · fingerprint <code>{manifest.fingerprint[:12]}</code></p>\n<div class=tiles>"
        + "".join(f"<div><b>{value}</b><span>{label}</span></div>" for value, label in tiles)
        + "</div>"
    )


def _splits(manifest: Manifest) -> str:
    rows = []
    all_documents, all_bytes = (sum(manifest.total(split, what) for split in SPLITS) for what in ("documents", "bytes"))
    for split in splits_of(manifest):
        documents, size, ids = (manifest.total(split, what) for what in ("documents", "bytes", "ids"))
        shares = f"{documents / all_documents:.2%}", f"{size / max(all_bytes, 1):.2%}"
        numbers = (f"{ids:,}", f"{size / max(ids, 1):.3f}", f"{len(manifest.splits[split]):,}")
        rows.append((split, f"{documents:,}", shares[0], f"{size:,}", shares[1], *numbers))
    head = ("", "documents", "share", "bytes", "share", "ids", "bytes per id", "shards")
    warnings = "".join(f"<p>Warning: {_text(warning)}.</p>" for warning in warnings_of(manifest))
    return _table(head, rows) + warnings


def _sources(manifest: Manifest) -> str:
    rows = []
    for source, values in zip(manifest.sources, manifest.statistics, strict=True):
        sample = values["sample"]
        rows.append(
            (
                source["name"],
                f"{source['documents']:,}",
                *(f"{values[split]['documents']:,}" for split in splits_of(manifest)),
                *(_number(values[split]["bytes"]) for split in splits_of(manifest)),
                *(_ratio(sample.get(what)) for what in ("bytes_per_id", "gzip_ratio", "xz_ratio")),
            )
        )
    first, *others = splits_of(manifest)
    head = ("", "documents read", first, *others, f"bytes, {first}", *others, "bytes per id", "gzip", "xz")
    note = (
        "<p class=quiet>Bytes per id and the compression ratios of gzip and xz are measured on a sample of each "
        "source, at most 256 KiB. Documents read do not include those that rules for single documents removed.</p>"
    )
    divided = "".join(
        f"<p>{_text(source['name'])}: {_text('; '.join(source['division']['text']))}.</p>"
        for source in manifest.sources
        if source.get("division", {}).get("text")
    )
    return _table(head, rows) + note + divided


def _plots(manifest: Manifest) -> str:
    lengths: dict[str, list[int]] = {}
    for split in splits_of(manifest):
        counts = [values[split]["lengths"] for values in manifest.statistics]
        longest = max(map(len, counts))
        lengths[split] = np.sum(
            [np.pad(np.array(one, np.int64), (0, longest - len(one))) for one in counts], 0
        ).tolist()
    samples = [values["sample"] for values in manifest.statistics if "byte_counts" in values["sample"]]
    byte_counts = np.sum([sample["byte_counts"] for sample in samples], axis=0).tolist() if samples else [0] * 256
    return (
        "<div class=plots>"
        f"<figure>{length_plot(lengths)}<figcaption>Lengths of the documents, in powers of two: the bar at 1Ki counts "
        f"those of 1,024 to 2,047 bytes.</figcaption></figure>"
        f"<figure>{byte_plot(byte_counts)}<figcaption>Byte values in the samples of all sources, "
        f"{_bytes(sum(byte_counts))}; logarithmic scale.</figcaption></figure></div>"
    )


def _left_out(manifest: Manifest) -> str:
    removed = manifest.cleaning["removed"]
    if not removed:
        return "<p>Nothing was left out.</p>"
    kept = sum(manifest.total(split, "documents") for split in SPLITS)
    total = kept + sum(rule["documents"] for rule in removed.values())
    ordered = sorted(removed.items(), key=lambda item: -item[1]["documents"])
    head = "".join(f"<span>{name}</span>" for name in ("rule", "documents", "share", "bytes"))
    parts = [f"<div class=rules><div class=row>{head}</div>"]
    for rule, one in ordered:
        numbers = (f"{one['documents']:,}", f"{one['documents'] / total:.2%}", f"{one['bytes']:,}")
        cells = f"<span>{_text(rule)}</span>" + "".join(f"<span>{number}</span>" for number in numbers)
        examples = "".join(_example(example) for example in one["examples"])
        parts.append(f"<details><summary class=row>{cells}</summary>{examples}</details>")
    parts.append("</div><p class=quiet>Click a rule to see examples.</p>")
    if decontamination := manifest.cleaning["decontamination"]:
        parts.append(
            f"<p class=quiet>Searched for {number_of(decontamination['texts'], 'evaluation text')}; "
            f"{decontamination['too_short']:,} of them were too short. {_text(decontamination['list'])} lists all "
            "documents that were left out because they hold one.</p>"
        )
    return "\n".join(parts)


def _example(example: dict[str, Any]) -> str:
    if "stays" in example:
        return (
            f"<div class=pair><div><h4>left out</h4>{_quote(example['text'])}</div>"
            f"<div><h4>stays; similarity {example['similarity']}</h4>{_quote(example['stays'])}</div></div>"
        )
    shared = ""
    if "ngram" in example:
        words = f"<mark>{_text(example['ngram'])}</mark>"
        shared = f"<p class=quiet>shares with {_text(example['evaluation_file'])}: {words}</p>"
    return shared + _quote(example["text"])


def _edits(manifest: Manifest) -> str:
    edits = manifest.cleaning["edits"]
    return _table(("change", "times"), [(what, f"{number:,}") for what, number in edits.items()]) if edits else ""


def _problem(name: str) -> str:
    return PROBLEMS[name][1] if name in PROBLEMS else name


def _problems(manifest: Manifest) -> str:
    parts = []
    for source in manifest.sources:
        if source["problems"]:
            rows = [(_problem(name), f"{number:,}") for name, number in sorted(source["problems"].items())]
            parts.append(f"<h3>{_text(source['name'])}</h3>" + _table(("problem", "times"), rows))
            parts += [_quote(example) for example in source["examples"]]
            for name, names in source.get("left_out", {}).items():
                more = source["problems"][name] - len(names)
                listed = "\n".join([*names, *([f"and {more:,} more"] if more else [])])
                parts.append(f"<p class=quiet>{_text(_problem(name))}:</p><pre>{_text(listed)}</pre>")
    return "\n".join(parts) or "<p>None.</p>"


def _samples(manifest: Manifest) -> str:
    parts = []
    for values in manifest.statistics:
        if values["excerpts"]:
            parts.append(f"<h3>{_text(values['name'])}</h3>" + "".join(map(_quote, values["excerpts"])))
    return "\n".join(parts)


def _settings(manifest: Manifest) -> str:
    text = json.dumps({"settings": manifest.settings, "split rule": manifest.split_rule}, indent=2, ensure_ascii=False)
    title = "Settings of the preparation, and the rule of the split"
    return f"<details><summary>{title}</summary><pre>{_text(text)}</pre></details>"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose first column is text and whose others are numbers, as strings."""
    cells = "".join(f"<th>{_text(name)}</th>" for name in head)
    lines = []
    for name, *numbers in rows:
        lines.append(f"<tr><th>{_text(name)}</th>" + "".join(f"<td>{_text(one)}</td>" for one in numbers) + "</tr>\n")
    return f"<div class=wide><table><thead><tr>{cells}</tr></thead>\n<tbody>\n{''.join(lines)}</tbody></table></div>\n"


def _quote(text: str) -> str:
    return f"<blockquote>{_text(text)}</blockquote>\n"


def _text(text: str) -> str:
    """Escape any text for HTML."""
    return html.escape(text.translate(_PICTURES))


def _number(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"


def _bytes(size: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:,.0f} bytes" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} TB"


_STYLE = """
:root { color-scheme: light dark; --font: system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  --paper: #fcfcfb; --card: #fff; --ink: #22252a; --quiet: #666c75; --grid: #dfe1e4; --mark: #ffe9a8;
  --series-1: #2f6fb2; --series-2: #e08a2c; --series-3: #4a9d6b; --series-4: #a05ca8; --series-5: #c4504b;
  --series-6: #6d7580; }
@media (prefers-color-scheme: dark) { :root { --paper: #17191c; --card: #1f2226; --ink: #e4e6e9; --quiet: #9aa1ab;
  --grid: #363a40; --mark: #6a5615; --series-1: #6fa8e0; --series-2: #eda55a; --series-3: #72c295; --series-4: #c68bcd;
  --series-5: #e37f7a; --series-6: #9aa3ae; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 var(--font); }
main { max-width: 70rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; overflow-wrap: anywhere; }
h4 { font-size: .8rem; font-weight: 600; color: var(--quiet); margin: .5rem 0 0; }
.quiet, figcaption { color: var(--quiet); font-size: .875rem; overflow-wrap: anywhere; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .75rem;
  margin-top: 1.25rem; }
.tiles div { background: var(--card); border: 1px solid var(--grid); border-radius: .5rem; padding: .75rem 1rem; }
.tiles b { display: block; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.tiles span { color: var(--quiet); font-size: .875rem; }
.wide { overflow-x: auto; }
.row { display: grid; grid-template-columns: 1fr 7rem 5rem 8rem; gap: 0 .75rem; padding: .4rem 0;
  border-bottom: 1px solid var(--grid); font-variant-numeric: tabular-nums; font-size: .9rem; }
.row span:not(:first-child) { text-align: right; }
div.row { color: var(--quiet); }
summary.row { color: inherit; }
summary.row span:first-child::before { content: "▸ "; color: var(--quiet); }
details[open] > summary.row span:first-child::before { content: "▾ "; }
.rules details { margin: 0; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .75rem; border-bottom: 1px solid var(--grid); text-align: right; white-space: nowrap; }
thead th { color: var(--quiet); font-weight: 500; vertical-align: bottom; }
th:first-child { text-align: left; padding-left: 0; font-weight: 500; white-space: normal; overflow-wrap: anywhere;
  min-width: 9rem; }
.plots, .pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1rem; }
figure { margin: 0; background: var(--card); border: 1px solid var(--grid); border-radius: .5rem; padding: 1rem; }
svg { display: block; width: 100%; height: auto; }
blockquote, pre { margin: .5rem 0; padding: .6rem .9rem; background: var(--card); border: 1px solid var(--grid);
  border-radius: .5rem; font-size: .875rem; white-space: pre-wrap; overflow-wrap: anywhere; }
blockquote { border-left: 3px solid var(--series-1); border-radius: 0 .5rem .5rem 0; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--quiet); font-size: .9rem; }
@media (max-width: 40rem) { main { padding: 1.25rem .9rem 3rem; } figure { padding: .6rem; }
  .row { grid-template-columns: 1fr 1fr 1fr; } .row span:first-child { grid-column: 1 / -1; } }
mark { background: var(--mark); color: inherit; padding: 0 .2em; border-radius: .2em; }
"""

_PAGE = """<!doctype html>
<html lang=en>
<head>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<header>
{head}
</header>
{body}
</main>
</body>
</html>
"""
