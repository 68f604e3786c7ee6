"""The steps common to all conversions: check the output path and the architecture, write the folder atomically, compare
logits."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.storage.atomic import atomic_directory, write_errors_as
from data_pipeline.tokenizers import HuggingFaceTokenizer
from stlm.checkpoints import locate_model
from stlm.config import DataConfig, RunConfig
from stlm.errors import ConversionError
from stlm.export.comparison import compare
from stlm.export.formats import SOURCES, TARGETS, supported_formats
from stlm.export.origin import Origin
from stlm.stlm import STLM


@dataclass(frozen=True)
class Converted:
    """The result of a conversion."""

    output: Path
    parameters: int
    bytes: int  # on disk
    difference: float  # the largest between the logits of both models
    num_ids: int  # number of compared ids

    def __str__(self) -> str:
        return (
            f"wrote {self.output}: {self.parameters:,} parameters, {self.bytes:,} bytes\n"
            f"largest difference of logits: {self.difference:.1e}, on {self.num_ids:,} ids of text"
        )


@write_errors_as(ConversionError)
def convert_to(target: str, source: str | os.PathLike[str], output: str | os.PathLike[str]) -> Converted:
    """Write the model of a run, checkpoint or model directory as `target`, a name in TARGETS, into a new folder.

    Raises CheckpointError or DataError where there is no valid model, ConversionError where the output is taken, the
    target cannot express the model, or the written model differs. After an error nothing is written.
    """
    if target not in TARGETS:
        raise ConversionError(f"--to: got {target!r}, expected one of {', '.join(TARGETS)}")
    output = check_output(output)
    directory = locate_model(source)
    model = STLM.load(directory)
    whole = model if model.config.lora.rank is None else model.merged()
    if found := TARGETS[target].obstacles(whole.config):
        raise ConversionError(
            f"{directory}: {target} cannot express {' and '.join(found)}; this model can be converted to "
            f"{' or '.join(supported_formats(whole.config, directory))}"
        )
    with atomic_directory(output) as folder:
        written = TARGETS[target].write(whole, Origin.of(directory), folder)
        difference, num_ids = compare(model, written)
    return Converted(output, whole.num_parameters(), folder_bytes(output), difference, num_ids)


@write_errors_as(ConversionError)
def convert_from(
    source: str, directory: str | os.PathLike[str], output: str | os.PathLike[str],
    begin_run: Callable[[RunConfig, STLM, Path], None],
) -> Converted:  # fmt: skip
    """Read the model of a folder in the format `source`, a name in SOURCES, into a new run, as its checkpoint of step
    0.

    `begin_run` writes such a run into a folder. Raises ConversionError or DataError where the output is taken, there is
    no such model, it cannot be expressed here, or the written model differs. After an error nothing is written.
    """
    if source not in SOURCES:
        raise ConversionError(f"--from: got {source!r}, expected one of {', '.join(SOURCES)}")
    output = check_output(output)
    model, logits = SOURCES[source].read(Path(directory))
    if isinstance(model.tokenizer, HuggingFaceTokenizer):  # for preparing data; see `begin_run`
        model.tokenizer.spec = f"hf:{output / 'tokenizer'}"
    with atomic_directory(output) as folder:
        begin_run(RunConfig(data=DataConfig(tokenizer=model.tokenizer.spec), model=model.config), model, folder)
        difference, num_ids = compare(STLM.load(folder), logits)
    return Converted(output, model.num_parameters(), folder_bytes(output), difference, num_ids)


def check_output(output: str | os.PathLike[str]) -> Path:
    """Return the path, which must not exist or be an empty folder. Raises ConversionError where it is taken."""
    path = Path(output)
    if path.is_dir() and not any(path.iterdir()):
        return path
    if path.exists() or path.is_symlink():
        what = "a folder that is not empty" if path.is_dir() else "not a folder"
        raise ConversionError(f"--output: {path} is {what}; expected a new or an empty folder, choose another name")
    return path


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files of a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
