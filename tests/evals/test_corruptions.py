"""Corruptions of text: the permitted changes of each, and scores of models with one known ability."""

from collections import Counter
from random import Random

import pytest
from test_likelihood import letters

from stlm.errors import StlmError
from stlm.evals.tasks.corruptions import CORRUPTIONS, Passage, corruption_items, passages_of, score_corruptions

SENTENCES = [" ".join(f"w{sentence}x{word}" for word in range(13)) + "." for sentence in range(12)]
PASSAGE = Passage("Once upon a time.", tuple(SENTENCES[:3]))
WORDS = PASSAGE.continuation.split()


def corrupted(name):
    return CORRUPTIONS[name](PASSAGE, Random(1), ["new"])


def test_there_are_thirteen_corruptions():
    assert len(CORRUPTIONS) == 13


def test_passages_are_whole_sentences_of_one_document_that_do_not_overlap():
    first = " ".join(SENTENCES[:5]) + "\n" + " ".join(SENTENCES[5:9])
    found = list(passages_of([first, "Too short. Far too short.", " ".join(SENTENCES[9:])]))
    assert [(passage.context, passage.sentences) for passage in found] == [
        (" ".join(SENTENCES[:2]), tuple(SENTENCES[2:4])),
        (" ".join(SENTENCES[4:6]), tuple(SENTENCES[6:8])),
    ]


def test_shuffles_keep_everything_but_the_order():
    assert Counter(corrupted("character_shuffle")) == Counter(PASSAGE.continuation)
    assert Counter(corrupted("word_shuffle").split()) == Counter(WORDS)
    assert sorted(corrupted("sentence_shuffle").split(". ")) != SENTENCES
    assert {part.rstrip(".") for part in corrupted("sentence_shuffle").split(". ")} == {s[:-1] for s in SENTENCES[:3]}


@pytest.mark.parametrize("n", [3, 5, 7, 12])
def test_shuffles_of_runs_keep_the_runs(n):
    text = corrupted(f"{n}_gram_shuffle")
    runs = [" ".join(WORDS[start : start + n]) for start in range(0, len(WORDS), n)]
    assert text != PASSAGE.continuation and Counter(text.split()) == Counter(WORDS)
    assert all(run in text for run in runs)


@pytest.mark.parametrize(("name", "change"), [("deletion", -6), ("insertion", 6), ("substitution", 0)])
def test_words_are_deleted_inserted_and_replaced_at_the_stated_rate(name, change):
    found = corrupted(f"word_{name}").split()
    assert len(found) - len(WORDS) == change  # 15 % of 39
    assert found.count("new") == (0 if name == "deletion" else 6)
    kept = [word for word in found if word != "new"]
    assert len(kept) == 39 - (0 if name == "insertion" else 6)
    places = [WORDS.index(word) for word in kept]
    assert places == sorted(places), "what is left keeps its order"


@pytest.mark.parametrize(("name", "sign"), [("deletion", -1), ("insertion", 1), ("substitution", 0)])
def test_characters_are_changed_at_the_stated_rate(name, sign):
    length = len(PASSAGE.continuation)
    assert len(corrupted(f"character_{name}")) == length + sign * round(0.15 * length)


def test_items_are_seeded_and_no_corruption_equals_the_truth():
    documents = [" ".join(SENTENCES), " ".join(reversed(SENTENCES))]
    items = corruption_items(documents, num_passages=3)
    assert items == corruption_items(documents, num_passages=3) != corruption_items(documents, num_passages=3, seed=1)
    assert len(items) == 3
    for item in items:
        assert len(item.choices) == 14 and item.choices[0] not in item.choices[1:]
    with pytest.raises(StlmError, match="no document of the validation text"):
        corruption_items(["Short."])
    with pytest.raises(StlmError, match="only repeats itself"):
        corruption_items(["a. " * 200])


def test_passages_are_drawn_from_the_first_two_thousand():
    documents = [f"Number {n} {'is here ' * 10}now. One. {'Two ' * 15}and {'three ' * 15}too." for n in range(2100)]
    assert len(list(passages_of(documents))) == 2100
    numbers = [int(item.context.split()[1]) for item in corruption_items(documents)]
    assert len(set(numbers)) == len(numbers) == 100
    assert sum(numbers) / 100 == pytest.approx(1000, abs=250)  # 577 / 10 is a standard error
    assert 1800 < max(numbers) < 2000


def test_the_interval_is_over_passages():
    """Two passages: a quarter of the resamples consist of one of them alone."""
    first = " ".join(SENTENCES[:4])
    pairs, values = score_corruptions(letters(w=1 / 4), corruption_items([first, first.replace("w", "y")]))
    of_passages = [sum(pair.measures.accuracy for pair in pairs if pair.item.passage == f"passage-{n}") / 13
                   for n in range(2)]  # fmt: skip
    assert values["passages"] == 2 and of_passages[0] != of_passages[1]
    assert (values["accuracy"]["low"], values["accuracy"]["high"]) == pytest.approx(sorted(of_passages))


def test_a_model_that_knows_only_how_frequent_letters_are():
    items = corruption_items([" ".join(SENTENCES)], num_passages=2)
    pairs, values = score_corruptions(letters(w=1 / 4), items)
    shares = {name: part["accuracy"]["value"] for name, part in values["groups"]["corruption"].items()}
    assert set(shares) == set(CORRUPTIONS)
    for name in CORRUPTIONS:
        if name.endswith("shuffle"):
            assert shares[name] == 0.5, "the same letters in another order are as probable"
    assert (shares["character_deletion"], shares["word_deletion"]) == (0, 0), "less text is more probable"
    assert (shares["character_insertion"], shares["word_insertion"]) == (1, 1)
    assert len(pairs) == 13 * len(items) and values["passages"] == len(items)
    assert values["accuracy"]["value"] == pytest.approx(sum(shares.values()) / 13)
