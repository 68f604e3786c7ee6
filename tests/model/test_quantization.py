"""Matrices as integers: the numbers by hand, and bounds of the rounding error."""

import pytest
import torch

from stlm.model.decoding.quantization import GROUP, Quantized, largest_level, round_to_nearest


def test_numbers_by_hand():
    """The largest entry of the tensor sets the largest step, 7 levels of 0.01; other steps are fractions of it."""
    weight = torch.tensor([[0.07, -0.035, 0.0, 0.014], [0.0, 0.0, 0.0, 0.0]])
    quantized = round_to_nearest(weight, 4)
    assert quantized.levels.tolist() == [[7, -4, 0, 1], [0, 0, 0, 0]]
    assert quantized.ratios.tolist() == [[255], [1]]
    assert quantized.unit * 255 == pytest.approx(0.01)
    torch.testing.assert_close(quantized.value(), torch.tensor([[0.07, -0.04, 0.0, 0.01], [0.0] * 4]))


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("shape", [(5, 130), (3, 4, 70), (2, 1)])
def test_every_entry_is_within_half_a_step(bits, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * torch.logspace(-4, 0, shape[-1])
    quantized = round_to_nearest(weight, bits)
    assert quantized.ratios.shape == (weight[..., 0].numel(), -(-shape[-1] // GROUP))
    steps_RC = (quantized.ratios.float() * quantized.unit).repeat_interleave(GROUP, 1)[:, : shape[-1]]
    error_RC = (quantized.value() - weight).flatten(0, -2).abs()
    assert (error_RC <= steps_RC * 0.5001).all()
    assert quantized.levels.abs().max() == largest_level(bits)


def test_a_zero_matrix_stays_zero():
    assert torch.equal(round_to_nearest(torch.zeros(3, 4), 6).value(), torch.zeros(3, 4))


def test_groups_have_steps_of_their_own():
    levels = torch.ones(1, GROUP + 1, dtype=torch.int8)
    value = Quantized(levels, torch.tensor([[1, 4]], dtype=torch.uint8), 0.5).value()
    assert value.tolist() == [[0.5] * GROUP + [2.0]]
    quantized = round_to_nearest(torch.tensor([[1.0] * GROUP + [0.01]]), 8)
    assert quantized.ratios.tolist() == [[255, 3]]  # 0.01 of 255 is 2.55
