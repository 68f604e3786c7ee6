"""The order of windows: one permutation per epoch, independent of how it is divided into requests."""

from __future__ import annotations

import numpy as np
import pytest

from data_pipeline.loading.order import window_at


@pytest.mark.parametrize("num_windows", [1, 2, 3, 4, 5, 7, 16, 97, 1000, 4099])
@pytest.mark.parametrize("seed", [0, 1, 2**63 + 5, -3])
def test_every_epoch_visits_every_window_once(num_windows, seed):
    positions = np.arange(3 * num_windows)
    epochs = window_at(positions, num_windows, seed).reshape(3, num_windows)
    assert np.array_equal(np.sort(epochs, axis=1), np.tile(np.arange(num_windows), (3, 1)))
    one_by_one = [int(window_at(int(position), num_windows, seed)) for position in positions[:50]]
    assert one_by_one == epochs.reshape(-1)[:50].tolist()


def test_epochs_and_seeds_differ_and_nothing_stays_in_line():
    n = 5000
    first, second = window_at(np.arange(2 * n), n, seed=1).reshape(2, n)
    other = window_at(np.arange(n), n, seed=2)
    for a, b in ((first, second), (first, other), (first, np.arange(n)), (first[1:], first[:-1] + 1)):
        assert (a == b).sum() < 15  # about one coincidence is expected
    assert abs(np.corrcoef(first[:-1], first[1:])[0, 1]) < 0.06


def test_all_orders_of_three_windows_are_equally_likely():
    n, epochs = 3, 6000
    orders = window_at(np.arange(n * epochs), n, seed=7).reshape(epochs, n)
    counts = np.unique(orders @ [9, 3, 1], return_counts=True)[1]
    assert len(counts) == 6
    assert ((counts - 1000) ** 2 / 1000).sum() < 25  # chi-squared, 5 degrees of freedom: passed by chance in 1 of 7000


def test_the_order_is_the_one_that_runs_have_used():
    """Changing it would give every resumed run different data."""
    assert window_at(np.arange(8), 10, seed=1).tolist() == [5, 1, 4, 0, 2, 9, 3, 6]
    far = window_at([10**17, 10**12 - 1], 10**12, seed=3)
    assert far.dtype == np.int64
    assert far.tolist() == [974920135783, 650972420488]


def test_invalid_arguments_are_refused():
    with pytest.raises(ValueError, match="num_windows"):
        window_at(0, 0, 1)
    with pytest.raises(ValueError, match="negative"):
        window_at([3, -1], 10, 1)
