"""The protocol that all methods of learning on top of a model follow, and its scores.

All settings are chosen on a held-back part of `train` (nested validation). A method gets the texts of `dev` without
their labels and predicts them once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline.plurals import number_of
from stlm.errors import StlmError
from stlm.evals.items.reading import json_sha256
from stlm.evals.measures import statistic_estimate
from stlm.evals.probing.glue import PREFIX, Example, GlueData, GlueTask, labels_of
from stlm.evals.probing.scores import SCORES

HELD_BACK = 0.2  # share of the training examples that settings are chosen on
_FEWEST = 5  # examples of a class at least, so that one of them can be held back

Texts = tuple[str, ...]


class MethodResult(NamedTuple):
    """A method's predictions for `dev`, and the settings it chose."""

    predicted_N: NDArray[np.float64]
    chosen: dict[str, Any]  # settings, and the score on the held-back examples: "validation"


@dataclass(frozen=True)
class ProbeOptions:
    """The user's options for probing. Raises StlmError where a number is out of range."""

    seeds: int = 3  # number of repetitions, with seeds 0, 1, …
    max_train_examples: int | None = None  # drawn by each seed, where there are more

    def __post_init__(self) -> None:
        for option, value in (("--seeds", self.seeds), ("--max-train-examples", self.max_train_examples)):
            if value is not None and value < 1:
                raise StlmError(f"{option}: got {value}, expected 1 or more")


class Method(Protocol):
    """A method of learning a task."""

    def __call__(self, task: GlueTask, train: Sequence[Example], dev: Sequence[Texts], seed: int) -> MethodResult:
        """Learn from `train`, and predict the label of each example of `dev`."""
        ...

    def is_cut(self, texts: Texts) -> bool:
        """Return whether the texts of an example are cut because the model's context is too short."""
        ...


def probe(data: GlueData, method: Method, options: ProbeOptions) -> dict[str, Any]:
    """Learn a task with every seed, score each on `dev`, and return every measure's mean, spread and interval, and its
    majority baseline. Raises StlmError where there are too few examples to learn from.
    """
    task, truth_N = data.task, labels_of(data.dev)
    learned, draws = [], []
    for seed in range(options.seeds):
        train = training_examples(data, options.max_train_examples, seed)
        found = method(task, train, [one.texts for one in data.dev], seed)
        learned.append(found.predicted_N)
        cut = sum(method.is_cut(one.texts) for one in train)
        draws.append({"seed": seed, **found.chosen, "train_cut": cut, "train_sha256": json_sha256(train)})
    return {
        "train_examples": len(train),
        "train_available": len(data.train),
        "dev_examples": len(data.dev),
        "dev_in_train": data.overlap,
        "dev_cut": sum(method.is_cut(one.texts) for one in data.dev),
        "measures": {name: summarize_scores(name, truth_N, learned, data.train) for name in task.measures},
        "draws": draws,
        "dev_sha256": json_sha256(data.dev),
        **{f"{part}_file_sha256": digest for part, digest in data.file_sha256.items()},
    }


def training_examples(data: GlueData, limit: int | None, seed: int) -> list[Example]:
    """Return the examples to learn from, in the order of the file: all, or `limit` of them, drawn by the seed."""
    train = data.train
    if limit is not None and limit < len(train):
        kept = np.sort(np.random.default_rng(seed).permutation(len(train))[:limit])
        train = [train[place] for place in kept]
    counts = Counter("a score" if data.task.classes is None else f"label {one.label:g}" for one in train)
    what, fewest = min(counts.items(), key=lambda item: item[1])
    if len({one.label for one in train}) < 2 or fewest < _FEWEST:
        raise StlmError(
            f"{PREFIX}{data.name}.train: of {number_of(len(train), 'training example')}, {fewest} have {what}; "
            f"expected two labels or more, and {_FEWEST} or more examples of each, because some are held back for "
            "choosing settings; raise --max-train-examples, or add examples"
        )
    return train


def inner_split(task: GlueTask, train: Sequence[Example], seed: int) -> tuple[list[Example], list[Example]]:
    """Split `train` into examples to learn from and held-back ones, stratified by class."""
    from sklearn.model_selection import train_test_split

    classes = labels_of(train) if task.classes else None
    size = max(round(HELD_BACK * len(train)), task.classes or 2)
    learned, held_back = train_test_split(list(train), test_size=size, random_state=seed, stratify=classes)
    return learned, held_back


def mean_score(task: GlueTask, truth_N: NDArray[np.float64], predicted_N: NDArray[np.float64]) -> float:
    """Return the mean of a task's measures, by which settings are chosen."""
    return float(np.mean([SCORES[name](truth_N, predicted_N) for name in task.measures]))


def summarize_scores(
    name: str, truth_N: NDArray[np.float64], predictions: Sequence[NDArray[np.float64]], train: Sequence[Example]
) -> dict[str, Any]:
    """Return one measure's mean over seeds, 95 % bootstrap interval over examples, standard deviation over seeds (None
    for one seed), and value if every example gets the commonest label of `train`."""
    score = SCORES[name]
    of_seeds = [score(truth_N, predicted_N) for predicted_N in predictions]
    estimate = statistic_estimate(
        lambda places: float(np.mean([score(truth_N[places], predicted_N[places]) for predicted_N in predictions])),
        len(truth_N),
    )
    return {
        **estimate._asdict(),
        "std": float(np.std(of_seeds, ddof=1)) if len(of_seeds) > 1 else None,
        "seeds": of_seeds,
        "majority": score(truth_N, np.full(len(truth_N), majority_label(train))),
    }


def majority_label(train: Sequence[Example]) -> float:
    """Return the commonest label, the smallest in a tie. Where labels are scores, any constant would do: its
    correlation is 0."""
    labels, counts = np.unique(labels_of(train), return_counts=True)
    return float(labels[counts.argmax()])
