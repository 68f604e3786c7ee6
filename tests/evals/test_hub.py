"""Items from a simulated hub, with data sets in memory: the schema, and messages where one is missing or changed."""

import pytest
from datasets import Dataset
from test_likelihood import letters

from data_pipeline.errors import DataError
from stlm.errors import StlmError
from stlm.evals import LoadedTask, Options, load_tasks
from stlm.evals.tasks.choices import rows_of

LETTERED = {"label": ["A", "B", "C"], "text": ["x", "y", "z"]}
RECORDS = {
    "blimp": {"sentence_good": "a", "sentence_bad": "b", "UID": "u", "linguistics_term": "t", "pair_id": 3},
    "hellaswag": {"activity_label": "Sport", "ctx": "He runs and", "endings": ["x", "y"], "label": "1"},
    "arc_easy": {"id": "q", "question": "Why?", "choices": LETTERED, "answerKey": "B"},
    "winogrande": {"sentence": "The _ is red.", "option1": "x", "option2": "y", "answer": "2"},
    "mmlu": {"question": "Why?", "choices": ["x", "y"], "answer": 1, "subject": "law"},
    "boolq": {"passage": "P.", "question": "is it", "answer": True},
    "copa": {
        "premise": "It fell.",
        "choice1": "The x.",
        "choice2": "The y.",
        "question": "cause",
        "idx": 0,
        "label": 1,
    },
    "openbookqa": {"id": "q", "question_stem": "Fire is", "choices": LETTERED, "answerKey": "B"},
    "race": {"article": "Long.", "question": "Why?", "options": ["x", "y", "z", "w"], "answer": "B"},
    "lambada": {"text": "He said y"},
}
TRUTHS = {  # the row of the truth
    "blimp": ("", "a"),
    "hellaswag": ("Sport: He runs and", " y"),
    "arc_easy": ("Question: Why?\nAnswer:", " y"),
    "winogrande": ("The y", " is red."),
    "mmlu": ("Question: Why?\nAnswer:", " y"),
    "boolq": ("P.\nQuestion: is it?\nAnswer:", " yes"),
    "copa": ("It fell because", " the y."),
    "openbookqa": ("Fire is", " y"),
    "race": ("Long.\nQuestion: Why?\nAnswer:", " y"),
    "lambada": ("He said", " y"),
}


@pytest.fixture
def hub(monkeypatch):
    """Return a function that sets the record of every data set."""

    def hold(record):
        monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: Dataset.from_list([record]))
        monkeypatch.setattr("datasets.get_dataset_config_names", lambda _: ["one", "two"])

    return hold


@pytest.mark.parametrize("name", RECORDS)
def test_records_become_items(hub, name):
    hub(RECORDS[name])
    if name == "blimp":
        with pytest.raises(DataError, match=r"u-3.* again, as in nyu-mll/blimp one"):
            LoadedTask.fetch(name)  # two parts of the same
        return
    loaded = LoadedTask.fetch(name)
    (item,) = loaded.items
    assert rows_of(loaded.task, item)[item.answer] == TRUTHS[name]
    _, values = loaded.score(letters(a=1 / 2))
    assert values["items"] == 1 and len(values["sha256"]) == 64 and "file_sha256" not in values


def test_missing_or_changed_data_sets_are_named(hub, monkeypatch):
    hub({**RECORDS["arc_easy"], "answerKey": "7"})
    with pytest.raises(DataError, match=r"allenai/ai2_arc ARC-Easy test\[0\]: its fields have changed"):
        load_tasks("arc_easy", Options(hub=True))
    hub({**RECORDS["hellaswag"], "label": "2"})
    with pytest.raises(DataError, match=r"Rowan/hellaswag validation\[0\]: answer: got 2"):
        load_tasks("hellaswag", Options(hub=True))
    with pytest.raises(DataError, match="mctest: not fetched from the hub"):
        load_tasks("mctest", Options(hub=True))
    with pytest.raises(StlmError, match="--shots: got 1 with --hub"):
        load_tasks("hellaswag", Options(hub=True, shots=1))

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(DataError, match=r"Rowan/hellaswag cannot be fetched \(no network"):
        load_tasks("hellaswag", Options(hub=True))
