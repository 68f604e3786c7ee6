"""Measures of choices from their likelihoods, with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

_RESAMPLES = 1000
CALIBRATION_BINS = 15
TAILS = (0.025, 0.975)  # of a 95 % interval
_ROUNDING = 1e-6  # relative: scores closer than this are tied


class Measures(NamedTuple):
    """The measures of one item, each between 0 and 1."""

    accuracy: float  # whether the truth is the most probable choice
    accuracy_per_byte: float  # the same by log-probability per byte; the space before a choice is not counted
    truth_probability: float  # of the truth, given that it is one of the choices


class Estimate(NamedTuple):
    """A mean and its 95 % bootstrap interval, which is None for a single item."""

    value: float
    low: float | None
    high: float | None


def measures_of(log_probabilities: Sequence[float], num_bytes: Sequence[int], answer: int) -> Measures:
    """Return the measures of an item from the log-probabilities (nats) and lengths of its choices."""
    per_byte = [nats / length for nats, length in zip(log_probabilities, num_bytes, strict=True)]
    largest = max(log_probabilities)
    weights = [math.exp(nats - largest) for nats in log_probabilities]
    return Measures(credit(log_probabilities, answer), credit(per_byte, answer), weights[answer] / sum(weights))


def credit(scores: Sequence[float], answer: int) -> float:
    """Return 1 if the truth has the highest score, 1/k if k choices share the highest score with it, else 0.

    This is the expected accuracy of drawing one of the best choices at random.
    """
    best = max(scores)
    tied = [best - score <= _ROUNDING * max(1.0, abs(best)) for score in scores]
    return tied[answer] / sum(tied)


def estimates(totals_NM: NDArray[np.float64], units_N: NDArray[np.float64] | None = None) -> list[Estimate]:
    """Estimate the mean of each column of [N items, M measures] by the percentile bootstrap over items (Efron 1979).

    `units_N`: denominator of each item, such as bytes where totals are bits; 1 if left out. All columns are resampled
    together, from one fixed seed: the same items give the same interval.
    """
    units_N = np.ones(len(totals_NM)) if units_N is None else units_N
    value_M = totals_NM.sum(0) / units_N.sum()
    if len(totals_NM) < 2:
        return [Estimate(float(value), None, None) for value in value_M]
    resampled_RM = _resampled(np.column_stack((totals_NM, units_N)))
    resampled_RM = resampled_RM[resampled_RM[:, -1] > 0]  # drop resamples that hold only documents without text
    low_M, high_M = np.quantile(resampled_RM[:, :-1] / resampled_RM[:, -1:], TAILS, axis=0)
    return [Estimate(*map(float, row)) for row in zip(value_M, low_M, high_M, strict=True)]


def statistic_estimate(statistic: Callable[[NDArray[np.int64]], float], number: int) -> Estimate:
    """Estimate a statistic that is not a mean, such as a correlation: `statistic` maps indices of items to its value.

    The interval is the percentile bootstrap of `estimates`.
    """
    value = statistic(np.arange(number))
    if number < 2:
        return Estimate(value, None, None)
    generator = np.random.default_rng(0)
    drawn_R = [statistic(generator.integers(number, size=number)) for _ in range(_RESAMPLES)]
    return Estimate(value, *map(float, np.quantile(drawn_R, TAILS)))


def confidence_bins(confidence_N: NDArray[np.floating[Any]], bins: int = CALIBRATION_BINS) -> NDArray[np.int64]:
    """Return the bin of each confidence, of `bins` bins of equal width."""
    return np.minimum((confidence_N * bins).astype(int), bins - 1)


def calibration_error(
    confidence: Sequence[float] | NDArray[Any], correct: Sequence[float] | NDArray[Any], bins: int = CALIBRATION_BINS
) -> float:
    """Return the expected calibration error (Guo et al. 2017, arXiv 1706.04599, section 2): the mean difference between
    confidence and accuracy over bins of equal width, weighted by their counts. 0 is perfect, 1 the worst."""
    confidence_N, correct_N = np.asarray(confidence, float), np.asarray(correct, float)
    gap_B = np.bincount(confidence_bins(confidence_N, bins), confidence_N - correct_N, bins)
    return float(np.abs(gap_B).sum() / len(confidence_N))


def _resampled(totals_NM: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return sums over N items drawn with replacement, one row for each resample: [resamples, M]."""
    generator = np.random.default_rng(0)
    number = len(totals_NM)
    draws = (generator.integers(number, size=number) for _ in range(_RESAMPLES))
    return np.array([np.bincount(drawn, minlength=number) @ totals_NM for drawn in draws])
