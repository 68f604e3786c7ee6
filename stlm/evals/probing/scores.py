"""The measures of GLUE (arXiv 1804.07461) for predicted labels, by scikit-learn and scipy.

Each takes truths and predictions, both [items], and returns 1 where they are equal. Constant predictions have a
correlation of 0.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from data_pipeline.extras import how_to_install
from stlm.errors import StlmError

Labels = NDArray[np.float64]


def matthews(truth_N: Labels, predicted_N: Labels) -> float:
    """Return Matthews' correlation of two or more classes (Matthews 1975): -1 to 1, 0 for guessing."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(truth_N, predicted_N)) if _vary(truth_N, predicted_N) else 0.0


def accuracy(truth_N: Labels, predicted_N: Labels) -> float:
    """Return the share of correct predictions."""
    return float(np.mean(truth_N == predicted_N))


def f1(truth_N: Labels, predicted_N: Labels) -> float:
    """Return F1 of label 1, the harmonic mean of precision and recall; 0 where it is neither predicted nor true."""
    from sklearn.metrics import f1_score

    return float(f1_score(truth_N, predicted_N, pos_label=1, zero_division=0.0))


def pearson(truth_N: Labels, predicted_N: Labels) -> float:
    """Return the linear correlation: -1 to 1."""
    from scipy.stats import pearsonr

    return float(pearsonr(truth_N, predicted_N).statistic) if _vary(truth_N, predicted_N) else 0.0


def spearman(truth_N: Labels, predicted_N: Labels) -> float:
    """Return the rank correlation, with ties sharing their mean rank: -1 to 1."""
    from scipy.stats import spearmanr

    return float(spearmanr(truth_N, predicted_N).statistic) if _vary(truth_N, predicted_N) else 0.0


SCORES: dict[str, Callable[[Labels, Labels], float]] = {
    score.__name__: score for score in (matthews, accuracy, f1, pearson, spearman)
}


def require_sklearn(what: str) -> None:
    """Raise StlmError where scikit-learn or scipy is not installed."""
    try:
        import scipy  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        raise StlmError(f"{what}: {error}: {how_to_install('scikit-learn', 'scipy')}") from None


def _vary(*values_N: Labels) -> bool:
    return all(np.ptp(values) > 0 for values in values_N)
