"""Inputs left out are named: links, unreadable folders and files, other formats, prepared data."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_pipeline.errors import DataError
from data_pipeline.preparation.options import PrepareConfig
from data_pipeline.preparation.pipeline import prepare
from data_pipeline.report.page import report
from data_pipeline.report.summary import summary
from data_pipeline.sources import folders
from data_pipeline.sources.files import Files
from data_pipeline.sources.folders import files_below, matches_of
from data_pipeline.sources.problems import Problems


def write(folder, *names, text="text"):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text} of {name}")


def below(folder, pattern=None, on_error="stop"):
    """Return names of files read, and of those left out, by reason."""
    problems = Problems()
    found = files_below(folder, on_error, problems) if pattern is None else matches_of(pattern, on_error, problems)
    names = [path.relative_to(folder).as_posix() for path in found]
    left_out = {
        why: [Path(one).relative_to(folder).as_posix() for one in all] for why, all in problems.left_out.items()
    }
    return names, left_out


@pytest.fixture
def refusing(monkeypatch):
    """Make a folder called `closed` unreadable, also for root."""
    scandir = os.scandir

    def refuse(path):
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(folders.os, "scandir", refuse)


def test_linked_folders_are_followed_and_each_folder_is_read_once(tmp_path):
    write(tmp_path, "in/a/1.txt", "in/a/b/2.txt", "outside/3.txt", "outside/deep/4.txt")
    (tmp_path / "in/a/loop").symlink_to("..")
    (tmp_path / "in/self").symlink_to(".")
    (tmp_path / "in/0").symlink_to("../outside")
    (tmp_path / "outside/back").symlink_to("../in")
    (tmp_path / "in/again").symlink_to("a/b")
    expected = ["0/3.txt", "0/deep/4.txt", "a/1.txt", "a/b/2.txt"]
    links = ["0/back", "a/loop", "again", "self"]
    names, left_out = below(tmp_path / "in")
    assert (names, sorted(left_out.pop("linked_folders")), left_out) == (expected, links, {})
    names, left_out = below(tmp_path / "in", f"{tmp_path}/in/**/*.txt")
    assert (names, sorted(left_out.pop("linked_folders")), left_out) == (expected, links, {})
    assert below(tmp_path / "in", f"{tmp_path}/in/0/*")[0] == ["0/3.txt", "0/back", "0/deep"]


def test_prepared_data_reports_and_hidden_files_are_never_input(tmp_path):
    write(tmp_path, "a.txt", ".b.txt", ".git/c.txt", "report.html", "sub/report.html", "sub/d.html")
    write(tmp_path, "data/removed.jsonl", "data/manifest.json", "half/tokenizer/tokenizer.json", "half/.preparing/lock")
    left_out = {
        "hidden_files": [".b.txt", ".git"],
        "reports": ["report.html", "sub/report.html"],
        "prepared_folders": ["data", "half"],
    }
    names, found = below(tmp_path)
    assert names == ["a.txt", "sub/d.html"]
    assert {why: sorted(all) for why, all in found.items()} == left_out
    assert below(tmp_path, f"{tmp_path}/**/*.*l")[0] == ["sub/d.html"]
    with pytest.raises(DataError, match=r"data holds manifest\.json, so it is prepared data, not input"):
        below(tmp_path / "data")
    with pytest.raises(DataError, match=r"half holds \.preparing"):
        below(tmp_path / "half")
    write(tmp_path, "only/.b.txt", "only/x.pdf")
    with pytest.raises(DataError, match=r"it holds only \.pdf, hidden files; the formats are"):
        below(tmp_path / "only")


def test_folders_that_cannot_be_read_stop_the_run_or_are_named(tmp_path, refusing):
    write(tmp_path, "in/a/1.txt", "in/closed/2.txt")
    for pattern in (None, f"{tmp_path}/in/**/*.txt", f"{tmp_path}/in/*/*.txt"):
        with pytest.raises(
            DataError, match=r"cannot read the folder .*in/closed: Permission denied; .*--on-error skip"
        ):
            below(tmp_path / "in", pattern)
        problems = Problems()
        find = files_below if pattern is None else matches_of
        found = find(tmp_path / "in" if pattern is None else pattern, "skip", problems)
        assert [path.name for path in found] == ["1.txt"]
        assert problems.left_out == {
            "unreadable_folders": [f"cannot read the folder {tmp_path}/in/closed: Permission denied"]
        }


def test_files_that_cannot_be_read_stop_the_run_or_are_named(tmp_path, monkeypatch):
    write(tmp_path, "a.txt", "b.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "b.txt" and access(path, mode))
    for name, why in (("b", "Permission denied"), ("gone", "No such file"), ("pipe", "it is not a file")):
        with pytest.raises(DataError, match=rf"cannot read .*/{name}\.txt: {why}.*--on-error skip"):
            Files("x", [tmp_path / f"{name}.txt"], "stop")
    files = Files("x", files_below(tmp_path, "skip", Problems()), "skip")
    assert [Path(one.split(": ")[0]).name for one in files.problems.left_out["unreadable_files"]] == [
        "b.txt", "gone.txt", "pipe.txt",
    ]  # fmt: skip
    assert files.problems.counts == {"unreadable_files": 3}


def test_inputs_left_out_are_named_and_beyond_twenty_counted(tmp_path):
    write(tmp_path, "in/a.txt", "in/b.txt", *(f"in/{number:02}.pdf" for number in range(25)))
    (tmp_path / "in/empty.txt").write_text("")
    manifest = prepare(PrepareConfig((str(tmp_path / "in"),), output=str(tmp_path / "out"), workers=1))
    source = manifest.sources[0]
    assert source["problems"] == {"files_of_other_formats": 25, "empty_files": 1}
    assert source["left_out"]["files_of_other_formats"] == [f"{tmp_path}/in/{number:02}.pdf" for number in range(20)]
    assert source["left_out"]["empty_files"] == [f"{tmp_path}/in/empty.txt"]
    for page in (summary(manifest, "out"), report(manifest, "out")):
        assert "19.pdf" in page and "20.pdf" not in page and "and 5 more" in page and "empty.txt" in page


def test_an_input_within_a_folder_that_cannot_be_looked_into_is_named_itself(tmp_path, monkeypatch):
    write(tmp_path, "closed/a.txt", "b.txt")
    stat = os.stat

    def refuse(path, *arguments, **options):
        if isinstance(path, (str, os.PathLike)) and "closed" in Path(path).parent.parts:
            raise PermissionError(13, "Permission denied")
        return stat(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", refuse)
    inputs = (str(tmp_path / "closed/a.txt"), str(tmp_path / "b.txt"))
    with pytest.raises(DataError, match=r"cannot read .*/closed/a\.txt: Permission denied; leave such files out"):
        prepare(PrepareConfig(inputs, output=str(tmp_path / "out"), workers=1))
    with pytest.raises(DataError, match=r"the input is empty: .*closed/a\.txt; left out: cannot read .*/closed/a\.txt"):
        prepare(PrepareConfig(inputs[:1], output=str(tmp_path / "out"), workers=1, on_error="skip"))
