"""Conversion of a checkpoint to a folder with one file for llama.cpp: write it, run it in llama.cpp, and compare."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data_pipeline.storage.atomic import atomic_directory, write_errors_as
from data_pipeline.tokenizers import Tokenizer
from data_pipeline.tokenizers.base import SPACE
from stlm.checkpoints import locate_model
from stlm.errors import ConversionError
from stlm.export.comparison import TOLERANCE, sample_ids, sample_text
from stlm.export.conversion import check_output
from stlm.export.formats import supported_formats
from stlm.export.gguf.llama_cpp import LlamaCpp, installed
from stlm.export.gguf.tokenizer import is_unigram
from stlm.export.gguf.writer import read_tensors, write_gguf
from stlm.export.huggingface.families import obstacles
from stlm.export.origin import Origin
from stlm.stlm import STLM

FILE = "model.gguf"
PLACES = 8  # positions of the text at which all log-probabilities are compared
TOLERANCES = {"f32": TOLERANCE, "f16": 0.05, "q8_0": 0.5}  # f16 and q8_0 round weights, q8_0 activations as well


@dataclass(frozen=True)
class WrittenGGUF:
    """The result of a conversion for llama.cpp."""

    output: Path
    parameters: int
    bytes: int
    difference: float | None  # the largest between log-probabilities; None: llama.cpp is not installed
    note: str  # differences of llama.cpp's tokenizer; empty if there are none

    def __str__(self) -> str:
        check = (
            "xllamacpp is not installed, so the file was not run: its tensors were read back and are bit-equal"
            if self.difference is None
            else f"largest difference of log-probabilities in llama.cpp: {self.difference:.1e}, at {PLACES} positions"
        )
        lines = [f"wrote {self.output}: {self.parameters:,} parameters, {self.bytes:,} bytes", check, self.note]
        return "\n".join(line for line in lines if line)


@write_errors_as(ConversionError)
def convert_to_gguf(source: str | os.PathLike[str], output: str | os.PathLike[str], type: str = "f32") -> WrittenGGUF:
    """Write the model of a run, checkpoint or model directory into a new folder, as model.gguf.

    Raises CheckpointError or DataError where there is no valid model, ConversionError where the output is taken, the
    format cannot express the model, or llama.cpp computes something else. After an error nothing is written.
    """
    if type not in TOLERANCES:
        raise ConversionError(f"--type: got {type!r}, expected one of {', '.join(TOLERANCES)}")
    output = check_output(output)
    directory = locate_model(source)
    model = STLM.load(directory)
    if found := obstacles(model.config):
        raise ConversionError(
            f"{directory}: gguf cannot express {' and '.join(found)}, for which llama.cpp has no architecture; this "
            f"model can be converted to {' or '.join(supported_formats(model.config, directory))}"
        )
    with atomic_directory(output) as folder:
        path = folder / FILE
        arrays = write_gguf(model, Origin.of(directory), path, type)
        if installed():
            try:
                runner = LlamaCpp(path, model.config.context_length)
            except RuntimeError as error:
                hint = "" if model.tokenizer.chat_template is None else "; check tokenizer/chat_template.jinja"
                problem = f"llama.cpp does not load the file ({error}){hint}; nothing was written"
                raise ConversionError(problem) from None
            difference = _compare(model, runner, TOLERANCES[type])
        else:
            difference = None
            tensors = read_tensors(path)
            for name, array in arrays.items():
                if name not in tensors or not np.array_equal(array, tensors[name]):
                    raise ConversionError(f"{path}: {name} does not read back as it was written; nothing was written")
        size = path.stat().st_size
    return WrittenGGUF(output / FILE, model.num_parameters(), size, difference, _tokenizer_note(model.tokenizer))


@torch.no_grad()
def _compare(model: STLM, other: LlamaCpp, tolerance: float) -> float:
    """Return the largest difference of log-probabilities. Raises ConversionError if it is too large or ids differ."""
    tokenizer = model.tokenizer
    text = _without_unknown(tokenizer, sample_text())
    expected, got = [tokenizer.start_id, *tokenizer.encode(text).tolist()], other.encode(text)
    if got != expected:
        place = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), len(expected))
        raise ConversionError(
            f"data.tokenizer: llama.cpp gives other ids than {tokenizer.spec}: id {place} of the sample text is "
            f"{got[place : place + 5]}, expected {expected[place : place + 5]}; nothing was written"
        )
    ids_T = sample_ids(model)[0]
    expected_TV = model.eval()(ids_T[None]).logits[0].log_softmax(-1)
    plain_id = next(id for id in range(tokenizer.vocab_size) if tokenizer.decode_bytes([id]).isalnum())
    difference = 0.0
    for place in np.unique(np.linspace(0, len(ids_T) - 2, PLACES).astype(int)).tolist():
        prompt = [tokenizer.start_id, *ids_T[:place].tolist()]
        found_V = other.log_probabilities(prompt, plain_id, tokenizer.vocab_size)
        difference = max(difference, (found_V - expected_TV[place]).abs().nan_to_num(torch.inf).max().item())
    if difference > tolerance:
        raise ConversionError(
            f"llama.cpp does not compute the same model: log-probabilities differ by up to {difference:.2e}, expected "
            f"at most {tolerance:.0e}; nothing was written"
        )
    return difference


def _without_unknown(tokenizer: Tokenizer, text: str) -> str:
    """Return the text without the characters that llama.cpp reads as other ids: see `_tokenizer_note`."""
    if not is_unigram(tokenizer):
        return text
    pieces = {tokenizer.decode_bytes([id]) for id in range(tokenizer.vocab_size)}
    return "".join(character for character in text if character.encode() in pieces and character != SPACE)


def _tokenizer_note(tokenizer: Tokenizer) -> str:
    if not is_unigram(tokenizer):
        return ""
    return (
        "llama.cpp reads a character beyond ASCII that the vocabulary lacks as one unknown id, where STLM reads its "
        "bytes; all other texts have the same ids"
    )
