"""Every measure against numbers worked out on paper."""

import math

import numpy as np
import pytest

from stlm.evals.measures import calibration_error, credit, estimates, measures_of


@pytest.mark.parametrize(
    ("scores", "expected"),
    [((-1.0, -2.0), 1.0), ((-2.0, -1.0), 0.0), ((-1.0, -1.0), 0.5), ((-3.0, -3.0, -3.0), 1 / 3), ((-3.0, -1, -1), 0.0)],
)
def test_ties_are_shared_equally(scores, expected):
    assert credit(scores, 0) == pytest.approx(expected)


def test_a_tie_is_a_tie_within_rounding():
    assert credit((-100.00001, -100.0), 0) == 0.5
    assert credit((-100.01, -100.0), 0) == 0.0


def test_measures_of_an_item_by_hand():
    # The truth has probability 1/8 and 4 bytes, the others 1/4 and 2 bytes, 1/8 and 3 bytes.
    nats = [math.log(1 / 4), math.log(1 / 8), math.log(1 / 8)]
    found = measures_of(nats, [2, 4, 3], answer=1)
    assert found.accuracy == 0  # 1/4 is more
    assert found.accuracy_per_byte == 1  # bits per byte: 2/2 = 1, 3/4, 3/3 = 1
    assert found.truth_probability == pytest.approx((1 / 8) / (1 / 4 + 1 / 8 + 1 / 8))


def test_probabilities_too_small_for_floats_are_still_shared_out():
    assert measures_of([-2000.0, -2000.0 + math.log(3)], [1, 1], 1).truth_probability == pytest.approx(3 / 4)


def test_the_bootstrap_interval_of_a_share():
    # Of 400 coins 100 are heads: the standard error is sqrt(.25 * .75 / 400) = 0.02165, and 1.96 of it 0.0424.
    values = np.repeat([1.0, 0.0], [100, 300])[:, None]
    (found,) = estimates(values)
    assert found.value == 0.25
    assert found.low == pytest.approx(0.25 - 0.0424, abs=0.006)
    assert found.high == pytest.approx(0.25 + 0.0424, abs=0.006)
    assert estimates(values) == [found]


def test_a_ratio_weighs_items_by_their_units_and_one_item_has_no_interval():
    found = estimates(np.array([[6.0], [1.0]]), np.array([3.0, 1.0]))[0]
    assert found.value == 7 / 4
    assert (found.low, found.high) == (1.0, 2.0)  # either of the two alone
    assert estimates(np.array([[6.0]]), np.array([3.0])) == [(2.0, None, None)]


def test_calibration_by_hand():
    # Two bins of two: 0.9 and 0.7 are sure, one of them right; 0.2 and 0.4 are not, none right.
    found = calibration_error([0.9, 0.7, 0.2, 0.4], [1, 0, 0, 0], bins=2)
    assert found == pytest.approx(0.5 * abs(0.8 - 0.5) + 0.5 * abs(0.3 - 0))
    assert calibration_error([1.0, 1.0], [1, 0]) == 0.5
    assert calibration_error([0.5, 0.5], [1, 0]) == 0


def test_overconfidence_and_underconfidence_do_not_cancel():
    # 0.6 and 0.8 are both right, 0.7 against 1; 0.2 and 0.4 are both wrong, 0.3 against 0.
    assert calibration_error([0.6, 0.8, 0.2, 0.4], [1, 1, 0, 0], bins=2) == pytest.approx(0.3)


def test_calibration_has_fifteen_bins():
    # 9/15 = 0.6 and 10/15 = 0.667 are edges: 0.61 and 0.66 share a bin, 0.65 and 0.68 do not.
    assert calibration_error([0.61, 0.66], [1, 0]) == pytest.approx((0.61 + 0.66 - 1) / 2)
    assert calibration_error([0.65, 0.68], [1, 0]) == pytest.approx((0.35 + 0.68) / 2)
