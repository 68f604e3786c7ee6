"""RMSNorm with its own gradient, compared with torch's."""

import torch
import torch.nn.functional as F

from stlm.config import RMSNormConfig
from stlm.model.core.normalization import RMSNorm


def test_rms_norm_has_the_output_and_the_gradient_of_torch():
    torch.manual_seed(1)
    norm = RMSNorm(RMSNormConfig(), 24)
    norm.weight.data.uniform_(0.5, 2.0)
    x, dy = torch.randn(3, 5, 24), torch.randn(3, 5, 24)
    x[0, 0] = 0.0  # as at empty positions
    x.requires_grad_()
    expected = F.rms_norm(x, (24,), norm.weight, norm.eps)
    found = norm(x)
    torch.testing.assert_close(found, expected)
    given = x, norm.weight
    for own, theirs in zip(
        torch.autograd.grad(found, given, dy), torch.autograd.grad(expected, given, dy), strict=True
    ):
        torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), found)
