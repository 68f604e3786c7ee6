"""Bits per byte of general compressors on the same text, as a baseline that needs no installation."""

from __future__ import annotations

import bz2
import lzma
import zlib
from collections.abc import Callable
from typing import Protocol

from data_pipeline.progress import Progress
from data_pipeline.storage.id_stream import IdStream
from data_pipeline.tokenizers import Tokenizer

SEPARATOR = b"\xff"  # a byte that UTF-8 never uses: document ends count for compressors, as for models


class _Compressor(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


# The output of the commands with -9, headers and checksums included.
COMPRESSORS: dict[str, Callable[[], _Compressor]] = {
    "gzip -9": lambda: zlib.compressobj(9, wbits=31),  # 31: the gzip format
    "bz2 -9": lambda: bz2.BZ2Compressor(9),
    "xz -9": lambda: lzma.LZMACompressor(preset=9),
}


def compressed_bits_per_byte(stream: IdStream, tokenizer: Tokenizer) -> dict[str, float]:
    """Return each compressor's bits per byte of text for all documents in order, one separator byte after each.

    The separators are compressed but not counted as text, exactly as a model's bits per byte treat end_of_text.
    """
    compressors = {name: make() for name, make in COMPRESSORS.items()}
    sizes = dict.fromkeys(compressors, 0)
    num_bytes = 0
    with Progress(total=stream.num_bytes, desc="compressors", unit="B", unit_scale=True, delay=2) as progress:
        for document in stream.documents():
            text = tokenizer.decode_bytes(document)  # end_of_text gives no bytes
            num_bytes += len(text)
            for name, compressor in compressors.items():
                sizes[name] += len(compressor.compress(text + SEPARATOR))
            progress.update(len(text))
    return {name: 8 * (sizes[name] + len(compressor.flush())) / num_bytes for name, compressor in compressors.items()}
