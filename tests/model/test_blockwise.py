"""Blockwise attention, compared with a one-line definition of attention, forward and backward."""

from __future__ import annotations

import pytest
import torch

from stlm.model.core.attention import causal_attention
from stlm.model.core.blockwise import BLOCK, Visibility, blockwise_attention

DOCUMENTS = torch.tensor([[0] * 30 + [1] * 90 + [2] * 30, [0] * 150])
KINDS = {
    "causal": Visibility(),
    "window": Visibility(window=20),
    "documents": Visibility(documents_BT=DOCUMENTS),
    "slopes": Visibility(slopes_N=torch.tensor([0.5, 0.25, 0.1, 0.0], dtype=torch.float64)),
    "cap": Visibility(cap=3.0),
    "all": Visibility(70, DOCUMENTS, torch.tensor([0.5, 0.25, 0.1, 0.0], dtype=torch.float64), 2.0),
}


def by_definition(q_BNTK, k_BMTK, v_BMTK, seen):
    groups, position = q_BNTK.size(1) // k_BMTK.size(1), torch.arange(q_BNTK.size(2))
    distance = position[:, None] - position
    scores = q_BNTK @ k_BMTK.repeat_interleave(groups, 1).mT / q_BNTK.size(3) ** 0.5
    if seen.cap is not None:
        scores = seen.cap * torch.tanh(scores / seen.cap)
    if seen.slopes_N is not None:
        scores = scores - seen.slopes_N[:, None, None] * distance
    hidden = (distance < 0) | (distance >= (seen.window or len(position)))
    if seen.documents_BT is not None:
        hidden = (hidden | (seen.documents_BT[:, :, None] != seen.documents_BT[:, None]))[:, None]
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v_BMTK.repeat_interleave(groups, 1)


def inputs(heads, kv_heads, length, dtype=torch.float64):
    torch.manual_seed(1)
    shapes = [(2, count, length, 8) for count in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, dtype=dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("seen", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_value_and_gradient(seen, kv_heads):
    tensors = inputs(4, kv_heads, 150)
    assert 2 * BLOCK < 150 < 3 * BLOCK, "the length has whole blocks, and one that is cut off"
    weight = torch.randn(2, 4, 150, 8, dtype=torch.float64)
    found, expected = blockwise_attention(*tensors, seen), by_definition(*tensors, seen)
    assert torch.allclose(found, expected, atol=1e-12)
    with torch.no_grad():
        assert torch.equal(found, blockwise_attention(*tensors, seen))
    for ours, theirs in zip(
        torch.autograd.grad(found, tensors, weight), torch.autograd.grad(expected, tensors, weight), strict=True
    ):
        assert torch.allclose(ours, theirs, atol=1e-12)


@pytest.mark.parametrize("length", [1, BLOCK, BLOCK + 1])
def test_lengths_near_the_block_size(length):
    tensors = inputs(2, 2, length)
    assert torch.allclose(blockwise_attention(*tensors, Visibility()), by_definition(*tensors, Visibility()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seen", KINDS.values(), ids=KINDS)
def test_later_positions_change_nothing(seen, dtype):
    """Bit-equal, with either kernel."""
    slopes = None if seen.slopes_N is None else seen.slopes_N.to(dtype)
    tensors = [tensor.detach() for tensor in inputs(4, 2, 150, dtype)]
    before = causal_attention(*tensors, seen._replace(slopes_N=slopes))
    changed = [torch.cat((tensor[:, :, :101], 5 * tensor[:, :, 101:]), 2) for tensor in tensors]
    after = causal_attention(*changed, seen._replace(slopes_N=slopes))
    assert torch.equal(before[:, :, :101], after[:, :, :101]) and not torch.equal(before, after)
