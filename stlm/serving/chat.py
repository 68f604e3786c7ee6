"""From the messages of a chat to the prompt of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_pipeline.conversations import END_OF_TURN
from data_pipeline.tokenizers.base import TEMPLATE_FILE
from stlm.errors import CheckpointError

PLAIN = """\
{%- for message in messages -%}
{{ message.role.capitalize() }}: {{ message.content }}
{% endfor -%}
{%- if add_generation_prompt %}Assistant:{% endif -%}
"""
PLAIN_STOP = ("\nUser:", "\nSystem:")  # what a model writes that goes on with the conversation by itself


class ChatTemplate:
    """A jinja template, run in a sandbox; where a model has none, each message is a line behind its role's name."""

    def __init__(self, source: str | None = None) -> None:
        """CheckpointError where `source` is no template."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.stop: tuple[str, ...] = PLAIN_STOP if source is None else (END_OF_TURN,)
        try:
            self._template = ImmutableSandboxedEnvironment().from_string(PLAIN if source is None else source)
        except TemplateError as error:
            raise CheckpointError(f"{TEMPLATE_FILE}: not a template ({error}); mend or remove it") from None

    @classmethod
    def of(cls, model_directory: Path) -> ChatTemplate:
        """That of a model directory: tokenizer/chat_template.jinja, or the plain one."""
        path = model_directory / "tokenizer" / TEMPLATE_FILE
        return cls(path.read_text(encoding="utf-8") if path.is_file() else None)

    def prompt(self, messages: list[dict[str, Any]]) -> str:
        """What the model continues with the assistant's answer. ValueError where the template refuses."""
        from jinja2 import TemplateError

        try:
            return self._template.render(messages=messages, add_generation_prompt=True)
        except TemplateError as error:
            raise ValueError(str(error)) from None
