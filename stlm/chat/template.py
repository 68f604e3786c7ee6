"""Chat templates, which turn the messages of a chat into a prompt."""

from __future__ import annotations

from typing import Any

from data_pipeline.sources.conversations import END_OF_TURN
from stlm.errors import CheckpointError

PLAIN = """\
{%- for message in messages -%}
{{ message.role.capitalize() }}: {{ message.content }}
{% endfor -%}
{%- if add_generation_prompt %}Assistant:{% endif -%}
"""
PLAIN_STOP = ("\nUser:", "\nSystem:")  # what a model writes when it continues the conversation by itself


class ChatTemplate:
    """A Jinja template, run in a sandbox. For a model without one, each message is a line after its role's name."""

    def __init__(self, source: str | None = None) -> None:
        """`source`: the `chat_template` of the model's tokenizer. Raises CheckpointError if it is not a template."""
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        self.stop: tuple[str, ...] = PLAIN_STOP if source is None else (END_OF_TURN,)
        try:
            self._template = ImmutableSandboxedEnvironment().from_string(PLAIN if source is None else source)
        except TemplateError as error:
            raise CheckpointError(
                f"tokenizer/chat_template.jinja: not a template ({error}); fix or remove it"
            ) from None

    def prompt(self, messages: list[dict[str, Any]]) -> str:
        """Return the prompt that the model continues with the assistant's answer. Raises ValueError if the template
        does."""
        from jinja2 import TemplateError

        try:
            return self._template.render(messages=messages, add_generation_prompt=True)
        except TemplateError as error:
            raise ValueError(str(error)) from None
