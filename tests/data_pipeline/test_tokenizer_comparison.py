"""The table that compares tokenizers gives the figures of a preparation with each of them."""

from __future__ import annotations

import os
from pydoc_data.topics import topics

import pytest

from data_pipeline.errors import DataError
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import prepare
from data_pipeline.report.tokenizer_comparison import Measured, compare_tokenizers, comparison_table, expand_specs


def test_numbers_take_the_kind_before_them():
    assert expand_specs("sentencepiece:1024,2048, byte,sentencepiece-bpe:300,400,400") == [
        "sentencepiece:1024",
        "sentencepiece:2048",
        "byte",
        "sentencepiece-bpe:300",
        "sentencepiece-bpe:400",
    ]
    with pytest.raises(DataError, match="'1024' is unknown"):
        expand_specs("1024,2048")


def test_it_gives_the_figures_of_a_preparation_and_leaves_no_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("\n<eos>\n".join(topics[name] for name in sorted(topics)[:20]))
    specs = ["byte", "sentencepiece:400", "sentencepiece-bpe:500", "sentencepiece:90000"]
    config = PrepareConfig(("x.txt",), validation_fraction=0.2, workers=1)
    rows = compare_tokenizers(config, specs)
    assert os.listdir() == ["data", "x.txt"] or os.listdir() == ["x.txt", "data"]
    assert os.listdir("data") == []

    for row, spec, vocab_size in zip(rows[:3], specs, (256, 400, 500), strict=False):
        manifest = prepare(
            PrepareConfig(("x.txt",), tokenizer=spec, output=f"out-{vocab_size}", validation_fraction=0.2, workers=1)
        )
        expected = manifest.total("validation", "bytes") / manifest.total("validation", "ids")
        assert isinstance(row, Measured)
        assert (row.spec, row.vocab_size) == (spec, vocab_size)
        assert row.bytes_per_id == pytest.approx(expected)
        assert row.megabytes_per_second > 0

    table = comparison_table(rows, [64, 256]).splitlines()
    assert table[3].split()[:3] == ["sentencepiece:400", "400", f"{rows[1].bytes_per_id:.3f}"]
    assert table[3].split()[-2:] == ["25,600", "102,400"]
    assert table[-1].startswith("left out: tokenizer sentencepiece:90000: the corpus is too small")
