"""Text vectors without training on top: similarity of sentences, and retrieval of documents.

The similarity of two texts is the cosine of their vectors, `STLM.embed`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_pipeline.errors import DataError
from data_pipeline.storage.atomic import sha256_file
from stlm.evals.items.reading import json_sha256, number_field, read_items, sample_items, task_file, text_field
from stlm.evals.measures import estimates, statistic_estimate
from stlm.evals.probing.scores import require_sklearn, spearman
from stlm.evals.report import percent, percents, table
from stlm.stlm import STLM


class RatedPair(NamedTuple):
    """Two sentences with a human rating of their similarity, on any scale; higher is more similar."""

    id: str
    sentence1: str
    sentence2: str
    score: float


class Query(NamedTuple):
    """A query and the document that answers it."""

    id: str
    query: str
    document: str


class QueryRanks(NamedTuple):
    """The measures of one query, each between 0 and 1."""

    recall_at_1: float  # whether its document is the most similar one
    recall_at_10: float  # whether it is among the ten most similar ones
    mrr: float  # the reciprocal of its rank


Measure = Callable[[STLM], tuple[str, dict[str, Any]]]


def rated_pair(record: dict[str, Any]) -> RatedPair:
    """Parse {"id": text, "sentence1": text, "sentence2": text, "score": number}."""
    id, first, second = (text_field(record, name) for name in ("id", "sentence1", "sentence2"))
    return RatedPair(id, first, second, number_field(record, "score"))


def query_item(record: dict[str, Any]) -> Query:
    """Parse {"id": text, "query": text, "document": text}."""
    return Query(*(text_field(record, name) for name in Query._fields))


def load_similarity(tasks_dir: str | os.PathLike[str] | None, items: int | None = None) -> Measure:
    """Load DIR/similarity.jsonl. Raises DataError where it is missing, breaks the schema or rates all pairs alike."""
    require_sklearn("similarity")
    path = task_file(tasks_dir, "similarity")
    found = read_items(path, rated_pair)
    pairs = sample_items(found, items)
    whole = {"sampled_from": len(found)} if len(pairs) < len(found) else {}
    if len({pair.score for pair in pairs}) < 2:
        raise DataError(f"{path}: every score is {pairs[0].score:g}; expected scores that differ")
    sentences = [one.sentence1 for one in pairs], [one.sentence2 for one in pairs]

    def measure(model: STLM) -> tuple[str, dict[str, Any]]:
        first_ND, second_ND = (_unit_vectors(model, texts) for texts in sentences)
        cosine_N = np.sum(first_ND * second_ND, axis=1)
        score_N = np.array([pair.score for pair in pairs])
        found = statistic_estimate(lambda places: spearman(score_N[places], cosine_N[places]), len(pairs))
        text = table(
            [["spearman", *percents(found._asdict()), "0.0"]], ["similarity", "100 rho", "95 %", "chance"], "lrrr"
        )
        cut = num_cut(model, sentences[0] + sentences[1])
        same = {"items": len(pairs), "chance": 0.0, "texts_cut": cut, **whole, **_hashes(path, pairs)}
        return text, {"spearman": found._asdict(), **same}

    return measure


def load_retrieval(tasks_dir: str | os.PathLike[str] | None, items: int | None = None) -> Measure:
    """Load DIR/retrieval.jsonl.

    Raises DataError where it is missing, breaks the schema, holds a query twice or only one document.
    """
    path = task_file(tasks_dir, "retrieval")
    queries = read_items(path, query_item)
    seen: dict[str, str] = {}
    for one in queries:
        if one.query in seen:
            raise DataError(f"{path}: {one.id} has the query of {seen[one.query]}; expected each query once")
        seen[one.query] = one.id
    whole = {} if items is None or items >= len(queries) else {"sampled_from": len(queries)}
    queries = sample_items(queries, items)
    documents = list(dict.fromkeys(one.document for one in queries))
    if len(documents) < 2:
        raise DataError(f"{path}: all queries have the same document; expected two documents or more")
    number = {document: place for place, document in enumerate(documents)}
    truth_Q = np.array([number[one.document] for one in queries])

    def measure(model: STLM) -> tuple[str, dict[str, Any]]:
        documents_ND = _unit_vectors(model, documents)
        cosine_QN = _unit_vectors(model, [one.query for one in queries]) @ documents_ND.T
        ranks = [query_ranks(cosine_N, truth) for cosine_N, truth in zip(cosine_QN, truth_Q, strict=True)]
        found = dict(zip(QueryRanks._fields, estimates(np.array(ranks)), strict=True))
        chance = query_ranks(np.zeros(len(documents)), 0)
        rows = [[name, *percents(one._asdict()), percent(guessed)]
                for (name, one), guessed in zip(found.items(), chance, strict=True)]  # fmt: skip
        cut = num_cut(model, [*documents, *(one.query for one in queries)])
        return table(rows, ["retrieval", "100 x", "95 %", "chance"], "lrrr"), {
            **{name: one._asdict() for name, one in found.items()},
            "items": len(queries), "documents": len(documents), "chance": chance._asdict(), "texts_cut": cut,
            **whole, **_hashes(path, queries),
        }  # fmt: skip

    return measure


def query_ranks(cosine_N: NDArray[np.floating[Any]], truth: int) -> QueryRanks:
    """Return the measures of the true document's rank. Equally similar documents share their ranks: each measure is its
    average over their random order."""
    first = 1 + int((cosine_N > cosine_N[truth]).sum())
    rank_R = np.arange(first, first + int((cosine_N == cosine_N[truth]).sum()))
    return QueryRanks(*(float(np.mean(value)) for value in (rank_R <= 1, rank_R <= 10, 1 / rank_R)))


def num_cut(model: STLM, texts: Iterable[str]) -> int:
    """Return the number of texts of which the model reads only the beginning."""
    return sum(len(model.tokenizer.encode(text)) > model.longest_text for text in dict.fromkeys(texts))


def _unit_vectors(model: STLM, texts: Sequence[str]) -> NDArray[np.float32]:
    vectors_ND = model.embed(texts)
    return vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)


def _hashes(path: os.PathLike[str], items: Iterable[RatedPair | Query]) -> dict[str, str]:
    return {"sha256": json_sha256(items), "file_sha256": sha256_file(path)}
