"""Hashed n-grams: the row of each one, positions without one, and the vectors that they add."""

import pytest
import torch
from test_pairs import make, random_ids

from stlm.config import ByteEmbedderConfig, ByteNgramsConfig, LinearHeadConfig, ModelConfig, NgramsConfig
from stlm.model.context import Context
from stlm.model.embedders.ngrams import NgramEmbedding

IDS = torch.tensor([[5, 7, 0, 2]])


def embedding(**settings):
    torch.manual_seed(0)
    return NgramEmbedding(NgramsConfig(**settings), width=4)


def test_rows_by_hand():
    """Worked out with B = BASE = 1,000,003, PRIME = 2,147,483,647, and tables of ten rows: the last digit counts."""
    rows, exists = embedding(table_size=10, shortest=2, longest=3).rows(IDS, None)
    # bigrams: 7 + 5 B = 5,000,022; 0 + 7 B = 7,000,021; 2 + 0 B = 2
    assert rows[0, 1:, 0].tolist() == [2, 1, 2]
    # trigrams: B^2 = 1,000,006,000,009 = 465 * PRIME + 1,426,104,154, so 0 + 7 B + 5 B^2 = 7,137,520,791, less
    # 3 * PRIME: 695,069,850; and 2 + 0 B + 7 B^2 = 9,982,729,080, less 4 * PRIME: 1,392,794,492. Their table is second.
    assert 1_000_003**2 == 465 * (2**31 - 1) + 1_426_104_154
    assert rows[0, 2:, 1].tolist() == [10 + 0, 10 + 2]
    assert exists[0].tolist() == [[False, False], [True, False], [True, True], [True, True]]


def test_none_reaches_across_the_edge_of_a_document():
    documents = torch.tensor([[3, 3, 3, 8, 8, 8, 8]])
    _, exists = embedding(table_size=10, shortest=2, longest=3).rows(torch.arange(7)[None], documents)
    assert exists[0, :, 0].tolist() == [False, True, True, False, True, True, True]
    assert exists[0, :, 1].tolist() == [False, False, True, False, False, True, True]


def test_the_sum_is_that_of_the_rows_over_the_root_of_their_number():
    module = embedding(table_size=10, shortest=2, longest=4)
    out = module(IDS, Context())
    rows, _ = module.rows(IDS, None)
    assert not out[0, 0].any()
    expected = sum(module.tables.weight[row] for row in rows[0, 3]) / 3**0.5
    torch.testing.assert_close(out[0, 3], expected)
    torch.testing.assert_close(out[0, 2], sum(module.tables.weight[row] for row in rows[0, 2, :2]) / 3**0.5)


def test_pieces_pick_the_same_rows():
    module = embedding(table_size=50, shortest=2, longest=5)
    ids = random_ids()
    whole = module(ids, Context())
    cache = module.new_cache()
    pieces = [module(piece, Context(), cache) for piece in ids.split([1, 1, 2, 9, 1, 10], dim=1)]
    assert torch.equal(torch.cat(pieces, 1), whole)
    assert cache.past_BS.shape == (2, 4)


def test_rows_of_ids_beyond_a_byte_stay_within_their_table():
    module = embedding(table_size=977, shortest=2, longest=8)
    rows, _ = module.rows(torch.randint(0, 200_000, (4, 64)), None)
    for table in range(7):
        mine = rows[..., table] - 977 * table
        assert mine.min() >= 0 and mine.max() < 977 and mine.unique().numel() > 200


@torch.no_grad()
def test_a_model_begins_as_the_one_without_them():
    from stlm.model import initialize

    plain = make(ByteEmbedderConfig(), LinearHeadConfig())
    model = make(ByteEmbedderConfig(ngrams=ByteNgramsConfig(table_size=50)), LinearHeadConfig())
    assert not torch.equal(model(random_ids()).logits, plain(random_ids()).logits)
    initialize(model, seed=3)
    assert torch.equal(model(random_ids()).logits, plain(random_ids()).logits)


@pytest.mark.parametrize(
    "settings, key",
    [({"shortest": 9}, "shortest"), ({"table_size": 10, "longest": 513}, "longest")],
)
def test_lengths_that_do_not_fit_name_the_key(settings, key):
    embedder = ByteEmbedderConfig(ngrams=ByteNgramsConfig(**settings))
    (conflict,) = ModelConfig(embedder=embedder).check()
    assert conflict.key == f"embedder.ngrams.{key}" and "would work" in conflict.message
