"""Multiple-choice tasks: the schema, the prompts, and scores of a model with known probabilities."""

import gzip
import hashlib
import json
import lzma
import math

import pytest
from test_likelihood import Unigram, letters

from data_pipeline.errors import DataError
from stlm.errors import StlmError
from stlm.evals import CHOICE_TASKS, LoadedTask, Options, load_tasks, markdown, overview_text
from stlm.evals.items.reading import choice_item
from stlm.evals.tasks.choices import rows_of

ITEM = {"id": "1", "context": "b", "choices": ["a", "bb"], "answer": 0}
PAIR = {"sentence_good": "aa", "sentence_bad": "ab", "UID": "order", "linguistics_term": "syntax", "pairID": "0"}


def write(folder, name, *records):
    (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


def score(folder, name, model=None, shots=0):
    return LoadedTask.read(name, folder, shots).score(model or letters(**{"a": 1 / 2, "b": 1 / 4, " ": 1 / 16}))


def test_known_probabilities_give_the_known_score(tmp_path):
    write(tmp_path, "hellaswag.jsonl", ITEM, {**ITEM, "id": "2", "answer": 1})
    scored, values = score(tmp_path, "hellaswag")
    # " a" has 1/16 * 1/2, " bb" 1/16 * 1/16: the truth of the first is 8/9 of both, that of the second 1/9.
    assert scored[0].log_probabilities == pytest.approx((math.log(1 / 32), math.log(1 / 256)), rel=1e-5)
    # A byte, the space's bits counted and its byte not: 5 bits / 1 against 8 bits / 2, so the longer one wins.
    assert [one.measures.accuracy for one in scored] == [1, 0]
    assert [one.measures.accuracy_per_byte for one in scored] == [0, 1]
    assert [one.measures.truth_probability for one in scored] == pytest.approx([8 / 9, 1 / 9], rel=1e-5)
    assert values["accuracy"]["value"] == 0.5 and values["truth_probability"]["value"] == pytest.approx(0.5)
    assert (values["items"], values["chance"], values["published_50m"], values["contexts_cut"]) == (2, 0.5, 0.30, 0)
    # Of both items it is 8/9 sure of " a", and right once.
    assert values["calibration_error"] == pytest.approx(8 / 9 - 1 / 2)


def test_a_choice_is_as_long_as_its_bytes(tmp_path):
    high, low = "é".encode()
    model = Unigram({ord(" "): 1 / 2, ord("b"): 1 / 16, high: 1 / 8, low: 1 / 8})
    write(tmp_path, "hellaswag.jsonl", {**ITEM, "choices": ["b", "é"], "answer": 1})
    scored, _ = score(tmp_path, "hellaswag", model)
    # 1 + 4 bits for one byte against 1 + 6 bits for two: 5 against 3.5 a byte. As one character it would lose by 7.
    assert (scored[0].measures.accuracy, scored[0].measures.accuracy_per_byte) == (0, 1)


def test_chance_is_the_mean_over_items_of_one_in_the_number_of_choices(tmp_path):
    four = {**ITEM, "id": "2", "choices": ["a", "b", "aa", "bb"]}
    write(tmp_path, "hellaswag.jsonl", ITEM, four)
    assert score(tmp_path, "hellaswag")[1]["chance"] == (1 / 2 + 1 / 4) / 2


def test_minimal_pairs_by_phenomenon_and_paradigm(tmp_path):
    tied = {**PAIR, "pairID": "1", "sentence_bad": "aa"}
    other = {**PAIR, "UID": "swap", "linguistics_term": "binding", "sentence_good": "b", "sentence_bad": "a"}
    _, values = score(write(tmp_path, "blimp.jsonl", PAIR, tied, other), "blimp")
    assert values["accuracy"]["value"] == pytest.approx((1 + 1 / 2 + 0) / 3)
    by_phenomenon = {name: part["accuracy"]["value"] for name, part in values["groups"]["phenomenon"].items()}
    assert by_phenomenon == {"binding": 0, "syntax": 0.75}
    assert set(values["groups"]["paradigm"]) == {"order", "swap"}
    assert values["published_50m"] == 0.78


def test_partial_scoring_scores_the_text_after_the_blank(tmp_path):
    item = {"id": "1", "context": "a _ b .", "choices": ["a", "bb"], "answer": 1}
    task = CHOICE_TASKS["winogrande"]
    assert rows_of(task, LoadedTask.read("winogrande", write(tmp_path, "winogrande.jsonl", item), 0).items[0]) == [
        ("a a", " b ."),
        ("a bb", " b ."),
    ]
    scored, values = score(tmp_path, "winogrande")  # to a model without memory both are the same
    assert values["accuracy"]["value"] == values["accuracy_per_byte"]["value"] == 0.5
    assert scored[0].measures.truth_probability == pytest.approx(0.5)


def test_targets_count_when_every_id_is_the_most_probable(tmp_path):
    items = [{"id": text, "context": "b", "choices": [text], "answer": 0} for text in ("aa", "ab")]
    model = letters(**{"a": 0.3, " ": 0.3, "b": 0.1})
    _, values = score(write(tmp_path, "lambada.jsonl", *items), "lambada", model)
    assert values["accuracy"]["value"] == pytest.approx((1 / 8 + 0) / 2)  # " " and "a" are tied, three times
    assert values["truth_probability"]["value"] == pytest.approx((0.3**3 + 0.3**2 * 0.1) / 2, rel=1e-4)
    assert values["chance"] == 0


@pytest.mark.parametrize(
    ("name", "prompt"),
    [("arc_easy", "Question: Why?\nAnswer:"), ("boolq", "Why?\nAnswer:"), ("hellaswag", "Why?")],
)
def test_prompts(name, prompt):
    item = choice_item({"id": "1", "context": " Why? ", "choices": ["so ", "no"], "answer": 0})
    assert rows_of(CHOICE_TASKS[name], item) == [(prompt, " so"), (prompt, " no")]


QUESTIONS = {"arc_easy", "arc_challenge", "mmlu", "piqa", "commonsenseqa"}
PASSAGES = {"boolq", "siqa", "race", "mctest"}
PLAIN = {"hellaswag", "copa", "openbookqa"}
BLANKS = {"winogrande", "wsc273"}


def test_prompts_match_the_documentation():
    item = choice_item({"id": "1", "context": "Why _ not?", "choices": ["so", "no"], "answer": 0})
    expected = dict.fromkeys(QUESTIONS, ("Question: Why _ not?\nAnswer:", " no"))
    expected |= dict.fromkeys(PASSAGES, ("Why _ not?\nAnswer:", " no")) | dict.fromkeys(PLAIN, ("Why _ not?", " no"))
    expected |= dict.fromkeys(BLANKS, ("Why no", " not?"))
    assert {name: rows_of(CHOICE_TASKS[name], item)[1] for name in expected} == expected
    assert CHOICE_TASKS.keys() - expected == {"blimp", "lambada"}


def test_shots_precede_the_question_in_order(tmp_path):
    write(tmp_path, "arc_easy.jsonl", ITEM)
    shots = [{**ITEM, "id": str(n), "context": f"c{n}", "answer": n % 2} for n in range(3)]
    write(tmp_path, "arc_easy.shots.jsonl", *shots)
    assert LoadedTask.read("arc_easy", tmp_path, 2).questions()[0][1] == (
        "Question: c0\nAnswer: a\n\nQuestion: c1\nAnswer: bb\n\nQuestion: b\nAnswer:",
        " bb",
    )
    with pytest.raises(StlmError, match="got 4, expected at most 3"):
        LoadedTask.read("arc_easy", tmp_path, 4)
    write(tmp_path, "arc_easy.shots.jsonl", ITEM)
    with pytest.raises(StlmError, match="is scored as well"):
        LoadedTask.read("arc_easy", tmp_path, 1)
    write(tmp_path, "blimp.jsonl", PAIR)
    with pytest.raises(StlmError, match="blimp, which has no prompts"):
        LoadedTask.read("blimp", tmp_path, 1)


def test_the_hash_of_the_scored_text_does_not_depend_on_batching(tmp_path):
    line = json.dumps(ITEM).encode() + b"\n"
    hashes = []
    for name, content in [
        ("copa.jsonl", line),
        ("copa.jsonl.gz", gzip.compress(line)),
        ("copa.jsonl.xz", lzma.compress(line)),
    ]:
        (tmp_path / name).write_bytes(content)
        _, values = score(tmp_path, "copa")
        assert values["file_sha256"] == hashlib.sha256(content).hexdigest()
        hashes.append(values["sha256"])
        (tmp_path / name).unlink()
    assert len(set(hashes)) == 1
    write(tmp_path, "copa.jsonl", {**ITEM, "answer": 1})
    assert score(tmp_path, "copa")[1]["sha256"] not in hashes


def test_another_prompt_or_another_shot_is_another_hash(tmp_path):
    """The file is the same, but the scored text differs."""
    for name in ("copa", "arc_easy"):
        write(tmp_path, f"{name}.jsonl", ITEM)
        write(tmp_path, f"{name}.shots.jsonl", {**ITEM, "context": "c"}, {**ITEM, "id": "2", "context": "d"})
    found = [score(tmp_path, name, shots=shots)[1] for name, shots in [("copa", 0), ("arc_easy", 0), ("arc_easy", 1),
                                                                       ("arc_easy", 2)]]  # fmt: skip
    assert len({values["file_sha256"] for values in found}) == 1
    assert len({values["sha256"] for values in found}) == 4


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("piqa", {"answer": 2}, "answer: got 2, expected 0 to 1"),
        ("piqa", {"answer": -1}, "answer: got -1"),
        ("piqa", {"answer": True}, "answer: got True"),
        ("piqa", {"choices": ["a", " "]}, "choices[1]: expected a text that is not empty, got ' '"),
        ("piqa", {"choices": ["a"]}, "choices: got 1, expected two or more"),
        ("piqa", {"choices": "ab"}, "choices: expected a list"),
        ("piqa", {"context": 3}, "context: expected a text that is not empty, got 3"),
        ("piqa", {"id": "1"}, "id: got '1' again, as in "),
        ("lambada", {}, "choices: got 2, expected one"),
        ("winogrande", {"context": "a b"}, 'expected one "_"'),
        ("winogrande", {"context": "a _"}, 'expected one "_"'),
        ("blimp", {}, "sentence_good: missing"),
        ("hellaswag", {"context": "\ud800"}, "context: holds the lone surrogate U+D800"),
        ("hellaswag", {"choices": ["a", "b\udc00"]}, "choices: holds the lone surrogate U+DC00"),
    ],
)
def test_schema_violations_are_named_with_line_and_field(tmp_path, name, change, message):
    first = {"lambada": {**ITEM, "choices": ["a"]}, "winogrande": {**ITEM, "context": "a _ b"}, "blimp": PAIR}
    write(tmp_path, f"{name}.jsonl", first.get(name, ITEM), {**ITEM, "id": "2", **change})
    with pytest.raises(DataError) as error:
        LoadedTask.read(name, tmp_path, 0)
    assert str(error.value).startswith(f"{tmp_path / name}.jsonl:2: ") and message in str(error.value)


