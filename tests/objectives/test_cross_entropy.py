"""Cross-entropy in chunks, compared with torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from stlm.objectives import cross_entropy as chunked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 7 * 3, 1 << 19])  # one row each, three rows with one left over, all rows
def test_value_and_gradient_are_those_of_torch(dtype, chunk, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    torch.manual_seed(0)
    logits = (3 * torch.randn(2, 5, 7)).to(dtype).requires_grad_()
    targets, weights = torch.randint(0, 7, (2, 5)), torch.rand(2, 5)
    found = chunked.cross_entropy(logits, targets)
    (gradient,) = torch.autograd.grad((weights * found).sum(), logits)
    expected = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view(2, 5)
    (expected_gradient,) = torch.autograd.grad((weights * expected).sum(), logits)
    assert found.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.allclose(gradient.float(), expected_gradient.float(), atol=1e-6, rtol=2**-8)
