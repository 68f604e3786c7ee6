"""A linear probe of a frozen model's vectors (Alain and Bengio 2016, arXiv 1610.01644).

Features are standardised to mean 0 and variance 1, and fitted by scikit-learn: logistic regression for classes, ridge
regression for scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stlm.evals.probing.glue import Example, GlueTask, labels_of
from stlm.evals.probing.protocol import MethodResult, Texts, inner_split, mean_score
from stlm.evals.probing.scores import require_sklearn
from stlm.stlm import STLM

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # inverse weights of the penalty: the first regularizes most
_MAX_ITERATIONS = 2000


class LinearProbe:
    """A linear probe on a frozen model: a `Method`. The vector of each text is computed once and kept."""

    def __init__(self, model: STLM) -> None:
        require_sklearn("--method linear")
        self.model = model
        self._vectors: dict[str, NDArray[np.float32]] = {}

    def __call__(self, task: GlueTask, train: Sequence[Example], dev: Sequence[Texts], seed: int) -> MethodResult:
        learned, held_back = inner_split(task, train, seed)
        features, truth_N = self._features([one.texts for one in held_back]), labels_of(held_back)
        best, strength = -np.inf, STRENGTHS[0]
        for candidate in STRENGTHS:
            found = mean_score(task, truth_N, self._fit(task, learned, candidate).predict(features))
            if found > best:
                best, strength = found, candidate
        predicted_N = self._fit(task, train, strength).predict(self._features(dev))
        return MethodResult(predicted_N, {"strength": strength, "validation": best})

    def is_cut(self, texts: Texts) -> bool:
        return any(len(self.model.tokenizer.encode(text)) > self.model.longest_text for text in texts)

    def _fit(self, task: GlueTask, examples: Sequence[Example], strength: float) -> Any:
        from sklearn.linear_model import LogisticRegression, Ridge
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

        logistic = LogisticRegression(C=strength, max_iter=_MAX_ITERATIONS)
        regression = Ridge(alpha=1 / strength) if task.classes is None else logistic
        probe = make_pipeline(StandardScaler(), regression)
        return probe.fit(self._features([one.texts for one in examples]), labels_of(examples))

    def _features(self, texts: Sequence[Texts]) -> NDArray[np.float32]:
        new = [text for text in dict.fromkeys(text for one in texts for text in one) if text not in self._vectors]
        self._vectors |= zip(new, self.model.embed(new), strict=True)
        return pair_features([np.stack([self._vectors[one[place]] for one in texts]) for place in range(len(texts[0]))])


def pair_features(vectors: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return the features of examples: for one text its vector u, [N, D]; for two texts u, v, |u - v| and u * v,
    [N, 4 D] (Conneau et al. 2017, arXiv 1705.02364, section 3.1)."""
    if len(vectors) == 1:
        return vectors[0]
    u_ND, v_ND = vectors
    return np.concatenate((u_ND, v_ND, np.abs(u_ND - v_ND), u_ND * v_ND), axis=1)
