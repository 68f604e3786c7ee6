"""Gold labels of the built-in minimal pairs, checked by rules independent of the templates: each rule sees only the
finished sentence, with its own idea of English."""

import re

import pytest

from stlm.evals.tasks.minimal_pairs import minimal_pairs

PAIRS = minimal_pairs()
FEMININE = {"girl", "woman", "queen", "mother", "sister", "aunt", "princess", "grandmother"}
PARTICIPLES = {"taken", "broken", "seen", "stolen", "chosen", "hidden", "forgotten"}
OBJECTLESS = {"slept", "smiled", "arrived", "laughed", "sneezed", "fell"}
DESCRIPTIONS = {"red", "big", "small", "old", "new", "blue", "heavy", "broken", "clean"}


def plural(noun):
    return noun in ("children", "men", "women") or noun.endswith("s")


def words(sentence):
    assert sentence[-1] in ".?" and sentence[0].isupper() and "  " not in sentence
    return sentence[:-1].split()


def agrees(sentence):  # a verb in -s goes with a singular
    _, subject, *_, verb = words(sentence)
    return plural(subject) != verb.endswith("s")


def determiner(sentence):
    *_, this, noun = words(sentence)
    return (this == "these") == plural(noun)


def reflexive(sentence):  # of the first noun, regardless of the words after it
    _, subject, *_, pronoun = words(sentence)
    if plural(subject) and subject != "princess":
        return pronoun == "themselves"
    return pronoun == ("herself" if subject in FEMININE else "himself")


def adjective(sentence):
    return words(sentence)[-2] in DESCRIPTIONS


def verb_object(sentence):
    return words(sentence)[3] in PARTICIPLES


def inversion(sentence):
    return sentence.startswith("What did the ")


def polarity(sentence):
    return sentence.startswith("No ") or " ever " not in sentence


def negation(sentence):
    return re.fullmatch(r"The \w+ does not \w+[^s] the \w+\.", sentence) is not None


def transitivity(sentence):  # two words after the verb: an object, which the verb must allow
    return words(sentence)[2] not in OBJECTLESS


def quantifier(sentence):
    _, _, _, quantifier, noun, *_ = words(sentence)
    return (quantifier == "many") == plural(noun)


def gap(sentence):  # "what" is the object already
    return words(sentence)[2] == "that"


def case(sentence):
    return words(sentence)[0] in ("She", "He", "They", "We")


def article(sentence):
    *_, a, noun = words(sentence)
    return (a == "an") == (noun[0] in "aeiou")


RULES = {
    "singular_subject": agrees,
    "plural_subject": agrees,
    "determiner_noun": determiner,
    "reflexive_gender": reflexive,
    "reflexive_number": reflexive,
    "reflexive_behind_another_noun": reflexive,
    "adjective_noun": adjective,
    "verb_object": verb_object,
    "question_inversion": inversion,
    "past_participle": verb_object,
    "negation_with_do": negation,
    "transitivity": transitivity,
    "negative_polarity": polarity,
    "many_and_much": quantifier,
    "filler_gap": gap,
    "pronoun_case": case,
    "a_and_an": article,
}


@pytest.mark.parametrize("paradigm", RULES)
def test_the_first_sentence_keeps_the_rule_and_the_second_breaks_it(paradigm):
    pairs = [item.choices for item in PAIRS if item.groups["paradigm"] == paradigm]
    assert len(set(pairs)) == len(pairs) == 50
    assert [pair for pair in pairs if not RULES[paradigm](pair[0])] == []
    assert [pair for pair in pairs if RULES[paradigm](pair[1])] == []


def test_every_paradigm_has_a_rule_and_all_pairs_are_the_same_every_time():
    assert {item.groups["paradigm"] for item in PAIRS} == set(RULES)
    assert len({item.id for item in PAIRS}) == len(PAIRS) and {item.answer for item in PAIRS} == {0}
    assert minimal_pairs() == PAIRS
