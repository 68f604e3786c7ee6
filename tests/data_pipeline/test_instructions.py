"""Instructions: every answer is correct by its rule, and equal seeds give equal questions."""

from __future__ import annotations

import json
import re

import pytest

from data_pipeline.errors import DataError
from data_pipeline.sources.conversations import segments_of
from data_pipeline.sources.default_corpus import instructions as module
from data_pipeline.sources.default_corpus.instructions import TASKS, as_lines, instructions

SENTENCES = [f"The file {word} of a thing is open" for word in ("name", "size", "mode", "path") for _ in range(30)]


@pytest.fixture(autouse=True)
def sentences(monkeypatch):
    monkeypatch.setattr(module, "_sentences", lambda: SENTENCES)


def test_answers_are_right() -> None:
    sentence, word = "The file is open", "file"
    assert {task.name: task.answer(sentence, word) for task in TASKS} == {
        "repeat": "The file is open",
        "capitals": "FILE",
        "spell": "f-i-l-e",
        "first": "The",
        "last": "open",
        "count": "4",
        "next": "is",
    }


def test_every_question_holds_what_its_answer_needs() -> None:
    made = list(instructions(500))
    assert len(made) == 500
    for conversation in made:
        question, answer = (message["content"] for message in conversation["messages"])
        assert "{" not in question
        letters = re.sub("[^a-z]", "", answer.lower())
        assert answer.isdigit() or letters in re.sub("[^a-z]", "", question.lower())
        segments_of(conversation)


def test_the_seed_decides() -> None:
    assert list(instructions(50, seed=1)) == list(instructions(50, seed=1)) != list(instructions(50, seed=2))
    assert [json.loads(line) for line in as_lines(instructions(3)).splitlines()] == list(instructions(3))


def test_too_little_text_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(module, "_sentences", lambda: SENTENCES[:99])
    with pytest.raises(DataError, match="99 fitting sentences here, expected 100"):
        next(instructions(1))
