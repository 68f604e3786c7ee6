"""What came of a preparation, for people."""

from __future__ import annotations

import os

from data_pipeline.manifest import SPLITS, Manifest

PROBLEMS = {
    "invalid_utf8_documents": "documents with invalid UTF-8",
    "replaced_characters": "characters replaced by U+FFFD",
    "byte_order_marks": "byte-order marks removed",
    "crlf_line_ends": "CRLF line ends made LF",
    "empty_documents": "empty documents left out",
    "broken_lines": "broken lines left out",
    "unreadable_files": "unreadable files left out, or the rest of them",
    "broken_documents": "documents with ids outside the vocabulary left out",
    "files_of_other_formats": "files of other formats left out",
}


def summary(manifest: Manifest, directory: str | os.PathLike[str]) -> str:
    """A table of both splits, and below it the inputs with the problems met in each."""
    tokenizer = manifest.tokenizer
    lines = [
        f"{os.fspath(directory)}: tokenizer {tokenizer['spec']}, fingerprint {manifest.fingerprint[:12]}",
        "",
        f"{'':<12}{'documents':>12}{'bytes':>16}{'ids':>16}{'bytes per id':>14}",
    ]
    for split in SPLITS:
        documents, size, ids = (manifest.total(split, what) for what in ("documents", "bytes", "ids"))
        lines.append(f"{split:<12}{documents:>12,}{size:>16,}{ids:>16,}{size / ids:>14.3f}")
    lines.append("")
    for source in manifest.sources:
        lines.append(f"read from {source['name']}: {source['documents']:,} documents, {source['text_bytes']:,} bytes")
        lines += [f"  {number:,} {PROBLEMS[name]}" for name, number in sorted(source["problems"].items())]
        lines += [f"    {example}" for example in source["examples"]]
        missing = [name for name, version in source.get("packages", {}).items() if version is None]
        if missing:
            lines.append(f"  not installed, so the corpus is not the usual one: {', '.join(missing)}")
    for rule, removed in manifest.cleaning.get("removed", {}).items():
        lines.append(f"left out {removed['documents']:,} documents, {removed['bytes']:,} bytes: {rule}")
    lines += [f"{number:,} {what}" for what, number in manifest.cleaning.get("edits", {}).items()]
    return "\n".join(lines)
