"""Conversion of a checkpoint to one small file: round, write, read back, and measure the cost."""

from __future__ import annotations

import copy
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.storage.atomic import write_bytes, write_errors_as
from stlm.artifact import decode_artifact, encode_artifact
from stlm.checkpoints import describe_model, locate_model
from stlm.errors import ConversionError
from stlm.export.artifact.calibration import quantize
from stlm.export.artifact.texts import CalibrationTexts, batches, bits_per_byte
from stlm.model.decoding.quantization import BITS, Quantized, is_quantized
from stlm.stlm import STLM


@dataclass(frozen=True)
class WrittenArtifact:
    """The result of a conversion to one file."""

    output: Path
    parameters: int
    bits: int
    bytes: int  # on disk, tokenizer and config included
    before: float  # bits per byte of the given model
    after: float
    method: str  # of rounding matrices
    texts: CalibrationTexts

    def __str__(self) -> str:
        return (
            f"wrote {self.output}: {self.parameters:,} parameters, {self.bytes:,} bytes, "
            f"{8 * self.bytes / self.parameters:.2f} bits per parameter\n"
            f"matrices in {self.bits} bits, {self.method}, {self.texts.calibration_note}\n"
            f"bits per byte: {self.before:.5f} before, {self.after:.5f} after, {self.after - self.before:+.5f}, "
            f"on {self.texts.evaluated_on}"
        )


@write_errors_as(ConversionError)
def convert_to_artifact(
    source: str | os.PathLike[str],
    output: str | os.PathLike[str],
    bits: int,
    calibration: str | os.PathLike[str] | None = None,
) -> WrittenArtifact:
    """Write the model of a run, checkpoint or model directory into one new file.

    `calibration`: see `CalibrationTexts.of`.

    Raises CheckpointError or DataError where there is no valid model, ConversionError where the output exists or does
    not read back as it was written. After an error nothing is written.
    """
    path = Path(output)
    if bits not in BITS:
        raise ConversionError(f"--bits: got {bits}, expected one of {', '.join(map(str, BITS))}")
    if path.exists() or path.is_symlink():
        raise ConversionError(f"--output: {path} exists; expected the name of a new file")
    directory = locate_model(source)
    model = STLM.load(directory)
    texts = CalibrationTexts.of(model, directory, calibration)
    before = bits_per_byte(model, texts.evaluation)
    matrices, method = _round(model, bits, texts)
    vectors = {name: vector.detach().clone() for name, vector in model.named_parameters() if not is_quantized(vector)}
    data = encode_artifact(
        describe_model(model.config, model.tokenizer), model.tokenizer, {**vectors, **matrices}, bits
    )
    expected = {**vectors, **{name: matrix.value() for name, matrix in matrices.items()}}
    found = decode_artifact(data, path).tensors
    if wrong := [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]:
        raise ConversionError(f"{path}: {wrong[0]} does not read back as it was written; nothing was written")
    model.load_tensors(found, path)
    after = bits_per_byte(model, texts.evaluation)
    write_bytes(path, data)
    return WrittenArtifact(path, model.num_parameters(), bits, len(data), before, after, method, texts)


def _round(model: STLM, bits: int, texts: CalibrationTexts) -> tuple[dict[str, Quantized], str]:
    """Return the rounded matrices and the method: GPTQ or to nearest, whichever is better on the calibration text.

    Rounding to nearest is better after training with rounded matrices, whose weights are close to their levels.
    """
    nearest = quantize(model, bits, ())
    if texts.calibration is None:
        return nearest, "rounded to nearest"
    calibrated = quantize(model, bits, ((ids, documents) for ids, _, documents in batches(texts.calibration)))
    costs = []
    for matrices in (calibrated, nearest):
        trial = copy.deepcopy(model)
        for name, parameter in trial.named_parameters():
            if name in matrices:
                parameter.data = matrices[name].value()
        costs.append(bits_per_byte(trial, texts.calibration))
    return (calibrated, "rounded by GPTQ") if costs[0] <= costs[1] else (nearest, "rounded to nearest")
