"""How probable a model finds continuations of contexts: many at a time, what they share being read once."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data_pipeline.tokenizers import Tokenizer
from stlm.evals.shares import current_share
from stlm.generation import nats_per_id
from stlm.stlm import STLM

_IDS_PER_BATCH = 1 << 14
_LOGITS_PER_BATCH = 1 << 24  # 64 MiB in fp32
_PREFIX_BUCKET = 32  # ids; questions whose common beginnings differ by less may be read together
_WORTH_SHARING = 0.2  # of the ids of a batch: saving fewer does not pay for reading it in two parts


class Row(NamedTuple):
    """Score `continuation` after `context`: text that is right behind it, with the space between them if there is one.

    The two are tokenised as one text, as a model meets them in training. An id that holds bytes of both belongs to the
    continuation, so that nothing of the continuation goes unscored.
    """

    context: str
    continuation: str


class Likelihood(NamedTuple):
    """Of one continuation."""

    log_probability: float  # nats
    greedy: float  # 1 if each of its ids is the most probable one in its place; of k equally probable ones, 1/k


@dataclass(frozen=True)
class Likelihoods:
    """Of the rows of each question, in order."""

    of: list[list[Likelihood]]
    num_cut: int  # questions whose contexts had to lose their beginnings


class _Encoded(NamedTuple):
    """The rows of one question."""

    place: int  # of the question
    ids: list[Tensor]
    starts: list[int]  # where each row's continuation begins
    shared: int  # first ids that all rows have in common; each row has one more at least

    @property
    def longest(self) -> int:
        return max(map(len, self.ids))


@torch.no_grad()
def log_likelihoods(model: STLM, questions: Sequence[Sequence[Row]], label: str = "") -> Likelihoods:
    """Score every row of every question, each as the beginning of a document.

    Where a row of a question is longer than the model's context, continuations stay whole, and contexts lose their
    beginnings: all of one question keep the same number of ids. A continuation that does not fit by itself has no
    context left, and is read in windows that overlap by half. `label`: what the progress bar says.
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
    share = current_share()
    found = [[Likelihood(0.0, 0.0)] * len(rows) for rows in questions]
    short = [question for question in encoded if question.longest <= context_length]
    pieces = [[question] for question in encoded if question.longest > context_length]
    pieces += _batches(short, model.tokenizer.vocab_size)
    with tqdm(total=len(encoded), desc=label, unit="item", delay=2, disable=share.rank > 0) as progress:
        for number, piece in enumerate(pieces):
            if share.has(number):
                for question, likelihoods in zip(piece, _score(model, piece), strict=True):
                    found[question.place] = likelihoods
            progress.update(len(piece))
    numbers = iter(share.add([number for rows in found for likelihood in rows for number in likelihood]))
    found = [[Likelihood(next(numbers), next(numbers)) for _ in rows] for rows in found]
    return Likelihoods(found, num_cut)


def _encode(tokenizer: Tokenizer, place: int, rows: Sequence[Row]) -> _Encoded:
    all_ids, starts = [], []
    for context, continuation in rows:
        ids = tokenizer.encode(context + continuation)
        ends = tokenizer.bytes_per_id[ids].cumsum()
        starts.append(1 + int(np.searchsorted(ends, len(context.encode()), side="right")))
        all_ids.append(torch.tensor([tokenizer.end_of_text_id, *ids.tolist()]))
    return _Encoded(place, all_ids, starts, _common(all_ids))


def _cut(question: _Encoded, context_length: int) -> _Encoded:
    longest = max(len(ids) - start for ids, start in zip(question.ids, question.starts, strict=True))
    kept = max(0, context_length - longest)
    cuts = [max(0, start - kept) for start in question.starts]
    ids = [ids[cut:] for ids, cut in zip(question.ids, cuts, strict=True)]
    starts = [start - cut for start, cut in zip(question.starts, cuts, strict=True)]
    return _Encoded(question.place, ids, starts, _common(ids))


def _common(rows: Sequence[Tensor]) -> int:
    """How many ids all rows begin with, at least one of each left over."""
    shortest = min(map(len, rows)) - 1
    head = torch.stack([row[:shortest] for row in rows])
    return int((head == head[0]).all(0).cumprod(0).sum())


