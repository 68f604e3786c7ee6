"""Each measure of generated text by hand, on texts of a few words."""

import math

import pytest
from test_likelihood import tiny_model

from stlm.errors import StlmError
from stlm.evals.tasks.text_quality import (
    Suffixes,
    distinct,
    longest_copy,
    measure_text,
    reading_ease,
    repetition,
    self_bleu,
    training_suffixes,
    write_texts,
)

TEXTS = ["a b a b c", "a b d"]
WORDS = [text.split() for text in TEXTS]


def test_variety_and_repetition_by_hand():
    # Words: a b a b c a b d; pairs: ab ba ab bc, ab bd. Of the first text's four pairs one has been there before.
    assert distinct(WORDS, 1) == 4 / 8
    assert distinct(WORDS, 2) == 4 / 6
    assert repetition(WORDS, 2) == pytest.approx(1 / 6)
    assert repetition(WORDS, 1) == pytest.approx(2 / 8)
    assert math.isnan(distinct([["a"]], 2))


def test_self_bleu_is_highest_where_all_are_alike():
    same = ["one two three four five six"] * 3
    assert self_bleu(same) == pytest.approx(100)
    other = "seven eight nine ten eleven twelve"
    for place in range(3):  # all others are references, wherever they stand
        assert self_bleu([*same[:place], other, *same[place:2]]) == pytest.approx(200 / 3, abs=5)
    assert math.isnan(self_bleu(["alone"]))


def test_the_longest_copy():
    source = training_suffixes(["the cat sat on the mat", "a dog"])
    assert longest_copy(b"my cat sat on a dog", source) == len(" cat sat on ")
    assert longest_copy(b"xyz", source) == 0
    assert longest_copy(b"mata dog", source) == len("a dog")  # copies do not reach across documents
    assert longest_copy("é".encode(), Suffixes(b"")) == 0
    assert longest_copy(b"banana", Suffixes(b"ananas")) == 5


def test_reading_ease_by_hand():
    # Six words of one syllable in one sentence; then twelve words in two sentences, two of them of two syllables.
    assert reading_ease("The cat sat on the mat.") == pytest.approx(206.835 - 1.015 * 6 - 84.6)
    found = reading_ease("The cat sat on the mat. The winter saw the cat winter.")
    assert found == pytest.approx(206.835 - 1.015 * 6 - 84.6 * 14 / 12)
    assert math.isnan(reading_ease("1 2 3"))


def test_a_report_of_texts():
    text, values = measure_text(["aa aa", "aa b"], ["zz aa b zz"], tiny_model())
    assert (values["texts"], values["words"], values["distinct_1"]) == (2, 4, 0.5)
    assert values["longest_copy_bytes"] == {"mean": 3.5, "max": 4}
    assert values["reference_bits_per_byte"] > 0 and "reference_bits_per_byte" in text
    model = tiny_model()
    bits = -model.log_likelihood("éé") / math.log(2)
    assert measure_text(["éé"], ["x"], model)[1]["reference_bits_per_byte"] == pytest.approx(bits / 4)
    with pytest.raises(StlmError, match="train the model longer"):
        measure_text(["", ""], ["x"])


def test_generated_texts_are_reproducible(monkeypatch):
    monkeypatch.setattr("stlm.evals.tasks.text_quality.NUM_TEXTS", 3)
    monkeypatch.setattr("stlm.evals.tasks.text_quality.MAX_NEW_IDS", 8)
    model = tiny_model()
    texts = write_texts(model)
    assert texts == write_texts(model) and len(set(texts)) == 3
    assert texts[2] == model.generate("", max_new_ids=8, temperature=1.0, seed=2)
