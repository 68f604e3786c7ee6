"""Shards and their reader: a format that other programs read, windows that lose no id, damage reported by name."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.loading.order import Shuffled
from data_pipeline.loading.prepared_data import PreparedData, TrainLoader, ValidationLoader
from data_pipeline.loading.windows import StreamWindows
from data_pipeline.storage.manifest import Manifest, ShardEntry
from data_pipeline.storage.shards import Shard, write_shard
from data_pipeline.tokenizers import build_tokenizer

TEXTS = {"train": [["one", "two two"], ["", "thrée \U0001f600"], ["four\n" * 30]], "validation": [["five", "six"]]}


def write_prepared(directory, texts):
    """Write a folder of prepared data: per split a list of shards, each a list of documents."""
    tokenizer = build_tokenizer("byte")
    tokenizer.save(directory / "tokenizer")
    splits = {}
    for split, shards in texts.items():
        splits[split] = []
        for number, documents in enumerate(shards):
            path = f"{split}/shard_{number:05d}"
            stored = [np.append(tokenizer.encode(text), np.uint8(0xFF)) for text in documents]
            blocks = [(ids, np.array([len(ids)])) for ids in stored]
            written = write_shard(directory / path, tokenizer.dtype, blocks)
            size = sum(len(text.encode()) for text in documents)
            splits[split].append(ShardEntry(path=path, bytes=size, **asdict(written)))
    description = {"spec": "byte", "vocab_size": 256, "dtype": "uint8", "fingerprint": tokenizer.fingerprint}
    Manifest(description, splits, sources=[], split_rule={}, duplicates={}, settings={}).save(directory)
    return directory


@pytest.fixture
def prepared(tmp_path):
    return write_prepared(tmp_path / "prepared", TEXTS)


def shuffled(stream, context_length, batch_size, seed=3):
    windows = StreamWindows(stream, context_length, pad_id=0xFE)
    return TrainLoader(windows, Shuffled(windows.num_windows, seed), batch_size)


def ids_of(shards):
    return np.concatenate([np.frombuffer(text.encode() + b"\xff", np.uint8) for texts in shards for text in texts])


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32"])
def test_deepspeed_reads_these_files_and_the_reverse(tmp_path, dtype):
    import torch
    from deepspeed.runtime.data_pipeline.data_sampling import indexed_dataset

    rng = np.random.default_rng(1)
    sizes = np.array([5, 1, 17, 300])
    documents = [rng.integers(0, np.iinfo(dtype).max, size, dtype=dtype) for size in sizes]

    write_shard(
        tmp_path / "ours", np.dtype(dtype), [(np.concatenate(documents[:3]), sizes[:3]), (documents[3], sizes[3:])]
    )
    theirs = indexed_dataset.MMapIndexedDataset(str(tmp_path / "ours"))
    assert len(theirs) == 4
    assert theirs.doc_idx.tolist() == [0, 1, 2, 3, 4]
    for index, document in enumerate(documents):
        assert theirs[index].dtype == dtype
        assert np.array_equal(theirs[index], document)

    builder = indexed_dataset.MMapIndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=getattr(np, dtype))
    for document in documents:
        builder.add_item(torch.from_numpy(document.astype(np.int64)))
        builder.end_document()
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"theirs{suffix}").read_bytes() == (tmp_path / f"ours{suffix}").read_bytes()


def test_type_codes_of_other_programs_are_interpreted_by_program(tmp_path):
    """The type code of uint16 is 6 in DeepSpeed and 8 in Megatron-LM; documents may consist of several sequences."""
    sizes, ids = np.array([2, 3, 0, 4], np.int32), np.arange(60_000, 60_009).astype(np.uint16)
    offsets, entries = np.array([0, 4, 10, 10], np.int64), np.array([0, 2, 4], np.int64)
    for code in (6, 8):
        header = b"MMIDIDX\0\0" + np.array([1], "<u8").tobytes() + bytes([code]) + np.array([4, 3], "<u8").tobytes()
        (tmp_path / "x.idx").write_bytes(header + sizes.tobytes() + offsets.tobytes() + entries.tobytes())
        (tmp_path / "x.bin").write_bytes(ids.tobytes())
        shard = Shard(tmp_path / "x")
        assert shard.dtype == np.uint16
        assert [document.tolist() for document in shard] == [ids[:5].tolist(), ids[5:].tolist()]


def test_a_stream_is_its_documents_in_a_row(prepared):
    data = PreparedData.open(prepared, verify=True)
    for split, shards in TEXTS.items():
        stream, expected = data.split(split), ids_of(shards)
        texts = [text for shard in shards for text in shard]
        assert len(stream) == len(expected)
        assert stream.num_documents == len(texts)
        assert stream.num_bytes == sum(len(text.encode()) for text in texts)
        assert data.tokenizer.bytes_per_id[expected].sum() == stream.num_bytes
        assert [data.tokenizer.decode(document) for document in stream.documents()] == texts
        for start in range(0, len(expected), 3):
            for stop in (start, start + 1, start + 7, len(expected)):
                if start <= stop <= len(expected):
                    assert np.array_equal(stream.read(start, stop), expected[start:stop])
    with pytest.raises(IndexError):
        stream.read(0, len(stream) + 1)


@pytest.mark.parametrize("context_length", [1, 7, 64, 1000])
def test_an_epoch_predicts_every_id_once(prepared, context_length):
    data = PreparedData.open(prepared)
    stream, expected = data.split("train"), ids_of(TEXTS["train"])
    loader = shuffled(stream, context_length, batch_size=1)
    assert loader.num_windows == -(-len(expected) // context_length)
    rows = [loader.rows(step, 0, 1)[:2] for step in range(1, loader.num_windows + 1)]
    windows = sorted((ids[mask].tolist() for ids, mask in rows), key=lambda ids: (len(ids) < context_length, ids))
    cut = [expected[start : start + context_length].tolist() for start in range(0, len(expected), context_length)]
    assert windows == sorted(cut, key=lambda ids: (len(ids) < context_length, ids))
    for ids, mask in rows:
        assert ids.shape == mask.shape == (1, context_length)
        assert (ids[~mask] == 0xFE).all()
    assert loader.epoch(loader.num_windows) == 1.0


def test_rows_do_not_depend_on_how_a_batch_is_divided(prepared):
    stream = PreparedData.open(prepared).split("train")
    loader = shuffled(stream, 8, batch_size=6)
    ids, mask, _ = loader.rows(12, 0, 6)
    for cuts in ([0, 3, 6], [0, 1, 2, 3, 4, 5, 6], [0, 5, 5, 6]):
        pieces = [loader.rows(12, first, last) for first, last in pairwise(cuts)]
        assert np.array_equal(np.concatenate([piece[0] for piece in pieces]), ids)
        assert np.array_equal(np.concatenate([piece[1] for piece in pieces]), mask)
    halves = shuffled(stream, 8, batch_size=3)
    assert np.array_equal(np.concatenate([halves.rows(23, 0, 3)[0], halves.rows(24, 0, 3)[0]]), ids)
    with pytest.raises(IndexError):
        loader.rows(1, 0, 7)


def test_validation_is_the_text_in_order(prepared):
    stream, expected = PreparedData.open(prepared).split("validation"), ids_of(TEXTS["validation"])
    loader = ValidationLoader(stream, 4, pad_id=0xFE)
    ids, mask, _ = loader.windows(0, loader.num_windows)
    assert np.array_equal(ids[mask], expected)
    assert np.array_equal(loader.windows(1, 3)[0], ids[1:3])


@pytest.mark.parametrize("name", ["train/shard_00001.bin", "train/shard_00001.idx", "validation/shard_00000.bin"])
def test_a_damaged_shard_is_named(prepared, name):
    path = prepared / name
    contents = path.read_bytes()

    path.write_bytes(contents[:-1])
    with pytest.raises(DataError, match=rf"{name} is cut short: {len(contents) - 1} bytes, expected {len(contents)}"):
        PreparedData.open(prepared)

    path.write_bytes(contents[:-3] + bytes([contents[-3] ^ 1]) + contents[-2:])
    PreparedData.open(prepared)
    with pytest.raises(DataError, match=rf"{name} is damaged: its sha256"):
        PreparedData.open(prepared, verify=True)

    path.unlink()
    with pytest.raises(DataError, match=rf"{name} is missing"):
        PreparedData.open(prepared)


def test_a_folder_that_is_not_whole_is_refused(prepared, tmp_path):
    with pytest.raises(DataError, match=r"no prepared data in .*nowhere.*scripts/preprocess\.py"):
        PreparedData.open(tmp_path / "nowhere")

    manifest = prepared / "manifest.json"
    contents = json.loads(manifest.read_text())
    contents["splits"]["train"][0]["ids"] += 1
    manifest.write_text(json.dumps(contents))
    with pytest.raises(DataError, match="its fingerprint does not match its contents"):
        PreparedData.open(prepared)
    manifest.write_text(json.dumps(contents | {"format_version": 99}))
    with pytest.raises(DataError, match="format version 99, expected 1"):
        PreparedData.open(prepared)
    manifest.write_text("{")
    with pytest.raises(DataError, match="damaged"):
        PreparedData.open(prepared)
    manifest.unlink()
    (prepared / ".preparing").mkdir()
    with pytest.raises(DataError, match="unfinished: its preparation was interrupted"):
        PreparedData.open(prepared)


def test_a_folder_with_another_tokenizer_is_refused(prepared):
    manifest = prepared / "manifest.json"
    contents = json.loads(manifest.read_text())
    other = Manifest.load(prepared)
    other.tokenizer["fingerprint"] = "0" * 64
    manifest.write_text(json.dumps(contents | {"tokenizer": other.tokenizer, "fingerprint": other.fingerprint}))
    with pytest.raises(DataError, match="is not the one that its shards were made with"):
        PreparedData.open(prepared)
    shutil.rmtree(prepared / "tokenizer")
    with pytest.raises(DataError, match="no tokenizer in"):
        PreparedData.open(prepared)


def test_foreign_files_are_not_taken_for_shards(tmp_path):
    (tmp_path / "x.idx").write_bytes(b"TNTIDX\0\0" + bytes(60))
    (tmp_path / "x.bin").write_bytes(b"")
    with pytest.raises(DataError, match="does not begin with MMIDIDX"):
        Shard(tmp_path / "x")
    write_shard(tmp_path / "y", np.dtype("uint8"), [(np.zeros(5, np.uint8), np.array([5]))])
    (tmp_path / "y.bin").write_bytes(bytes(4))
    with pytest.raises(DataError, match=r"y\.bin is damaged: 4 bytes, expected 5"):
        Shard(tmp_path / "y")
