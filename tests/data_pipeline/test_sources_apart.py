"""Validation text by source: counted during preparation, reported id by id during validation."""

from __future__ import annotations

import json

import numpy as np

from data_pipeline.config import DataConfig
from data_pipeline.loading.loaders import open_data, validation_loader
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import prepare


def test_each_source_has_its_stretch_of_both_splits(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "data_pipeline.preparation.encoding.SHARD_BYTES", 700
    )  # so that shards and sources do not end together
    inputs = []
    for letter, number in (("a", 40), ("b", 25), ("c", 31)):
        inputs.append(str(tmp_path / f"{letter}.jsonl"))
        lines = [json.dumps({"text": letter * 7 + str(index)}) + "\n" for index in range(number)]
        (tmp_path / f"{letter}.jsonl").write_text("".join(lines))
    config = PrepareConfig((*inputs,), output=str(tmp_path / "data"), workers=1, validation_fraction=0.3)
    manifest = prepare(config)
    assert len(manifest.splits["train"]) > 1
    data = open_data(DataConfig(dir=str(tmp_path / "data")))
    for split in ("train", "validation"):
        sources = data.sources(split)
        assert [source.name for source in sources] == inputs
        for source, letter, described in zip(sources, "abc", manifest.sources, strict=True):
            text = bytes(data.split(split).read(source.start, source.stop))
            assert text.count(letter.encode()) == 7 * text.count(b"\xff") > 0
            assert described[split] == {"documents": text.count(b"\xff"), "ids": len(text)}
        assert sources[-1].stop == len(data.split(split))

    loader = validation_loader(data, DataConfig(), 5)
    ids = loader.windows(0, loader.num_windows).ids
    of_source = loader.source_ids(0, loader.num_windows)
    assert loader.source_names == inputs
    for number, letter in enumerate(b"abc"):
        assert np.array_equal(np.unique(of_source[ids == letter]), [number])
