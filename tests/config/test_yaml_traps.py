"""YAML pitfalls: scalars that plain YAML misreads, repeated keys, and unsupported features."""

import pytest
import yaml

from stlm.config.yaml.tree import Dumper, read_tree


def read(text):
    problems = []
    tree = read_tree(text, "a.yaml", problems)
    return tree, [str(problem) for problem in problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4),
        ("1e3", 1000.0),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("1_000", 1000),
        ("+7", 7),
        ("0", 0),
        ("no", "no"),
        ("yes", "yes"),
        ("off", "off"),
        ("true", True),
        ("False", False),
        ("12:30:00", "12:30:00"),
        ("010", "010"),
        ("0x10", "0x10"),
        ("2024-01-02", "2024-01-02"),
        ("null", None),
        ("~", None),
        ("", None),
        ("'3e-4'", "3e-4"),
        ("e5", "e5"),
        ("1e", "1e"),
        (".", "."),
    ],
)
def test_scalars_have_the_intended_types(text, value):
    tree, problems = read(f"key: {text}")
    assert problems == []
    got = tree.value["key"].value
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "text", ["3e-4", "no", "12:30", "010", "1_000", "null", "true", ".5", "", "a: b", "é", " x ", "[", "1e3"]
)
def test_dumped_text_stays_text_for_every_reader(text):
    dumped = yaml.dump({"key": text}, Dumper=Dumper, allow_unicode=True)
    assert read(dumped)[0].value["key"].value == text
    assert yaml.safe_load(dumped) == {"key": text}


def test_repeated_key_names_both_lines():
    assert read("a: 1\nb:\n  c: 2\n  d: 3\n  c: 4\n")[1] == ["a.yaml:5: c: repeated key; it is already set in line 3"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &x 1\nb: *x\n", "a.yaml:2: not readable as YAML: aliases are not used here"),
        ("a: !!python/tuple [1]\n", "a.yaml:1: got the tag"),
        ("a: !thing 1\n", "a.yaml:1: got '1' with the tag '!thing'"),
        ("[a]: 1\n", "a.yaml:1: got a section or list as a key"),
        ("a: 1\n  b: 2\n", "a.yaml:2: not readable as YAML: mapping values are not allowed"),
        ("a: [1, 2\n", "a.yaml:2: not readable as YAML: "),
        ("a: 1\n---\nb: 2\n", "a.yaml:2: not readable as YAML: "),
        ("a: \x07\n", "a.yaml: not readable as YAML: "),
    ],
)
def test_unsupported_yaml_is_refused(text, message):
    (problem,) = read(text)[1]
    assert problem.startswith(message)


def test_every_value_knows_its_line():
    tree, _ = read("a:\n  b: 1\n\n  c:\n    d: 2\n")
    assert tree.value["a"].place == "a.yaml:1"  # the place of its name
    assert tree.value["a"].value["b"].place == "a.yaml:2"
    assert tree.value["a"].value["c"].value["d"].place == "a.yaml:5"
