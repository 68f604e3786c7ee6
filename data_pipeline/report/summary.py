"""A summary of prepared data, as text."""

from __future__ import annotations

import os

from data_pipeline.plurals import number_of
from data_pipeline.sources.problems import lines_of_problems
from data_pipeline.storage.manifest import SPLITS, Manifest

ENOUGH = 64 << 10  # bytes of text; on less, bits per byte vary by more than models differ


def summary(manifest: Manifest, directory: str | os.PathLike[str]) -> str:
    """Return a table of the splits, followed by the inputs with their problems, and warnings."""
    tokenizer = manifest.tokenizer
    lines = [
        f"{os.fspath(directory)}: tokenizer {tokenizer['spec']}, fingerprint {manifest.fingerprint[:12]}",
        "",
        f"{'':<12}{'documents':>12}{'share':>9}{'bytes':>16}{'share':>9}{'ids':>16}{'bytes per id':>14}",
    ]
    all_documents, all_bytes = (sum(manifest.total(split, what) for split in SPLITS) for what in ("documents", "bytes"))
    for split in splits_of(manifest):
        documents, size, ids = (manifest.total(split, what) for what in ("documents", "bytes", "ids"))
        shares = f"{documents / all_documents:.2%}", f"{size / max(all_bytes, 1):.2%}"
        lines.append(f"{split:<12}{documents:>12,}{shares[0]:>9}{size:>16,}{shares[1]:>9}{ids:>16,}{size / ids:>14.3f}")
    lines.append("")
    for source in manifest.sources:
        read = f"{number_of(source['documents'], 'document')}, {number_of(source['text_bytes'], 'byte')}"
        lines.append(f"read from {source['name']}: {read}")
        lines += [f"  {sentence}" for sentence in source.get("division", {}).get("text", ())]
        lines += lines_of_problems(source["problems"], source.get("left_out", {}))
        lines += [f"    {example}" for example in source["examples"]]
        missing = [name for name, version in source.get("packages", {}).items() if version is None]
        if missing:
            lines.append(f"  packages of the default corpus that are not installed: {', '.join(missing)}")
    for rule, removed in manifest.cleaning.get("removed", {}).items():
        left_out = f"{number_of(removed['documents'], 'document')}, {number_of(removed['bytes'], 'byte')}"
        lines.append(f"left out {left_out}: {rule}")
    lines += [f"{number:,} {what}" for what, number in manifest.cleaning.get("edits", {}).items()]
    lines += [f"warning: {warning}" for warning in warnings_of(manifest)]
    return "\n".join(lines)


def splits_of(manifest: Manifest) -> list[str]:
    """Return the splits that hold text."""
    return [split for split in SPLITS if manifest.total(split, "ids")]


def warnings_of(manifest: Manifest) -> list[str]:
    """Return warnings about splits and sources with too little text for reliable measurements, each with a remedy."""
    given = {split for split in ("validation", "test") if split in manifest.settings}
    total = sum(manifest.total(split, "bytes") for split in SPLITS if split not in given)
    cures = {
        "train": "give more text with --input",
        "validation": f"hold back more with --validation-fraction {_share(total)}, or give your own with "
        "--validation PATH",
    } | {split: f"give more text with --{split}" for split in given}
    found, short = [], set()
    for split in splits_of(manifest):
        documents = manifest.total(split, "documents")
        if problem := _too_little(documents, manifest.total(split, "bytes")):
            short.add(split)
            use = {"train": "training", "test": "a test"}.get(split, split)
            more = "; where that is a file, --documents paragraphs makes several documents of it"
            found.append(f"the text for {use} is {problem}: {cures[split]}{more * (documents == 1)}")
    return found + _warnings_of_sources(manifest, of_validation="validation" not in given | short)


def _warnings_of_sources(manifest: Manifest, of_validation: bool) -> list[str]:
    """Return warnings about single sources, if there are several. of_validation: also about their validation text."""
    found, short = [], []
    sources = zip(manifest.sources, manifest.statistics, strict=True) if len(manifest.sources) > 1 else ()
    for source, numbers in sources:
        if problem := _too_little(source["documents"], source["text_bytes"]):
            is_divisible = source["documents"] == 1 and bool(source.get("division"))  # one text
            more = "; --documents paragraphs makes several documents of it" * is_divisible
            cure = f"if that is not all of it, check its path and its format{more}"
            found.append(f"{source['name']} holds {problem}: {cure}")
        elif numbers["train"]["documents"] and _too_little(
            *(numbers["validation"][what] for what in ("documents", "bytes"))
        ):
            short.append(source)
    if short and of_validation:
        names = ", ".join(source["name"] for source in short[:5]) + ", …" * (len(short) > 5)
        share = _share(min(source["text_bytes"] for source in short))
        found.append(
            f"the text for validation of {names} is less than {ENOUGH >> 10} KiB, or one document: for bits per byte "
            f"of each source, hold back more with --validation-fraction {share}"
        )
    return found


def _share(size: int) -> str:
    """Return the share of this many bytes that is 1.5 times ENOUGH."""
    return f"{min(-(-150 * ENOUGH // max(size, 1)) / 100, 0.5):.2g}"


def _too_little(documents: int, size: int | None) -> str:
    """Describe what is too little about some text; "" if nothing is."""
    parts = [number_of(documents, "document")] if documents <= 1 else []
    if size is not None and size < ENOUGH:
        parts += [f"{number_of(size, 'byte')}, less than {ENOUGH >> 10} KiB"]
    return " of ".join(parts)
