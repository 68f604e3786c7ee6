"""Log-likelihoods of continuations given their contexts, in batches, with shared beginnings read once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.progress import Progress
from data_pipeline.tokenizers import Tokenizer
from stlm.evals.sharding import WHOLE, EvalShard
from stlm.generation import nats_per_id
from stlm.stlm import STLM

_IDS_PER_BATCH = 1 << 11  # on a CPU: few enough for their vectors and logits to stay in its caches
_IDS_PER_BATCH_ON_GPU = 1 << 15
_HELD_PER_READ = 8  # ids whose keys and values a batch may hold, for each id that it reads
_IDS_OF_A_BATCH = 256  # overhead of one more batch, in ids: a batch may waste up to this many to avoid another one
_WORTH_SHARING = 0.2  # of the ids of a batch: saving fewer does not pay for reading it in parts


class Row(NamedTuple):
    """A context and the continuation to score after it, which begins with the space between the two, if there is one.

    The two are tokenised as one text, as in training. An id that holds bytes of both belongs to the continuation, so
    that every byte of the continuation is scored.
    """

    context: str
    continuation: str


class Likelihood(NamedTuple):
    """The likelihood of one continuation."""

    log_probability: float  # nats
    greedy: float  # 1 if each of its ids is the most probable one at its position; a tie of k ids counts 1/k


@dataclass(frozen=True)
class Likelihoods:
    """The likelihoods of the rows of each question, in order."""

    by_question: list[list[Likelihood]]
    num_cut: int  # questions whose contexts were cut at the beginning to fit


class _Question(NamedTuple):
    """The rows of one question."""

    place: int  # of the question
    ids: list[NDArray[np.int64]]
    starts: list[int]  # where each row's continuation begins
    prefix: int  # ids that all rows begin with; each row has at least one more

    @property
    def longest(self) -> int:
        return max(map(len, self.ids))

    @property
    def num_needed(self) -> int:
        """The number of ids to read if the shared beginning is read once."""
        return sum(map(len, self.ids)) - (len(self.ids) - 1) * self.prefix


@torch.no_grad()
def log_likelihoods(
    model: STLM, questions: Sequence[Sequence[Row]], label: str = "", shard: EvalShard = WHOLE
) -> Likelihoods:
    """Score every row of every question, each as the beginning of a document.

    Where a row of a question is longer than the model's context, continuations stay whole and contexts are cut at the
    beginning: all contexts of the question keep the same number of ids. A continuation that does not fit by itself
    keeps no context and is read in windows that overlap by half. `label`: description of the progress bar.
    `shard`: the batches that this rank scores.
    """
    model.eval()
    context_length = model.config.context_length
    encoded, num_cut = [], 0
    for place, rows in enumerate(questions):
        question = _encode(model.tokenizer, place, rows)
        if question.longest > context_length:
            question = _cut(question, context_length)
            num_cut += 1
        encoded.append(question)
    found = [[Likelihood(0.0, 0.0)] * len(rows) for rows in questions]
    short = [question for question in encoded if question.longest <= context_length]
    pieces = [[question] for question in encoded if question.longest > context_length]
    pieces += _batches(short, _IDS_PER_BATCH if model.device.type == "cpu" else _IDS_PER_BATCH_ON_GPU)
    with Progress(total=len(encoded), desc=label, unit="item", delay=2, disable=shard.rank > 0) as progress:
        for number, piece in enumerate(pieces):
            if shard.owns(number):
                for question, likelihoods in zip(piece, _score(model, piece), strict=True):
                    found[question.place] = likelihoods
            progress.update(len(piece))
    numbers = iter(shard.sum([number for rows in found for likelihood in rows for number in likelihood]))
    found = [[Likelihood(next(numbers), next(numbers)) for _ in rows] for rows in found]
    return Likelihoods(found, num_cut)


def longest_continuation(tokenizer: Tokenizer, rows: Sequence[Row]) -> int:
    """Return the number of ids in the longest continuation of a question."""
    question = _encode(tokenizer, 0, rows)
    return max(len(ids) - start for ids, start in zip(question.ids, question.starts, strict=True))


def _encode(tokenizer: Tokenizer, place: int, rows: Sequence[Row]) -> _Question:
    all_ids, starts = [], []
    for context, continuation in rows:
        ids = tokenizer.encode(context + continuation)
        ends = tokenizer.bytes_per_id[ids].cumsum()
        starts.append(1 + int(np.searchsorted(ends, len(context.encode()), side="right")))
        all_ids.append(np.concatenate(([tokenizer.end_of_text_id], ids), dtype=np.int64))
    return _Question(place, all_ids, starts, _common_prefix(all_ids))


def _cut(question: _Question, context_length: int) -> _Question:
    longest = max(len(ids) - start for ids, start in zip(question.ids, question.starts, strict=True))
    kept = max(0, context_length - longest)
    cuts = [max(0, start - kept) for start in question.starts]
    ids = [ids[cut:] for ids, cut in zip(question.ids, cuts, strict=True)]
    starts = [start - cut for start, cut in zip(question.starts, cuts, strict=True)]
    return _Question(question.place, ids, starts, _common_prefix(ids))


def _common_prefix(rows: Sequence[NDArray[np.int64]]) -> int:
    """Return the number of ids that all rows begin with, leaving at least one of each row."""
    shortest = min(map(len, rows)) - 1
    for row in rows[1:]:
        differing = np.flatnonzero(rows[0][:shortest] != row[:shortest])
        shortest = int(differing[0]) if len(differing) else shortest
    return shortest


def _batches(questions: Sequence[_Question], limit: int) -> Iterator[list[_Question]]:
    """Yield batches of questions of similar length with shared beginnings of similar length, the longest first.

    A batch reads about `limit` ids: the shared beginning of each question once, and the rest of each row.
    """
    for group in _groups(questions, limit):
        batch: list[_Question] = []
        rows = longest = shared = needed = 0
        for question in sorted(group, key=lambda q: q.longest - q.prefix, reverse=True):
            rows, longest = rows + len(question.ids), max(longest, question.longest)
            shared = min(shared, question.prefix) if batch else question.prefix
            needed += question.num_needed
            read = (len(batch) + 1) * shared + rows * (longest - shared)
            if batch and (read > limit or read - needed > _IDS_OF_A_BATCH or rows * longest > _HELD_PER_READ * limit):
                yield batch
                batch, rows, longest, shared = [], len(question.ids), question.longest, question.prefix
                needed = question.num_needed
            batch.append(question)
        yield batch


def _groups(questions: Sequence[_Question], enough: int) -> Iterator[list[_Question]]:
    """Yield questions grouped by the length of their shared beginnings; lengths with few ids are put together."""
    group: list[_Question] = []
    num_ids = 0
    for question in sorted(questions, key=lambda q: q.prefix, reverse=True):
        if num_ids >= enough and question.prefix != group[-1].prefix:
            yield group
            group, num_ids = [], 0
        group.append(question)
        num_ids += question.num_needed
    if group:
        yield group


def _score(model: STLM, batch: Sequence[_Question]) -> list[list[Likelihood]]:
    context_length = model.config.context_length
    if batch[0].longest > context_length:  # such a question is a batch of its own
        return [[_score_in_windows(model, torch.from_numpy(ids), context_length) for ids in batch[0].ids]]
    rows = [ids for question in batch for ids in question.ids]
    starts_R = np.array([start for question in batch for start in question.starts])
    lengths_R = np.array([len(ids) for ids in rows])
    ids_RT = np.zeros((len(rows), lengths_R.max()), np.int64)  # causal: padding after the end of a row is never read
    for row, ids in enumerate(rows):
        ids_RT[row, : len(ids)] = ids
    places_T = np.arange(ids_RT.shape[1])
    scored_RT = (places_T >= starts_R[:, None]) & (places_T < lengths_R[:, None])

    common, shared = _common_prefix(rows), min(question.prefix for question in batch)
    saved = (len(rows) - len(batch)) * shared + (len(batch) - 1) * common
    if model.embedder.ragged or scored_RT[:, 0].any() or saved < _WORTH_SHARING * ids_RT.size:
        row_M, place_M = np.nonzero(scored_RT)
        logits_MV = model(_to_device(ids_RT, model), wanted_BT=_to_device(scored_RT, model)).logits
        parts = [(row_M, *_nats_and_greedy(logits_MV, np.arange(len(row_M)), ids_RT[row_M, place_M]))]
    else:
        question_of_R = np.repeat(np.arange(len(batch)), [len(question.ids) for question in batch])
        parts = list(_read_in_parts(model, ids_RT, scored_RT, question_of_R, common, shared))

    row_M, nats_M, greedy_M = map(np.concatenate, zip(*parts, strict=True))
    nats_R, greedy_R = np.bincount(row_M, nats_M, len(rows)), np.ones(len(rows))
    np.multiply.at(greedy_R, row_M, greedy_M)
    found = iter([Likelihood(-nats, greedy) for nats, greedy in zip(nats_R.tolist(), greedy_R.tolist(), strict=True)])
    return [[next(found) for _ in question.ids] for question in batch]


def _read_in_parts(
    model: STLM,
    ids_RT: NDArray[np.int64],
    scored_RT: NDArray[np.bool_],
    question_of_R: NDArray[np.int64],
    common: int,
    shared: int,
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]]:
    """Read the first `common` ids once for all rows, those up to `shared` once for each question, and then each row.

    Yield the row, the nats and `greedy` of every id to be scored, part by part.
    """
    one_R, each_R = np.zeros_like(question_of_R), np.arange(len(ids_RT))
    ends = (common, one_R), (shared, question_of_R), (ids_RT.shape[1] - 1, each_R)  # nothing follows the last id
    _, state = model.begin(1)
    begin, holder_of_R = 0, one_R  # the row of the state that holds the ids of each row read so far
    for end, reader_of_R in ends:
        if begin == end:
            continue
        _, first_B = np.unique(reader_of_R, return_index=True)  # one row for each distinct beginning
        state = state.select(torch.from_numpy(holder_of_R[first_B]))
        following = slice(begin + 1, end + 1)  # positions that are predicted
        scored_RN = scored_RT[:, following]
        wanted_BN = np.zeros((len(first_B), end - begin), bool)
        np.logical_or.at(wanted_BN, reader_of_R, scored_RN)
        logits_WV = model.step(_to_device(ids_RT[first_B, begin:end], model), state, _to_device(wanted_BN, model))
        number_BN = wanted_BN.cumsum().reshape(wanted_BN.shape) - 1
        row_M, place_M = np.nonzero(scored_RN)
        number_M = number_BN[reader_of_R[row_M], place_M]
        yield row_M, *_nats_and_greedy(logits_WV, number_M, ids_RT[:, following][row_M, place_M])
        begin, holder_of_R = end, reader_of_R


def _to_device(array: NDArray[Any], model: STLM) -> Tensor:
    return torch.from_numpy(array).to(model.device)


def _nats_and_greedy(
    logits_WV: Tensor, number_M: NDArray[np.int64], ids_M: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the nats of each id, and 1 if it is the most probable one (1/k in a tie of k), else 0.

    `number_M`: the row of `logits_WV` that predicts each id.
    """
    logits_WV = logits_WV.float()
    number, ids = torch.from_numpy(number_M).to(logits_WV.device), torch.from_numpy(ids_M).to(logits_WV.device)
    nats = -logits_WV.log_softmax(-1)[number, ids]
    best_W = logits_WV.amax(-1)
    greedy = (logits_WV[number, ids] == best_W[number]).double()
    tied = greedy.nonzero()[:, 0]
    greedy[tied] /= (logits_WV[number[tied]] == best_W[number[tied], None]).sum(-1)
    return nats.double().cpu().numpy(), greedy.cpu().numpy()


def _score_in_windows(model: STLM, ids: Tensor, context_length: int) -> Likelihood:
    """Score a continuation that is longer than the context. Windows give only its nats: `greedy` is NaN."""
    stride = max(1, context_length // 2)
    pieces = nats_per_id(
        lambda ids_BT: model(ids_BT.to(model.device)).logits, ids, context_length=context_length, stride=stride
    )
    return Likelihood(-torch.cat(list(pieces)).double().sum().item(), math.nan)
