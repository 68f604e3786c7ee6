"""The likelihood of a text file."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from pathlib import Path

from data_pipeline.plurals import number_of
from stlm.errors import StlmError
from stlm.stlm import STLM


def score_file(model: STLM, name: str, per_line: bool = False) -> Iterator[str]:
    """Yield a line with the log-likelihood of a UTF-8 file, read as one document without its end.

    `name`: a path, or "-" for the standard input. `per_line`: before it, bits per byte of each line as a text of its
    own, a tab, and the line. Raises StlmError if the file cannot be read, is not UTF-8 or is empty.
    """
    text = _read(name)
    if per_line:
        for line in filter(None, text.splitlines()):
            yield f"{bits_per_byte(line, model.log_likelihood(line)):.4f}\t{line}"
    nats = model.log_likelihood(text)
    size = number_of(len(text.encode()), "byte")
    yield f"log-likelihood {nats:.4f} nats, {size}, {bits_per_byte(text, nats):.4f} bits per byte"


def bits_per_byte(text: str, log_likelihood: float) -> float:
    """Return the bits per byte of a text from its log-likelihood in nats."""
    return -log_likelihood / math.log(2) / len(text.encode())


def _read(name: str) -> str:
    try:
        text = (sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()).decode("utf-8")
    except FileNotFoundError:
        raise StlmError(f"--score: there is no file {name}") from None
    except OSError as error:
        raise StlmError(f"--score: {name} cannot be read ({error.strerror}), expected a text file") from None
    except UnicodeDecodeError as error:
        raise StlmError(f"--score: {name} is not UTF-8 at byte {error.start}; convert it first") from None
    if not text:
        raise StlmError(f"--score: {name} is empty, expected a text")
    return text
