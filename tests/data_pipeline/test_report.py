"""The report DIR/report.html shows the manifest's numbers, escapes all text, and loads nothing from elsewhere."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.extras import how_to_install
from data_pipeline.loading.prepared_data import PreparedData
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import prepare
from data_pipeline.report.page import report, write_report
from data_pipeline.report.plots import PlotsMissing, byte_plot
from data_pipeline.storage.cleaning_record import excerpt
from data_pipeline.storage.manifest import Manifest

SCRIPT = Path(__file__).parents[2] / "scripts/preprocess.py"
NASTY = "<script>alert(1)</script> & \"quotes\" 'n' \x00\x1b[31m <img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    texts = [NASTY, NASTY, *(f"{'word ' * number}{number}" for number in range(200))]
    (folder / "<b>.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts) + "{<broken>\n")
    (folder / "notes.txt").write_text("Grüße.\r\n<eos>\r\nZweiter Absatz.\n")
    (folder / "evaluation.txt").write_text("<i> " + "word " * 13)
    prepare(
        PrepareConfig(
            (str(folder / "<b>.jsonl"), str(folder / "notes.txt")),
            output=str(folder / "out"),
            on_error="skip",
            validation_fraction=0.2,
            decontaminate=(str(folder / "evaluation.txt"),),
        )
    )
    return folder / "out"


class Page(HTMLParser):
    """Collects the elements, addresses and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.addresses: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        for name, value in attrs:
            assert not name.startswith("on"), "no scripts in attributes"
            if name in ("src", "href", "xlink:href", "srcset", "data"):
                self.addresses.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone_and_shows_text_as_text(prepared: Path) -> None:
    text = write_report(prepared).read_text()
    page = Page(text)
    assert not {"script", "img", "link", "iframe", "object", "b>"} & set(page.elements)
    assert all(address.startswith("#") for address in page.addresses)
    assert not re.search(r"@import|url\((?!#)", text)
    assert page.elements.count("svg") == 2
    shown = NASTY.replace("\x00", "\u2400").replace("\x1b", "\u241b")
    assert shown in page.text and "<b>.jsonl" in page.text and "\x00" not in text
    assert "{<broken>" not in text and "not valid JSON" in page.text


def test_its_numbers_are_those_of_the_manifest(prepared: Path) -> None:
    manifest = Manifest.load(prepared)
    source, notes = manifest.statistics
    assert sum(source[split]["documents"] + notes[split]["documents"] for split in ("train", "validation")) == sum(
        manifest.total(split, "documents") for split in ("train", "validation")
    )
    assert sum(source[split]["bytes"] + notes[split]["bytes"] for split in ("train", "validation")) == sum(
        manifest.total(split, "bytes") for split in ("train", "validation")
    )
    # "Grüße." has 8 bytes, "Zweiter Absatz." 15: both in the class from 8 to 15.
    assert (np.array(notes["train"]["lengths"] or [0] * 4) + np.array(notes["validation"]["lengths"] or [0] * 4))[
        3
    ] == 2
    sample = notes["sample"]
    data = "Grüße.Zweiter Absatz.".encode()
    assert sample["bytes"] == len(data) == 23 and sample["byte_counts"] == np.bincount([*data], minlength=256).tolist()
    assert sample["gzip_ratio"] == round(23 / len(gzip.compress(data, 6, mtime=0)), 4)
    assert sample["bytes_per_id"] == round(23 / 25, 4)
    data = PreparedData.open(prepared)
    documents = [bytes(ids[:-1]) for split in ("train", "validation") for ids in data.split(split).documents()]
    of_source = [document for document in documents if not document.startswith((b"Gr", b"Zw"))]
    assert len(of_source) == 14
    of_source.sort(key=lambda document: hashlib.blake2b(document, digest_size=16).digest()[:7:-1])
    assert source["excerpts"] == [excerpt(document, 500) for document in of_source[:3]], "the lowest hashes"
    page = Page(report(manifest, "name"))
    removed = manifest.cleaning["removed"]
    assert removed["exact duplicates"]["documents"] == 1 and removed["decontamination"]["documents"] == 187
    for split in ("train", "validation"):
        for what in ("documents", "bytes", "ids"):
            assert f"{manifest.total(split, what):,}" in page.text
    assert "187" in page.text and "word word word word word word word word word word word word word" in page.text


def test_the_same_manifest_gives_the_same_page(prepared: Path) -> None:
    manifest = Manifest.load(prepared)
    assert report(manifest, "name") == report(manifest, "name")
    assert "var(--series-1)" in byte_plot([1] * 256) and "#0303" not in byte_plot([1] * 256)


def test_a_missing_library_is_one_message(prepared: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(PlotsMissing, match=re.escape(how_to_install("matplotlib"))):
        report(Manifest.load(prepared), "name")


def test_the_command_rewrites_it_or_names_the_missing_part(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n<eos>\ntwo\n")
    output = tmp_path / "out"

    def run(*arguments: str, code: int = 0, without: str = "nothing") -> subprocess.CompletedProcess[str]:
        blocked = f"import runpy, sys; sys.modules[{without!r}] = None; sys.argv = {[str(SCRIPT), *arguments]!r}; "
        start = f"sys.path.insert(0, {str(SCRIPT.parent)!r}); runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
        done = subprocess.run([sys.executable, "-c", blocked + start], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == code, done.stderr
        return done

    prepare_it = ("--input", str(tmp_path / "a.txt"), "--output", str(output))
    told = [line for line in run(*prepare_it, without="matplotlib").stdout.splitlines() if "matplotlib" in line]
    assert len(told) == 1 and told[0].startswith("no report: ") and not (output / "report.html").exists()
    assert run("report", str(output), code=2, without="matplotlib").stderr.count("\n") == 1
    assert run("report", str(output)).stdout.strip() == str(output / "report.html")
    first = (output / "report.html").read_text()
    (output / "report.html").unlink()
    run(*prepare_it)  # already prepared: only the page is missing
    assert (output / "report.html").read_text() == first


def test_data_of_an_earlier_version_is_refused_by_name(prepared: Path, tmp_path: Path) -> None:
    contents = json.loads((prepared / "manifest.json").read_bytes())
    del contents["statistics"], contents["cleaning"]
    (tmp_path / "manifest.json").write_text(json.dumps(contents))
    with pytest.raises(DataError, match="holds no statistics"):
        write_report(tmp_path)
