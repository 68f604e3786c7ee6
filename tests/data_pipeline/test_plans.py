"""Packing and curriculum: every id is predicted exactly once, and waste stays within the stated bound."""

from __future__ import annotations

import json
from itertools import pairwise

import numpy as np
import pytest
from test_reader import write_prepared

from data_pipeline.config import DataConfig
from data_pipeline.errors import DataError
from data_pipeline.loading.best_fit import RunningNumbers, Slots, best_fit_decreasing
from data_pipeline.loading.loaders import open_data, train_loader, validation_loader
from data_pipeline.loading.window_plans import plan_dir, write_plan
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import prepare

END, PAD, START = 0xFF, 0xFE, 0xFC
LENGTHS = [0, 1, 2, 3, 5, 6, 7, 8, 9, 13, 14, 15, 16, 22, 40, 2, 2, 7, 3]  # around multiples of a window of 8


@pytest.fixture
def folder(tmp_path):
    texts = ["".join(chr(97 + (13 * i + j) % 26) for j in range(length)) for i, length in enumerate(LENGTHS)]
    return write_prepared(tmp_path / "data", {"train": [texts[:7], texts[7:]], "validation": [["ab", "cde"]]})


def epoch_of(folder, packing, curriculum=None, context_length=8, seed=1):
    config = DataConfig(dir=str(folder), packing=packing, curriculum=curriculum)
    data = open_data(config)
    loader = train_loader(data, config, context_length, batch_size=1, seed=seed)
    return data, [loader.rows(step, 0, 1) for step in range(1, loader.num_windows + 1)]


def simple_best_fit(sizes, capacity):
    """Return the number of windows by the algorithm as the paper states it."""
    rooms = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms[rooms.index(min(fitting))] -= size
        else:
            rooms.append(capacity - size)
    return sorted(rooms)


@pytest.mark.parametrize("capacity", [1, 2, 7, 40])
def test_packing_by_counts_is_packing_piece_by_piece(capacity):
    rng = np.random.default_rng(capacity)
    for _ in range(30):
        sizes = rng.integers(1, capacity + 1, rng.integers(1, 200))
        counts = np.bincount(sizes, minlength=capacity + 1)
        packed = best_fit_decreasing(counts.tolist(), capacity)
        rooms = [capacity - sum(size * each for size, each in p.contents) for p in packed for _ in range(p.number)]
        assert sorted(rooms) == simple_best_fit(sizes.tolist(), capacity)

        slots, ranks = Slots.of(packed, counts.tolist()), RunningNumbers(capacity + 1)
        placed = [slots.place(part, ranks(part)) for part in np.array_split(sizes, 3)]
        windows, pieces = (np.concatenate(column) for column in zip(*placed, strict=True))
        assert sorted(pieces.tolist()) == list(range(len(sizes)))
        firsts = slots.firsts(packed)
        assert np.array_equal(np.searchsorted(firsts, pieces, side="right") - 1, windows)
        assert np.bincount(windows, sizes).max() <= capacity


@pytest.mark.parametrize("packing", ["stream", "documents", "padded", "best_fit"])
@pytest.mark.parametrize("curriculum", [None, "length"])
def test_every_id_is_predicted_once_in_its_document(folder, packing, curriculum):
    summary = write_plan(open_data(DataConfig(dir=str(folder))), packing, 8, curriculum)
    data, rows = epoch_of(folder, packing, curriculum)
    stream = data.split("train")
    predicted = np.concatenate([ids[mask] for ids, mask, _ in rows])
    assert np.array_equal(np.sort(predicted), np.sort(stream.read(0, len(stream))))
    assert len(rows) == summary.windows
    assert summary.wasted_share == pytest.approx(1 - len(stream) / (8 * len(rows)))
    if packing == "padded" or packing == "stream":
        assert all(documents is None for _, _, documents in rows)
        return
    for ids, mask, documents in rows:
        assert (documents[mask] >= 0).all()
        assert ((ids == PAD) <= (documents == -1)).all()
        if packing == "documents":
            changes = np.flatnonzero(np.diff(documents[0])) + 1
            assert np.array_equal(np.flatnonzero(ids[0, :-1] == END) + 1, changes)


