"""Positions: rotary, learned, linear biases."""

import pytest
import torch

from stlm.config import ALiBiConfig, GroupedQueryConfig, LearnedPositionsConfig, RoPEConfig
from stlm.errors import ConfigError
from stlm.model.core.positions import (
    ALiBi,
    LearnedPositions,
    RoPE,
    RotaryTable,
    begin_of_document,
    rotary_table,
    rotate,
)


def test_rotary_scores_depend_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(query_position, key_position):
        tables = [rotary_table(p, 1, 16, 10_000.0, q.device) for p in (query_position, key_position)]
        return (rotate(q, tables[0]) * rotate(k, tables[1])).sum()

    torch.testing.assert_close(score(7, 3), score(107, 103), atol=1e-5, rtol=1e-4)
    assert abs(score(7, 3) - score(8, 3)) > 1e-3
    assert torch.equal(rotate(q, rotary_table(0, 1, 16, 10_000.0, q.device)), q)


def test_a_fraction_of_a_head_is_turned_as_a_head_of_that_width():
    """Wavelengths are those of the rotated width, not those of the first part of a whole head (as in GPT-NeoX)."""
    rope = RoPE(RoPEConfig(fraction=0.25, theta=100.0), GroupedQueryConfig(num_heads=2), 32, None)
    table = rope.placement(3, 5, torch.device("cpu")).rotary
    x = torch.randn(1, 2, 5, 16)
    turned = rotate(x, table)
    assert torch.equal(turned[..., 4:], x[..., 4:])
    assert torch.equal(turned[..., :4], rotate(x[..., :4], rotary_table(3, 5, 4, 100.0, x.device)))


def test_slopes_of_eight_heads_match_the_paper():
    slopes = (
        ALiBi(ALiBiConfig(), GroupedQueryConfig(num_heads=8), 32, None).placement(0, 1, torch.device("cpu")).slopes_N
    )
    assert slopes.tolist() == [2.0**-n for n in range(1, 9)]


def test_learned_positions_count_from_the_start_of_each_document():
    positions = LearnedPositions(LearnedPositionsConfig(), GroupedQueryConfig(), 8, 6)
    documents = torch.tensor([[4, 4, 7, 7, 7, -1], [0, 0, 0, 0, 0, 0]])
    assert begin_of_document(documents).tolist() == [[0, 0, 2, 2, 2, 5], [0] * 6]
    x = torch.zeros(2, 6, 8)
    rows = [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]
    assert torch.equal(positions.enter(x, 0, documents), positions.table.weight[torch.tensor(rows)])
    assert torch.equal(positions.enter(x[:, :2], 4, None)[0], positions.table.weight[4:])
    with pytest.raises(ConfigError, match=r"'learned' and a text of 7 positions, expected at most the 6"):
        positions.enter(x, 1, None)


def test_the_gradient_of_a_rotation_is_the_rotation_back():
    """Without gradients, the same rotation is computed by other operations."""
    table = rotary_table(3, 5, 16, 100.0, torch.device("cpu"))
    x, dy = torch.randn(2, 1, 5, 16, requires_grad=True), torch.randn(2, 1, 5, 16)
    turned = rotate(x, table)
    with torch.no_grad():
        torch.testing.assert_close(rotate(x, table), turned)
        torch.testing.assert_close(rotate(turned, RotaryTable(table.cosine, -table.sine)), x)
    (dx,) = torch.autograd.grad(turned, x, dy)
    torch.testing.assert_close(dx, rotate(dy, RotaryTable(table.cosine, -table.sine)))
