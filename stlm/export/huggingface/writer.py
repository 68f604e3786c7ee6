"""Folders that transformers loads: config, weights, tokenizer, model card, and code where transformers has none."""

from __future__ import annotations

import inspect
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.extras import how_to_install
from data_pipeline.tokenizers import SentencePieceTokenizer, Tokenizer
from data_pipeline.tokenizers.base import TEMPLATE_FILE
from stlm.config import PublishedEmbedderConfig, to_dict
from stlm.errors import ConversionError
from stlm.export.chat import end_of_turn, exported_template
from stlm.export.comparison import Logits, sample_text
from stlm.export.huggingface.card import model_card
from stlm.export.huggingface.families import describe, obstacles, transformers_name
from stlm.export.huggingface.fast_tokenizer import definition_of, is_marked, special_names
from stlm.export.origin import Origin
from stlm.export.remote.files import LICENCE, NAME, remote_files
from stlm.stlm import STLM


def write_huggingface(model: STLM, origin: Origin, folder: Path) -> Logits:
    """Write a folder for AutoModelForCausalLM and AutoTokenizer; see `ExportFormat`.

    The model has a class of transformers where one computes the same network; otherwise this project's class, whose
    code is part of the folder.
    """
    transformers = import_transformers()
    tokenizer = model.tokenizer
    turn = end_of_turn(tokenizer)
    ends = [tokenizer.end_of_text_id, *turn.ids] if turn.ids else tokenizer.end_of_text_id
    symbols = {"bos_token_id": tokenizer.start_id, "eos_token_id": ends, "pad_token_id": tokenizer.pad_id}
    native = not obstacles(model.config)
    exported = _native_model(model, symbols) if native else _remote_code_model(model, symbols)
    textless = (tokenizer.bytes_per_id == 0).nonzero()[0].tolist()
    never = [id for id in textless if id != tokenizer.end_of_text_id]
    stop = {"stop_strings": turn.strings} if turn.strings else {}
    exported.generation_config = transformers.GenerationConfig(**symbols, **stop, suppress_tokens=never)
    exported.save_pretrained(folder)
    if not native:
        for name, source in remote_files().items():
            (folder / name).write_text(source, encoding="utf-8")
        (folder / "LICENSE").write_text(LICENCE, encoding="utf-8")

    write_tokenizer(model, folder)
    fast_tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=not native)
    _compare_ids(tokenizer, fast_tokenizer)
    if native:
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        loaded = _load_with_code(transformers, folder)
    card = model_card(model, origin, loaded, fast_tokenizer, native)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return logits_of(loaded, tokenizer)


def write_tokenizer(model: STLM, folder: Path) -> None:
    """Write the tokenizer's files, for AutoTokenizer and for the `tokenizers` library."""
    tokenizer = model.tokenizer
    with tempfile.TemporaryDirectory() as scratch:
        definition = definition_of(tokenizer, Path(scratch), end_of_turn(tokenizer).single)
    (folder / "tokenizer.json").write_text(json.dumps(definition, ensure_ascii=False), encoding="utf-8")
    if isinstance(tokenizer, SentencePieceTokenizer):  # for `reader`
        tokenizer.save_model(folder)
    names = special_names(tokenizer, definition)
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": names["start"],
        "eos_token": names["end_of_text"],
        "pad_token": names["pad"],
        "mask_token": names["mask"],
        "model_max_length": model.config.context_length,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": not is_marked(tokenizer),  # read a text that spells out a symbol as text
        "padding_side": "left",  # `generate` continues rows at their ends
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if tokenizer.chat_template is not None:
        (folder / TEMPLATE_FILE).write_text(exported_template(tokenizer.chat_template), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _native_model(model: STLM, symbols: dict[str, Any]) -> Any:
    """Return the model as an object of a class of transformers."""
    transformers = import_transformers()
    fields = {**describe(model.config), "vocab_size": model.tokenizer.vocab_size, **symbols}
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    exported = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    exported.load_state_dict({transformers_name(name): tensor for name, tensor in model.state_dict().items()})
    return exported


def _remote_code_model(model: STLM, symbols: dict[str, Any]) -> Any:
    """Return the model as an object of this project's class, exported with its code."""
    from stlm.export.remote.modeling_stlm import StlmConfig, StlmForCausalLM

    tokenizer = model.tokenizer
    reads_bytes = isinstance(model.config.embedder, PublishedEmbedderConfig)
    config = StlmConfig(
        to_dict(model.config),
        tokenizer.vocab_size,
        tokenizer.start_id,
        [spelling.hex() for spelling in model.vocabulary.spellings] if reads_bytes else None,
        auto_map={"AutoConfig": f"{NAME}.StlmConfig", "AutoModelForCausalLM": f"{NAME}.StlmForCausalLM"},
        **symbols,
    )
    exported = StlmForCausalLM(config)
    exported.network.load_state_dict(model.state_dict())
    return exported


def _load_with_code(transformers: Any, folder: Path) -> Any:
    """Load the model with its code, as users will. transformers caches the code by the folder's name, which is a
    temporary one here, so the cached copy is deleted."""
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
    shutil.rmtree(Path(inspect.getfile(type(loaded))).parents[1], ignore_errors=True)
    return loaded


def import_transformers() -> Any:
    """Return the transformers library. Raises ConversionError where it is not installed."""
    try:
        import transformers
    except ImportError:
        raise ConversionError(f"huggingface: transformers is not installed: {how_to_install('transformers')}") from None
    transformers.logging.set_verbosity_error()  # conversions report errors themselves
    transformers.logging.disable_progress_bar()
    return transformers


def _compare_ids(own: Tokenizer, fast: Any) -> None:
    """Raise ConversionError where the ids of the sample text differ, or do not decode to it."""
    text = sample_text()
    expected, got = own.encode(text).tolist(), fast(text, add_special_tokens=False)["input_ids"]
    if got != expected:
        place = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), len(expected))
        raise ConversionError(
            f"the converted tokenizer differs: id {place} of the sample text is {got[place : place + 5]}, expected "
            f"{expected[place : place + 5]}; nothing was written"
        )
    if fast.decode(got) != text:
        raise ConversionError("the converted tokenizer does not decode the ids to the sample text; nothing was written")


def logits_of(exported: Any, tokenizer: Tokenizer) -> Logits:
    """Return a function for the logits of each id given those before it; transformers returns those of the next id."""
    exported.eval()

    def logits(ids_BT: Tensor) -> Tensor:
        return exported(input_ids=shift_right(ids_BT, tokenizer)).logits

    return logits


def shift_right(ids_BT: Tensor, tokenizer: Tokenizer) -> Tensor:
    """Return the inputs that predict these ids: the start symbol, and then all but the last."""
    return torch.cat((torch.full_like(ids_BT[:, :1], tokenizer.start_id), ids_BT[:, :-1]), dim=1)
