"""STLM: a language model over text. Embedder, core and head, with the tokenizer they were made for.

model = STLM.load("runs/quickstart")
print(model.generate("The file is"))
print(model.log_likelihood("The file is closed."))
print(model.embed(["The file is closed.", "It is open."]).shape)
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data_pipeline.storage.atomic import write_errors_as
from data_pipeline.tokenizers import Tokenizer
from stlm.checkpoints import locate_model, read_model, save_model
from stlm.config import LoRAConfig, ModelConfig
from stlm.errors import CheckpointError, ConfigError
from stlm.generation import (
    DecodingBatch,
    DecodingRow,
    DecodingStats,
    EarlyExit,
    Sampler,
    Sampling,
    TextStream,
    UTF8Automaton,
    beam_search,
    generate_ids,
    nats_per_id,
    resolve_sampling,
    speculate_with_layers,
    speculate_with_ngrams,
)
from stlm.generation.arguments import check_integer, check_number, check_text, check_texts, stop_strings
from stlm.model import PRECISIONS, Network, Vocabulary, initialize, other_ties, pack, unpack
from stlm.model.core.lora import merged_parameters
from stlm.model.decoding.cache import ROLL_BACK

_IDS_PER_BATCH = 1 << 11  # ids embedded in one pass, on a CPU: few enough to stay in its caches
_IDS_PER_BATCH_ON_GPU = 1 << 15


class STLM(Network):
    """A network with its tokenizer: a language model over text, with exact likelihoods."""

    def __init__(self, config: ModelConfig, tokenizer: Tokenizer) -> None:
        super().__init__(config, vocabulary_of(tokenizer), tokenizer.start_id)
        self.tokenizer = tokenizer

    @classmethod
    def from_config(cls, config: ModelConfig, tokenizer: Tokenizer, seed: int = 0) -> STLM:
        """Build a new model whose initial values depend on the seed alone."""
        model = cls(config, tokenizer)
        initialize(model, seed)
        return model

    # ------------------------------------------------------------------ text in, text out

    def generate(self, prompt: str = "", **options: Any) -> str:
        """Return the text that follows `prompt`, without the prompt. Options: those of `generate_stream`."""
        return "".join(self.generate_stream(prompt, **options))

    def generate_stream(
        self,
        prompt: str = "",
        *,
        max_new_ids: int = 256,
        stop: str | Sequence[str] = (),
        sampling: Sampling | None = None,
        exit_threshold: float | None = None,
        speculative: str | None = "auto",
        num_drafts: int | None = None,
        stats: DecodingStats | None = None,
        **rules: Any,
    ) -> Iterator[str]:
        """Yield pieces of valid text as they are drawn, up to `max_new_ids` ids, the end of the document, or a string
        of `stop`, which is left out.

        Set the sampling rules by `sampling`, or by its fields as keywords: `temperature=0.7, seed=3`. If a prompt is
        longer than the context, its end is read.

        `speculative` drafts `num_drafts` ids at a time and verifies them in one pass, which is exact: "ngram" copies
        the ids that followed the same ids earlier (8 at a time); "self", for models with exits, drafts with the layers
        before the first exit (4 at a time); "auto" is "ngram" at temperature 0; None reads one id at a time.
        `exit_threshold`, for models with exits, draws an id from the first exit at which some id has this probability:
        an approximation. `stats` collects statistics of either. Raises ConfigError immediately if an option is out of
        range.
        """
        sampling, stop = resolve_sampling(sampling, rules), stop_strings(stop)
        check_integer("max_new_ids", max_new_ids, 0)
        if speculative == "auto":
            speculative = "ngram" if sampling.temperature == 0 and exit_threshold is None else None
        if num_drafts is None:
            num_drafts = 8 if speculative == "ngram" else 4
        self._check_depth(exit_threshold, speculative, num_drafts)
        stats = stats or DecodingStats()
        row = self.row(check_text("prompt", prompt), sampling, max_new_ids)
        options: dict[str, Any] = {
            "context_length": self.config.context_length,
            "stop_id": self.tokenizer.end_of_text_id,
        }
        self.eval()
        if speculative is not None:
            drafted = speculate_with_ngrams if speculative == "ngram" else speculate_with_layers
            ids = drafted(self, row.window, row.sampler, num_drafts=num_drafts, stats=stats, **options)
        elif exit_threshold is not None:
            ids = generate_ids(EarlyExit(self, exit_threshold, stats), row.window, row.sampler, **options)
        else:
            ids = generate_ids(self, row.window, row.sampler, **options)
        return TextStream(self.tokenizer, stop).decode(ids)

    def generate_batch(
        self,
        prompts: Sequence[str],
        *,
        max_new_ids: int = 256,
        stop: str | Sequence[str] = (),
        sampling: Sampling | None = None,
        **rules: Any,
    ) -> list[str]:
        """Return the text that follows each prompt. Prompts are continued together, and each text equals that of
        `generate` for its prompt alone, row r with seed + r. Repeat a prompt n times for n samples.

        The options are those of `generate_stream`.
        """
        sampling, stop = resolve_sampling(sampling, rules), stop_strings(stop)
        check_integer("max_new_ids", max_new_ids, 0)
        prompts = check_texts("prompts", prompts, "generate continues one prompt")
        self.eval()
        batch = DecodingBatch(self, self.config.context_length)
        rows = [
            self.row(prompt, replace(sampling, seed=sampling.seed + number), max_new_ids)
            for number, prompt in enumerate(prompts)
        ]
        streams = {row: TextStream(self.tokenizer, stop) for row in rows}
        pieces: dict[DecodingRow, list[str]] = {row: [] for row in rows}
        batch.add([row for row in rows if row.sampler.remaining > 0])
        while len(batch):
            for row in batch.step():
                if row.error is not None:
                    raise row.error
                ended = row.last_id == self.tokenizer.end_of_text_id
                if not ended:
                    assert row.last_id is not None
                    pieces[row].append(streams[row].push(row.last_id))
                if ended or row.sampler.remaining == 0 or streams[row].stopped:
                    pieces[row].append(streams[row].close())
                    batch.remove(row)
        return ["".join(pieces[row]) for row in rows]

    def beam_search(self, prompt: str = "", *, num_beams: int = 4, max_new_ids: int = 256) -> list[tuple[str, float]]:
        """Return continuations found by beam search, the most probable first, each with its natural log-probability.

        Raises ConfigError if an option is out of range.
        """
        check_integer("num_beams", num_beams, 1)
        check_integer("max_new_ids", max_new_ids, 0)
        check_text("prompt", prompt)
        self.eval()
        found = beam_search(
            self,
            [self.tokenizer.end_of_text_id, *self.tokenizer.encode(prompt).tolist()],
            num_beams=num_beams,
            max_new_ids=max_new_ids,
            context_length=self.config.context_length,
            stop_id=self.tokenizer.end_of_text_id,
            banned_V=self._drawable[0],
        )
        return [(self.tokenizer.decode(text.ids), text.log_probability) for text in found]

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the ids that the model reads for a prompt: end_of_text, then the prompt as a document's beginning."""
        return [self.tokenizer.end_of_text_id, *self.tokenizer.encode(prompt).tolist()]

    def row(
        self, prompt: str | Sequence[int], sampling: Sampling, max_new_ids: int, num_top: int | None = None
    ) -> DecodingRow:
        """Return a row to be continued in a `DecodingBatch`, as `generate_batch` and the server do.

        `prompt` is a text, or end_of_text and the ids of a document's beginning. `num_top` as in `DecodingRow`.
        Raises DataError if a text holds a lone surrogate, ConfigError if `logit_bias` names an id that the vocabulary
        lacks.
        """
        ids = self.prompt_ids(prompt) if isinstance(prompt, str) else prompt
        for id, _ in sampling.logit_bias:
            if not 0 <= id < self.tokenizer.vocab_size:
                raise ConfigError(f"logit_bias: got id {id}, expected 0 to {self.tokenizer.vocab_size - 1}")
        banned_V, automaton = self._drawable
        stop_id = self.tokenizer.end_of_text_id
        return DecodingRow(ids, Sampler(sampling, ids, banned_V, max_new_ids, stop_id, automaton), num_top)

    @cached_property
    def _drawable(self) -> tuple[Tensor, UTF8Automaton]:
        """Mask [V] of the ids that are never drawn; automaton that keeps text valid UTF-8."""
        banned_V = torch.from_numpy(self.tokenizer.bytes_per_id == 0)
        banned_V[self.tokenizer.end_of_text_id] = False
        return banned_V, UTF8Automaton(vocabulary_of(self.tokenizer).spellings)

    def _check_depth(self, exit_threshold: float | None, speculative: str | None, num_drafts: int) -> None:
        """Raise ConfigError if the model cannot do the early exit or speculation requested."""
        asked = {"exit_threshold": exit_threshold, "speculative": speculative}
        given = [f"{name}={value!r}" for name, value in asked.items() if value is not None]
        if speculative not in (None, "self", "ngram"):
            raise ConfigError(f"speculative: got {speculative!r}, expected 'auto', 'self', 'ngram' or None")
        if exit_threshold is not None:
            check_number("exit_threshold", exit_threshold, 0, 1)
            if exit_threshold == 0:
                raise ConfigError("exit_threshold: got 0, expected above 0 and at most 1; try 0.9")
        check_integer("num_drafts", num_drafts, 1)
        if num_drafts > ROLL_BACK:
            raise ConfigError(f"num_drafts: got {num_drafts}, expected 1 to {ROLL_BACK}; 4 would work")
        if len(given) == 2:
            raise ConfigError(f"got {' and '.join(given)}, expected at most one of them")
        if given and speculative != "ngram" and len(self.depths) == 1:
            raise ConfigError(
                f"{given[0]}: the model has no exits, as model.core.exits.every = null; expected a model trained "
                f"with them: model.core.exits.every={max(1, self.depths[-1] // 4)} would work"
            )
        if exit_threshold is not None and self.head.new_cache() is not None:
            raise ConfigError(
                f"{given[0]}: the head has a state that depends on the exits of earlier ids, as model.head.kind = "
                f"{self.config.head.kind}; expected model.head.kind=linear, or speculative='self', which is exact"
            )

    def optimize_for_decoding(self, precision: str = "fp32") -> STLM:
        """Optimize for decoding, and return the model. Layers run in packed form, which needs a second copy of their
        matrices, until the model is trained, moved or given other weights.

        In fp32, logits are equal within rounding. "bf16" rounds the matrices of layers and head, and the vectors they
        multiply, to 16 bits; "int8" rounds the matrices to 8 bits, with a step for each row, and the vectors to 16.
        Raises ConfigError if the precision is unknown, or int8 is requested on another device than a CPU.
        """
        if precision not in PRECISIONS:
            raise ConfigError(f"precision: got {precision!r}, expected one of {', '.join(PRECISIONS)}")
        if precision == "int8" and self.device.type != "cpu":
            raise ConfigError(f"precision: got 'int8' on {self.device.type}, expected bf16 there; int8 is for CPUs")
        pack(self.eval(), precision)
        return self

    @torch.no_grad()
    def log_likelihood(self, text: str) -> float:
        """Return the natural log-probability of `text` at the start of a document, without its end.

        Text longer than the context is read in windows that overlap by half.
        """
        check_text("text", text)
        self.eval()
        ids = torch.tensor([self.tokenizer.end_of_text_id, *self.tokenizer.encode(text).tolist()])
        context = self.config.context_length
        pieces = nats_per_id(
            lambda ids_BT: self(ids_BT.to(self.device)).logits, ids, context_length=context, stride=max(1, context // 2)
        )
        nats = torch.cat(list(pieces))[1:]  # the first end_of_text is given, not predicted
        return -nats.double().sum().item()

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Return a vector for each text, [texts, width]: the mean of the core's states over it (see `embed_ids`).

        A vector does not depend on the other texts. If a text has more than `longest_text` ids, its beginning is read.
        """
        texts = check_texts("texts", texts, "for one text, write embed([text])[0]")
        self.eval()
        ids_of = [self.tokenizer.encode(text)[: self.longest_text].astype(np.int64) for text in texts]
        vectors_ND = np.empty((len(ids_of), self.config.width), np.float32)
        for places in batches_by_length([len(ids) for ids in ids_of], self.device):
            rows = pad_sequence([torch.from_numpy(ids_of[place]) for place in places], batch_first=True)
            lengths = torch.tensor([len(ids_of[place]) for place in places])
            vectors_ND[places] = self.embed_ids(rows.to(self.device), lengths.to(self.device)).cpu().numpy()
        return vectors_ND

    def merged(self) -> STLM:
        """Return a model whose corrections (LoRA) are merged into their matrices; nothing is frozen."""
        model = STLM(replace(self.config, lora=LoRAConfig()), self.tokenizer)
        model.load_tensors(merged_parameters(self), source="the merged model")
        return model.to(self.device).train(self.training)

    # ------------------------------------------------------------------ disk

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write config.json, model.safetensors (fp32, tied tensors once) and tokenizer/ as one atomic folder.

        Raises CheckpointError where it cannot be written.
        """
        tensors = {name: parameter.detach().float().cpu() for name, parameter in self.named_parameters()}
        try:
            with write_errors_as(CheckpointError):
                save_model(directory, self.config, self.tokenizer, tensors)
        except SafetensorError as error:
            raise CheckpointError(f"cannot write {directory}: {error}") from error

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> STLM:
        """Load from a run directory (its newest complete checkpoint), a checkpoint, a model directory, or an artifact.

        Files in a checkpoint are verified against their recorded checksums. Raises CheckpointError.
        """
        source = locate_model(path)
        config, tokenizer, tensors = read_model(source)
        model = cls(config, tokenizer)
        model.load_tensors(tensors, source=source)
        return model.to(device).eval()

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor], source: str | os.PathLike[str]) -> None:
        """Set every parameter by name. Raises CheckpointError that lists missing, unknown and misshapen tensors."""
        parameters = dict(self.named_parameters())
        problems = [f"missing: {name} {list(p.shape)}" for name, p in parameters.items() if name not in tensors]
        for name, tensor in tensors.items():
            if name not in parameters:
                problems.append(f"unknown: {name} {list(tensor.shape)}")
            elif tensor.shape != parameters[name].shape:
                problems.append(f"{name}: got {list(tensor.shape)}, expected {list(parameters[name].shape)}")
        if problems:
            problems = other_ties(self, tensors.keys()) + problems
            shown = "\n  ".join(problems[:8] + ([f"… and {len(problems) - 8} more"] if len(problems) > 8 else []))
            raise CheckpointError(f"{source} does not fit this model; was it made with another config?\n  {shown}")
        unpack(self)
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def batches_by_length(lengths: Sequence[int], device: torch.device) -> Iterator[list[int]]:
    """Yield batches of indices of texts of similar length, the longest first."""
    limit = _IDS_PER_BATCH if device.type == "cpu" else _IDS_PER_BATCH_ON_GPU
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    while order:
        count = max(1, limit // max(1, lengths[order[0]]))
        yield order[:count]
        order = order[count:]


def vocabulary_of(tokenizer: Tokenizer) -> Vocabulary:
    """Return the spelling of a tokenizer's ids, for the parts of a model."""
    text = tokenizer.decode_bytes(range(tokenizer.vocab_size))
    ends = tokenizer.bytes_per_id.cumsum().tolist()
    return Vocabulary(tuple(text[start:end] for start, end in zip([0, *ends], ends, strict=False)))