def test_whole_documents_begin_as_in_generation(folder):
    write_plan(open_data(DataConfig(dir=str(folder))), "padded", 8)
    data, rows = epoch_of(folder, "padded")
    windows = [(ids[0].tolist(), mask[0].tolist()) for ids, mask, _ in rows]
    for document in data.split("train").documents():
        behind = [END, *document.tolist()]
        for start in range(0, len(behind), 8):
            part = behind[start : start + 8]
            padded = part + [PAD] * (8 - len(part))
            mask = [start > 0 or place > 0 for place in range(len(part))] + [False] * (8 - len(part))
            windows.remove((padded, mask))
    assert not windows


def test_best_fit_windows_hold_whole_documents_and_remainders_of_long_ones(folder):
    write_plan(open_data(DataConfig(dir=str(folder))), "best_fit", 8)
    data, rows = epoch_of(folder, "best_fit")
    pieces = []
    for ids, mask, documents in rows:
        for number in range(documents.max() + 1):
            places = np.flatnonzero((documents[0] == number) & mask[0])
            assert np.array_equal(places, np.arange(places[0], places[-1] + 1))
            before = None if places[0] == 0 else ids[0, places[0] - 1]
            pieces.append((before, bytes(ids[0, places].astype(np.uint8))))
    expected = []
    for document in data.split("train").documents():
        behind = bytes([END, *document])
        parts = [behind[start : start + 8] for start in range(0, len(behind), 8)]
        expected += [(True, parts[0][1:])] * (len(parts[0]) > 1) + [(False, part) for part in parts[1:]]
    assert sorted(text for _, text in pieces) == sorted(text for _, text in expected)
    for before, text in pieces:
        assert ((True, text) in expected and before == END) or ((False, text) in expected and before in (None, START))


def test_a_curriculum_goes_from_short_to_long_in_the_first_epoch_only(tmp_path):
    rng = np.random.default_rng(1)
    texts = ["x" * length for length in rng.integers(1, 200, 300)]
    folder = write_prepared(tmp_path / "data", {"train": [texts], "validation": [["ab"]]})
    for packing in ("padded", "best_fit", "stream"):
        data = open_data(DataConfig(dir=str(folder)))
        summary = write_plan(data, packing, 256, "length")
        config = DataConfig(dir=str(folder), packing=packing, curriculum="length")
        loader = train_loader(data, config, 256, batch_size=1, seed=1)
        epochs = [
            [loader.rows(epoch * loader.num_windows + row + 1, 0, 1) for row in range(loader.num_windows)]
            for epoch in (0, 1)
        ]
        lengths = [np.array([mask.sum() / (ids == END)[mask].sum() for ids, mask, _ in rows]) for rows in epochs]
        positions = np.arange(loader.num_windows)
        if packing == "padded":
            groups = np.split(lengths[0], summary.edges[1:-1])
            assert all(low.max() <= high.min() for low, high in pairwise(groups))
            assert len(groups) == 10
            assert any((np.diff(group) < 0).any() for group in groups)  # shuffled within
            assert np.corrcoef(positions, lengths[0])[0, 1] > 0.95
        else:
            assert np.corrcoef(positions, lengths[0])[0, 1] > 0.4
        assert abs(np.corrcoef(positions, lengths[1])[0, 1]) < 0.3
        contents = [sorted(ids.tobytes() for ids, _, _ in rows) for rows in epochs]
        assert contents[0] == contents[1]


def test_validation_keeps_documents_apart_when_training_does(folder):
    for packing in ("stream", "documents", "padded", "best_fit"):
        config = DataConfig(dir=str(folder), packing=packing)
        windows = validation_loader(open_data(config), config, 4).windows(0, 2)
        assert windows.ids.tolist() == [[97, 98, END, 99], [100, 101, END, PAD]]
        expected = None if packing == "stream" else [[0, 0, 0, 1], [0, 0, 0, -1]]
        assert expected == (None if windows.document_ids is None else windows.document_ids.tolist())


