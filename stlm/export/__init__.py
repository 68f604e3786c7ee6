"""Conversion of models to and from other formats, each checked by comparing logits on a text."""

from stlm.export.artifact.conversion import WrittenArtifact, convert_to_artifact
from stlm.export.conversion import Converted, convert_from, convert_to
from stlm.export.gguf.conversion import WrittenGGUF, convert_to_gguf

__all__ = [
    "Converted",
    "WrittenArtifact",
    "WrittenGGUF",
    "convert_from",
    "convert_to",
    "convert_to_artifact",
    "convert_to_gguf",
]
