"""A GGUF file run in llama.cpp, through the server that its Python bindings start in this process."""

from __future__ import annotations

import json
import urllib.request
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_FORCING_BIAS = 1e4  # added to an id's logit to force it to be drawn; the reported log-probabilities do not change


def installed() -> bool:
    """Return whether the bindings are installed, which LlamaCpp needs."""
    try:
        import xllamacpp  # noqa: F401
    except ImportError:
        return False
    return True


class LlamaCpp:
    """The model of a GGUF file, computed on the CPU as exactly as llama.cpp can: in fp32, cache included."""

    def __init__(self, path: Path, context_length: int) -> None:
        import xllamacpp

        settings = xllamacpp.CommonParams()
        settings.model.path = str(path)
        settings.n_ctx, settings.n_parallel, settings.n_gpu_layers = context_length, 1, 0
        settings.cache_type_k = settings.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        settings.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = torch.get_num_threads()
        settings.fit_params = settings.warmup = False
        settings.verbosity = -1
        self._server = xllamacpp.Server(settings)  # runs as long as this object exists
        self._open = urllib.request.build_opener(urllib.request.ProxyHandler({})).open

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text after the symbol that begins a sequence."""
        return self.request("/tokenize", content=text, add_special=True, parse_special=False)["tokens"]

    def log_probabilities(self, ids: list[int], plain_id: int, vocab_size: int) -> Tensor:
        """Return the log-probabilities of the next id, [V]. `plain_id`: an id that is a whole character."""
        answer = self.complete(ids, n_predict=1, n_probs=vocab_size, logit_bias=[[plain_id, _FORCING_BIAS]])
        found = torch.full((vocab_size,), float("nan"))
        for entry in answer["completion_probabilities"][0]["top_logprobs"]:
            found[entry["id"]] = entry["logprob"]
        return found

    def complete(self, ids: list[int], **options: Any) -> dict[str, Any]:
        """Return the server's greedy completion of a prompt."""
        settings = {"temperature": 0, "cache_prompt": False, "return_tokens": True}
        return self.request("/completion", prompt=ids, **settings, **options)

    def request(self, place: str, **body: Any) -> dict[str, Any]:
        """Send one request to the server and return its answer."""
        request = urllib.request.Request(
            self._server.listening_address + place, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with self._open(request) as answer:
            return json.loads(answer.read())
