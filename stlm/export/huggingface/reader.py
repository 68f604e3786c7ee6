"""A model of transformers read as one of this project: config, tokenizer, and bit-equal weights.

No code of the folder is run, and nothing is fetched.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data_pipeline.errors import DataError, first_line
from data_pipeline.tokenizers import ALGORITHMS, ByteTokenizer, SentencePieceTokenizer, Tokenizer
from data_pipeline.tokenizers.base import TEMPLATE_FILE
from data_pipeline.tokenizers.huggingface import adopt_huggingface, tokenizer_file
from data_pipeline.tokenizers.sentencepiece import MODEL_FILE
from stlm.config import ByteEmbedderConfig, TokenEmbedderConfig
from stlm.errors import ConversionError, StlmError
from stlm.export.chat import MARK, end_of_turn, is_exported, original_template
from stlm.export.comparison import Logits
from stlm.export.huggingface.fast_tokenizer import definition_of, is_byte_level, unmarked
from stlm.export.huggingface.foreign_models import config_of, tensors_of
from stlm.export.huggingface.writer import import_transformers, logits_of
from stlm.stlm import STLM


def read_huggingface(directory: Path) -> tuple[STLM, Logits]:
    """Read the model of a folder, and return it with the logits that transformers computes; see `ImportFormat`.

    Raises ConversionError, naming the key, where STLM cannot express the model, and DataError where its tokenizer does
    not reproduce every text.
    """
    transformers = import_transformers()
    path = directory / "config.json"
    if not path.is_file():
        raise ConversionError(f"{directory}: holds no config.json; expected a folder that save_pretrained has written")
    try:
        is_own = json.loads(path.read_bytes()).get("model_type") == "stlm"
        their_config = _remote_classes()[0].from_pretrained(directory) if is_own else _config(transformers, directory)
    except (StlmError, DataError):
        raise
    except Exception as error:  # the library raises no narrower class
        raise ConversionError(f"{path}: transformers cannot read it: {first_line(error)}") from None
    config = their_config.settings() if is_own else config_of(their_config, str(path))
    tokenizer = read_tokenizer(directory, their_config.vocab_size)
    template = directory / TEMPLATE_FILE
    tokenizer.chat_template = original_template(template.read_text(encoding="utf-8")) if template.is_file() else None
    if isinstance(tokenizer, ByteTokenizer) and isinstance(config.embedder, TokenEmbedderConfig) and not is_own:
        config = replace(config, embedder=ByteEmbedderConfig(scaled=config.embedder.scaled))
    loaded = _load(_remote_classes()[1] if is_own else transformers.AutoModelForCausalLM, directory)
    model = STLM(config, tokenizer)
    weights = loaded.network.state_dict() if is_own else loaded.state_dict()
    if not is_own:
        weights = tensors_of(weights, model, their_config.model_type, str(directory))
    model.load_tensors({name: weights[name] for name, _ in model.named_parameters()}, source=directory)
    return model.eval(), logits_of(loaded, tokenizer)


def _config(transformers: Any, directory: Path) -> Any:
    return transformers.AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _remote_classes() -> tuple[Any, Any]:
    """Return this project's config and model classes, which are used instead of the code in the folder."""
    from stlm.export.remote.modeling_stlm import StlmConfig, StlmForCausalLM

    return StlmConfig, StlmForCausalLM


def read_tokenizer(directory: Path, vocab_size: int) -> Tokenizer:
    """Return the tokenizer of a folder: the original one if this project wrote the folder, else one of the library.

    Raises DataError where it does not reproduce every text, or has more than `vocab_size` ids.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = directory if (directory / "tokenizer.json").is_file() else _convert_to_fast(directory, Path(scratch))
        definition = json.loads(tokenizer_file(str(path)).read_bytes())
        for known in _own_tokenizers(directory):
            known.chat_template = ""  # the folder may hold a chat model
            for end in (None, end_of_turn(known).single):
                with tempfile.TemporaryDirectory() as empty:
                    if _vocabulary(definition_of(known, Path(empty), end)) == _vocabulary(definition):
                        return known
        if is_byte_level(definition) and is_exported(directory / TEMPLATE_FILE):
            path = _unmarked(directory, definition, Path(scratch, "unmarked"))
        return adopt_huggingface(str(path), f"hf:{directory}", vocab_size)


def _unmarked(directory: Path, definition: dict[str, Any], scratch: Path) -> Path:
    """Write the tokenizer as it was before its export with a chat model, and return its folder."""
    scratch.mkdir()
    (scratch / "tokenizer.json").write_text(json.dumps(unmarked(definition)), encoding="utf-8")
    config = json.loads((directory / "tokenizer_config.json").read_bytes())
    names = {key: value.removeprefix(MARK) if isinstance(value, str) else value for key, value in config.items()}
    (scratch / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")
    return scratch


def _own_tokenizers(directory: Path) -> list[Tokenizer]:
    """Return this project's tokenizers from which a folder may have been written."""
    file = directory / MODEL_FILE
    kinds = ALGORITHMS if file.is_file() else ()
    return [ByteTokenizer(), *(SentencePieceTokenizer(file.read_bytes(), kind) for kind in kinds)]


def _vocabulary(definition: dict[str, Any]) -> tuple[Any, ...]:
    """Return a key that is equal for definitions of the same mapping: the model's table and the unmarked symbols."""
    added = {token["id"]: token["content"].removeprefix(MARK) for token in definition.get("added_tokens") or ()}
    model = definition["model"]
    table = dict(enumerate(model["vocab"])) if isinstance(model["vocab"], list) else _by_id(model["vocab"])
    pieces = {id: piece for id, piece in table.items() if id not in added}
    return model.get("type"), pieces, model.get("merges"), added


def _by_id(vocab: dict[str, int]) -> dict[int, str]:
    return {id: piece for piece, id in vocab.items()}


def _convert_to_fast(directory: Path, scratch: Path) -> Path:
    """Convert a tokenizer in an older format to tokenizer.json, and return its folder."""
    try:
        import_transformers().AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        ).save_pretrained(scratch / "fast")
    except Exception as error:  # the library raises no narrower class
        raise DataError(
            f"{directory}: holds no tokenizer.json, and no other tokenizer that transformers can read "
            f"({first_line(error)}); copy the tokenizer's files into this folder"
        ) from None
    if not (scratch / "fast" / "tokenizer.json").is_file():
        raise DataError(f"{directory}: holds no tokenizer.json, and its tokenizer cannot be converted to one")
    return scratch / "fast"


def _load(kind: Any, directory: Path) -> Any:
    """Load the model by transformers, in fp32. Raises ConversionError where weights are missing or left over."""
    try:
        loaded, loading_info = kind.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the library raises no narrower class
        raise ConversionError(
            f"{directory}: transformers cannot load its weights: {first_line(error)}; is the folder complete?"
        ) from None
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(map(str, loading_info.get(what) or ())):
            shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
            raise ConversionError(
                f"{directory}: its weights do not fit its config.json: {what.replace('_', ' ')} {shown}"
            )
    return loaded
