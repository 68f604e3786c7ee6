"""A factorised table equals a table whose rows are products."""

import pytest
import torch
from test_pairs import make, random_ids

from stlm.config import LinearHeadConfig, ModelConfig, TokenEmbedderConfig


@torch.no_grad()
@pytest.mark.parametrize("tied", [True, False])
def test_it_equals_the_table_of_the_products(tied):
    factorised = make(TokenEmbedderConfig(rank=8), LinearHeadConfig(tied=tied))
    whole = make(TokenEmbedderConfig(), LinearHeadConfig(tied=tied))
    whole.embedder.table.weight.copy_(factorised.embedder.table.weight @ factorised.embedder.factor.weight.T)
    if not tied:
        whole.head.output.weight.copy_(factorised.head.output.weight @ factorised.head.factor.weight.T)
    torch.testing.assert_close(factorised(random_ids()).logits, whole(random_ids()).logits, atol=1e-5, rtol=0)
    saved = (256 * 32 - 256 * 8 - 8 * 32) * (1 if tied else 2)
    assert whole.num_parameters() - factorised.num_parameters() == saved


def test_vectors_begin_as_large_as_those_of_a_whole_table():
    deviations = [
        make(TokenEmbedderConfig(rank=rank), LinearHeadConfig(), width=256)
        .embedder(torch.arange(256)[None], None)[0]
        .std()
        for rank in (None, 64)
    ]
    assert deviations[0].item() == pytest.approx(0.02 * 256**0.5, rel=0.02)
    assert deviations[1].item() == pytest.approx(deviations[0].item(), rel=0.1)


def test_a_rank_that_saves_nothing_names_the_key():
    (conflict,) = ModelConfig(width=256, embedder=TokenEmbedderConfig(rank=256)).check()
    assert conflict.key == "embedder.rank" and "64 would work" in conflict.message
