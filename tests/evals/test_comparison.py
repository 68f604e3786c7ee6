"""Comparisons: statistics worked out by hand, and two models from their files to the page."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from stlm.config import RunConfig, dump_run_config, from_dict
from stlm.errors import StlmError
from stlm.evals.comparison.paired import (
    Sample,
    compare,
    comparison_text,
    difference,
    group_difference,
    holm,
    mcnemar,
    read_samples,
)
from stlm.evals.comparison.plots import Curve, figures, read_curve, write_figures, write_page
from stlm.evals.comparison.seed_groups import groups_of, run_of


def choices(credits, sha256="same", passages=None):
    items = [{"id": str(n), "accuracy": credit} for n, credit in enumerate(credits)]
    for item, passage in zip(items, passages or [], strict=False):
        item["passage"] = passage
    return Sample.of({"sha256": sha256}, items, "accuracy")


def documents(pairs):
    items = [{"id": str(n), "nats": bits * np.log(2), "bytes": size} for n, (bits, size) in enumerate(pairs)]
    return Sample.of({"sha256": "text"}, items, "accuracy")


def test_mcnemar_by_hand():
    """Ten items differ, nine of them won: 2 (C(10,0) + C(10,1)) / 2^10; ties do not count."""
    delta = np.array([1.0] * 8 + [0.5] + [-1.0] + [0.0] * 5)
    assert mcnemar(delta) == pytest.approx(22 / 1024)
    assert mcnemar(np.zeros(4)) == 1.0
    assert mcnemar(np.array([1.0, -1.0])) == 1.0


def test_holm_by_hand():
    """Sorted: 0.01 x 4, 0.02 x 3, 0.03 x 2, 0.04 x 1, and each at least the previous one."""
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
    """Documents cost from 10 to 300 bits, and each costs one model a bit more: only that bit is the difference."""
    sizes = [10 * n for n in range(1, 31)]
    found = difference(documents([(bits + 1, 10) for bits in sizes]), documents([(bits, 10) for bits in sizes]))
    assert found[:3] == pytest.approx((0.1, 0.1, 0.1))
    half = [1.0, 0.0] * 10
    same = difference(choices(half), choices(half))
    assert (same[:3], same.p) == ((0, 0, 0), 1)


def test_one_item_is_never_significant():
    found = difference(documents([(5, 1)]), documents([(7, 1)]))
    assert (found.value, found.p, found.low, found.high) == (-2, 1, -math.inf, math.inf)


def test_items_of_one_passage_count_as_one():
    """Twenty items won are significant; twenty items of only two passages are not."""
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
    with pytest.raises(StlmError, match=r"task: one and two were scored on different items .sha256 a and b"):
        compare({"one": {"task": choices([1.0], "a")}, "two": {"task": choices([1.0], "b")}})
    with pytest.raises(StlmError, match="items of one and two differ in '1'"):
        compare({"one": {"task": choices([1.0])}, "two": {"task": choices([1.0, 0.0])}})
    with pytest.raises(StlmError, match=r"no task with items in common \(one: x; two: y\)"):
        compare({"one": {"x": choices([1.0])}, "two": {"y": choices([1.0])}})


def test_seeds_of_groups_by_hand():
    """Scores 1.00, 1.02, 1.04 and 1.10, 1.12, 1.14, the same on every item: only seeds vary.

    The difference is -0.1, its variance 2 x 0.0004 / 3 with 4 degrees of freedom, t = -0.1 / 0.01633 = -6.124:
    p = 0.0036 by any table of t, and the interval is 2.776 x 0.01633 to each side.
    """
    first = [documents([(10 * score, 10)] * 30) for score in (1.00, 1.02, 1.04)]
    second = [documents([(10 * score, 10)] * 30) for score in (1.10, 1.12, 1.14)]
    found = group_difference(first, second)
    assert found.value == pytest.approx(-0.1) and found.p == pytest.approx(0.00360, abs=2e-5)
    assert found.high - found.value == pytest.approx(2.776 * 0.016330, abs=1e-4)
    alone = group_difference(first, second[1:2])  # variance assumed equal: 0.0004 (1/3 + 1), 2
    assert alone.high - alone.value == pytest.approx(4.303 * 0.023094, abs=1e-4)
    same = group_difference(first[:1], second[:1])
    assert same == difference(first[0], second[0])


def test_items_contribute_to_the_variance_in_addition_to_seeds():
    """Without spread over seeds, the t-test of the items' differences remains: 1 for twelve items and 0 for eight."""
    won, lost = choices([1.0] * 12 + [0.0] * 8), choices([0.0] * 20)
    found = group_difference([won, won], [lost, lost])
    error = np.std([1.0] * 12 + [0.0] * 8, ddof=1) / np.sqrt(20)
    assert found.high - found.value == pytest.approx(2.093 * error, abs=1e-4)


