"""GGUF files for llama.cpp: architecture, weights and tokenizer.

The architectures llama, qwen3 and granite are those of transformers (see `families`). Weights keep their values. In
llama and granite the rows of queries and keys are reordered, because llama.cpp rotates pairs of neighbouring entries of
a head, where transformers and STLM pair an entry of the first half with one of the second.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.extras import how_to_install
from data_pipeline.plurals import number_of
from data_pipeline.tokenizers import Tokenizer
from stlm.errors import ConversionError
from stlm.export.chat import end_of_turn, exported_template, unescape_controls
from stlm.export.gguf.tokenizer import GGUFVocabulary, vocabulary_of
from stlm.export.huggingface.families import describe, transformers_name
from stlm.export.origin import Origin
from stlm.stlm import STLM

_BLOCK = 32  # entries of a row that share a step in q8_0
_NEIGHBOURS = ("llama", "granite")  # architectures that rotate neighbouring entries
_SOURCES = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def import_gguf() -> Any:
    """Return the gguf library. Raises ConversionError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise ConversionError(f"gguf: the package is not installed: {how_to_install('gguf')}") from None
    return gguf


def write_gguf(model: STLM, origin: Origin, path: Path, type: str) -> dict[str, NDArray[Any]]:
    """Write one file, and return its tensors as `read_tensors` would.

    `type`: of the matrices, f32, f16 or q8_0; vectors are fp32. Raises ConversionError where the tokenizer cannot be
    expressed, or rows are not whole blocks of q8_0.
    """
    gguf = import_gguf()
    fields = describe(model.config)
    writer = gguf.GGUFWriter(path, fields["model_type"])
    _add_settings(writer, fields, model, origin)
    writer.add_file_type(gguf.LlamaFileType[{"f32": "ALL_F32", "f16": "MOSTLY_F16", "q8_0": "MOSTLY_Q8_0"}[type]])
    _add_tokenizer(writer, gguf, model.tokenizer, vocabulary_of(model.tokenizer))
    written = {}
    for name, array in tensors_of(model, fields).items():
        kind = gguf.GGMLQuantizationType[(type if array.ndim > 1 else "f32").upper()]
        if kind.name == "Q8_0" and array.shape[-1] % _BLOCK:
            raise ConversionError(
                f"--type: got q8_0, whose blocks are of {_BLOCK} entries, but the rows of {name} have "
                f"{array.shape[-1]}; expected f32 or f16"
            )
        written[name] = gguf.quantize(array, kind)
        writer.add_tensor(name, written[name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


def read_tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Return the tensors of a file by name, as stored."""
    return {tensor.name: tensor.data for tensor in import_gguf().GGUFReader(path).tensors}


def tensors_of(model: STLM, fields: dict[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Return the parameters by llama.cpp's names, in fp32; tied parameters once."""
    gguf = import_gguf()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[fields["model_type"].upper()], fields["num_hidden_layers"])
    found = {}
    for name, parameter in model.named_parameters():
        name = transformers_name(name)
        array = parameter.detach().float().cpu().numpy()
        heads = fields.get(_SOURCES.get(name.split(".")[-2], ""))
        if heads and fields["model_type"] in _NEIGHBOURS:
            array = _halves_to_neighbours(array, heads)
        found[names.get_name(name, try_suffixes=(".weight",))] = np.ascontiguousarray(array)
    return found


def _halves_to_neighbours(rows: NDArray[np.float32], num_heads: int) -> NDArray[np.float32]:
    """Return the rows of each head in the order 0, K/2, 1, K/2 + 1, …"""
    return rows.reshape(num_heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def _add_settings(writer: Any, fields: dict[str, Any], model: STLM, origin: Origin) -> None:
    writer.add_name(f"stlm {model.num_parameters():,} parameters")
    writer.add_description("" if origin.step is None else f"trained for {number_of(origin.step, 'step')}")
    writer.add_vocab_size(model.tokenizer.vocab_size)
    writer.add_context_length(fields["max_position_embeddings"])
    writer.add_embedding_length(fields["hidden_size"])
    writer.add_feed_forward_length(fields["intermediate_size"])
    writer.add_block_count(fields["num_hidden_layers"])
    writer.add_head_count(fields["num_attention_heads"])
    writer.add_head_count_kv(fields["num_key_value_heads"])
    writer.add_key_length(fields["head_dim"])
    writer.add_value_length(fields["head_dim"])
    writer.add_rope_dimension_count(fields["head_dim"])
    writer.add_rope_freq_base(fields["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(fields["rms_norm_eps"])
    if fields["model_type"] == "granite":
        writer.add_embedding_scale(fields["embedding_multiplier"])
        writer.add_residual_scale(fields["residual_multiplier"])
        writer.add_attention_scale(fields["attention_multiplier"])
        writer.add_logit_scale(fields["logits_scaling"])


def _add_tokenizer(writer: Any, gguf: Any, tokenizer: Tokenizer, vocabulary: GGUFVocabulary) -> None:
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.pieces)
    writer.add_token_types([gguf.TokenType[kind] for kind in vocabulary.kinds])
    if vocabulary.scores is not None:
        writer.add_token_scores(vocabulary.scores)
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(tokenizer.start_id)
    writer.add_eos_token_id(tokenizer.end_of_text_id)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(unescape_controls(exported_template(tokenizer.chat_template)))
    if ids := end_of_turn(tokenizer).ids:
        writer.add_eot_token_id(ids[0])
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_mask_token_id(tokenizer.mask_id)
    if vocabulary.unknown is not None:
        writer.add_unk_token_id(vocabulary.unknown)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_remove_extra_whitespaces(False)
