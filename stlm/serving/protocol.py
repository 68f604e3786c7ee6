"""The fields of a request: OpenAI's completions and chat completions, checked one by one."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse

from stlm.chat.template import ChatTemplate
from stlm.errors import ConfigError
from stlm.generation import Sampling


class RequestError(Exception):
    """Error of a request: an HTTP status, and OpenAI's error object as the `body`."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        message = message.encode(errors="backslashreplace").decode()  # it may quote lone surrogates
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        """Return the HTTP response."""
        return JSONResponse(self.body, self.status, headers=_HEADERS.get(self.status))


def invalid(param: str, problem: str) -> RequestError:
    """Return the error for one field of a request."""
    return RequestError(f"{param}: {problem}", param)


_HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    408: {"Connection": "close"},
    413: {"Connection": "close"},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "1"},
}


@dataclass(frozen=True)
class ServerLimits:
    """Limits of one request."""

    max_tokens: int = 1024
    max_choices: int = 16  # prompts times n
    max_body_bytes: int = 1 << 20
    body_timeout_s: float = 30.0
    head_timeout_s: float = 10.0  # until the headers of a request have arrived


@dataclass(frozen=True)
class RequestParams:
    """A valid request."""

    prompts: list[str | list[int]]  # text, or ids
    choices: int  # of each prompt
    max_tokens: int
    stop: tuple[str, ...]
    sampling: Sampling
    stream: bool
    usage: bool  # whether a stream ends with the counts
    model: str | None
    chat: bool
    logprobs: int | None = None  # number of most probable ids to list for each id; None: no log-probabilities
    echo: bool = False  # whether the prompt is part of the text