def test_seeds_of_one_group_are_not_compared():
    samples = {
        f"{kind}{seed}": {"task": choices([1.0] * wins + [0.0] * (40 - wins))}
        for kind, all_wins in (("a", (30, 31, 32)), ("b", (10, 11, 12)))
        for seed, wins in enumerate(all_wins)
    }
    groups = {"a": ("a0", "a1", "a2"), "b": ("b0", "b1", "b2")}
    found = compare(samples, groups)
    assert [(pair.first, pair.second) for pair in found.pairs] == [("a", "b")] and found.best("task") == "a"
    text = comparison_text(found)
    assert "a (3 seeds)" in text and "0.7750 ± 0.0250*" in text and "0.2750 ± 0.0250\n" in text
    assert ["b", "b2", "0.3000"] in [line.split() for line in text.splitlines()]
    assert "corrected for 1 test (Holm)" in text
    alone = compare({name: samples[name] for name in groups["a"]}, {"a": groups["a"]})
    assert alone.pairs == [] and alone.best("task") is None and "Holm" not in comparison_text(alone)


def run_folder(path, seed, rate=1e-3, validation=()):
    path.mkdir(parents=True)
    (path / "config.yaml").write_text(
        dump_run_config(from_dict(RunConfig, {"seed": seed, "training": {"learning_rate": rate}}))
    )
    lines = [{"step": 10 * n, "split": "train", "bytes_seen": 600 * n, "bits_per_byte": 5 - n,
              "timing": {"bytes_per_second": 10}} for n in (1, 2)]  # fmt: skip
    lines[1:1] = [{"step": step, "split": "validation", "bits_per_byte": value} for step, value in validation]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_runs_are_grouped_by_equal_settings(tmp_path):
    one, two = (run_folder(tmp_path / "runs" / f"a-seed{seed}", seed) for seed in (1, 2))
    other = run_folder(tmp_path / "runs" / "b", 1, rate=2e-3)
    again = run_folder(tmp_path / "runs" / "c", 1, rate=2e-3)
    result = tmp_path / "two.json"
    result.write_text(json.dumps({"model": f"{two}/checkpoints/step_00000020/model", "results": {}}))
    assert groups_of([one, other, two], []) == {str(tmp_path / "runs" / "a"): (one, two), other: (other,)}
    assert groups_of([one, str(result)], []) == {f"{one} and others": (one, str(result))}
    seeds = [run_folder(tmp_path / "d" / f"seed{seed}", seed, rate=3e-3) for seed in (1, 2)]
    assert groups_of(seeds, []) == {str(tmp_path / "d"): tuple(seeds)}
    assert run_of(str(result)) == Path(two) and run_of(str(tmp_path / "none.json")) is None
    assert groups_of([other, again], []) == {other: (other,), again: (again,)}, "equal seeds are no spread"
    assert groups_of([other], [f"a={tmp_path}/runs/a-*"]) == {"a": (one, two), other: (other,)}
    assert groups_of([one, other], [f"mine={one},{two}"]) == {"mine": (one, two), other: (other,)}
    for named, message in [
        (["a"], r"--group: got 'a', expected NAME=RUN,RUN"),
        ([f"a={tmp_path}/nothing*"], r"--group a: no path matches"),
        ([f"a={one}", f"a={two}"], r"got 'a' twice"),
        ([f"a={one}", f"b={one}"], r"--group b: .* is in another group too"),
        ([f"a={one},{one}"], r"named twice"),
        ([f"a={one}", f"b={one}/"], r"are the same model; name each once"),
        ([f"a={one},{other}"], r"both have seed=1, .* train it with seed=2"),
    ]:
        with pytest.raises(StlmError, match=message):
            groups_of([], named)


