"""Comparisons on numbers that were worked out by hand, and of two models from their files to the page."""

import json
from pathlib import Path

import numpy as np
import pytest

from stlm.errors import StlmError
from stlm.evals.comparison import Sample, compare, comparison_text, difference, holm, mcnemar, read_samples
from stlm.evals.comparison_plots import Curve, read_curve, write_plots


def choices(credits, sha256="same", passages=None):
    items = [{"id": str(n), "accuracy": credit} for n, credit in enumerate(credits)]
    for item, passage in zip(items, passages or [], strict=False):
        item["passage"] = passage
    return Sample.of({"sha256": sha256}, items, "accuracy")


def documents(pairs):
    items = [{"id": str(n), "nats": bits * np.log(2), "bytes": size} for n, (bits, size) in enumerate(pairs)]
    return Sample.of({"sha256": "text"}, items, "accuracy")


def test_mcnemar_by_hand():
    """Nine won and one lost of ten that differ: 2 (C(10,0) + C(10,1)) / 2^10; the rest say nothing."""
    delta = np.array([1.0] * 8 + [0.5] + [-1.0] + [0.0] * 5)
    assert mcnemar(delta) == pytest.approx(22 / 1024)
    assert mcnemar(np.zeros(4)) == 1.0
    assert mcnemar(np.array([1.0, -1.0])) == 1.0


def test_holm_by_hand():
    """Sorted: 0.01 x 4, 0.02 x 3, 0.03 x 2, 0.04 x 1, and none less than the one before."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def test_bits_per_byte_are_compared_by_ratio_of_sums():
    one = documents([(10, 10), (400, 100)])
    two = documents([(20, 10), (300, 100)])
    assert one.estimate().value == pytest.approx(410 / 110)
    found = difference(one, two)
    assert (found.value, found.test) == (pytest.approx(90 / 110), "bootstrap")
    assert (found.low, found.high) == (pytest.approx(-1.0), pytest.approx(1.0))  # only the first, only the second
    assert found.p > 0.3
    always = difference(documents([(11, 10)] * 30), documents([(10, 10)] * 30))
    assert (always.low, always.high) == (pytest.approx(0.1), pytest.approx(0.1))
    assert always.p == pytest.approx(2 / 10_001)


def test_each_item_is_compared_with_itself():
    """Documents cost from 10 to 300 bits, and each costs one model a bit more: that bit alone is the difference."""
    sizes = [10 * n for n in range(1, 31)]
    found = difference(documents([(bits + 1, 10) for bits in sizes]), documents([(bits, 10) for bits in sizes]))
    assert found[:3] == pytest.approx((0.1, 0.1, 0.1))
    half = [1.0, 0.0] * 10
    same = difference(choices(half), choices(half))
    assert (same[:3], same.p) == ((0, 0, 0), 1)


def test_items_of_one_passage_count_as_one():
    """Twenty items won are much; if they are of two passages, they are as good as nothing."""
    won, lost = [1.0] * 20, [0.0] * 20
    alone = difference(choices(won), choices(lost))
    assert (alone.test, alone.p) == ("McNemar", pytest.approx(2 / 2**20))
    passages = ["first"] * 19 + ["second"]
    mixed = [1.0] * 19 + [0.0]
    of_two = difference(choices(mixed, passages=passages), choices([0.0] * 19 + [1.0], passages=passages))
    assert of_two.test == "bootstrap" and of_two.p > 0.3


def test_the_best_is_marked_where_it_is_significant():
    samples = {
        "good": {"clear": choices([1.0] * 20), "close": choices([1.0] * 11 + [0.0] * 9)},
        "bad": {"clear": choices([0.0] * 20), "close": choices([1.0] * 10 + [0.0] * 10)},
        "worse": {"clear": choices([0.0] * 20), "close": choices([0.0] * 20)},
    }
    found = compare(samples)
    assert (found.best("clear"), found.best("close")) == ("good", None)
    assert len(found.pairs) == 6
    text = comparison_text(found)
    (clear,) = [line for line in text.splitlines() if line.startswith("clear") and "to" in line and "-" not in line]
    assert clear.count("*") == 1 and "1.0000 (1.0000 to 1.0000)*" in clear


def test_less_is_better_for_bits():
    samples = {
        "few": {"bits_per_byte": documents([(10, 10)] * 30)},
        "many": {"bits_per_byte": documents([(11, 10)] * 30)},
    }
    assert compare(samples).best("bits_per_byte") == "few"


def test_other_items_are_refused():
    with pytest.raises(StlmError, match=r"task: one was asked other items than two .sha256 a and b"):
        compare({"one": {"task": choices([1.0], "a")}, "two": {"task": choices([1.0], "b")}})
    with pytest.raises(StlmError, match="items of one and two differ in '1'"):
        compare({"one": {"task": choices([1.0])}, "two": {"task": choices([1.0, 0.0])}})
    with pytest.raises(StlmError, match=r"no task with items in common \(one: x; two: y\)"):
        compare({"one": {"x": choices([1.0])}, "two": {"y": choices([1.0])}})


def test_files_and_page(tmp_path: Path):
    for name, credits in (("a", [1, 0, 1]), ("b", [0, 0, 1])):
        lines = [{"task": "blimp", "id": str(n), "accuracy": credit} for n, credit in enumerate(credits)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = {"results": {"blimp": {"sha256": "x"}}, "items_file": f"{name}.jsonl"}
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    (tmp_path / "metrics.jsonl").write_text(
        '{"split": "train", "bytes_seen": 600, "bits_per_byte": 5, "timing": {"bytes_per_second": 10}}\n'
        '{"split": "validation", "bits_per_byte": 4, "timing": {}}\n'
        '{"split": "train", "bytes_seen": 1800, "bits_per_byte": 3, "timing": {"bytes_per_second": 20}}\n'
    )
    curve = read_curve(tmp_path)
    assert curve == Curve([0.0006, 0.0018], [1.0, 2.0], [5, 3])
    found = compare({name: read_samples(tmp_path / f"{name}.json", "accuracy") for name in "ab"})
    assert found.pairs[0].difference.value == pytest.approx(1 / 3)
    write_plots(tmp_path / "page.html", found, {"a": curve})
    page = (tmp_path / "page.html").read_text()
    assert "blimp" in page and "data:image/png;base64," in page and "http" not in page
    write_plots(tmp_path / "plot.png", found, {})
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(StlmError, match=r"a\.json: cannot be compared"):
        read_samples(tmp_path / "a.json", "accuracy")
