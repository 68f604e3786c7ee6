"""The project's own minimal pairs: an English sentence that is correct and one that breaks one rule.

They are made from templates and a small lexicon, the same pairs every time, so they need no data and no network. Each
paradigm isolates one rule, as in BLiMP (Warstadt et al. 2020, arXiv 1912.00582); none of BLiMP's data are used.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from stlm.evals.items.reading import Item

NUM_PAIRS = 50  # of each paradigm

# Singular and plural.
_ANIMATE = [("dog", "dogs"), ("cat", "cats"), ("boy", "boys"), ("girl", "girls"), ("teacher", "teachers"),
            ("farmer", "farmers"), ("doctor", "doctors"), ("king", "kings"), ("bird", "birds"), ("sister", "sisters"),
            ("child", "children"), ("man", "men"), ("woman", "women")]  # fmt: skip
_THINGS = [("tree", "trees"), ("house", "houses"), ("table", "tables"), ("chair", "chairs"), ("book", "books"),
           ("box", "boxes"), ("car", "cars"), ("cup", "cups"), ("door", "doors"), ("ball", "balls")]  # fmt: skip
_MASS = ["water", "milk", "bread", "sand", "rice", "money", "music", "snow"]
_FEMALE = ["girl", "woman", "queen", "mother", "sister", "aunt", "princess", "grandmother"]
_MALE = ["boy", "man", "king", "father", "brother", "uncle", "prince", "grandfather"]
_PLACES = ["near", "behind", "beside", "under"]
_ADJECTIVES = ["red", "big", "small", "old", "new", "blue", "heavy", "broken", "clean"]
# Third person singular, and plural.
_ACTS = [("runs", "run"), ("sleeps", "sleep"), ("sings", "sing"), ("falls", "fall"), ("waits", "wait"),
         ("jumps", "jump"), ("smiles", "smile")]  # fmt: skip
# Base, past, and past participle, all different.
_IRREGULAR = [("take", "took", "taken"), ("break", "broke", "broken"), ("see", "saw", "seen"),
              ("steal", "stole", "stolen"), ("choose", "chose", "chosen"), ("hide", "hid", "hidden"),
              ("forget", "forgot", "forgotten")]  # fmt: skip
_REFLEXIVE = ["saw", "helped", "hurt", "washed", "liked", "praised"]
_TRANSITIVE = ["found", "carried", "painted", "bought", "touched", "cleaned"]
_INTRANSITIVE = ["slept", "smiled", "arrived", "laughed", "sneezed", "fell"]
_BASE = ["like", "want", "know", "need", "see", "hear"]
_CONSONANTS = ["dog", "cat", "table", "book", "house", "ball", "river", "garden", "letter"]
_VOWELS = ["apple", "egg", "orange", "umbrella", "elephant", "owl", "island", "onion", "eagle"]

Pair = tuple[str, str]  # right, wrong
Draw = random.Random


def _agreement(rng: Draw, subject: int) -> Pair:
    noun, thing, verb = rng.choice(_ANIMATE), rng.choice(_THINGS), rng.choice(_ACTS)
    start = f"The {noun[subject]} {rng.choice(_PLACES)} the {thing[1 - subject]}"  # the nearest noun misleads
    return f"{start} {verb[subject]}.", f"{start} {verb[1 - subject]}."


def _determiner(rng: Draw) -> Pair:
    noun, number = rng.choice(_THINGS), rng.randrange(2)
    start = f"The {rng.choice(_ANIMATE)[0]} {rng.choice(_TRANSITIVE)} {('this', 'these')[number]}"
    return f"{start} {noun[number]}.", f"{start} {noun[1 - number]}."


def _person(rng: Draw) -> tuple[str, str, str]:
    """Draw a person with the right reflexive and the wrong one."""
    if rng.randrange(2):
        return rng.choice(_FEMALE), "herself", "himself"
    return rng.choice(_MALE), "himself", "herself"


def _reflexive_gender(rng: Draw) -> Pair:
    person, right, wrong = _person(rng)
    start = f"The {person} {rng.choice(_REFLEXIVE)}"
    return f"{start} {right}.", f"{start} {wrong}."


def _reflexive_number(rng: Draw) -> Pair:
    start = f"The {rng.choice(_ANIMATE)[1]} {rng.choice(_REFLEXIVE)}"
    return f"{start} themselves.", f"{start} {rng.choice(['himself', 'herself'])}."


def _binding(rng: Draw) -> Pair:
    person, right, wrong = _person(rng)
    other = rng.choice(_MALE if right == "herself" else _FEMALE)
    start = f"The {person} {rng.choice(_PLACES)} the {other} {rng.choice(_REFLEXIVE)}"
    return f"{start} {right}.", f"{start} {wrong}."


def _adjective(rng: Draw) -> Pair:
    start = f"The {rng.choice(_ANIMATE)[0]} {rng.choice(_TRANSITIVE)} the"
    adjective, thing = rng.choice(_ADJECTIVES), rng.choice(_THINGS)[0]
    return f"{start} {adjective} {thing}.", f"{start} {thing} {adjective}."


def _object(rng: Draw) -> Pair:
    start = f"The {rng.choice(_ANIMATE)[0]} has"
    participle, thing = rng.choice(_IRREGULAR)[2], rng.choice(_THINGS)[0]
    return f"{start} {participle} the {thing}.", f"{start} the {thing} {participle}."


def _inversion(rng: Draw) -> Pair:
    noun, verb = rng.choice(_ANIMATE)[0], rng.choice(_BASE)
    return f"What did the {noun} {verb}?", f"What the {noun} did {verb}?"


def _participle(rng: Draw) -> Pair:
    _, past, participle = rng.choice(_IRREGULAR)
    start, end = f"The {rng.choice(_ANIMATE)[0]} has", f"the {rng.choice(_THINGS)[0]}."
    return f"{start} {participle} {end}", f"{start} {past} {end}"


def _polarity(rng: Draw) -> Pair:
    noun, participle, thing = rng.choice(_ANIMATE)[0], rng.choice(_IRREGULAR)[2], rng.choice(_THINGS)[0]
    end = f"{noun} has ever {participle} the {thing}."
    return f"No {end}", f"Some {end}"


def _negation(rng: Draw) -> Pair:
    start, verb, thing = f"The {rng.choice(_ANIMATE)[0]}", rng.choice(_BASE), rng.choice(_THINGS)[0]
    return f"{start} does not {verb} the {thing}.", f"{start} not {verb}s the {thing}."


def _transitivity(rng: Draw) -> Pair:
    start, end = f"The {rng.choice(_ANIMATE)[0]}", f"the {rng.choice(_THINGS)[0]}."
    return f"{start} {rng.choice(_TRANSITIVE)} {end}", f"{start} {rng.choice(_INTRANSITIVE)} {end}"


def _quantifier(rng: Draw) -> Pair:
    place = f"{rng.choice(_PLACES)} the {rng.choice(_THINGS)[0]}."
    if rng.randrange(2):
        noun = rng.choice(_ANIMATE)[1]
        return f"There are not many {noun} {place}", f"There are not much {noun} {place}"
    mass = rng.choice(_MASS)
    return f"There is not much {mass} {place}", f"There is not many {mass} {place}"


def _case(rng: Draw) -> Pair:
    right, wrong = rng.choice([("She", "Her"), ("He", "Him"), ("They", "Them"), ("We", "Us")])
    end = f"{rng.choice(_TRANSITIVE)} the {rng.choice(_THINGS)[0]}."
    return f"{right} {end}", f"{wrong} {end}"


def _gap(rng: Draw) -> Pair:
    end = f"the {rng.choice(_ANIMATE)[0]} {rng.choice(_TRANSITIVE)} the {rng.choice(_THINGS)[0]}."
    return f"I know that {end}", f"I know what {end}"


def _article(rng: Draw) -> Pair:
    start = f"The {rng.choice(_ANIMATE)[0]} {rng.choice(_TRANSITIVE)}"
    if rng.randrange(2):
        return f"{start} an {(noun := rng.choice(_VOWELS))}.", f"{start} a {noun}."
    return f"{start} a {(noun := rng.choice(_CONSONANTS))}.", f"{start} an {noun}."


# Phenomenon → paradigm → function that draws a pair.
PARADIGMS: dict[str, dict[str, Callable[[Draw], Pair]]] = {
    "agreement": {
        "singular_subject": lambda rng: _agreement(rng, 0),
        "plural_subject": lambda rng: _agreement(rng, 1),
        "determiner_noun": _determiner,
    },
    "binding": {
        "reflexive_gender": _reflexive_gender,
        "reflexive_number": _reflexive_number,
        "reflexive_behind_another_noun": _binding,
    },
    "word_order": {"adjective_noun": _adjective, "verb_object": _object, "question_inversion": _inversion},
    "verb_forms": {"past_participle": _participle, "negation_with_do": _negation, "transitivity": _transitivity},
    "licensing": {"negative_polarity": _polarity, "many_and_much": _quantifier, "filler_gap": _gap},
    "word_forms": {"pronoun_case": _case, "a_and_an": _article},
}


def minimal_pairs() -> list[Item]:
    """Return all pairs, `NUM_PAIRS` different ones of each paradigm, the right sentence first."""
    items = []
    for phenomenon, paradigms in PARADIGMS.items():
        for paradigm, draw in paradigms.items():
            rng, pairs = random.Random(paradigm), dict[Pair, None]()
            while len(pairs) < NUM_PAIRS:
                pairs[draw(rng)] = None
            groups = {"phenomenon": phenomenon, "paradigm": paradigm}
            items += [Item(f"{paradigm}-{number}", "", pair, 0, groups) for number, pair in enumerate(pairs)]
    return items
