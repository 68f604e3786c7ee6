"""Paired significance tests between models, or groups of seeds, on the same items, corrected for multiple tests.

Accuracies, where every item counts 0, 1 or a share of a tie, are compared by McNemar's exact test (McNemar 1947) on the
items that only one of two models wins. Everything else is compared by the paired bootstrap (Efron and Tibshirani 1993,
section 16): bits per byte over documents, the rest over items, or over passages where several items come from one. All
p-values of a comparison are corrected together (Holm 1979).

Runs that differ only in their seed are a group. Groups are compared with each other, never the seeds of one group, by a
t-test whose variance is the sum of those of seeds and of items (Welch 1947; Satterthwaite 1946).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.extras import how_to_install
from stlm.errors import StlmError
from stlm.evals.comparison.seed_groups import Groups
from stlm.evals.measures import TAILS, Estimate, estimates
from stlm.evals.registry import DATA_TASKS, Task
from stlm.evals.report import table
from stlm.evals.subject import Subject

SIGNIFICANT = 0.05
_RESAMPLES = 10_000
_DRAWS_AT_A_TIME = 1 << 22


@dataclass(frozen=True)
class Sample:
    """One model's scores on the items of one task."""

    measure: str  # "bits_per_byte", where less is better, or a measure of choices
    sha256: str  # of the scored items
    ids: tuple[str, ...]
    totals_N: NDArray[np.float64]  # bits of each document, or the measure of each item
    units_N: NDArray[np.float64]  # bytes of each document, or 1
    clusters_N: NDArray[np.int64]  # items with the same number are not independent

    @classmethod
    def of(cls, values: Mapping[str, Any], items: Iterable[Mapping[str, Any]], measure: str) -> Sample | None:
        """Build a sample from a task's result and its items as written to a file; None without bits or `measure`."""
        items = list(items)
        if items and "nats" in items[0]:
            bits, size = np.array([(item["nats"] / math.log(2), item["bytes"]) for item in items], dtype=float).T
            names = [item["id"] for item in items]
            return cls("bits_per_byte", values["sha256"], tuple(names), bits, size, np.arange(len(items)))
        if not items or measure not in items[0]:
            return None
        _, clusters = np.unique([item.get("passage", item["id"]) for item in items], return_inverse=True)
        totals = np.array([item[measure] for item in items], dtype=float)
        return cls(
            measure, values["sha256"], tuple(item["id"] for item in items), totals, np.ones(len(items)), clusters
        )

    @property
    def value(self) -> float:
        """The mean over the items."""
        return float(self.totals_N.sum() / self.units_N.sum())

    @property
    def independent(self) -> bool:
        return len(np.unique(self.clusters_N)) == len(self.ids)

    def estimate(self) -> Estimate:
        """Return the mean with its bootstrap interval."""
        totals, units = (_by_cluster(values, self.clusters_N) for values in (self.totals_N, self.units_N))
        return estimates(totals[:, None], units)[0]


class Difference(NamedTuple):
    """The difference of the first of two models to the second."""

    value: float
    low: float  # bounds of the 95 % interval
    high: float
    p: float
    test: str


class Pair(NamedTuple):
    """Two groups of runs on one task; a single model is a group of its own."""

    task: str
    first: str
    second: str
    difference: Difference
    corrected_p: float


def difference(first: Sample, second: Sample) -> Difference:
    """Compare two samples of the same items by the paired test that fits the measure."""
    delta_N = first.totals_N - second.totals_N
    delta_C, units_C = (_by_cluster(values, first.clusters_N) for values in (delta_N, first.units_N))
    drawn_R = _resampled(delta_C, units_C)
    low, high = np.quantile(drawn_R, TAILS)
    value = float(delta_C.sum() / units_C.sum())
    if first.measure.startswith("accuracy") and first.independent:
        return Difference(value, float(low), float(high), mcnemar(delta_N), "McNemar")
    if len(delta_C) == 1:  # every resample equals the one item: there is no information about the spread
        return Difference(value, -math.inf, math.inf, 1.0, "none (1 item)")
    tail = min(int((drawn_R <= 0).sum()), int((drawn_R >= 0).sum()))
    p = min(1.0, 2 * (tail + 1) / (len(drawn_R) + 1))
    return Difference(value, float(low), float(high), p, "bootstrap")


