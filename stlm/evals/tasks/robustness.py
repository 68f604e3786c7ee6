"""Robustness: the cost of typos, changed case, changed spacing and foreign letters."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from stlm.errors import StlmError
from stlm.evals.items.reading import Item, minimal_pair
from stlm.evals.likelihood import Row, log_likelihoods
from stlm.evals.report import table
from stlm.evals.sharding import WHOLE, EvalShard
from stlm.evals.tasks.choices import ChoiceTask, rows_of, scored_item
from stlm.evals.tasks.corruptions import passages_of
from stlm.stlm import STLM

NUM_PASSAGES = 50
_TYPO_RATE = 0.05  # of the letters
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_CYRILLIC = str.maketrans(_LETTERS + _LETTERS.upper(), (cyrillic := "абцдефгхийклмнопярстувшъыз") + cyrillic.upper())
_FULL_WIDTH = {code: code + 0xFEE0 for code in range(ord("!"), ord("~") + 1)}


def _typos(text: str, rng: random.Random) -> str:
    """Swap some letters with the next one, or omit, double or replace them."""
    found, place = [], 0
    while place < len(text):
        letter, following = text[place], text[place + 1 : place + 2]
        place += 1
        if letter.isalpha() and rng.random() < _TYPO_RATE:
            wrong = rng.choice((following + letter, "", letter * 2, rng.choice(_LETTERS)))
            place += wrong == following + letter and bool(following)
            letter = wrong
        found.append(letter)
    return "".join(found)


PERTURBATIONS: dict[str, Callable[[str, random.Random], str]] = {
    "clean": lambda text, rng: text,
    "typos": _typos,
    "upper_case": lambda text, rng: text.upper(),
    "lower_case": lambda text, rng: text.lower(),
    "double_spaces": lambda text, rng: text.replace(" ", "  "),
    "no_spaces": lambda text, rng: text.replace(" ", ""),
    "cyrillic": lambda text, rng: text.translate(_CYRILLIC),
    "full_width": lambda text, rng: text.translate(_FULL_WIDTH),
}


def perturbed(name: str, text: str, seed: int = 0) -> str:
    """Return the text under one of `PERTURBATIONS`; the same seed gives the same text."""
    return PERTURBATIONS[name](text, random.Random(seed))


def measure_robustness(
    model: STLM,
    documents: Iterable[str],
    pairs: Sequence[Item],
    num_passages: int = NUM_PASSAGES,
    shard: EvalShard = WHOLE,
) -> tuple[str, dict[str, Any]]:
    """Return a table and its values: bits per byte and per character, and accuracy on `pairs`, for each perturbation.

    Both sentences of a pair are perturbed by the same draws. Raises StlmError if the documents hold no passage.
    """
    texts = []
    for passage in passages_of(documents):
        texts.append(f"{passage.context} {passage.continuation}")
        if len(texts) >= min(num_passages, NUM_PASSAGES):
            break
    if not texts:
        raise StlmError(
            "robustness: the validation text has no passages to perturb; choose other prepared data with --data"
        )
    values = {name: _measure_perturbation(model, name, texts, pairs, shard) for name in PERTURBATIONS}
    rows = [[name, f"{found['bits_per_byte']:.3f}", f"{found['bits_per_character']:.3f}",
             f"{found['bits_per_character'] / values['clean']['bits_per_character']:.2f}",
             f"{100 * found['pairs']:.1f}", f"{100 * (found['pairs'] - values['clean']['pairs']):+.1f}"]
            for name, found in values.items()]  # fmt: skip
    header = ["text", "bits per byte", "per character", "ratio to clean", "pairs, %", "change"]
    return table(rows, header, "lrrrrr"), {
        "bits_per_byte": values["clean"]["bits_per_byte"], "passages": len(texts), "items": len(pairs),
        "perturbations": values,
    }  # fmt: skip


def _measure_perturbation(
    model: STLM, name: str, texts: Sequence[str], pairs: Sequence[Item], shard: EvalShard
) -> dict[str, float]:
    changed = [perturbed(name, text, number) for number, text in enumerate(texts)]
    found = log_likelihoods(model, [[Row("", text)] for text in changed], name, shard)
    bits = -sum(rows[0].log_probability for rows in found.by_question) / math.log(2)

    task = ChoiceTask(minimal_pair)
    items = [Item(pair.id, "", tuple(perturbed(name, text, number) for text in pair.choices), pair.answer)
             for number, pair in enumerate(pairs)]  # fmt: skip
    of_pairs = log_likelihoods(model, [rows_of(task, item) for item in items], name, shard).by_question
    scored = (scored_item(task, item, rows) for item, rows in zip(items, of_pairs, strict=True))
    num_correct = sum(one.measures.accuracy for one in scored)
    return {
        "bits_per_byte": bits / sum(len(text.encode()) for text in changed),
        "bits_per_character": bits / sum(map(len, texts)),  # of the clean text: the content is the same
        "pairs": num_correct / len(items),
    }