def test_a_missing_damaged_or_foreign_plan_is_named_with_the_command_that_makes_it(folder, monkeypatch):
    data = open_data(DataConfig(dir=str(folder)))
    command = rf"preprocess\.py plan {folder} --packing best_fit --context-length 8"
    with pytest.raises(DataError, match=rf"has no plan for these windows.*{command}$"):
        epoch_of(folder, "best_fit")
    with pytest.raises(DataError, match=rf"has no plan for these windows.*{command} --curriculum length$"):
        epoch_of(folder, "best_fit", "length")
    write_plan(data, "best_fit", 8)
    directory = plan_dir(folder, "best_fit", 8, None)
    pieces = (directory / "pieces.npy").read_bytes()
    (directory / "pieces.npy").write_bytes(pieces[:-1])
    with pytest.raises(DataError, match=rf"pieces\.npy is missing or cut short.*{command}"):
        epoch_of(folder, "best_fit")
    (directory / "pieces.npy").write_bytes(pieces[:-1] + bytes([pieces[-1] ^ 1]))
    for verify in (True, None):  # None: few windows
        with pytest.raises(DataError, match=rf"pieces\.npy is damaged.*{command}"):
            train_loader(data, DataConfig(dir=str(folder), packing="best_fit", verify=verify), 8, 1, 1)
    monkeypatch.setattr("data_pipeline.loading.prepared_data._VERIFIED_BYTES", 1)
    train_loader(data, DataConfig(dir=str(folder), packing="best_fit"), 8, 1, 1)
    description = json.loads((directory / "plan.json").read_text())
    (directory / "plan.json").write_text(json.dumps(description | {"data_fingerprint": "0"}))
    with pytest.raises(DataError, match=rf"was made for other data than .*{command}"):
        epoch_of(folder, "best_fit")


def test_a_curriculum_by_score_begins_with_the_low_ones(tmp_path):
    """Scores stay with their documents although some documents are dropped, held back, or in another shard."""
    lines = []
    for number in range(400):
        score = (number * 37) % 200 / 8 - 9
        lines.append(json.dumps({"text": f"{score:.3f}", "score": score, "id": number}) + "\n")
    (tmp_path / "a.jsonl").write_text("".join(lines[:150]))
    (tmp_path / "b.jsonl").write_text("".join(lines[150:]))
    config = PrepareConfig(
        (str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")), output=str(tmp_path / "data"), workers=1,
        validation_fraction=0.2, score_key="score",
    )  # fmt: skip
    prepare(config)
    data = open_data(DataConfig(dir=str(tmp_path / "data")))
    write_plan(data, "padded", 16, "score")
    choice = DataConfig(dir=str(tmp_path / "data"), packing="padded", curriculum="score")
    loader = train_loader(data, choice, 16, batch_size=1, seed=1)
    rows = [loader.rows(step, 0, 1) for step in range(1, loader.num_windows + 1)]
    scores = np.array([float(bytes(ids[mask].astype(np.uint8))[:-1]) for ids, mask, _ in rows])
    assert loader.num_windows == data.split("train").num_documents < 200
    groups = np.array_split(scores, 10)
    assert np.corrcoef(np.arange(len(scores)), scores)[0, 1] > 0.95
    assert np.sort(groups[0]).max() < groups[3].min() < groups[6].min()


def test_scores_that_are_missing_are_named(folder, tmp_path):
    with pytest.raises(DataError, match="has no scores: prepare it from JSON Lines with --score-key KEY"):
        write_plan(open_data(DataConfig(dir=str(folder))), "padded", 8, "score")
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "a", "s": 1}\n{"text": "b", "s": "high"}\n')
    with pytest.raises(DataError, match=r"x\.jsonl:2: expected a number under 's' \(--score-key\), got 'high'"):
        prepare(PrepareConfig((str(path),), output=str(tmp_path / "out"), workers=1, score_key="s"))
    (tmp_path / "y.txt").write_text("one\n<eos>\ntwo\n<eos>\nthree\n")
    with pytest.raises(DataError, match="--score-key s asks for a score of every document, but only JSON Lines"):
        prepare(PrepareConfig((str(tmp_path / "y.txt"),), output=str(tmp_path / "out2"), workers=1, score_key="s"))
