"""Mixtures: exact shares at every position, unchanged order within each part, one tokenizer."""

from __future__ import annotations

import numpy as np
import pytest
from test_reader import write_prepared

from data_pipeline.config import DataConfig, MixturePart
from data_pipeline.errors import DataError
from data_pipeline.loading.loaders import open_data, train_loader, validation_loader
from data_pipeline.loading.mixture import Mixture, share_out, whole_weights
from data_pipeline.loading.order import derived_seed, window_at
from data_pipeline.loading.prepared_data import PreparedData

TEXTS = (
    {"train": [["a" * 90], ["a" * 30]], "validation": [["aa", "a"]]},
    {"train": [["b" * 39]], "validation": [["b"]]},
)


@pytest.fixture
def folders(tmp_path):
    return [write_prepared(tmp_path / name, texts) for name, texts in zip("ab", TEXTS, strict=True)]


def mixed(folders, weights=(0.75, 0.25), **options):
    parts = tuple(MixturePart(str(folder), weight) for folder, weight in zip(folders, weights, strict=True))
    return DataConfig(mixture=parts, **options)


@pytest.mark.parametrize("weights", [[1], [3, 1], [1, 1, 1], [7, 2, 90, 1], [1, 10**9, 5]])
def test_shares_are_exact_and_counts_are_the_positions_before(weights):
    positions = np.arange(5 * min(sum(weights), 400))
    sources, counts = share_out(positions, weights)
    for source, weight in enumerate(weights):
        mine = sources == source
        assert counts[mine].tolist() == list(range(mine.sum()))
        drawn = np.cumsum(mine) - weight / sum(weights) * (positions + 1)
        assert np.abs(drawn).max() < len(weights)
    far = 10**12 + positions * 12_345_678_901
    again = [share_out(np.array([position]), weights) for position in far.tolist()]
    assert np.array_equal(np.concatenate([source for source, _ in again]), share_out(far, weights)[0])
    total = sum(weights)
    for position, source, count in zip(far.tolist(), *share_out(far, weights), strict=True):
        if source == 0:
            assert count == (position * weights[0] + total // 2) // total


def test_weights_become_integers_in_the_same_proportion():
    assert whole_weights([0.3, 0.1]) == [3, 1]
    assert whole_weights([2, 2, 4]) == [1, 1, 2]
    assert whole_weights([1e-3, 1]) == [1, 1000]
    rounded = whole_weights([0.123456789012345, 1.0])
    assert sum(rounded) <= 1 << 31
    assert rounded[0] / rounded[1] == pytest.approx(0.123456789012345, rel=1e-7)


def test_a_part_is_visited_in_its_own_order(folders):
    data, seed = open_data(mixed(folders)), 5
    loader = train_loader(data, mixed(folders), context_length=10, batch_size=8, seed=seed)
    streams = [part.split("train") for part in data.parts]
    seen = [0, 0]
    for step in range(1, 7):
        ids, mask, documents = loader.rows(step, 0, 8)
        assert documents is None
        pieces = [loader.rows(step, row, row + 1).ids for row in range(8)]
        assert np.array_equal(np.concatenate(pieces), ids)
        for row in range(8):
            part = int(ord("b") in ids[row])
            num_windows = -(-len(streams[part]) // 10)
            window = int(window_at(seen[part], num_windows, derived_seed(seed, part)))
            expected = streams[part].read(10 * window, min(10 * window + 10, len(streams[part])))
            assert np.array_equal(ids[row][mask[row]], expected)
            seen[part] += 1
    assert seen == [36, 12]
    assert loader.epoch(1) == 8 / (13 + 4)


def test_all_text_is_validated_and_each_source_known(folders):
    data = open_data(mixed(folders))
    loader = validation_loader(data, mixed(folders), 4)
    ids, mask, _ = loader.windows(0, loader.num_windows)
    assert bytes(ids[mask].astype(np.uint8)) == b"aa\xffa\xffb\xff"
    assert loader.source_names == [str(folder) for folder in folders]
    assert loader.source_ids(0, loader.num_windows)[mask].tolist() == [0] * 5 + [1] * 2
    assert np.array_equal(loader.source_ids(1, 2), loader.source_ids(0, 2)[1:])


def test_the_identity_of_a_mixture_includes_its_weights(folders):
    fingerprints = {open_data(mixed(folders, weights)).fingerprint for weights in ((3, 1), (0.75, 0.25), (1, 1))}
    assert len(fingerprints) == 2


def test_parts_of_different_tokenizers_are_refused(folders):
    parts = [PreparedData.open(folder) for folder in folders]
    parts[1].tokenizer.fingerprint = "0" * 64
    with pytest.raises(DataError, match=r"share one tokenizer: .*a was made with byte .*, .*b with byte \(0000"):
        Mixture(parts, [1, 1])


def test_verify_reads_every_byte(folders, monkeypatch):
    path = folders[1] / "train/shard_00000.bin"
    path.write_bytes(b"x" + path.read_bytes()[1:])
    open_data(mixed(folders, verify=False))
    for verify in (True, None):
        with pytest.raises(DataError, match=r"b/train/shard_00000\.bin is damaged: its sha256"):
            open_data(mixed(folders, verify=verify))
    monkeypatch.setattr("data_pipeline.loading.prepared_data._VERIFIED_BYTES", 1)
    open_data(mixed(folders))
