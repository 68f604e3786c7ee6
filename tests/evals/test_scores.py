"""Scores of predictions, against numbers worked out on paper."""

import numpy as np
import pytest

from stlm.evals.measures import statistic_estimate
from stlm.evals.probing.scores import SCORES, accuracy, f1, matthews, pearson, spearman


def labels(*values):
    return np.array(values, float)


def test_two_classes_on_paper():
    truth, predicted = labels(1, 1, 0, 0), labels(1, 1, 1, 0)  # 2 true positives, 1 false one, 1 true negative
    assert matthews(truth, predicted) == pytest.approx((2 * 1 - 1 * 0) / (3 * 2 * 2 * 1) ** 0.5)
    assert f1(truth, predicted) == pytest.approx(2 * (2 / 3) * 1 / (2 / 3 + 1))
    assert f1(1 - truth, 1 - predicted) == pytest.approx(2 * 1 * (1 / 2) / (1 + 1 / 2))  # of the other label
    assert accuracy(truth, predicted) == 3 / 4
    assert matthews(truth, 1 - truth) == -1


def test_correlations_on_paper():
    # Ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4: less 2.5 each, products 2.25 + 2.25, squares 4.5 and 5.
    assert spearman(labels(1, 2, 2, 9), labels(0.1, 0.3, 0.2, 0.4)) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert pearson(labels(0, 1, 2), labels(0, 2, 1)) == pytest.approx(1 / 2)
    assert spearman(labels(1, 2, 3), labels(1, 10, 100)) == pytest.approx(1)
    assert pearson(labels(1, 2, 3), labels(1, 10, 100)) < 0.95


@pytest.mark.parametrize("constant", [0, 1])
def test_constant_predictions_have_no_correlation(constant):
    truth, same = labels(1, 0, 1, 1), np.full(4, float(constant))
    assert matthews(truth, same) == pearson(truth, same) == spearman(truth, same) == 0
    assert f1(truth, same) == pytest.approx(constant * 2 * (3 / 4) / (3 / 4 + 1))


@pytest.mark.parametrize("name", SCORES)
def test_correct_predictions_score_one(name):
    assert SCORES[name](labels(1, 0, 1, 0), labels(1, 0, 1, 0)) == pytest.approx(1)


def test_intervals_resample_items():
    truth = np.arange(400.0)
    noise = np.random.default_rng(1).normal(0, 400, 400)
    found = statistic_estimate(lambda places: pearson(truth[places], (truth + noise)[places]), 400)
    assert found.value == pearson(truth, truth + noise)
    # Fisher's transformation (1915): atanh r is normal with a standard deviation of 1 / sqrt(N - 3).
    expected = np.tanh(np.arctanh(found.value) + np.array([-1.96, 1.96]) / 397**0.5)
    np.testing.assert_allclose([found.low, found.high], expected, atol=0.02)
    assert statistic_estimate(lambda places: 1.0, 1) == (1.0, None, None)
