"""Instructions about the default corpus, with answers: conversations for fine-tuning without a network.

Every answer follows from the question by rule, so correct answers of a fine-tuned model can be counted. The questions
are phrased in several ways, over words and sentences of the corpus.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

from data_pipeline.errors import DataError
from data_pipeline.sources.default_corpus import corpus

_SENTENCE = re.compile(r"(?:[A-Z][a-z]*|[a-z]+)(?: [a-z]+){3,7}(?=[.,;:])")
_KEPT = 10_000  # sentences at most


class Task(NamedTuple):
    """A question about a sentence and one of its words, in several phrasings, and its answer."""

    name: str
    questions: tuple[str, ...]
    answer: Callable[[str, str], str]


TASKS = (
    Task("repeat", ("Repeat: {sentence}", "Say this again: {sentence}"), lambda sentence, word: sentence),
    Task("capitals", ("Write {word} in capitals.", "{word} in capital letters?"), lambda sentence, word: word.upper()),
    Task("spell", ("Spell {word}.", "How is {word} spelled?"), lambda sentence, word: "-".join(word)),
    Task(
        "first", ("First word of: {sentence}", "Which word begins this? {sentence}"),
        lambda sentence, word: sentence.split()[0],
    ),
    Task(
        "last", ("Last word of: {sentence}", "Which word ends this? {sentence}"),
        lambda sentence, word: sentence.split()[-1],
    ),
    Task(
        "count", ("Count the words: {sentence}", "How many words? {sentence}"),
        lambda sentence, word: str(len(sentence.split())),
    ),
    Task(
        "next", ("Which word follows {word} in: {sentence}", "What comes after {word}? {sentence}"),
        lambda sentence, word: sentence.split()[sentence.split().index(word) + 1],
    ),
)  # fmt: skip


def instructions(number: int, seed: int = 0) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Yield `number` conversations of one question and its answer; the same seed and packages give the same ones.

    Raises DataError if the installed packages hold too little text.
    """
    sentences = _sentences()
    if len(sentences) < 100:
        raise DataError(f"the default corpus has {len(sentences)} fitting sentences here, expected 100 or more")
    draw = random.Random(seed)
    for _ in range(number):
        task = draw.choice(TASKS)
        sentence = draw.choice(sentences)
        words = sentence.split()
        word = draw.choice([word for word in words[:-1] if words.count(word) == 1] or words[:1])
        question = draw.choice(task.questions).format(sentence=sentence, word=word)
        yield {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": task.answer(sentence, word)},
            ]
        }


def as_lines(conversations: Iterator[dict[str, list[dict[str, str]]]]) -> str:
    """Return conversations as JSON Lines."""
    return "".join(json.dumps(conversation, ensure_ascii=False) + "\n" for conversation in conversations)


def _sentences() -> list[str]:
    """Return beginnings of sentences of the default corpus, 4 to 8 words long, each once and in order."""
    found: dict[str, None] = {}
    for package, files, _ in corpus.corpus_units():
        for document in corpus.read_unit(package, files):
            found |= dict.fromkeys(_SENTENCE.findall(document))
            if len(found) >= _KEPT:
                return list(found)[:_KEPT]
    return list(found)