def group_difference(first: Sequence[Sample], second: Sequence[Sample]) -> Difference:
    """Compare the means of two groups of runs, each run a sample of the same items.

    Two single runs are compared by `difference`, other groups by Student's t. The variance of the difference is the
    sum of each group's variance over seeds divided by its number of runs, and the variance over items of the mean
    difference. The degrees of freedom are Welch's and Satterthwaite's. A group of one run is assumed to have the
    other group's variance over seeds.
    """
    if len(first) == len(second) == 1:
        return difference(first[0], second[0])
    mean_first, mean_second = mean_sample(first), mean_sample(second)
    delta_C, units_C = (
        _by_cluster(values, mean_first.clusters_N)
        for values in (mean_first.totals_N - mean_second.totals_N, mean_first.units_N)
    )
    value = float(delta_C.sum() / units_C.sum())
    parts = _seed_variances(first, second)  # each with its degrees of freedom
    if (number := len(delta_C)) > 1:
        residual_C = delta_C - value * units_C
        parts.append((float((residual_C**2).sum() / units_C.sum() ** 2 * number / (number - 1)), number - 1))
    variance = sum(part for part, _ in parts)
    if variance == 0:
        return Difference(value, value, value, float(value == 0), "t of seeds, items")
    t = _scipy_stats().t
    freedom = variance**2 / sum(part**2 / free for part, free in parts)
    half = float(t.isf(0.025, freedom)) * math.sqrt(variance)
    p = 2 * float(t.sf(abs(value) / math.sqrt(variance), freedom))
    return Difference(value, value - half, value + half, p, "t of seeds, items")


def _seed_variances(first: Sequence[Sample], second: Sequence[Sample]) -> list[tuple[float, int]]:
    """Return the parts of the difference's variance that come from seeds, each with its degrees of freedom."""
    several = [group for group in (first, second) if len(group) > 1]
    variances = [float(np.var([sample.value for sample in group], ddof=1)) for group in several]
    if len(several) == 2:
        return [(var / len(group), len(group) - 1) for var, group in zip(variances, several, strict=True)]
    return [(variances[0] * (1 + 1 / len(several[0])), len(several[0]) - 1)]


def mean_sample(samples: Sequence[Sample]) -> Sample:
    """Return a sample in which each item has its mean over the runs of a group."""
    return replace(samples[0], totals_N=np.mean([sample.totals_N for sample in samples], axis=0))


def mcnemar(delta_N: NDArray[np.float64]) -> float:
    """Return the exact two-sided p-value of the items won and lost, if each were equally probable; ties are ignored."""
    won, lost = int((delta_N > 0).sum()), int((delta_N < 0).sum())
    return float(_scipy_stats().binomtest(won, won + lost).pvalue) if won + lost else 1.0


def _scipy_stats() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise StlmError(f"comparison needs scipy ({error}): {how_to_install('scipy')}") from error
    return stats


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the p-values corrected for multiple tests, in the same order (Holm 1979)."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def _by_cluster(values_N: NDArray[np.float64], clusters_N: NDArray[np.int64]) -> NDArray[np.float64]:
    return np.bincount(clusters_N, values_N).astype(np.float64)


