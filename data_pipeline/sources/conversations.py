"""Conversations: text given to a model, and the answers that it learns.

A turn is written as one character U+0002, the role, a line end, the message, and one character U+0003:

    ␂user⏎What is 2 + 2?␃␂assistant⏎4␃

Neither character occurs in ordinary text, each is one byte, and a message may hold neither, so no message can imitate
another turn. The assistant's messages count in the loss, including the final U+0003, so a model learns where to stop;
all other text is given. In a stored document, during preparation, each byte 0xFE marks a change from given text to an
answer or back.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_pipeline.tokenizers.base import END_OF_STORED_DOCUMENT, Tokenizer

TURN, END_OF_TURN = "\x02", "\x03"
ROLES = ("system", "user", "assistant")
# Names of roles in ShareGPT and similar data, in lower case.
_SHARED_ROLES = {
    "human": "user",
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "ai", "bot", "model"), "assistant"),
    **{role: role for role in ROLES},
}
_KEYS = ("messages", "conversations", "conversation")
END_OF_STORED_SEGMENT = 0xFE

# The same format as a Jinja template, for programs such as transformers.
TEMPLATE = (
    "{% for message in messages %}{{ '\\x02' + message['role'] + '\\n' + message['content'] + '\\x03' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\x02assistant\\n' }}{% endif %}"
)


def prompt_of(messages: Iterable[Mapping[str, Any]]) -> str:
    """Return the text that a model reads before it answers. Raises ValueError for an invalid message."""
    return "".join(text for message in messages for text in _turn(message)) + f"{TURN}assistant\n"


def segments_of(record: Mapping[str, Any], key: str | None = None) -> list[str]:
    """Return given text and answers alternating, given text first. Raises ValueError for a record of another form.

    key: of the messages, if it is none of these:

    {"messages": [{"role": …, "content": …}, …]}
    {"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]}, as in ShareGPT
    {"instruction": …, "input": …, "output": …}, as in Alpaca
    {"prompt": …, "completion": …}, whose texts are used unchanged
    """
    key = key or next((key for key in _KEYS if key in record), None)
    if key or ("instruction" in record and "output" in record):
        messages = record[key] if key else _instruction(record)
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"{key!r} is not a list of messages but {_kind(messages)}")
        messages = [_shared(message) for message in messages]
        system, first = record.get("system"), messages[0]
        if system and isinstance(system, str) and isinstance(first, Mapping) and first.get("role") != "system":
            messages = [{"role": "system", "content": system}, *messages]
        pieces: list[tuple[bool, str]] = []
        for message in messages:
            head, said = _turn(message)
            pieces += [(False, head), (message["role"] == "assistant", said)]
        if not any(counts for counts, _ in pieces):
            raise ValueError(f"{key!r} holds no message of the role 'assistant', so there is nothing to learn")
        if not any(counts and said != END_OF_TURN for counts, said in pieces):
            raise ValueError(f"{key!r} holds only empty messages of the role 'assistant', so there is nothing to learn")
        return ["".join(text for _, text in group) for _, group in groupby(pieces, key=lambda piece: piece[0])]
    if "prompt" in record and "completion" in record:
        texts = [record["prompt"], record["completion"]]
        if wrong := [text for text in texts if not isinstance(text, str)]:
            raise ValueError(f"'prompt' and 'completion' are texts, got {_kind(wrong[0])}")
        if not texts[1]:
            raise ValueError("'completion' is empty, so there is nothing to learn")
        return texts
    keys = ", ".join(map(str, [*record][:10]))
    raise ValueError(
        "expected the key 'messages' or 'conversations', or 'prompt' and 'completion', or 'instruction' and 'output', "
        f"or messages under the key that --text-key names; the keys are: {keys}"
    )


def _instruction(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the messages of an instruction: any earlier turns, the instruction with its input after a blank line, the
    output.
    """
    texts = [record["instruction"], record.get("input") or "", record["output"]]
    if wrong := [text for text in texts if not isinstance(text, str)]:
        raise ValueError(f"'instruction', 'input' and 'output' are texts, got {_kind(wrong[0])}")
    instruction, given, output = texts
    if not output:
        raise ValueError("'output' is empty, so there is nothing to learn")
    history = record.get("history") or []
    if not isinstance(history, list) or any(not isinstance(turn, list) or len(turn) != 2 for turn in history):
        raise ValueError(f"'history' is not a list of pairs of an instruction and its answer but {_kind(history)}")
    asked = "\n\n".join(text for text in (instruction, given) if text)
    turns = [*history, [asked, output]]
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def _shared(message: Any) -> Any:
    """Return a message with `role` and `content`, converting the keys `from` and `value` and other names of roles."""
    if not isinstance(message, Mapping) or not ("role" in message or "from" in message):
        return message
    role = message.get("role", message.get("from"))
    return {
        "role": _SHARED_ROLES.get(role.lower(), role) if isinstance(role, str) else role,
        "content": message.get("content", message.get("value")),
    }


def encode_conversations(
    tokenizer: Tokenizer, stored: NDArray[np.uint8], lengths: NDArray[np.int64]
) -> tuple[NDArray[Any], NDArray[np.int64], NDArray[np.bool_]]:
    """Return the ids of stored conversations, the number of ids of each, and a mask of the given (not learned) ids.

    Each segment is encoded separately, as when a model answers a prompt. The end_of_text after an answer is learned.
    """
    ends = np.flatnonzero(stored >= END_OF_STORED_SEGMENT)  # bytes that UTF-8 never uses
    last = stored[ends] == END_OF_STORED_DOCUMENT
    assert last.sum() == len(lengths)
    ids, counts = tokenizer.encode_documents(
        np.where(stored == END_OF_STORED_SEGMENT, np.uint8(END_OF_STORED_DOCUMENT), stored),
        np.diff(ends, prepend=-1),
    )
    document = np.cumsum(last) - last
    first = np.flatnonzero(np.diff(document, prepend=-1))
    given = np.repeat((np.arange(len(ends)) - first[document]) % 2 == 0, counts)
    kept = np.ones(len(ids), dtype=np.bool_)
    kept[np.cumsum(counts)[~last] - 1] = False  # end_of_text of a segment that is not the last of its document
    return ids[kept], np.add.reduceat(counts - ~last, first), given[kept]


def _turn(message: Any) -> tuple[str, str]:
    """Return the head of a turn, and its message with the end of the turn."""
    if not isinstance(message, Mapping):
        raise ValueError(f"a message is not an object with 'role' and 'content' but {_kind(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"the role of a message is {role!r}, expected one of {', '.join(ROLES)}")
    if not isinstance(content, str):
        raise ValueError(f"the content of a message is not a text but {_kind(content)}")
    if found := next((character for character in (TURN, END_OF_TURN) if character in content), None):
        raise ValueError(f"a message holds the character U+{ord(found):04X}, which marks where turns begin and end")
    return f"{TURN}{role}\n", f"{content}{END_OF_TURN}"


def _kind(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
