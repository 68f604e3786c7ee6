"""Prompts of requests, encoded and checked."""

from __future__ import annotations

from dataclasses import dataclass

from data_pipeline.tokenizers import Tokenizer
from stlm.serving.protocol import RequestError, RequestParams, invalid
from stlm.serving.scheduler import Prompt
from stlm.stlm import STLM


@dataclass
class EncodedPrompt:
    """A prompt as given, and as the model reads it."""

    prompt: Prompt
    text: str
    prefix: list[int]  # symbols of a document's beginning that the given ids contain


def encode_prompt(model: STLM, params: RequestParams, prompt: str | list[int]) -> EncodedPrompt:
    """Encode a prompt, or check its ids. Raises RequestError if an id is unknown or the prompt exceeds the context."""
    tokenizer, context_length = model.tokenizer, model.config.context_length
    param = "messages" if params.chat else "prompt"
    scores_only = params.echo and params.max_tokens <= 1  # an id drawn at the last position is not scored
    longest = context_length - (1 if scores_only else 2)
    last_id = tokenizer.vocab_size - 1
    if not isinstance(prompt, str):
        for place, id in enumerate(prompt):
            if not 0 <= id <= last_id:
                raise invalid("prompt", f"got id {str(id)[:40]} at place {place}, expected 0 to {last_id}")
    for id, _ in params.sampling.logit_bias:
        if id > last_id:
            raise invalid("logit_bias", f"got id {id}, expected 0 to {last_id}")

    def too_long(size: str) -> RequestError:
        return RequestError(
            f"the prompt has {size} ids, expected at most {longest}, as the context has {context_length}; shorten it",
            param, code="context_length_exceeded",
        )  # fmt: skip

    if isinstance(prompt, str):
        least = -(-len(prompt.encode()) // int(tokenizer.bytes_per_id.max()))
        if least > longest and len(prompt) > 1 << 16:
            raise too_long(f"at least {least}")  # without encoding what may be a megabyte
        ids, text, prefix = model.prompt_ids(prompt), prompt, []
    else:
        prefix = document_prefix(tokenizer, prompt)
        text = tokenizer.decode(prompt[len(prefix) :])
        ids = [tokenizer.end_of_text_id, *prompt[len(prefix) :]]
    if len(ids) - 1 > longest:
        raise too_long(str(len(ids) - 1))
    return EncodedPrompt(Prompt(ids, params.logprobs if params.echo else None), text, prefix)


def document_prefix(tokenizer: Tokenizer, ids: list[int]) -> list[int]:
    """Return the first ids of a prompt that mark the beginning of a document: start, end_of_text, or both."""
    number = 0
    for symbol in (tokenizer.start_id, tokenizer.end_of_text_id):
        number += ids[number : number + 1] == [symbol]
    return ids[:number]
