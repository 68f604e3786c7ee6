"""Exact bits per byte of a split of prepared data."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_pipeline.loading.prepared_data import SourceRange
from data_pipeline.progress import Progress
from data_pipeline.storage.id_stream import IdStream
from data_pipeline.tokenizers import Tokenizer
from stlm.errors import StlmError
from stlm.evals.measures import Estimate, estimates
from stlm.evals.sharding import WHOLE, EvalShard
from stlm.generation import nats_per_id
from stlm.stlm import STLM

_WINDOWS_PER_SEGMENT = 64  # windows read from disk at a time, so that a split of any size fits into memory
_LOGITS_PER_BATCH = 1 << 24  # 64 MiB in fp32


class SourceScore(NamedTuple):
    """Sums over the ids of one source."""

    nats: float
    ids: int
    bytes: int
    documents: int

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


@dataclass(frozen=True)
class SplitScore:
    """Sums over all ids of a split, and the windows in which they were read."""

    nats: float
    ids: int  # predicted ids, each end_of_text included
    bytes: int  # of text; end_of_text counts none
    context_length: int  # ids of a window
    stride: int  # ids from one window to the next
    sources: dict[str, SourceScore]  # sums over each source of the text, by name, in the order of the text
    nats_D: NDArray[np.float64]  # of each document, its end_of_text included
    bytes_D: NDArray[np.float64]

    @property
    def bits_per_byte(self) -> float:
        """The bits for the text and the end_of_text of its documents, per byte of text."""
        return self.nats / math.log(2) / self.bytes

    def interval(self) -> Estimate:
        """Return bits per byte with their bootstrap interval over documents."""
        return _interval(self.nats_D, self.bytes_D)

    def source_intervals(self) -> dict[str, Estimate]:
        """Return bits per byte with their interval for each source that has text."""
        found, place = {}, 0
        for name, part in self.sources.items():
            span = slice(place, place := place + part.documents)
            if part.bytes:
                found[name] = _interval(self.nats_D[span], self.bytes_D[span])
        return found


class ScoredDocument(NamedTuple):
    """The score of one document."""

    id: str
    nats: float
    bytes: int

    def values(self) -> dict[str, Any]:
        """Return the score for a JSON file."""
        return self._asdict()


def scored_documents(score: SplitScore) -> list[ScoredDocument]:
    """Return the scores of the documents of the split, in their order."""
    return [
        ScoredDocument(f"document-{number}", float(nats), int(size))
        for number, (nats, size) in enumerate(zip(score.nats_D, score.bytes_D, strict=True))
    ]


def text_fingerprint(stream: IdStream, tokenizer: Tokenizer) -> str:
    """Return the sha256 of the documents' text, which does not depend on the tokenizer."""
    digest = hashlib.sha256()
    for ids in stream.documents():
        text = tokenizer.decode_bytes(ids)
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()


def _interval(nats_D: NDArray[np.float64], bytes_D: NDArray[np.float64]) -> Estimate:
    return estimates(nats_D[:, None] / math.log(2), bytes_D)[0]


