"""The pages of docs/components and docs/objectives, one for each part, and docs/settings.md match the code."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "components"
SECTIONS = ["The idea", "Shapes", "Settings", "Cost", "When to use it"]
OBJECTIVE_SECTIONS = ["The idea", "Loss", "Settings", "When to use it"]

spec = importlib.util.spec_from_file_location("refresh", FOLDER / "refresh.py")
refresh = sys.modules["refresh"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(refresh)
PAGES = {page.path.name: page for page in refresh.pages()}
OBJECTIVES = {page.path.name: page for page in refresh.objective_pages()}


@pytest.mark.parametrize("folder, pages", [("components", PAGES), ("objectives", OBJECTIVES)])
def test_every_part_has_a_page_and_every_page_a_part(folder, pages):
    place = FOLDER.parent / folder
    assert sorted(path.name for path in place.glob("*.md")) == sorted([*pages, "README.md"])
    index = (place / "README.md").read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"\(([\w-]+\.md)\)", index))) == sorted(pages)


def test_the_list_of_components_is_current():
    text = refresh.INDEX.read_text(encoding="utf-8")
    assert text == refresh.index(text), "python docs/components/refresh.py writes it anew"


@pytest.mark.parametrize("page", [*PAGES.values(), *OBJECTIVES.values()], ids=lambda page: page.path.stem)
def test_every_page_has_the_required_sections(page):
    text = page.path.read_text(encoding="utf-8")
    assert re.findall(r"^## (.*)$", text, re.M) == (SECTIONS if page in PAGES.values() else OBJECTIVE_SECTIONS)
    for section in re.split(r"^## ", text, flags=re.M)[1:]:
        title = section.splitlines()[0]
        assert len(section.split()) > 10, f"fewer than 11 words, heading included, in the section {title!r}"
    assert refresh.settings_table(page) in text, "python docs/components/refresh.py writes it anew"


def test_the_reference_of_settings_is_current():
    text = refresh.PAGE.read_text(encoding="utf-8")
    assert text == refresh.settings_page(), "python docs/components/refresh.py writes it anew"
    assert (
        "| `training.learning_rate` | number, above 0 | `0.001` |  | `--allow-change` | peak learning rate |\n" in text
    )


@pytest.mark.slow
def test_costs_match_the_code():
    for page in PAGES.values():
        assert refresh.cost_table(page) in page.path.read_text(encoding="utf-8"), page.path.name