def _batches(questions: list[_Encoded], vocab_size: int) -> Iterator[list[_Encoded]]:
    """Questions of about the same lengths together, the longest ones first."""
    limit = min(_IDS_PER_BATCH, _LOGITS_PER_BATCH // vocab_size)
    batch: list[_Encoded] = []
    rows = longest = 0
    for question in sorted(questions, key=lambda q: (q.shared // _PREFIX_BUCKET, q.longest - q.shared), reverse=True):
        rows += len(question.ids)
        longest = max(longest, question.longest)
        if batch and rows * longest > limit:
            yield batch
            batch, rows, longest = [], len(question.ids), question.longest
        batch.append(question)
    if batch:
        yield batch


def _score(model: STLM, batch: Sequence[_Encoded]) -> list[list[Likelihood]]:
    context_length = model.config.context_length
    if batch[0].longest > context_length:  # such a question is alone
        return [[_in_windows(model, ids, context_length) for ids in batch[0].ids]]
    rows = [row for question in batch for row in question.ids]
    shared = min(question.shared for question in batch)
    saved = (len(rows) - len(batch)) * shared
    if model.embedder.ragged or saved < _WORTH_SHARING * sum(map(len, rows)):
        ids_RT = pad_sequence(rows, batch_first=True)  # what stands behind the end is never looked at: causal
        nats_RT, greedy_RT = _measured(model(ids_RT.to(model.device)).logits, ids_RT)
    else:
        nats_RT, greedy_RT = _score_in_two(model, batch, rows, shared)
    found, row = [], 0
    for question in batch:
        likelihoods = []
        for ids, start in zip(question.ids, question.starts, strict=True):
            mine = slice(start, len(ids))
            likelihoods.append(Likelihood(-nats_RT[row, mine].sum().item(), greedy_RT[row, mine].prod().item()))
            row += 1
        found.append(likelihoods)
    return found


def _score_in_two(model: STLM, batch: Sequence[_Encoded], rows: Sequence[Tensor], shared: int) -> tuple[Tensor, Tensor]:
    """Read the first `shared` ids once for each question, then the rest of each row."""
    first_QS = torch.stack([question.ids[0][:shared] for question in batch])
    question_of_R = torch.tensor([number for number, question in enumerate(batch) for _ in question.ids])
    start_QV, state = model.begin(len(batch))
    logits_QSV = model.step(first_QS, state)
    first_logits_QSV = torch.cat((start_QV[:, None], logits_QSV[:, :-1]), dim=1)
    first = _measured(first_logits_QSV, first_QS)

    rest_RT = pad_sequence([row[shared:] for row in rows], batch_first=True)
    next_R1V = logits_QSV[question_of_R.to(logits_QSV.device), -1:]
    logits_RTV = [next_R1V]
    if rest_RT.size(1) > 1:
        logits_RTV.append(model.step(rest_RT[:, :-1], state.select(question_of_R)))
    rest = _measured(torch.cat(logits_RTV, dim=1), rest_RT)
    nats, greedy = (torch.cat((one[question_of_R], two), dim=1) for one, two in zip(first, rest, strict=True))
    return nats, greedy


def _measured(logits_BTV: Tensor, ids_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Of each id: its nats, and whether it is the most probable one (1/k of k). Both [B, T], float64, on the CPU."""
    logits_BTV, ids_BT = logits_BTV.float(), ids_BT.to(logits_BTV.device)
    nats_BT = cross_entropy(logits_BTV.transpose(1, 2), ids_BT, reduction="none")
    best_BT1 = logits_BTV.amax(-1, keepdim=True)
    is_best_BT = logits_BTV.gather(-1, ids_BT[..., None])[..., 0] == best_BT1[..., 0]
    greedy_BT = is_best_BT / (logits_BTV == best_BT1).sum(-1)
    return nats_BT.double().cpu(), greedy_BT.double().cpu()


def _in_windows(model: STLM, ids: Tensor, context_length: int) -> Likelihood:
    """Of a continuation that is longer than the context. Windows give its nats alone: `greedy` is not a number."""
    stride = max(1, context_length // 2)
    pieces = nats_per_id(
        lambda ids_BT: model(ids_BT.to(model.device)).logits, ids, context_length=context_length, stride=stride
    )
    return Likelihood(-torch.cat(list(pieces)).double().sum().item(), math.nan)
