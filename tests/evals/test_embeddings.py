"""Similarity and retrieval with known vectors."""

import json

import numpy as np
import pytest
from scipy.stats import spearmanr

from data_pipeline.errors import DataError
from data_pipeline.tokenizers import build_tokenizer
from stlm.errors import StlmError
from stlm.evals import Options, curve_text, load_tasks, markdown
from stlm.evals.tasks.embeddings import load_retrieval, load_similarity, query_ranks


class Angles:
    """A model that embeds the text "30 …" at an angle of 30 degrees."""

    tokenizer, longest_text = build_tokenizer("byte"), 12

    def embed(self, texts):
        angles = np.radians([float(text.split()[0]) for text in texts])
        return 7 * np.stack((np.cos(angles), np.sin(angles)), 1)


def write(folder, name, *records):
    lines = [json.dumps({"id": str(number), **record}) + "\n" for number, record in enumerate(records)]
    (folder / name).write_text("".join(lines))
    return folder


def pair(first, second, score):
    return {"sentence1": first, "sentence2": second, "score": score}


def query(text, document):
    return {"query": text, "document": document}


def test_similarity_is_the_correlation_of_ranks_and_not_its_p_value(tmp_path):
    pairs = [pair("0", "0 same", 5), pair("0", "20", 4), pair("90", "60", 1), pair("10", "60", 2), pair("0", "100", 0)]
    text, values = load_similarity(write(tmp_path, "similarity.jsonl", *pairs))(Angles())
    # Cosines fall with the angles 0, 20, 30, 50, 100: ranks 5, 4, 3, 2, 1 against 5, 4, 2, 3, 1.
    assert values["spearman"]["value"] == pytest.approx(1 - 6 * (1 + 1) / (5 * 24))
    assert spearmanr([5, 4, 3, 2, 1], [5, 4, 2, 3, 1]).pvalue < 0.05  # which is not the number above
    assert values["spearman"]["low"] <= values["spearman"]["value"] <= values["spearman"]["high"]
    assert (values["items"], values["texts_cut"]) == (5, 0) and "90.0" in text


def test_retrieval_by_hand(tmp_path):
    write(
        tmp_path,
        "retrieval.jsonl",
        query("1", "0 first"),  # of 0, 10, 50 the nearest is the first: rank 1
        query("8", "0 first"),  # 10 is nearer: rank 2
        query("49", "10"),  # 50 is nearer: rank 2
        query("0", "50 with much text"),  # rank 3
    )
    text, values = load_retrieval(tmp_path)(Angles())
    assert values["recall_at_1"]["value"] == 1 / 4 and values["recall_at_10"]["value"] == 1
    assert values["mrr"]["value"] == pytest.approx((1 + 1 / 2 + 1 / 2 + 1 / 3) / 4)
    assert (values["items"], values["documents"], values["texts_cut"]) == (4, 3, 1)
    chance = {"recall_at_1": 1 / 3, "recall_at_10": 1, "mrr": (1 + 1 / 2 + 1 / 3) / 3}
    assert values["chance"] == pytest.approx(chance) and "61.1" in text


def test_documents_of_equal_similarity_share_their_ranks():
    assert query_ranks(np.array([0.9, 0.5, 0.5, 0.1]), 1) == pytest.approx((0, 1, (1 / 2 + 1 / 3) / 2))
    assert query_ranks(np.zeros(20), 3) == pytest.approx((1 / 20, 10 / 20, sum(1 / n for n in range(1, 21)) / 20))


@pytest.mark.parametrize(
    ("name", "records", "message"),
    [
        ("similarity", [pair("a", " ", 1)], "similarity.jsonl:1: sentence2: expected a text that is not empty"),
        ("similarity", [pair("a", "b", "high")], "similarity.jsonl:1: score: got 'high', expected a number"),
        ("similarity", [pair("a", "b", True)], "score: got True, expected a number"),
        ("similarity", [pair("a", "b", float("nan"))], "score: got nan, expected a number"),
        ("similarity", [pair("a", "b", 10**400)], "expected a number"),
        ("similarity", [pair("a", "b", 2), pair("a", "c", 2)], "every score is 2; expected scores that differ"),
        ("retrieval", [query("a", "b"), query("", "b")], "retrieval.jsonl:2: query: expected a text"),
        ("retrieval", [query("a", "b"), query("a", "c")], "1 has the query of 0; expected each query once"),
        ("retrieval", [query("a", "b"), query("c", "b")], "expected two documents or more"),
    ],
)
def test_invalid_records_are_named(tmp_path, name, records, message):
    write(tmp_path, f"{name}.jsonl", *records)
    with pytest.raises(DataError) as error:
        load_tasks(name, Options(tmp_path))
    assert message in str(error.value)


def test_missing_files_and_the_hub():
    with pytest.raises(DataError, match=r"DIR/similarity\.jsonl"):
        load_tasks("similarity", Options())
    with pytest.raises(StlmError, match="retrieval: not fetched from the hub"):
        load_tasks("retrieval", Options(hub=True))
    with pytest.raises(StlmError, match=r"'glue_cola' \(evaluated by scripts/probe\.py\)"):
        load_tasks("glue_cola", Options())


def test_reports_show_them(tmp_path):
    pairs = [pair("0", "0 same", 5), pair("0", "20", 4)]
    _, values = load_similarity(write(tmp_path, "similarity.jsonl", *pairs))(Angles())
    results = {"similarity": values}
    assert "| spearman | 100.0 |" in markdown({"model": "m"}, results)
    assert "100.0" in curve_text([{"step": 3, "results": results}])
