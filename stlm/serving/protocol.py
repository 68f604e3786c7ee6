"""What a request may say: OpenAI's completions and chat completions, checked field by field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stlm.errors import ConfigError
from stlm.generation import Sampling
from stlm.serving.chat import ChatTemplate


class Refused(Exception):
    """A request that is not served: an HTTP status, and OpenAI's error object."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    max_tokens: int = 1024
    max_choices: int = 16  # prompts times n
    max_body_bytes: int = 1 << 20
    body_timeout_s: float = 30.0


@dataclass(frozen=True)
class Asked:
    """A request that makes sense."""

    prompts: list[str]
    choices: int  # of each prompt
    max_tokens: int
    stop: tuple[str, ...]
    sampling: Sampling
    stream: bool
    usage: bool  # whether a stream ends with the counts
    model: str | None
    chat: bool


NUMBERS = ("temperature", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
COMMON = {*NUMBERS, "top_k", "model", "n", "stream", "stream_options", "stop", "seed", "user", "max_tokens"}
OWN = {False: {"prompt"}, True: {"messages", "max_completion_tokens"}}
# Fields of the protocol that ask for what is not there; these values ask for nothing.
NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})
UNSERVED = {"logprobs", "top_logprobs", "echo", "best_of", "logit_bias", "suffix", "tools", "tool_choice", "functions",
            "function_call", "response_format", "modalities", "audio", "store", "metadata",
            "parallel_tool_calls"}  # fmt: skip
MOST_STOPS, LONGEST_STOP = 16, 256


def parse_body(body: bytes) -> Mapping[str, Any]:
    """The JSON object in a body."""

    def no_number(text: str) -> None:
        raise ValueError(f"{text} is no JSON")

    try:
        asked = json.loads(body, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON: {error}") from None
    if not isinstance(asked, dict):
        raise Refused(f"the body: got {_kind(asked)}, expected a JSON object")
    return asked


def read_request(asked: Mapping[str, Any], chat: bool, limits: Limits, template: ChatTemplate) -> Asked:
    """What a request asks for. Raises Refused, naming the field."""
    for name, value in asked.items():
        if name in UNSERVED and value not in NOTHING and not (name == "best_of" and value == 1):
            raise Refused(f"{name}: not supported by this server; leave it out", name)
        if name not in COMMON | OWN[chat] | UNSERVED:
            raise Refused(f"{name}: unknown; expected any of {', '.join(sorted(COMMON | OWN[chat]))}", name)
    if chat:
        prompts, stop = [_prompt_of(asked.get("messages"), template)], template.stop
    else:
        prompts, stop = _prompts(asked.get("prompt")), ()
    choices = _integer(asked, "n", 1, 1, limits.max_choices)
    if len(prompts) * choices > limits.max_choices:
        raise Refused(
            f"n: got {len(prompts)} prompts times {choices}, expected at most {limits.max_choices} texts at once", "n"
        )
    length = "max_completion_tokens" if asked.get("max_completion_tokens") is not None else "max_tokens"
    options = asked.get("stream_options")
    if options is not None and not isinstance(options, dict):
        raise Refused(f"stream_options: got {_kind(options)}, expected an object", "stream_options")
    model = asked.get("model")
    if model is not None and not isinstance(model, str):
        raise Refused(f"model: got {_kind(model)}, expected a string", "model")
    return Asked(
        prompts=prompts,
        choices=choices,
        max_tokens=_integer(asked, length, min(256 if chat else 16, limits.max_tokens), 1, limits.max_tokens),
        stop=(*stop, *_stops(asked.get("stop"))),
        sampling=_sampling(asked),
        stream=_boolean(asked, "stream"),
        usage=bool(options and options.get("include_usage") is True),
        model=model,
        chat=chat,
    )


def _sampling(asked: Mapping[str, Any]) -> Sampling:
    rules: dict[str, Any] = {}
    for name in NUMBERS:
        value = asked.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise Refused(f"{name}: got {_kind(value)}, expected a number", name)
            rules[name] = value if abs(value) < 1e9 else math.inf  # an integer may be beyond any float
    if asked.get("top_k") is not None:
        rules["top_k"] = _integer(asked, "top_k", 1, 1, 1 << 31)
    rules["seed"] = _integer(asked, "seed", 0, -(1 << 63), (1 << 64) - 1)
    try:
        return Sampling(**rules)
    except ConfigError as error:
        raise Refused(str(error), str(error).partition(":")[0]) from None


def _prompts(value: Any) -> list[str]:
    if value is None:
        raise Refused("prompt: missing; expected a string, or a list of strings", "prompt")
    prompts = [value] if isinstance(value, str) else value
    if not isinstance(prompts, list) or not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise Refused(f"prompt: got {_kind(value)}, expected a string, or a list of strings", "prompt")
    return [_text(prompt, "prompt") for prompt in prompts]


def _prompt_of(value: Any, template: ChatTemplate) -> str:
    if not isinstance(value, list) or not value:
        raise Refused(f"messages: got {_kind(value)}, expected a list of messages", "messages")
    messages = []
    for place, message in enumerate(value):
        param = f"messages[{place}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise Refused(f'{param}: expected an object such as {{"role": "user", "content": "…"}}', param)
        if message["role"] not in ("system", "developer", "user", "assistant"):
            raise Refused(f"{param}.role: got {message['role'][:40]!r}, expected system, user or assistant", param)
        content = message.get("content")
        if isinstance(content, list):  # parts, of which text alone can be read
            texts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else None
        if not isinstance(content, str):
            raise Refused(f"{param}.content: got {_kind(message.get('content'))}, expected text", param)
        messages.append({"role": message["role"], "content": _text(content, param)})
    try:
        return _text(template.prompt(messages), "messages")
    except ValueError as error:
        raise Refused(f"messages: the model's chat template refuses them: {error}", "messages") from None


def _text(text: str, param: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Refused(
            f"{param}: holds a lone surrogate at character {error.start}; send valid Unicode", param
        ) from None
    return text


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise Refused(f"stop: got {_kind(value)}, expected a string, or a list of strings", "stop")
    if len(stops) > MOST_STOPS or any(not stop or len(stop) > LONGEST_STOP for stop in stops):
        raise Refused(f"stop: expected up to {MOST_STOPS} strings of 1 to {LONGEST_STOP} characters", "stop")
    return tuple(stops)


def _integer(asked: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = asked.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise Refused(f"{name}: got {_kind(value)}, expected an integer", name)
    if not low <= value <= high:
        raise Refused(f"{name}: got {str(value)[:40]}, expected {low} to {high}", name)
    return value


def _boolean(asked: Mapping[str, Any], name: str) -> bool:
    value = asked.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refused(f"{name}: got {_kind(value)}, expected true or false", name)
    return bool(value)


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names[type(value)]