@torch.no_grad()
def score_split(
    model: STLM,
    stream: IdStream,
    *,
    stride: int | None = None,
    sources: Sequence[SourceRange] = (),
    documents_apart: bool = False,
    shard: EvalShard = WHOLE,
) -> SplitScore:
    """Score every id of the stream exactly once, in fp32; in conversations, only the ids that count in the loss.

    Windows of the model's context length begin every `stride` ids (None: half of the context), so that each id but the
    first few is predicted after at least context_length - stride others. Validation during training uses a stride of
    the context length, which is cheapest and gives the least context. `sources`: ranges of the stream to score
    separately, too. `documents_apart`: predict each id from its own document alone, as in training with windows that
    keep documents apart. `shard`: the segments that this rank scores. Raises StlmError where the split holds no text.
    """
    context = model.config.context_length
    stride = max(1, context // 2) if stride is None else stride
    if not stream.num_bytes:
        raise StlmError("the split holds no text: there is nothing to score")
    bytes_per_id = torch.from_numpy(model.tokenizer.bytes_per_id).long()
    model.eval()
    nats, num_bytes, place = 0.0, 0, 0
    of_source = {source.name: SourceScore(0.0, 0, 0, 0) for source in sources}
    given, num_given = stream.given, 0
    documents, nats_D, bytes_D = 0, np.zeros(stream.num_documents), np.zeros(stream.num_documents)
    with Progress(
        total=len(stream), desc="bits per byte", unit="id", unit_scale=True, delay=2, disable=shard.rank > 0
    ) as progress:
        for ids, nats_of_ids in _segments(model, stream, context, stride, documents_apart, shard):
            bytes_of_ids, counted = bytes_per_id[ids], torch.ones(len(ids), dtype=torch.bool)
            if given is not None:
                counted = torch.from_numpy(given.read(place, place + len(ids))) == 0
                num_given += int((~counted).sum())
                nats_of_ids, bytes_of_ids = nats_of_ids * counted, bytes_of_ids * counted
            nats += nats_of_ids.double().sum().item()
            num_bytes += int(bytes_of_ids.sum())
            ends = ids == model.tokenizer.end_of_text_id
            document_of = (documents + (ends.cumsum(0) - ends.long())).numpy()
            np.add.at(nats_D, document_of, nats_of_ids.double().numpy())
            np.add.at(bytes_D, document_of, bytes_of_ids.numpy())
            documents += int(ends.sum())
            for name, start, stop in sources:
                span = slice(max(start - place, 0), max(stop - place, 0))
                before = of_source[name]
                of_source[name] = SourceScore(
                    before.nats + nats_of_ids[span].double().sum().item(),
                    before.ids + int(counted[span].sum()),
                    before.bytes + int(bytes_of_ids[span].sum()),
                    before.documents + int(ends[span].sum()),
                )
            place += len(ids)
            progress.update(len(ids))
    nats, *rest = shard.sum([nats, *nats_D, *(source.nats for source in of_source.values())])
    nats_D, sums = np.array(rest[: len(nats_D)]), rest[len(nats_D) :]
    of_source = {name: one._replace(nats=sum) for (name, one), sum in zip(of_source.items(), sums, strict=True)}
    return SplitScore(nats, len(stream) - num_given, num_bytes, context, stride, of_source, nats_D, bytes_D)


def _segments(
    model: STLM, stream: IdStream, context: int, stride: int, documents_apart: bool, shard: EvalShard
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (ids, their nats) segment by segment, with zeros for segments that other ranks score.

    Each segment begins where a window of the whole stream begins, and the ids that it shares with the previous segment
    serve only as context: the results equal those of one pass over the whole stream.
    """

    def logits_of(ids_BT: Tensor) -> Tensor:
        documents_BT = _documents(ids_BT, model.tokenizer.end_of_text_id).to(model.device) if documents_apart else None
        return model(ids_BT.to(model.device), documents_BT).logits

    batch_size = max(1, min(16, _LOGITS_PER_BATCH // (context * model.tokenizer.vocab_size)))
    overlap = context - stride
    scored, pieces = 0, itertools.count()
    while scored < len(stream):
        start = max(0, scored - overlap)
        stop = min(start + (_WINDOWS_PER_SEGMENT - 1) * stride + context, len(stream))
        ids = torch.from_numpy(stream.read(start, stop)).long()
        new = slice(scored - start, None)
        if shard.owns(next(pieces)):
            nats = nats_per_id(logits_of, ids, context_length=context, stride=stride, batch_size=batch_size)
            yield ids[new], torch.cat(list(nats))[new]
        else:
            yield ids[new], torch.zeros(len(ids[new]))
        scored = stop


def _documents(ids_BT: Tensor, end_of_text_id: int) -> Tensor:
    """Return the number [B, T] of each id's document in its window; an end_of_text belongs to the document it ends."""
    documents_BT = torch.zeros_like(ids_BT)
    documents_BT[:, 1:] = (ids_BT[:, :-1] == end_of_text_id).cumsum(1)
    return documents_BT
