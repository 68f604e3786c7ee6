"""The layout on disk matches docs/data_reference.md, whose reader is run."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.loading.prepared_data import PreparedData
from data_pipeline.preparation import encoding
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import prepare
from data_pipeline.storage.manifest import MANIFEST_FILE

DOCS = (Path(__file__).resolve().parents[2] / "docs" / "data_reference.md").read_text()


def reader():
    """The function `documents` of the documentation."""
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL) if "MMIDIDX" in block]
    assert len([line for line in code.splitlines() if line.strip()]) <= 15
    names = {}
    exec(code, names)
    return names["documents"]


@pytest.fixture(params=["byte", "sentencepiece:290"])
def data(request, tmp_path, monkeypatch):
    """Prepared data of several shards."""
    monkeypatch.setattr(encoding, "SHARD_BYTES", 3000)
    monkeypatch.setattr(encoding, "PIECE_BYTES", 1500)
    rng = random.Random(1)
    words = ["the", "of", "and", "to", "in", "is", "was", "it", "for", "with", "he", "be", "on", "that", "by", "you"]
    path, output = tmp_path / "a.txt", tmp_path / "out"
    path.write_text("\n<eos>\n".join(" ".join(rng.choices(words, k=12)) for _ in range(400)))
    prepare(PrepareConfig((str(path),), request.param, str(output), workers=1, validation_fraction=0.1))
    data = PreparedData.open(output)
    assert len(data.manifest.splits["train"]) > 2
    return data


def test_documents_keep_their_order(data, tmp_path):
    paragraphs = (tmp_path / "a.txt").read_text().split("\n<eos>\n")
    for split in ("train", "validation"):
        found = [data.tokenizer.decode(ids) for ids in data.split(split).documents()]
        assert found == [paragraph for paragraph in dict.fromkeys(paragraphs) if paragraph in set(found)]


def test_the_documented_reader_reads_prepared_data(data):
    for split in ("train", "validation"):
        stream = data.split(split)
        found = list(reader()(data.dir, split))
        assert len(found) == stream.num_documents > 0
        assert np.array_equal(np.concatenate(found), stream.read(0, len(stream)))
        assert all(ids[-1] == data.tokenizer.end_of_text_id for ids in found)
        assert all((ids[:-1] != data.tokenizer.end_of_text_id).all() for ids in found)


def test_deepspeed_reads_prepared_data_and_its_files_keep_their_ids(data, tmp_path):
    import torch
    from deepspeed.runtime.data_pipeline.data_sampling import indexed_dataset

    theirs = [
        document.copy()
        for shard in data.manifest.splits["train"]
        for document in indexed_dataset.MMapIndexedDataset(str(data.dir / shard.path))
    ]
    ours = list(data.split("train").documents())
    assert [ids.tolist() for ids in theirs] == [ids.tolist() for ids in ours]

    if data.tokenizer.spec == "byte":
        builder = indexed_dataset.MMapIndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=np.uint8)
        for ids in ours:
            builder.add_item(torch.from_numpy(ids.copy()))
            builder.end_document()
        builder.finalize(str(tmp_path / "theirs.idx"))
        config = PrepareConfig((str(tmp_path / "theirs"),), "byte", str(tmp_path / "again"), input_tokenizer="byte")
        prepare(config)
        again = PreparedData.open(tmp_path / "again")
        found = [ids.tolist() for split in ("train", "validation") for ids in again.split(split).documents()]
        assert sorted(found) == sorted(ids.tolist() for ids in ours)


def test_every_field_of_the_manifest_is_described(tmp_path):
    (tmp_path / "a.txt").write_text("one\n<eos>\ntwo\n<eos>\nthree")
    prepare(PrepareConfig((str(tmp_path / "a.txt"),), output=str(tmp_path / "out"), workers=1))
    section = DOCS[DOCS.index("**manifest.json**") :]
    described = set(re.findall(r"`(\w+)`", section[: section.index("**tokenizer")]))
    manifest = json.loads((tmp_path / "out" / MANIFEST_FILE).read_text())
    assert set(manifest) <= described
    assert set(manifest["tokenizer"]) | set(manifest["splits"]) | set(manifest["splits"]["train"][0]) <= described
