"""The SVG files in docs/pictures match their script, suit light and dark mode, and are each shown on a page."""

from __future__ import annotations

import re
import runpy
import xml.etree.ElementTree
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"


def test_pictures_are_current_and_embedded() -> None:
    pictures = runpy.run_path(str(DOCS / "pictures" / "make.py"))["PICTURES"]
    assert {path.name for path in DOCS.glob("pictures/*.svg")} == set(pictures)
    embedded = {
        name: alternative
        for page in DOCS.rglob("*.md")
        for alternative, name in re.findall(r"!\[([^\]]*)\]\([./]*pictures/([\w-]+\.svg)\)", page.read_text("utf-8"))
    }
    assert set(embedded) == set(pictures) and all(len(text) > 20 for text in embedded.values())
    for name, draw in pictures.items():
        text = (DOCS / "pictures" / name).read_text(encoding="utf-8")
        assert draw().svg() == text, "python docs/pictures/make.py writes it anew"
        xml.etree.ElementTree.fromstring(text)
        assert "@media (prefers-color-scheme: dark)" in text and "http://www.w3.org/2000/svg" in text
