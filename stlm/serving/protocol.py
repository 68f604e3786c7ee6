"""The fields of a request: OpenAI's completions and chat completions, checked one by one."""

from __future__ import annotations

import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stlm.errors import ConfigError
from stlm.generation import Sampling
from stlm.serving.chat import ChatTemplate


class Refused(Exception):
    """Error of a request: an HTTP status and OpenAI's error object."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        message = message.encode(errors="backslashreplace").decode()  # it may quote lone surrogates
        super().__init__(message)
        self.status = status
        kind = "invalid_request_error" if status < 429 else "rate_limit_error" if status == 429 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


@dataclass(frozen=True)
class ServerLimits:
    """Limits of one request."""

    max_tokens: int = 1024
    max_choices: int = 16  # prompts times n
    max_body_bytes: int = 1 << 20
    body_timeout_s: float = 30.0
    head_timeout_s: float = 10.0  # until the headers of a request have arrived


@dataclass(frozen=True)
class Asked:
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
OWN = {False: {"prompt", "echo", "best_of"}, True: {"messages", "max_completion_tokens", "top_logprobs"}}
# Unsupported fields of the protocol and of other servers. Null and the listed values are accepted: they change nothing.
UNSERVED: dict[str, tuple[Any, ...]] = {
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
MOST_STOPS, LONGEST_STOP, MOST_LOGPROBS = 16, 256, 20


def parse_body(body: bytes) -> Mapping[str, Any]:
    """Parse the JSON object in a body. Raises Refused."""

    def no_number(text: str) -> None:
        raise ValueError(f"{text} is no JSON")

    try:
        asked = json.loads(body, parse_constant=no_number)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body is not JSON: {error}") from None
    if not isinstance(asked, dict):
        raise Refused(f"the body: got {_kind(asked)}, expected a JSON object")
    for name, value in asked.items():
        _text(name, "the body")
        _refuse_surrogates(value, name)
    return asked


def _refuse_surrogates(value: Any, param: str) -> None:
    """Raise Refused for lone surrogates in keys and values at any depth."""
    waiting = [value]
    while waiting:
        found = waiting.pop()
        if isinstance(found, dict):
            waiting += [*found, *found.values()]
        elif isinstance(found, list):
            waiting += found
        elif isinstance(found, str):
            _text(found, param)


def read_request(asked: Mapping[str, Any], chat: bool, limits: ServerLimits, template: ChatTemplate) -> Asked:
    """Check the fields of a request. Raises Refused that names the field."""
    for name, value in asked.items():
        if name in COMMON | OWN[chat] or (value is None and name in UNSERVED):
            continue
        if name not in UNSERVED:
            raise Refused(f"{name}: unknown; expected any of {', '.join(sorted(COMMON | OWN[chat]))}", name)
        if value not in UNSERVED[name]:
            neutral = "".join(f", or send {json.dumps(one)}" for one in UNSERVED[name][:1])
            raise Refused(f"{name}: not supported by this server; leave it out{neutral}", name)
    for name in LABELS:
        if not isinstance(asked.get(name), str | None):
            raise Refused(f"{name}: got {_kind(asked[name])}, expected a string", name)
    prompts: list[str | list[int]]
    if chat:
        prompts, stop = [_prompt_of(asked.get("messages"), template)], template.stop
    else:
        prompts, stop = _prompts(asked.get("prompt")), ()
    choices = _integer(asked, "n", 1, 1, limits.max_choices)
    if not chat and _integer(asked, "best_of", choices, 1, limits.max_choices) not in (1, choices):
        raise Refused(f"best_of: not supported by this server but for n, which is {choices}; leave it out", "best_of")
    if len(prompts) * choices > limits.max_choices:
        raise Refused(
            f"n: got {len(prompts)} prompts times {choices}, expected at most {limits.max_choices} texts at once", "n"
        )
    length = "max_completion_tokens" if asked.get("max_completion_tokens") is not None else "max_tokens"
    stream = _boolean(asked, "stream")
    echo = not chat and _boolean(asked, "echo")
    least = 0 if echo else 1  # 0: only the prompt's log-probabilities
    model = asked.get("model")
    if model is not None and not isinstance(model, str):
        raise Refused(f"model: got {_kind(model)}, expected a string", "model")
    return Asked(
        prompts=prompts,
        choices=choices,
        max_tokens=_integer(asked, length, min(256 if chat else 16, limits.max_tokens), least, limits.max_tokens),
        stop=(*stop, *_stops(asked.get("stop"))),
        sampling=_sampling(asked),
        stream=stream,
        usage=_stream_options(asked.get("stream_options"), stream),
        model=model,
        chat=chat,
        logprobs=_logprobs_of_chat(asked) if chat else _logprobs(asked),
        echo=echo,
    )


def _stream_options(options: Any, stream: bool) -> bool:
    """Return whether the stream ends with the counts of ids."""
    if options is None:
        return False
    if not isinstance(options, dict):
        raise Refused(f"stream_options: got {_kind(options)}, expected an object", "stream_options")
    for name, value in options.items():
        if value is not None and not isinstance(value, bool):
            raise Refused(f"stream_options.{name}: got {_kind(value)}, expected true or false", "stream_options")
        if value and name != "include_usage":
            raise Refused(f"stream_options.{name}: not supported by this server; leave it out", "stream_options")
    usage = bool(options.get("include_usage"))
    if usage and not stream:
        raise Refused("stream_options: only for streams; an answer in one piece always has its usage", "stream_options")
    return usage


def _logprobs(asked: Mapping[str, Any]) -> int | None:
    if asked.get("logprobs") is None or asked["logprobs"] is False:
        return None
    return _integer(asked, "logprobs", 0, 0, MOST_LOGPROBS)


def _logprobs_of_chat(asked: Mapping[str, Any]) -> int | None:
    likeliest = _integer(asked, "top_logprobs", 0, 0, MOST_LOGPROBS)
    if _boolean(asked, "logprobs"):
        return likeliest
    if likeliest:
        raise Refused("top_logprobs: only beside logprobs, expected logprobs to be true", "top_logprobs")
    return None


def _sampling(asked: Mapping[str, Any]) -> Sampling:
    rules: dict[str, Any] = {}
    for name in NUMBERS:
        value = asked.get(name)
        if value is not None:
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise Refused(f"{name}: got {_kind(value)}, expected a number", name)
            rules[name] = value if abs(value) < 1e9 else math.inf  # an integer may exceed any float
    if asked.get("top_k") not in (None, -1, 0):  # -1 and 0 mean all on other servers
        rules["top_k"] = _integer(asked, "top_k", 1, 1, 1 << 31)
    rules["logit_bias"] = _logit_bias(asked.get("logit_bias"))
    rules["seed"] = _integer(asked, "seed", secrets.randbits(62), -(1 << 63), (1 << 64) - 1)
    try:
        return Sampling(**rules)
    except ConfigError as error:
        raise Refused(str(error), str(error).partition(":")[0]) from None


def _logit_bias(value: Any) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise Refused(f"logit_bias: got {_kind(value)}, expected an object of ids and numbers", "logit_bias")
    found = {}
    for id, bias in value.items():
        if not (id.isascii() and id.isdecimal() and len(id) < 10):
            raise Refused(f"logit_bias: got {id[:40]!r}, expected an id of the vocabulary, in digits", "logit_bias")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise Refused(f"logit_bias.{id}: got {str(bias)[:40]}, expected a number from -100 to 100", "logit_bias")
        if bias:
            found[int(id)] = float(bias)
    return tuple(sorted(found.items()))


def _prompts(value: Any) -> list[str | list[int]]:
    expected = "expected a string, a list of ids, or a list of either"
    if value is None:
        raise Refused(f"prompt: missing; {expected}", "prompt")
    if isinstance(value, str):
        return [_text(value, "prompt")]
    if isinstance(value, list) and value and all(map(_is_id, value)):
        return [value]
    if not isinstance(value, list) or not value:
        raise Refused(f"prompt: got {_kind(value)}, {expected}", "prompt")
    if all(isinstance(prompt, str) for prompt in value):
        return [_text(prompt, "prompt") for prompt in value]
    for place, prompt in enumerate(value):
        if not isinstance(prompt, list) or not all(map(_is_id, prompt)):
            raise Refused(f"prompt: got a list whose place {place} holds {_kind(prompt)}, {expected}", "prompt")
    return value


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
        if isinstance(content, list):  # content parts: only text is supported
            for number, part in enumerate(content):
                if isinstance(part, dict) and part.get("type", "text") != "text":
                    got = str(part["type"])[:40]
                    raise Refused(f"{param}.content[{number}].type: got {got!r}, this server reads text alone", param)
            texts = [part.get("text") if isinstance(part, dict) else None for part in content]
            content = "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else None
        if not isinstance(content, str):
            raise Refused(f"{param}.content: got {_kind(message.get('content'))}, expected text", param)
        if message.get("tool_calls") or message.get("function_call"):
            raise Refused(f"{param}: calls of tools are not supported by this server; leave the message out", param)
        role = "system" if message["role"] == "developer" else message["role"]  # its name in other templates
        named = {"name": message["name"]} if isinstance(message.get("name"), str) else {}
        messages.append({"role": role, "content": _text(content, param), **named})
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
    if value in ([], {}):
        return "an empty list" if value == [] else "an empty object"
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object"}
    return names[type(value)]
