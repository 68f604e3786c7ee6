"""Extraction of English prose from docstrings.

Docstrings mix sentences with code, tables of parameters, directives and markup, in several conventions
(reStructuredText, numpydoc, Google style, Markdown). The layout is removed and the sentences stay: one paragraph per
line, without hard line breaks.
"""

from __future__ import annotations

import inspect
import re

# Frequent words of English: a paragraph in which they are rare is a list of names, a formula or code.
_FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a an and are as at be but by can do does for from had has have if in into is it its may more must no not of
        on one only or other should so such than that the their then there these they this to use used using was were
        when where which will with would you your""",
    )
)
_MIN_CHARACTERS, _MIN_WORDS, _MIN_FUNCTION_WORDS, _MIN_LETTERS = 40, 7, 0.2, 0.88
_ENDS = tuple(".!?)\"'")
_WORD = re.compile(r"[a-z][a-z'’-]*")
_SYMBOL = re.compile(r"[^A-Za-z ,.']")
_NOT_ENGLISH = re.compile(r"[\\$|]| = .* = |\w\(\w+=.*\w+=|^\w+ = ")

# Kinds of lines.
_UNDERLINE = re.compile(r"\s*([=\-~^\"'`#*+.:_])\1{2,}\s*$")
_TABLE = re.compile(r"\s*(?:\+[-=+]+\+|\|.*\||[=-]{2,}(?:\s+[=-]{2,})+)\s*$")
_CODE_DIRECTIVE = re.compile(
    r"\s*\.\. *(?:code|code-block|sourcecode|math|plot|ipython|test\w+|doctest|parsed-literal|productionlist|figure|"
    r"image|\w*-?table|toctree|index|auto\w+|current\w+|module|highlight|\w*include|raw|only|jupyter\S+|graphviz|tabs?)\b"
)
_DIRECTIVE = re.compile(r"\s*\.\.(?:\s|$)|\s*:[\w-]+:(?:\s|$)")
_FIELD = re.compile(r"\s*:(?:param|arg|key|keyword|raises?|returns?|yields?|ivar|cvar|var|r?type|meta)\b[^:]*:\s*")
_HEADING = re.compile(r"\s*[A-Z][A-Za-z ]{2,24}::?\s*$")  # "Args:", "Example::"
_NAME = r"\*{0,2}`{0,2}\*{0,2}[\w.]+`{0,2}\*{0,2}"
# A line above an indented description: "x, y : array_like", "*args", "int or None".
_LABEL = re.compile(rf"\s*{_NAME}(?:\s*,\s*{_NAME})*\s+:\s+\S.*$|(?=.{{0,60}}$).*[^\s.,;:!?]:?\s*$")
_GOOGLE_PARAMETER = re.compile(rf"\s*(?:[-*•]\s+)?{_NAME}\s*(?:\((?:[^()]|\([^()]*\))*\))?\s*(?::|--?|–)\s+(?=\S)")
_ITEM = re.compile(r"\s*(?:[-*•+]|\d+[.)]|\(\w\))\s+")
_SKIPPED_SECTIONS = frozenset(
    (
        "see also",
        "reference",
        "references",
        "example",
        "examples",
        "example usage",
        "usage",
        "shape",
        "links",
        "methods",
    )
)

# Markup within a line: a character that it always contains, a pattern, and the replacement.
_ROLE = r":(?:[\w+-]+:)*[\w+-]+:"
_MARKUP: tuple[tuple[str, re.Pattern[str], str], ...] = (
    ("`", re.compile(_ROLE + r"`~(?:[\w.]*\.)?([\w]+)`"), r"\1"),  # :class:`~package.Name`
    ("`", re.compile(_ROLE + r"`!?([^`<]*?)\s*(?:<[^`>]*>)?`"), r"\1"),  # :func:`name`, :ref:`text <target>`
    ("`", re.compile(r"`([^`<]*?)\s*<[^`>]*>`_{0,2}"), r"\1"),  # `text <address>`_
    ("]", re.compile(r"!?\[([^\][]*)\]\([^()]*\)"), r"\1"),  # [text](address)
    ("]", re.compile(r"\s*\[(?:\d+|#\w*|\*)\]_"), ""),  # [1]_
    ("`", re.compile(r"(`{1,2})([^`]+)\1_{0,2}"), r"\2"),  # ``code``, `name`_
    ("*", re.compile(r"(?<![\w*])(\*{1,2})([^\s*](?:[^*]*[^\s*])?)\1(?![\w*])"), r"\2"),  # *emphasis*, **strong**
    ("/", re.compile(r"<?https?://[^\s>)]+>?"), ""),
    ("<", re.compile(r"</?[A-Za-z][^<>]{0,60}>"), ""),
    ("(", re.compile(r" +\((?:see|see also|at)? *\)"), ""),  # the rest around a removed address
    (" ", re.compile(r"\s+([.,;:])(?=\s|$)"), r"\1"),
    ("", re.compile(r"\s+"), " "),
)


def paragraphs(docstring: str) -> list[str]:
    """Return the paragraphs of a docstring that read as English, each in one line, in order."""
    found = (_without_markup(" ".join(lines)) for lines in _blocks(inspect.cleandoc(docstring).split("\n")))
    return [text for text in found if is_prose(text)]


def is_prose(text: str) -> bool:
    """Return whether a paragraph reads as English.

    It has enough words, common function words among them, few symbols, and a proper end.
    """
    if len(text) < _MIN_CHARACTERS or not text.endswith(_ENDS) or not (text[0].isupper() or text[0] in "\"'("):
        return False
    words = _WORD.findall(text.lower())
    if len(words) < _MIN_WORDS or sum(map(_FUNCTION_WORDS.__contains__, words)) < _MIN_FUNCTION_WORDS * len(words):
        return False
    return len(_SYMBOL.findall(text)) <= (1 - _MIN_LETTERS) * len(text) and not _NOT_ENGLISH.search(text)


def _blocks(lines: list[str]) -> list[list[str]]:
    """Return the runs of lines that may be paragraphs.

    Code, tables, headings and directives are left out; each list item is a run.
    """
    blocks: list[list[str]] = [[]]
    deeper_than: int | None = None  # skip lines indented more than this
    in_fence = in_section = in_doctest = False
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        text = line.strip()
        if not text:
            in_doctest = False
            blocks.append([])
            continue
        if text.startswith(("```", "~~~~")):
            in_fence = not in_fence
            blocks.append([])
            continue
        depth, next_depth = _indent(line), _indent(following)
        if deeper_than is not None and depth <= deeper_than:
            deeper_than = None
        if in_fence or deeper_than is not None:
            continue
        in_doctest = in_doctest or text.startswith((">>>", "In ["))
        marked = text[0] in ".:"
        rest: str | None = ""  # text kept from a line that begins a block; None: it continues the last block
        if _UNDERLINE.match(following) and not _UNDERLINE.match(line):
            in_section = text.lower() in _SKIPPED_SECTIONS
        elif in_section or in_doctest or _UNDERLINE.match(line) or _TABLE.match(line):
            pass
        elif _HEADING.match(line):
            if text.endswith("::") or text.rstrip(":").lower() in _SKIPPED_SECTIONS:
                deeper_than = depth
        elif marked and _CODE_DIRECTIVE.match(line):
            deeper_than = depth
        elif marked and (field := _FIELD.match(line)):
            rest = line[field.end() :]
        elif (marked and _DIRECTIVE.match(line)) or (next_depth > depth and _LABEL.match(line)):
            pass
        elif label := _GOOGLE_PARAMETER.match(line) or _ITEM.match(line):
            rest = line[label.end() :]
        else:
            rest = None
        if rest is None:
            blocks[-1].append(text)
        else:
            blocks.append([rest.strip()] if rest.strip() else [])
        if text.endswith("::") and deeper_than is None:
            deeper_than = depth
            blocks.append([])
    return [block for block in blocks if block]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _without_markup(text: str) -> str:
    """Return one line of plain text, with a capital first letter, and with a full stop if a list item had none."""
    for sign, pattern, replacement in _MARKUP:
        if sign in text:
            text = pattern.sub(replacement, text)
    text = text.strip()
    if re.match(r"[a-z]+[ ,]", text):
        text = text[0].upper() + text[1:]
    return text + "." if text[-1:].isalnum() and len(text) > 60 else text
