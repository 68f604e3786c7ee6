"""The default corpus: prose from docstrings, the same each time, read without importing the packages."""

from __future__ import annotations

import sys

import pytest

from data_pipeline.sources.default_corpus import corpus
from data_pipeline.sources.default_corpus.prose import paragraphs
from data_pipeline.sources.problems import Problems
from data_pipeline.sources.source import DefaultCorpus

NUMPY_STYLE = """
    Return the metric closure of the graph, as it is defined
    in the book [1]_.

    Parameters
    ----------
    G, H : NetworkX graph
        The graph whose *closure* is to be found; see :class:`~networkx.Graph`
        for all the ways to make one.

    weight : string, optional
        short

    Returns
    -------
    list of nodes
        All the nodes that belong to the closure of ``G``.

    Examples
    --------
    >>> closure(G)  # this is the call that you would write here
    This is what is printed and it should not be in the corpus.

    This sentence belongs to the examples and not to the prose either.

    Notes
    -----
    +------+-------------------------------------------------------------+
    | name | This is a cell of a table that is not a part of the prose.  |
    +------+-------------------------------------------------------------+
    Read more about it in `the manual <https://example.org/manual>`_ and at https://example.org for free.
"""

GOOGLE_STYLE = """Sets the level of the logger to the value that is given.

    Args:
        level (int, optional): the level below which nothing is shown to the user of a program
        name: the one of it
        short: a label

    Example::

        with these(lines): that = "are code and they are not for the corpus"

    .. code-block:: python

        this is a block of code and it is not for the corpus, of course

    .. note:: The level is kept for all of the processes that are started later.

    :param other: that it is also written in this way by some of the other authors
    - Items of a list are paragraphs, if they are long enough to be one

    $x = y$ is a formula, and it is not what we would call English, is it?
"""


def test_prose_is_what_remains_of_a_docstring():
    assert paragraphs(NUMPY_STYLE) == [
        "Return the metric closure of the graph, as it is defined in the book.",
        "The graph whose closure is to be found; see Graph for all the ways to make one.",
        "All the nodes that belong to the closure of G.",
        "Read more about it in the manual and at for free.",
    ]
    assert paragraphs(GOOGLE_STYLE) == [
        "Sets the level of the logger to the value that is given.",
        "The level below which nothing is shown to the user of a program.",
        "That it is also written in this way by some of the other authors.",
        "Items of a list are paragraphs, if they are long enough to be one.",
    ]


def test_documents_come_from_a_package_that_is_never_imported(tmp_path, monkeypatch):
    package = tmp_path / "plain_package"
    (package / "tests").mkdir(parents=True)
    (package / "tests" / "test_it.py").write_text(
        '"""This is the text of a test, and it is not to be in the corpus."""'
    )
    (package / "__init__.py").write_text("raise SystemExit('imported')\n")
    (package / "old.py").write_text("print 'this is not Python of our time'\n")
    long = "The quick brown fox is not the one that jumps over the dog that was as lazy as it could be"
    (package / "module.py").write_text(
        f'"""{long}."""\n'
        f'def f():\n    """Once more, and in the words of a function, {long}."""\n'
        f'class C:\n    """{long}!"""\n'
        f'    def g(self):\n        """And this one is for a method of the class, if it may be so."""\n'
        f'add_doc(f, """\nA text that is given to a function that adds it to another one, later.\n""")\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [name for name, _ in corpus._files("plain_package")] == ["__init__.py", "module.py", "old.py"]
    documents = list(corpus.read_unit("plain_package", ("__init__.py", "module.py", "old.py")))
    assert documents == [
        "\n\n".join(
            [
                f"{long}.",
                f"Once more, and in the words of a function, {long}.",
                "And this one is for a method of the class, if it may be so.",
                "A text that is given to a function that adds it to another one, later.",
            ]
        )
    ]
    assert "plain_package" not in sys.modules


def test_units_are_bounded_and_read_the_same_each_time():
    source = DefaultCorpus()
    units = source.units(0)
    assert units[0].package == "python"
    assert {unit.package for unit in units} == {
        name for name, version in corpus.installed_versions().items() if version
    }
    assert max(unit.size for unit in units) < 10 << 20
    names = [(unit.package, name) for unit in units for name in unit.files]
    assert len(names) == len(set(names))

    smallest = min(units, key=lambda unit: unit.size)
    first, second = ([*smallest.read(Problems())] for _ in range(2))
    assert first == second
    assert len(first) > 3
    assert all(len(document) >= 200 for document in first)


def test_the_language_reference_is_in_it():
    documents = "\n\n".join(corpus.read_unit("python", ("pydoc_data/topics.py",)))
    assert "Comparisons can be chained arbitrarily" in documents
    assert len(documents) > 200_000
    with pytest.raises(FileNotFoundError):
        list(corpus.read_unit("python", ("no_such_file.py",)))
