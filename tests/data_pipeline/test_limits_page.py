"""The limits stated in docs/data.md and docs/data_reference.md match the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from data_pipeline.cleaning.decontamination import LONGEST_RUN, SHORTEST_RUN
from data_pipeline.cleaning.words import WORD
from data_pipeline.loading import prepared_data as reader
from data_pipeline.preparation import encoding, statistics
from data_pipeline.report import summary
from data_pipeline.sources import hub
from data_pipeline.sources import plain_text as plaintext
from data_pipeline.sources import text_files as textfiles
from data_pipeline.tokenizers import cutting, sentencepiece

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [(DOCS / name).read_text(encoding="utf-8") for name in ("data.md", "data_reference.md")]
PAGE = " ".join(" ".join(PAGES).split())
UNITS = {"": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}

# The page's sentence, with the number as a group, and the constant.
LIMITS = [
    (r"trained on up to (\d+ MiB) of the documents for training", encoding._SAMPLE_BYTES),
    (r"read in slices of (\d+ MiB) by all workers", textfiles.SLICE),
    (r"pieces of work \((\d+ MiB) to read,", textfiles.SLICE),
    (r"to read, (\d+ MiB) to encode,", encoding.PIECE_BYTES),
    (r"to encode, (\d+ MiB) to write\)", encoding.SHARD_BYTES),
    (r"(\d+ MiB) of text in a shard", encoding.SHARD_BYTES),
    (r"a line of JSON \| (\d+ MiB) \|", textfiles.LONGEST_RECORD),
    (r"a line of CSV, a page of HTML \| (\d+ MiB) \|", textfiles.LONGEST_RECORD),
    (r"a document of any other kind \| (\d+ GiB) \|", plaintext.LONGEST_DOCUMENT),
    (r"a document of more than (\d+ GiB) is an error", plaintext.LONGEST_DOCUMENT),
    (r"fewer than (\d+) documents of plain text, it cuts", plaintext.ENOUGH),
    (r"it cuts those above (\d+ KiB)", plaintext.PIECE),
    (r"pieces of at most (\d+ KiB)", plaintext.PIECE),
    (r"\(of at least (\d+ KiB)\)", plaintext._SMALLEST_PIECE),
    (r"Documents above (\d+ MiB) are always cut", plaintext._LONGEST_WHOLE),
    (r"a document of plain text, by `--documents auto` \| (\d+ MiB) \|", plaintext._LONGEST_WHOLE),
    (r"units of ([\d,]+) rows are read by all workers", hub._HUB_ROWS),
    (r"given to the library in pieces of about (\d+ MiB)", cutting.PIECE),
    (r"Any N of (\d+) and more is tried", sentencepiece.MINIMUM_VOCAB_SIZE),
    (r"has less than (\d+ KiB) or one document", summary.ENOUGH),
    (r"A sample is (\d+ KiB) of documents at most", statistics.SAMPLE_BYTES),
    (r"every byte of folders up to (\d+ MiB)", reader._VERIFIED_BYTES),
    (r"share (\d+) words in a row", LONGEST_RUN // WORD),
    (r"Texts of fewer than (\d+) words cannot be looked for", SHORTEST_RUN // WORD),
]


@pytest.mark.parametrize(("words", "constant"), LIMITS, ids=[words for words, _ in LIMITS])
def test_the_page_states_the_limits_of_the_code(words, constant):
    found = re.search(words, PAGE)
    assert found, f"docs/data*.md no longer say {words!r}: state the limit there, or change this list"
    number, _, unit = found[1].replace(",", "").partition(" ")
    assert int(number) * UNITS[unit] == constant