def test_curves_are_plotted_over_the_bytes_read(tmp_path):
    run = Path(run_folder(tmp_path / "run", 1, validation=[(0, 8.0), (5, 4.5), (15, 3.5), (20, 3.0)]))
    assert read_curve(run) == Curve([0.0006, 0.0012], [1.0, 2.0], [4, 3])
    found = read_curve(run, "validation")
    assert found is not None and found.bits_per_byte == [8.0, 4.5, 3.5, 3.0]
    assert found.megabytes == pytest.approx([0, 0.0003, 0.0009, 0.0012])
    assert found.minutes == pytest.approx([0, 0.5, 1.5, 2])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 30, "spl')  # a running or killed run leaves half a line
    assert read_curve(run, "validation") == found
    assert read_curve(tmp_path) is None


def test_seeds_without_a_common_range_are_lines_of_their_own(tmp_path):
    runs = {f"a{seed}": Path(run_folder(tmp_path / f"a{seed}", seed)) for seed in (1, 2)}
    path = runs["a2"] / "metrics.jsonl"
    path.write_text(path.read_text().replace('"bytes_per_second": 10', '"bytes_per_second": 1'))
    samples = {name: {"blimp": choices([1.0, 0.0])} for name in runs}
    drawn = figures(compare(samples, {"a": ("a1", "a2")}), runs)["train_by_time"].drawn
    assert [list(line.get_xdata()) for line in drawn.axes[0].lines] == [[1.0, 2.0], [10.0, 20.0]]


def test_page_and_figures(tmp_path: Path):
    """Results of two groups and of a single run go into one file, and each figure into two."""
    runs = {f"a{seed}": Path(run_folder(tmp_path / f"a{seed}", seed, validation=[(10, 4.0 + seed), (20, 3.0)]))
            for seed in (1, 2)}  # fmt: skip
    samples = {name: {"blimp": choices(credits)} for name, credits in
               (("a1", [1.0, 0.0]), ("a2", [1.0, 1.0]), ("b<1>", [0.0, 0.0]))}  # fmt: skip
    found = compare(samples, {"a": ("a1", "a2"), "b<1>": ("b<1>",)})
    files = write_figures(tmp_path / "new" / "figures", found, runs)
    names = {"validation_by_data", "validation_by_time", "train_by_data", "train_by_time", "score_blimp"}
    assert {(path.stem, path.suffix) for path in files} == {(name, kind) for name in names for kind in (".svg", ".pdf")}
    for path in files:
        assert path.read_bytes().startswith(b"%PDF" if path.suffix == ".pdf" else b"<?xml")
    before = [path.read_bytes() for path in files]
    assert before == [path.read_bytes() for path in write_figures(tmp_path / "again", found, runs)], "the same again"
    write_page(tmp_path / "page.html", found, runs)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == len(names) and "b&lt;1&gt;" in page and "<b<1>" not in page
    assert "learning_rate: 0.001" in page and "src=" not in page and "± " in page
    alone = compare({"a1": samples["a1"]})
    write_page(tmp_path / "alone.html", alone, {"a1": runs["a1"]})
    page = (tmp_path / "alone.html").read_text()
    assert "<h1>a1</h1>" in page and page.count("<svg") == len(names) and "Holm" not in page


def test_results_are_read_from_files(tmp_path: Path):
    for name, credits in (("a", [1, 0, 1]), ("b", [0, 0, 1])):
        lines = [{"task": "blimp", "id": str(n), "accuracy": credit} for n, credit in enumerate(credits)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        found = {"results": {"blimp": {"sha256": "x"}}, "items_file": f"{name}.jsonl"}
        (tmp_path / f"{name}.json").write_text(json.dumps(found))
    found = compare({name: read_samples(tmp_path / f"{name}.json", "accuracy") for name in "ab"})
    assert found.pairs[0].difference.value == pytest.approx(1 / 3)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(StlmError, match=r"a\.json: there is no file .*a\.jsonl; expected a run, or the output of"):
        read_samples(tmp_path / "a.json", "accuracy")
