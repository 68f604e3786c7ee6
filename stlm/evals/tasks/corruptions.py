"""Corruptions: the fraction of passages whose true continuation scores above each of thirteen corruptions of it.

The task needs only held-out text, and its scores rise long before those of knowledge tasks: a model tells shuffled
characters from text within a few training steps, replaced words much later, shuffled sentences perhaps never.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from stlm.errors import StlmError
from stlm.evals.items.reading import Item
from stlm.evals.likelihood import Likelihood, log_likelihoods
from stlm.evals.measures import Measures, estimates
from stlm.evals.sharding import WHOLE, EvalShard
from stlm.evals.tasks.choices import ChoiceTask, ScoredItem, fingerprint, rows_of, scored_item, summary
from stlm.stlm import STLM

NUM_PASSAGES = 100
_CANDIDATES = 2000  # passages to draw from: the first ones of the text
_CONTEXT_WORDS = 20  # of a context, at least, in whole sentences
_WORDS = 25  # of a continuation, at least: three runs of up to twelve words to shuffle
_RATE = 0.15  # of the characters or words that are deleted, inserted or replaced
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


class Passage(NamedTuple):
    """Text from one document, with single spaces for all white space."""

    context: str
    sentences: tuple[str, ...]  # what follows: two or more

    @property
    def continuation(self) -> str:
        return " ".join(self.sentences)


Corrupt = Callable[[Passage, random.Random, Sequence[str]], str]  # the last: words of all passages, with repetitions


def _shuffled(units: Sequence[str], between: str, rng: random.Random) -> str:
    return between.join(rng.sample(units, len(units)))


def _ngram_shuffle(n: int) -> Corrupt:
    def corrupt(passage: Passage, rng: random.Random, words: Sequence[str]) -> str:
        own = passage.continuation.split()
        return _shuffled([" ".join(own[start : start + n]) for start in range(0, len(own), n)], " ", rng)

    return corrupt


def _random_indices(number: int, rng: random.Random) -> set[int]:
    return set(rng.sample(range(number), max(1, round(_RATE * number))))


def _deletion(units: Sequence[str], between: str, rng: random.Random) -> str:
    deleted = _random_indices(len(units), rng)
    return between.join(unit for place, unit in enumerate(units) if place not in deleted)


def _insertion(units: Sequence[str], between: str, others: Sequence[str], rng: random.Random) -> str:
    chosen = _random_indices(len(units), rng)
    return between.join(
        between.join((rng.choice(others), unit)) if place in chosen else unit for place, unit in enumerate(units)
    )


def _substitution(units: Sequence[str], between: str, others: Sequence[str], rng: random.Random) -> str:
    chosen = _random_indices(len(units), rng)
    return between.join(rng.choice(others) if place in chosen else unit for place, unit in enumerate(units))


# Characters rather than bytes, so that every corruption is text. Inserted and replacing characters are drawn from the
# passage itself, words from all passages, so that their frequencies are those of the text.
CORRUPTIONS: dict[str, Corrupt] = {
    "character_shuffle": lambda passage, rng, words: _shuffled(list(passage.continuation), "", rng),
    "word_shuffle": _ngram_shuffle(1),
    "3_gram_shuffle": _ngram_shuffle(3),
    "5_gram_shuffle": _ngram_shuffle(5),
    "7_gram_shuffle": _ngram_shuffle(7),
    "12_gram_shuffle": _ngram_shuffle(12),
    "character_deletion": lambda passage, rng, words: _deletion(passage.continuation, "", rng),
    "character_insertion": lambda passage, rng, words: _insertion(passage.continuation, "", passage.continuation, rng),
    "character_substitution": lambda passage, rng, words: _substitution(
        passage.continuation, "", passage.continuation, rng
    ),
    "word_deletion": lambda passage, rng, words: _deletion(passage.continuation.split(), " ", rng),
    "word_insertion": lambda passage, rng, words: _insertion(passage.continuation.split(), " ", words, rng),
    "word_substitution": lambda passage, rng, words: _substitution(passage.continuation.split(), " ", words, rng),
    "sentence_shuffle": lambda passage, rng, words: _shuffled(passage.sentences, " ", rng),
}


def passages_of(documents: Iterable[str]) -> Iterator[Passage]:
    """Yield passages of the documents, each a context and two or more sentences after it; passages do not overlap."""
    for document in documents:
        context: list[str] = []
        following: list[str] = []
        for sentence in filter(None, _SENTENCE_END.split(document.strip())):
            sentence = " ".join(sentence.split())
            if _num_words(context) < _CONTEXT_WORDS:
                context.append(sentence)
                continue
            following.append(sentence)
            if len(following) > 1 and _num_words(following) >= _WORDS:
                yield Passage(" ".join(context), tuple(following))
                context, following = [], []


def _num_words(sentences: Iterable[str]) -> int:
    return sum(len(sentence.split()) for sentence in sentences)


def corruption_items(documents: Iterable[str], num_passages: int = NUM_PASSAGES, seed: int = 0) -> list[Item]:
    """Return items of fourteen choices: the truth, then its corruptions in their order, all different from it.

    Raises StlmError if the documents hold no passage.
    """
    candidates = []
    for passage in passages_of(documents):
        candidates.append(passage)
        if len(candidates) == _CANDIDATES:
            break
    if not candidates:
        raise StlmError(
            f"corruptions: no document of the validation text has {_CONTEXT_WORDS} words followed by two sentences of "
            f"{_WORDS} words; choose other prepared data with --data"
        )
    rng = random.Random(seed)
    passages = rng.sample(candidates, min(num_passages, len(candidates)))
    words = [word for passage in passages for word in passage.continuation.split()]
    items = []
    for number, passage in enumerate(passages):
        found = [_try_corruption(corrupt, passage, rng, words) for corrupt in CORRUPTIONS.values()]
        corrupted = tuple(text for text in found if text is not None)
        if len(corrupted) == len(CORRUPTIONS):  # text that repeats itself may not change when shuffled
            items.append(Item(f"passage-{number}", passage.context, (passage.continuation, *corrupted), 0))
    if not items:
        raise StlmError("corruptions: the validation text only repeats itself; choose other prepared data with --data")
    return items


def _try_corruption(corrupt: Corrupt, passage: Passage, rng: random.Random, words: Sequence[str]) -> str | None:
    tries = (corrupt(passage, rng, words) for _ in range(20))
    return next((text for text in tries if text != passage.continuation), None)


def score_corruptions(
    model: STLM, items: Sequence[Item], shard: EvalShard = WHOLE
) -> tuple[list[ScoredItem], dict[str, Any]]:
    """Return scored pairs of the truth and each corruption, and their summary by corruption.

    The interval over all pairs resamples passages: the pairs of one passage are not independent.
    """
    task = ChoiceTask()
    questions = [rows_of(task, item) for item in items]
    found = log_likelihoods(model, questions, "corruptions", shard)
    pairs = [
        pair
        for item, likelihoods in zip(items, found.by_question, strict=True)
        for pair in _pairs(task, item, likelihoods)
    ]
    values = summary(pairs)
    by_passage = np.array([pair.measures for pair in pairs]).reshape(len(items), len(CORRUPTIONS), -1).mean(1)
    for name, estimate in zip(Measures._fields, estimates(by_passage), strict=True):
        values[name] = estimate._asdict()
    values |= {"passages": len(items), "published_50m": None, "contexts_cut": found.num_cut}
    values["sha256"] = fingerprint(questions, items)
    return pairs, values


def _pairs(task: ChoiceTask, item: Item, likelihoods: Sequence[Likelihood]) -> Iterator[ScoredItem]:
    for place, name in enumerate(CORRUPTIONS, 1):
        choices = item.choices[0], item.choices[place]
        pair = Item(f"{item.id}-{name}", item.context, choices, 0, {"corruption": name}, item.id)
        yield scored_item(task, pair, (likelihoods[0], likelihoods[place]))
