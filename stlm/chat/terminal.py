"""Prompts from the command line, a pipe or a terminal, and the texts that continue them."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TextIO

from data_pipeline.plurals import number_of
from stlm.chat.template import ChatTemplate
from stlm.generation import DecodingStats, Sampling
from stlm.stlm import STLM

COMMANDS = {
    "/help": "list the commands",
    "/reset": "forget the conversation (/new does the same)",
    "/exit": "end, as Ctrl-D does; Ctrl-C stops an answer",
}


@dataclass(frozen=True)
class GenerationOptions:
    """Options of text generation: the arguments of `STLM.generate_stream`, `generate_batch` and `beam_search`."""

    max_new_ids: int = 256
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    samples: int = 1  # texts for each prompt
    beams: int | None = None  # beam search instead of sampling
    exit_threshold: float | None = None
    speculative: str | None = "auto"
    num_drafts: int | None = None
    print_stats: bool = False  # layers run and drafts accepted, after each text


class Streams(NamedTuple):
    """The streams for reading prompts, writing texts, and writing all other messages."""

    input: TextIO
    output: TextIO
    messages: TextIO


class Conversation:
    """A conversation as the model reads it: one text or, with `chat`, turns in the model's chat template."""

    def __init__(self, model: STLM, chat: bool) -> None:
        self._text = ""
        self._turns: list[dict[str, str]] = []
        self._template = ChatTemplate(model.tokenizer.chat_template) if chat else None
        self.stop = self._template.stop if self._template else ()

    def prompt(self, line: str) -> str:
        """Return the text that the model continues."""
        if self._template is None:
            return self._text + line
        return self._template.prompt([*self._turns, {"role": "user", "content": line}])

    def add(self, line: str, answer: str) -> None:
        """Append a line and its answer."""
        self._text += f"{line}{answer}\n"
        self._turns += [{"role": "user", "content": line}, {"role": "assistant", "content": answer}]

    def forget(self) -> None:
        """Clear the conversation."""
        self._text, self._turns = "", []


def answer_prompts(
    model: STLM, prompt: str | None, options: GenerationOptions, streams: Streams, chat: bool = False
) -> None:
    """Continue `prompt`; if None, each line of the input. At a terminal the lines are one conversation.

    Prompt number n uses the seeds from `options.sampling.seed` + n × `options.samples` on.
    """
    _reconfigure(streams.output, encoding="utf-8")  # whatever the locale: the output is valid UTF-8
    conversation = Conversation(model, chat)
    if chat and model.tokenizer.chat_template is None:
        print("the model was trained on no conversations; prompts are plain lines", file=streams.messages)
    interactive = prompt is None and streams.input.isatty()
    for number, line in enumerate(_prompts(prompt, streams)):
        if interactive and is_command(line):
            if line.strip() == "/exit":
                break
            _run_command(line.strip(), conversation, streams.messages)
            continue
        text = conversation.prompt(line)
        _warn_of_length(model, text, streams.messages)
        stats = DecodingStats()
        answer: list[str] = []
        sampling = replace(options.sampling, seed=options.sampling.seed + number * options.samples)
        stop = (*options.stop, *conversation.stop)
        try:
            for pieces in _texts(model, text, replace(options, sampling=sampling, stop=stop), stats, streams.messages):
                answer = []
                _show("" if chat else line, pieces, answer, streams.output)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\nstopped", file=streams.messages)
        if interactive:
            conversation.add(line, "".join(answer))
        if stats.ids and options.print_stats:
            print(stats, file=streams.messages)


def is_command(line: str) -> bool:
    """Return whether a line is a command: a slash and one word. A leading space makes it text."""
    return re.fullmatch(r"/\w+ *", line) is not None


def _run_command(command: str, conversation: Conversation, messages: TextIO) -> None:
    if command in ("/reset", "/new"):
        conversation.forget()
        print("forgot the conversation", file=messages)
    elif command == "/help":
        print("\n".join(f"{name:<8}{what}" for name, what in COMMANDS.items()), file=messages)
    else:
        print(f"unknown command {command}; /help lists them; to send it as text, begin with a space", file=messages)


def _texts(
    model: STLM, prompt: str, options: GenerationOptions, stats: DecodingStats, messages: TextIO
) -> Iterator[Iterator[str]]:
    """Yield each continuation of a prompt as an iterator of pieces."""
    stop, most = options.stop, options.max_new_ids
    if options.beams is not None:
        (text, log_probability), *_ = model.beam_search(prompt, num_beams=options.beams, max_new_ids=most)
        yield iter([text])
        print(f"log-probability {log_probability:.4f}", file=messages)
    elif options.samples > 1:
        prompts: Sequence[str] = [prompt] * options.samples
        for text in model.generate_batch(prompts, max_new_ids=most, stop=stop, sampling=options.sampling):
            yield iter([text])
    else:
        yield model.generate_stream(
            prompt, max_new_ids=most, stop=stop, sampling=options.sampling, exit_threshold=options.exit_threshold,
            speculative=options.speculative, num_drafts=options.num_drafts, stats=stats,
        )  # fmt: skip


def _warn_of_length(model: STLM, prompt: str, messages: TextIO) -> None:
    length, most = len(model.tokenizer.encode(prompt)), model.config.context_length - 1
    if length > most:
        print(f"the prompt has {number_of(length, 'id')}; the model reads the last {most}", file=messages)


def _prompts(given: str | None, streams: Streams) -> Iterator[str]:
    """Yield the given prompt, or lines as they are typed or piped in."""
    if given is not None:
        yield given
    elif streams.input.isatty():
        import readline  # noqa: F401 (arrow keys bring back earlier lines)

        _reconfigure(streams.input, errors="replace")  # an invalid byte does not end the conversation
        print("Type a text and press Enter; /help lists the commands, Ctrl-D ends.", file=streams.messages)
        while True:
            try:
                yield input("› ")
            except KeyboardInterrupt:
                print("\nCtrl-D or /exit ends", file=streams.messages)
            except EOFError:
                print(file=streams.messages)
                return
    else:
        _reconfigure(streams.input, encoding="utf-8", errors="replace")
        for line in streams.input:
            yield line.rstrip("\r\n")


def _show(prompt: str, pieces: Iterator[str], answer: list[str], output: TextIO) -> None:
    """Print the prompt and its continuation as it is generated; append the pieces to `answer`."""
    answer.append(next(pieces, ""))  # raises before anything is printed if the model cannot read the prompt
    print(prompt + answer[0], end="", flush=True, file=output)
    for piece in pieces:
        print(piece, end="", flush=True, file=output)
        answer.append(piece)
    print(flush=True, file=output)


def _reconfigure(stream: TextIO, encoding: str | None = None, errors: str | None = None) -> None:
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(encoding=encoding, errors=errors)