def test_unknown_tasks_and_missing_data_are_named(tmp_path):
    with pytest.raises(StlmError, match=r"'helaswag' \(nearest: hellaswag\)"):
        load_tasks("blimp,helaswag", Options(tmp_path))
    with pytest.raises(DataError, match=r"put them into .*/hellaswag\.jsonl \(or hellaswag\.jsonl\.gz"):
        load_tasks("hellaswag", Options(tmp_path))
    with pytest.raises(DataError, match="--tasks-dir DIR"):
        load_tasks("hellaswag", Options())
    write(tmp_path, "copa.jsonl")
    with pytest.raises(DataError, match="holds no items"):
        load_tasks("copa", Options(tmp_path))
    (tmp_path / "copa.jsonl").write_text("{\n")
    with pytest.raises(DataError, match=r"copa\.jsonl:1: not valid JSON"):
        load_tasks("copa", Options(tmp_path))
    (tmp_path / "copa.jsonl").write_bytes(json.dumps(ITEM).encode() + b"\n\xff\xfe\n")
    with pytest.raises(DataError, match=r"copa\.jsonl:2: not UTF-8 at byte 0; convert the file first"):
        load_tasks("copa", Options(tmp_path))
    (tmp_path / "copa.jsonl").write_text('{"id": "1", "id": "2"}\n')
    with pytest.raises(DataError, match=r"copa\.jsonl:1: id: given twice"):
        load_tasks("copa", Options(tmp_path))


def test_a_target_longer_than_the_context_is_named_before_anything_is_scored(tmp_path):
    class Unread(Unigram):
        def forward(self, *arguments, **options):
            pytest.fail("something was scored")

    model = Unread({ord("a"): 1 / 2, ord(" "): 1 / 4})
    long = "a" * model.config.context_length
    write(tmp_path, "lambada.jsonl", {**ITEM, "choices": ["a"]}, {**ITEM, "id": "2", "choices": [long]})
    with pytest.raises(StlmError, match=r"lambada\.jsonl:2: its target has \d+ ids, expected at most"):
        score(tmp_path, "lambada", model)


def test_reports_show_chance_and_the_published_row(tmp_path):
    write(tmp_path, "hellaswag.jsonl", ITEM)
    _, values = score(tmp_path, "hellaswag")
    text = overview_text({"hellaswag": values})
    assert text.splitlines()[2].split() == ["hellaswag", "1", "100.0", "0.0", "88.9", "50.0", "30.0"]  # no intervals
    page = markdown({"model": "m", "step": None}, {"hellaswag": values})
    assert "| hellaswag | 1 | 100.0 |" in page and f"- sha256: {values['sha256']}" in page and "step" not in page