def _resampled(delta_C: NDArray[np.float64], units_C: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return mean differences of bootstrap resamples of the clusters, from one fixed seed: [resamples]."""
    generator, number = np.random.default_rng(0), len(delta_C)
    size, parts = max(1, _DRAWS_AT_A_TIME // number), []
    for start in range(0, _RESAMPLES, size):
        drawn = generator.integers(number, size=(min(size, _RESAMPLES - start), number))
        parts.append(delta_C[drawn].sum(1) / np.maximum(units_C[drawn].sum(1), 1e-9))
    return np.concatenate(parts)


# ---------------------------------------------------------------------- several models


@dataclass(frozen=True)
class Comparison:
    """The scores of all models on all tasks, and the comparisons of each pair of groups."""

    samples: dict[str, dict[str, Sample]]  # task → model → its scores
    groups: Groups
    pairs: list[Pair]

    def measure(self, task: str) -> str:
        """Return the measure of a task."""
        return next(iter(self.samples[task].values())).measure

    def group_samples(self, task: str, group: str) -> list[Sample]:
        """Return the scores of each run of a group."""
        return [self.samples[task][model] for model in self.groups[group]]

    def best(self, task: str) -> str | None:
        """Return the group that is significantly better than every other one; None if there is none."""
        sign = -1 if self.measure(task) == "bits_per_byte" else 1
        for name in self.groups:
            own_pairs = [pair for pair in self.pairs if pair.task == task and name in (pair.first, pair.second)]
            if not own_pairs:  # a single group
                return None
            ahead = [sign * pair.difference.value * (1 if pair.first == name else -1) > 0 for pair in own_pairs]
            if all(ahead) and all(pair.corrected_p < SIGNIFICANT for pair in own_pairs):
                return name
        return None


def compare(samples: Mapping[str, Mapping[str, Sample]], groups: Groups | None = None) -> Comparison:
    """Compare models, each given as task → scores, on the tasks that all of them have.

    `groups`: runs that differ in their seed, by name (see `seed_groups`); if left out, each model is a group.

    Raises StlmError where they have no task in common, or where a task's items differ between models.
    """
    names = list(samples)
    tasks = [task for task in samples[names[0]] if all(task in samples[name] for name in names)]
    if not tasks:
        held = "; ".join(f"{name}: {', '.join(samples[name]) or 'none'}" for name in names)
        raise StlmError(f"the models have no task with items in common ({held}); choose some with --tasks")
    by_task = {task: {name: samples[name][task] for name in names} for task in tasks}
    for task, of in by_task.items():
        for name in names[1:]:
            _check_same_items(task, names[0], of[names[0]], name, of[name])
    groups = groups or {name: (name,) for name in names}
    found = []
    for task, of in by_task.items():
        for two in combinations(groups, 2):
            runs = ([of[model] for model in groups[group]] for group in two)
            found.append((task, *two, group_difference(*runs)))
    corrected = holm([one[-1].p for one in found])
    return Comparison(by_task, groups, [Pair(*one, p) for one, p in zip(found, corrected, strict=True)])


def _check_same_items(task: str, first: str, first_sample: Sample, second: str, second_sample: Sample) -> None:
    if first_sample.sha256 != second_sample.sha256:
        raise StlmError(
            f"{task}: {first} and {second} were scored on different items (sha256 {first_sample.sha256[:12]} and "
            f"{second_sample.sha256[:12]}); evaluate both on the same items, or choose other tasks with --tasks"
        )
    if first_sample.ids != second_sample.ids:
        differing = next(iter(set(first_sample.ids) ^ set(second_sample.ids)), "the order")
        raise StlmError(f"{task}: the items of {first} and {second} differ in {differing!r}; write both files again")


def evaluate_samples(model: str, tasks: Mapping[str, Task], data: str | None, measure: str) -> dict[str, Sample]:
    """Run tasks on a run, checkpoint or model, and return its scores on the tasks that have items.

    `data`: a folder of prepared data; None: that of the run.
    """
    subject = Subject.open(model, data, with_data=not tasks.keys().isdisjoint(DATA_TASKS))
    results = {name: task(subject) for name, task in tasks.items()}
    sampled = {
        name: Sample.of(one.values, (item.values() for item in one.items), measure) for name, one in results.items()
    }
    return {name: sample for name, sample in sampled.items() if sample is not None}


def read_samples(path: Path, measure: str) -> dict[str, Sample]:
    """Read the output of `evaluate.py --output FILE.json --items ITEMS.jsonl`.

    Raises StlmError where a file cannot be read or names no items.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        results, name = found["results"], found["items_file"]
        lines = [json.loads(line) for line in (path.parent / name).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StlmError(
            f"{path}: {_reason(error)}; expected a run, or the output of "
            "`python scripts/evaluate.py RUN --output FILE.json --items ITEMS.jsonl`"
        ) from None
    items: dict[str, list[dict[str, Any]]] = {task: [] for task in results}
    for line in lines:
        items.setdefault(line["task"], []).append(line)
    sampled = {task: Sample.of(values, items[task], measure) for task, values in results.items()}
    return {task: sample for task, sample in sampled.items() if sample is not None}


def _reason(error: Exception) -> str:
    match error:
        case FileNotFoundError():
            return f"there is no file {error.filename}"
        case OSError():
            return f"{error.filename} cannot be read ({error.strerror})"
        case KeyError():
            return f"it has no key {error}"
        case _:
            return f"not results in JSON ({error})"


# ---------------------------------------------------------------------- for people


def comparison_text(comparison: Comparison) -> str:
    """Return tables of the scores of groups, of each run where a group has several, and of the differences."""
    groups = comparison.groups
    rows = []
    for task in comparison.samples:
        best = comparison.best(task)
        cells = [score_text(comparison.group_samples(task, name)) + ("*" if name == best else " ") for name in groups]
        items = len(comparison.group_samples(task, next(iter(groups)))[0].ids)
        rows.append([task, comparison.measure(task), f"{items:,}", *cells])
    header = [name if len(runs) == 1 else f"{name} ({len(runs)} seeds)" for name, runs in groups.items()]
    parts = [table(rows, ["task", "measure", "items", *header], "llr" + "r" * len(groups))]
    notes = []
    if any(len(runs) == 1 for runs in groups.values()):
        notes.append("in parentheses: 95 % interval over items")
    if any(len(runs) > 1 for runs in groups.values()):
        notes.append("±: standard deviation over the seeds of a group")
    if comparison.pairs:
        notes.append(f"*: better than all others at p < {SIGNIFICANT}, corrected for {_tests(comparison)} (Holm)")
    parts[0] += "\n" + "\n".join(notes)
    if any(len(runs) > 1 for runs in groups.values()):
        of_runs = [
            [name, model, *(f"{of[model].value:.4f}" for of in comparison.samples.values())]
            for name, runs in groups.items() for model in runs
        ]  # fmt: skip
        parts.append(table(of_runs, ["group", "run", *comparison.samples], "ll" + "r" * len(comparison.samples)))
    if comparison.pairs:
        differences = [
            [pair.task, f"{pair.first} - {pair.second}", *map(_signed, pair.difference[:3]), pair.difference.test,
             f"{pair.difference.p:.2g}", f"{pair.corrected_p:.2g}"] for pair in comparison.pairs
        ]  # fmt: skip
        header = ["task", "models", "difference", "95 % from", "to", "test", "p", "p (Holm)"]
        parts.append(table(differences, header, "llrrrlrr"))
    return "\n\n".join(parts)


def _tests(comparison: Comparison) -> str:
    return "1 test" if len(comparison.pairs) == 1 else f"{len(comparison.pairs)} tests"


def score_text(runs: Sequence[Sample]) -> str:
    """Return the score of one run with its interval, or the mean and standard deviation of several."""
    if len(runs) > 1:
        values = [run.value for run in runs]
        return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"
    value, low, high = runs[0].estimate()
    if low is None or high is None:
        return f"{value:.4f}"
    return f"{value:.4f} ({low:.4f} to {high:.4f})"


def _signed(value: float) -> str:
    return f"{value:+.4f}" if math.isfinite(value) else "-"
