"""The encoding of HTML pages, and detection of pages that are too large or deep for a parser.

The encoding follows the HTML and the Encoding Standard of the WHATWG: a byte-order mark has priority; next is the label
in a meta tag, or in the XML prolog. Labels are resolved as there: gb2312 is GBK, iso-8859-1 is windows-1252. A page
that is valid UTF-8 is read as UTF-8, whatever its label.
"""

from __future__ import annotations

import re

import webencodings

from data_pipeline.sources.encodings import SAMPLE, bom_and_codec, check_text, looks_broken

MAX_DEPTH = 1_000  # open elements; browsers stop at 512
MAX_NODES = 500_000  # a parser takes about 600 bytes for each

_HEAD = 64 << 10  # bytes that are searched for the label
_COMMENT = re.compile(rb"<!--.*?-->", re.DOTALL)
_META = re.compile(rb"<meta\b([^>]*)", re.IGNORECASE)
_ATTRIBUTE = re.compile(rb"""([\w-]+)\s*=\s*("[^"]*"|'[^']*'|[^\s"'>]+)""")
_IN_CONTENT = re.compile(rb"""charset\s*=\s*["']?([^\s;"']+)""", re.IGNORECASE)
_PROLOG = re.compile(rb"""\s*<\?xml\b[^>]*?\bencoding\s*=\s*["']([^"'>]+)""", re.IGNORECASE)
_WIDE_PROLOGS = ((b"<\0?\0x\0", "utf-16-le"), (b"\0<\0?\0x", "utf-16-be"))

_TAG = re.compile(rb"<(?:(!--)|(/?)([a-z][^\s/>]*)([^<>]*))")
_VOID = frozenset(b"area base br col embed hr img input link meta param source track wbr".split())
_CLOSED_BY_THE_NEXT = frozenset(b"p li dt dd tr td th tbody thead tfoot colgroup option optgroup rt rp".split())
_FORMATTING = frozenset(b"a b big code em font i nobr s small strike strong tt u".split())  # reopened in each block
_RAW = frozenset(b"script style textarea title xmp iframe noembed noframes".split())


def decoded_page(page: bytes, path: str, encoding: str) -> tuple[str, int]:
    """Return the text of a page, and the number of broken characters in it that became U+FFFD.

    encoding: given by the user; "" for none. Raises DataError if the page is not text, or has no label and is largely
    not in UTF-8.
    """
    bom, told = bom_and_codec(page, encoding)
    if told:
        text = page[len(bom) :].decode(told, "replace")
        return text, text.count("\ufffd") - _given(page)
    for beginning, codec in _WIDE_PROLOGS:
        if page.startswith(beginning):
            return page.decode(codec, "replace"), 0
    if b"\0" in page[:_HEAD]:
        check_text([page[:SAMPLE]], path)
    label = declared_encoding(page, xml_first=".xhtm" in path.lower())
    as_utf8 = page.decode("utf-8", "replace")
    broken = as_utf8.count("\ufffd") - _given(page)
    if label in ("", "utf-8") or (not broken and not label.startswith("iso2022")):
        if looks_broken([page]):
            check_text([page], path)
        return as_utf8, broken
    labelled = page.decode(label, "replace")
    worse = labelled.count("\ufffd")
    return (as_utf8, broken) if broken < worse else (labelled, worse)


def _given(page: bytes) -> int:
    """Return the number of U+FFFD in the page itself."""
    return page.count(b"\xef\xbf\xbd")


def declared_encoding(page: bytes, xml_first: bool) -> str:
    """Return Python's name of the encoding that a page declares; "" if it declares no known one."""
    head = _COMMENT.sub(b"", page[:_HEAD])
    prolog = _PROLOG.match(head)
    in_prolog = [prolog[1]] if prolog else []
    for label in [*in_prolog, *_in_meta(head)] if xml_first else [*_in_meta(head), *in_prolog]:
        found = webencodings.lookup(label.strip().decode("ascii", "replace"))
        if found is not None and found.name != "replacement":
            if found.name.startswith("utf-16"):
                return "utf-8"  # a label that could be read as ASCII rules out UTF-16
            names = {"gbk": "gb18030", "x-user-defined": "cp1252"}
            return names.get(found.name, found.codec_info.name)
    return ""


def _in_meta(head: bytes) -> list[bytes]:
    labels = []
    for meta in _META.finditer(head):
        attributes = {name.lower(): value.strip(b"\"'") for name, value in _ATTRIBUTE.findall(meta[1])}
        if b"charset" in attributes:
            labels.append(attributes[b"charset"])
        elif attributes.get(b"http-equiv", b"").lower() == b"content-type":
            labels += _IN_CONTENT.findall(attributes.get(b"content", b""))
    return labels


def beyond_limits(page: bytes) -> str:
    """Return why a page is too deep or too large for a parser, which may take hours or all memory for it; "" if it is
    not.

    Tags are counted as a parser would nest them, without building a tree.
    """
    if page.count(b"<") <= MAX_DEPTH:
        return ""
    page = page.lower()
    open_elements: list[bytes] = []
    counts: dict[bytes, int] = {}
    formatting: dict[bytes, int] = {}  # elements that a parser reopens after the block in which they were opened
    nodes = place = 0
    while tag := _TAG.search(page, place):
        comment, closing, name, rest = tag.groups()
        place = tag.end()
        if comment:
            place = page.find(b"-->", place) + 3
            if place < 3:
                break
        elif closing:
            if formatting.get(name):
                formatting[name] -= 1
            while counts.get(name):
                last = open_elements.pop()
                counts[last] -= 1
                if last == name:
                    break
        else:
            if name in (b"a", b"nobr") and formatting.get(name):  # each ends an earlier one
                formatting[name] -= 1
                if open_elements and open_elements[-1] == name:
                    counts[open_elements.pop()] -= 1
            nodes += 1 + sum(formatting.values())
            if nodes > MAX_NODES:
                return f"more than {MAX_NODES:,} elements"
            foreign = counts.get(b"svg") or counts.get(b"math")
            if name in _RAW and not foreign:
                place = page.find(b"</" + name, place)
                if place < 0:
                    break
            elif not (name in _VOID or name in _CLOSED_BY_THE_NEXT or (foreign and rest.endswith(b"/"))):
                open_elements.append(name)
                counts[name] = counts.get(name, 0) + 1
                if name in _FORMATTING:
                    formatting[name] = formatting.get(name, 0) + 1
                if len(open_elements) > MAX_DEPTH:
                    return f"elements nested more than {MAX_DEPTH:,} deep"
    return ""
