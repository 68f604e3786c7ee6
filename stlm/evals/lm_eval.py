"""Models for lm-evaluation-harness, registered as `--model stlm`.

python -m stlm.evals.lm_eval run --model stlm --model_args checkpoint=runs/mine --tasks lambada_openai

The harness registers models on import, so its own command does not know this one: the line above runs that command
after the import. In Python, `import stlm.evals.lm_eval` before calling `lm_eval.simple_evaluate(model="stlm", …)`.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch

from data_pipeline.extras import how_to_install
from stlm.errors import StlmError
from stlm.evals.likelihood import Row, log_likelihoods
from stlm.stlm import STLM

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise StlmError(f"lm-evaluation-harness is not installed ({error}): {how_to_install('lm-eval')}") from None

_SAMPLING = ("temperature", "top_k", "top_p")


@register_model("stlm")
class HarnessModel(LM):
    """The harness's interface to a model, computed in the same batches and with the same numbers as the tasks here.

    Every request is read as the beginning of a document, after the end of another.
    """

    def __init__(self, checkpoint: str, device: str | None = None, precision: str = "fp32", **sizes: Any) -> None:
        """Load `checkpoint`: a run, a checkpoint or a model directory. `precision`: fp32 or bf16, of matrix products.

        The harness also passes batch sizes, which are ignored: batches are chosen by length.
        """
        super().__init__()
        if unknown := set(sizes) - {"batch_size", "max_batch_size"}:
            raise StlmError(f"--model_args: got {min(unknown)!r}, expected checkpoint, device or precision")
        if precision not in ("fp32", "bf16"):
            raise StlmError(f"--model_args: got precision={precision}, expected fp32 or bf16")
        self._bf16 = precision == "bf16"
        if device is None or not torch.cuda.is_available():  # the harness passes cuda:0 on every machine
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = STLM.load(checkpoint, device)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Return (nats, whether it is the most probable continuation) for each (context, continuation)."""
        of_documents = groupby(requests, key=lambda request: (request.task_name, request.doc_id))
        questions = [[Row(*request.args) for request in together] for _, together in of_documents]
        return [(found.log_probability, found.greedy == 1) for rows in self._scored(questions) for found in rows]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Return the nats of each text, read in windows that overlap by half where it is longer than the context."""
        with self._precision():
            return [self.model.log_likelihood(*request.args) for request in requests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Return the text generated after each prompt, up to the first of the `until` strings."""
        return [self._generated(*request.args) for request in requests]

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self._bf16)

    def _scored(self, questions: list[list[Row]]) -> list[Any]:
        with self._precision():
            return log_likelihoods(self.model, questions, "requests").by_question

    def _generated(self, prompt: str, settings: dict[str, Any]) -> str:
        settings = dict(settings)
        until = settings.pop("until", None) or []
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        length = settings.pop("max_gen_toks", 256)
        if not settings.pop("do_sample", False):
            settings["temperature"] = 0.0
        if unknown := sorted(settings.keys() - set(_SAMPLING)):
            raise StlmError(f"generation_kwargs: got {unknown[0]!r}, expected until, max_gen_toks, do_sample, "
                            f"{', '.join(_SAMPLING)}")  # fmt: skip
        with self._precision():
            return self.model.generate(prompt, max_new_ids=length, stop=stops, **settings)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