NUMBERS = ("temperature", "top_p", "min_p", "typical_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
LABELS = ("user", "safety_identifier", "prompt_cache_key")  # accepted, without effect on the answer
COMMON = {*NUMBERS, *LABELS, "top_k", "logit_bias", "seed", "n", "max_tokens", "stop", "logprobs", "model", "stream",
          "stream_options"}  # fmt: skip
SPECIFIC = {False: {"prompt", "echo", "best_of"}, True: {"messages", "max_completion_tokens", "top_logprobs"}}
# Unsupported fields of the protocol and of other servers. Null and the listed values are accepted: they change nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_generation_prompt": (True,),
    "add_special_tokens": (True,),
    "audio": (),
    "best_of": (1,),
    "cache_prompt": (True, False),
    "continue_final_message": (False,),
    "early_stopping": (False,),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "ignore_eos": (False,),
    "include_stop_str_in_output": (False,),
    "length_penalty": (1,),
    "metadata": ({},),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "num_beams": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_logprobs": (),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True, False),
    "stop_token_ids": ([],),
    "store": (False,),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
MAX_STOPS, MAX_STOP_LENGTH, MAX_LOGPROBS = 16, 256, 20


def parse_body(body: bytes) -> Mapping[str, Any]:
    """Parse the JSON object in a body. Raises RequestError."""

    def reject_constant(text: str) -> None:
        raise ValueError(f"{text} is not valid JSON")

    try:
        fields = json.loads(body, parse_constant=reject_constant)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise RequestError(f"the body: got {_json_type(fields)}, expected a JSON object")
    for name, value in fields.items():
        _check_unicode(name, "the body")
        _refuse_surrogates(value, name)
    return fields


def _refuse_surrogates(value: Any, param: str) -> None:
    """Raise RequestError for lone surrogates in keys and values at any depth."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            waiting += [*found, *found.values()]
        elif isinstance(found, list):
            waiting += found
        elif isinstance(found, str):
            _check_unicode(found, param)


def parse_request(fields: Mapping[str, Any], chat: bool, limits: ServerLimits, template: ChatTemplate) -> RequestParams:
    """Check the fields of a request. Raises RequestError that names the field."""
    for name, value in fields.items():
        if name in COMMON | SPECIFIC[chat] or (value is None and name in UNSUPPORTED):
            continue
        if name not in UNSUPPORTED:
            raise invalid(name, f"unknown; expected any of {', '.join(sorted(COMMON | SPECIFIC[chat]))}")
        if value not in UNSUPPORTED[name]:
            neutral = "".join(f", or send {json.dumps(one)}" for one in UNSUPPORTED[name][:1])
            raise invalid(name, f"not supported by this server; leave it out{neutral}")
    for name in LABELS:
        if not isinstance(fields.get(name), str | None):
            raise invalid(name, f"got {_json_type(fields[name])}, expected a string")
    prompts: list[str | list[int]]
    if chat:
        prompts, stop = [_chat_prompt(fields.get("messages"), template)], template.stop
    else:
        prompts, stop = _prompts(fields.get("prompt")), ()
    choices = _integer(fields, "n", 1, 1, limits.max_choices)
    if not chat and _integer(fields, "best_of", choices, 1, limits.max_choices) not in (1, choices):
        raise invalid("best_of", f"only supported where it equals n, which is {choices}; leave it out")
    if len(prompts) * choices > limits.max_choices:
        raise invalid(
            "n", f"got {len(prompts)} prompts times {choices}, expected at most {limits.max_choices} texts at once"
        )
    length = "max_completion_tokens" if fields.get("max_completion_tokens") is not None else "max_tokens"
    stream = _boolean(fields, "stream")
    echo = not chat and _boolean(fields, "echo")
    least = 0 if echo else 1  # 0: only the prompt's log-probabilities
    model = fields.get("model")
    if model is not None and not isinstance(model, str):
        raise invalid("model", f"got {_json_type(model)}, expected a string")
    return RequestParams(
        prompts=prompts,
        choices=choices,
        max_tokens=_integer(fields, length, min(256 if chat else 16, limits.max_tokens), least, limits.max_tokens),
        stop=(*stop, *_stops(fields.get("stop"))),
        sampling=_sampling(fields),
        stream=stream,
        usage=_stream_options(fields.get("stream_options"), stream),
        model=model,
        chat=chat,
        logprobs=_chat_logprobs(fields) if chat else _logprobs(fields),
        echo=echo,
    )


def _stream_options(options: Any, stream: bool) -> bool:
    """Return whether the stream ends with the counts of ids."""
    if options is None:
        return False
    if not isinstance(options, dict):
        raise invalid("stream_options", f"got {_json_type(options)}, expected an object")
    for name, value in options.items():
        if value is not None and not isinstance(value, bool):
            raise RequestError(
                f"stream_options.{name}: got {_json_type(value)}, expected true or false", "stream_options"
            )
        if value and name != "include_usage":
            raise RequestError(f"stream_options.{name}: not supported by this server; leave it out", "stream_options")
    usage = bool(options.get("include_usage"))
    if usage and not stream:
        raise invalid("stream_options", "only valid with stream=true; other answers always include usage")
    return usage


def _logprobs(fields: Mapping[str, Any]) -> int | None:
    if fields.get("logprobs") is None or fields["logprobs"] is False:
        return None
    return _integer(fields, "logprobs", 0, 0, MAX_LOGPROBS)


def _chat_logprobs(fields: Mapping[str, Any]) -> int | None:
    num_top = _integer(fields, "top_logprobs", 0, 0, MAX_LOGPROBS)
    if _boolean(fields, "logprobs"):
        return num_top
    if num_top:
        raise invalid("top_logprobs", "only valid with logprobs=true")
    return None


def _sampling(fields: Mapping[str, Any]) -> Sampling:
    rules: dict[str, Any] = {}
    for name in NUMBERS:
        value = fields.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise invalid(name, f"got {_json_type(value)}, expected a number")
            rules[name] = value if abs(value) < 1e9 else math.inf  # an integer may exceed any float
    if fields.get("top_k") not in (None, -1, 0):  # -1 and 0 mean all on other servers
        rules["top_k"] = _integer(fields, "top_k", 1, 1, 1 << 31)
    rules["logit_bias"] = _logit_bias(fields.get("logit_bias"))
    rules["seed"] = _integer(fields, "seed", secrets.randbits(62), -(1 << 63), (1 << 64) - 1)
    try:
        return Sampling(**rules)
    except ConfigError as error:
        raise RequestError(str(error), str(error).partition(":")[0]) from None


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise invalid("logit_bias", f"got {_json_type(value)}, expected an object of ids and numbers")
    found = {}
    for id, bias in value.items():
        if not (id.isascii() and id.isdecimal() and len(id) < 10):
            raise invalid("logit_bias", f"got {id[:40]!r}, expected an id of the vocabulary, in digits")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise RequestError(
                f"logit_bias.{id}: got {str(bias)[:40]}, expected a number from -100 to 100", "logit_bias"
            )
        if bias:
            found[int(id)] = float(bias)
    return tuple(sorted(found.items()))


def _prompts(value: Any) -> list[str | list[int]]:
    expected = "expected a string, a list of ids, or a list of either"
    if value is None:
        raise invalid("prompt", f"missing; {expected}")
    if isinstance(value, str):
        return [_check_unicode(value, "prompt")]
    if isinstance(value, list) and value and all(map(_is_id, value)):
        return [value]
    if not isinstance(value, list) or not value:
        raise invalid("prompt", f"got {_json_type(value)}, {expected}")
    if all(isinstance(prompt, str) for prompt in value):
        return [_check_unicode(prompt, "prompt") for prompt in value]
    for place, prompt in enumerate(value):
        if not isinstance(prompt, list) or not all(map(_is_id, prompt)):
            raise invalid("prompt", f"got a list whose item {place} is {_json_type(prompt)}, {expected}")
    return value


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _chat_prompt(value: Any, template: ChatTemplate) -> str:
    if not isinstance(value, list) or not value:
        raise invalid("messages", f"got {_json_type(value)}, expected a list of messages")
    messages = []
    for place, message in enumerate(value):
        param = f"messages[{place}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise RequestError(f'{param}: expected an object such as {{"role": "user", "content": "…"}}', param)
        if message["role"] not in ("system", "developer", "user", "assistant"):
            raise RequestError(f"{param}.role: got {message['role'][:40]!r}, expected system, user or assistant", param)
        content = message.get("content")
        if isinstance(content, list):  # content parts: only text is supported
            for part_number, part in enumerate(content):
                if isinstance(part, dict) and part.get("type", "text") != "text":
                    got = str(part["type"])[:40]
                    raise RequestError(f"{param}.content[{part_number}].type: got {got!r}, expected 'text'", param)
            texts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else None
        if not isinstance(content, str):
            raise RequestError(f"{param}.content: got {_json_type(message.get('content'))}, expected text", param)
        if message.get("tool_calls") or message.get("function_call"):
            raise invalid(param, "tool calls are not supported by this server; leave the message out")
        role = "system" if message["role"] == "developer" else message["role"]  # its name in other templates
        named = {"name": message["name"]} if isinstance(message.get("name"), str) else {}
        messages.append({"role": role, "content": _check_unicode(content, param), **named})
    try:
        return _check_unicode(template.prompt(messages), "messages")
    except ValueError as error:
        raise invalid("messages", f"rejected by the model's chat template: {error}") from None


def _check_unicode(text: str, param: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise invalid(param, f"holds a lone surrogate at character {error.start}; send valid Unicode") from None
    return text


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise invalid("stop", f"got {_json_type(value)}, expected a string, or a list of strings")
    if len(stops) > MAX_STOPS or any(not stop or len(stop) > MAX_STOP_LENGTH for stop in stops):
        raise invalid("stop", f"expected up to {MAX_STOPS} strings of 1 to {MAX_STOP_LENGTH} characters")
    return tuple(stops)


def _integer(fields: Mapping[str, Any], name: str, default: int, low: int, high: int) -> int:
    value = fields.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise invalid(name, f"got {_json_type(value)}, expected an integer")
    if not low <= value <= high:
        raise invalid(name, f"got {str(value)[:40]}, expected {low} to {high}")
    return value


def _boolean(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name)
    if value is not None and not isinstance(value, bool):
        raise invalid(name, f"got {_json_type(value)}, expected true or false")
    return bool(value)


def _json_type(value: Any) -> str:
    if value is None:
        return "null"
    if value in ([], {}):
        return "an empty list" if value == [] else "an empty object"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names[type(value)]
