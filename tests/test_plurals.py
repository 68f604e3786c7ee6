"""No message prints a plural after the number one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from data_pipeline.plurals import number_of

ROOT = Path(__file__).parents[1]
NOUNS = (
    "answers|bytes|checkpoints|conversations|cores|documents|drafts|duplicates|entries|epochs|examples|experts|"
    "files|folders|groups|heads|ids|images|items|jobs|labels|layers|lines|minutes|models|names|nodes|pages|pairs|"
    "paragraphs|pieces|plans|problems|processes|prompts|questions|ranks|records|requests|rollbacks|rows|runs|samples|"
    "scores|seconds|sentences|settings|shards|sources|splits|steps|stories|tasks|tensors|texts|threads|times|tokens|"
    "turns|windows|words|workers"
)
COUNTED = re.compile(rf"^ (?:more |further |new |other |different |left-out |training )*(?:{NOUNS})\b")


def test_counted():
    assert [number_of(number, "document") for number in (0, 1, 2, 1234)] == [
        "0 documents", "1 document", "2 documents", "1,234 documents",
    ]  # fmt: skip
    assert (number_of(1, "matrix", "matrices"), number_of(2, "matrix", "matrices")) == ("1 matrix", "2 matrices")


def uncounted(tree: ast.Module) -> list[str]:
    """The f-strings with a whole number before a plural. A number with digits behind the point takes the plural anyway,
    and so does a constant, which its author knows to be more than one."""
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.JoinedStr):
            continue
        for value, text in zip(node.values, node.values[1:], strict=False):
            if not isinstance(value, ast.FormattedValue) or not isinstance(text, ast.Constant):
                continue
            spec = "" if value.format_spec is None else ast.unparse(value.format_spec)
            name = ast.unparse(value.value)
            if COUNTED.match(str(text.value)) and "." not in spec and "%" not in spec and not is_constant(name):
                found.append(f"{node.lineno}: {{{name}}}{text.value[:30]}")
    return found


# Numbers that preceding lines have checked to be more than one, or sizes of files that are.
MORE_THAN_ONE = {
    "len(problems)", "self.bytes", "self.num_ids", "longest - 1", "len(prompts)", "told", "size", "vocabulary.size",
    "tokenizer['vocab_size']", "facts['context_length']", "state['bytes_seen']", "file.stat().st_size", "len(data)",
    "limits.max_body_bytes", "limits.max_choices", "values['sampled_from']", "more", "verbs[0]",
    "len(lines.taken)",
}  # fmt: skip


def is_constant(name: str) -> bool:
    if name in MORE_THAN_ONE or name.rpartition(".")[2] in ("vocab_size", "context_length", "patch_length"):
        return True  # a limit or a size that is more than one
    return name.rpartition(".")[2].lstrip("_").isupper() or " >> " in name or name.startswith(("' or '", "' and '"))


@pytest.mark.parametrize("folder", ["data_pipeline", "stlm", "scripts"])
def test_numbers_of_things_are_counted(folder):
    wrong = {
        str(path.relative_to(ROOT)): found
        for path in sorted((ROOT / folder).rglob("*.py"))
        # export/remote is exported with models, and imports as little of the project as possible
        if path.name != "plurals.py"
        and path.parent.name != "remote"
        and (found := uncounted(ast.parse(path.read_text(encoding="utf-8"))))
    }
    assert not wrong, f"say it by data_pipeline.plurals.number_of: {wrong}"


@pytest.mark.parametrize("code", ['f"{n} documents"', 'f"of {len(x):,} more rows, {y}"'])
def test_plurals_are_found(code):
    assert uncounted(ast.parse(code)) != []
