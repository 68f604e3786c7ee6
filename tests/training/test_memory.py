"""Freed memory stays in the process."""

import ctypes
import resource

import pytest
import torch

from stlm.training.memory import keep_freed_memory


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_the_kernel_clears_no_page_twice() -> None:
    """A large tensor that replaces a freed one touches no new page."""
    assert keep_freed_memory()

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.zeros(16 << 20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    faults()
    assert faults() < 100  # of 16,384 pages
