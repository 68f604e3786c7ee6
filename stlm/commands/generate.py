"""Generate text with a trained model, or score a text.

python scripts/generate.py runs/quickstart --prompt "The module"
python scripts/generate.py runs/quickstart --score FILE
"""

from __future__ import annotations

import argparse
import io
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from data_pipeline.plurals import number_of
from stlm.errors import StlmError

if TYPE_CHECKING:
    from stlm.generation import DecodingStats, Sampling
    from stlm.stlm import STLM


# Defaults of options. argparse's default is None, so that a given option without effect is detected.
DEFAULTS: dict[str, Any] = {
    "prompt": None, "max_ids": 256, "temperature": 0.8, "top_k": None, "top_p": None, "min_p": None, "typical_p": None,
    "repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "stop": (), "seed": 0, "samples": 1,
    "beams": None, "score": None, "exit_threshold": None, "speculative": "auto", "drafts": None,
}  # fmt: skip
FILTERS = ("top_k", "top_p", "min_p", "typical_p")
DRAWING = ("temperature", *FILTERS, "repetition_penalty", "frequency_penalty", "presence_penalty", "valid_utf8", "seed")
DRAFTING = ("exit_threshold", "speculative", "drafts")


def refuse_without_effect(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with a usage error where an option has no effect in combination with the others."""

    def refuse(options: Sequence[str], beside: str, why: str) -> None:
        given = [name for name in options if getattr(args, name) is not None and getattr(args, name) is not False]
        if given:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
            parser.error(f"{names}: without effect beside {beside}, {why}; leave one of them out")

    if args.score is not None:
        texts = ("prompt", "chat", "max_ids", *DRAWING, "stop", "samples", "beams", *DRAFTING)
        refuse(texts, "--score", "which writes no text but scores the file as it stands")
    elif args.per_line:
        parser.error("--per-line: goes with --score FILE")
    if args.beams is not None:
        refuse((*DRAWING, "samples", *DRAFTING), "--beams", "which searches and draws nothing")
        refuse(("stop", "chat"), "--beams", "whose texts end with the document alone")
    if args.temperature == 0:
        refuse((*FILTERS, "seed", "samples"), "--temperature 0", "which always takes the likeliest id")
    if (args.samples or 1) > 1:
        refuse(DRAFTING, f"--samples {args.samples}", "whose texts are written together, id by id")
    if args.exit_threshold is not None:
        refuse(("speculative", "drafts"), "--exit-threshold", "which drafts nothing")
    if args.speculative == "off" or (args.speculative in (None, "auto") and args.temperature != 0):
        refuse(("drafts",), f"--speculative {args.speculative or 'auto'}", "which drafts nothing here")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Continue a prompt. Without --prompt, every line that is piped in is one; at a terminal, lines and "
        "answers are one conversation. Of a prompt longer than the model's context, the end is read.",
    )
    parser.add_argument("model", metavar="RUN_OR_CHECKPOINT", help="run (its newest checkpoint), checkpoint or model")
    parser.add_argument("--prompt", metavar="TEXT", help="what the text begins with; may be empty")
    parser.add_argument(
        "--chat", action="store_true", help="what is typed is what a user says; the model answers as an assistant"
    )
    parser.add_argument("--max-ids", type=at_least(0), metavar="N", help="longest continuation in ids (default: 256)")
    parser.add_argument(
        "--temperature",
        type=number(0.0, 100.0),
        metavar="T",
        help="1: as the model says, lower: likelier ids, 0: always the likeliest (default: 0.8)",
    )
    parser.add_argument("--top-k", type=at_least(1), metavar="K", help="draw from the K likeliest ids only")
    parser.add_argument(
        "--top-p",
        type=number(0.0, 1.0),
        metavar="P",
        help="draw from the fewest ids that hold this share of the probability",
    )
    parser.add_argument(
        "--min-p", type=number(0.0, 1.0), metavar="P", help="only ids P times as likely as the likeliest"
    )
    parser.add_argument(
        "--typical-p", type=number(0.0, 1.0), metavar="P", help="only ids of about the expected surprise, of this share"
    )
    parser.add_argument(
        "--repetition-penalty",
        type=number(0.01, 100.0),
        metavar="X",
        help="divide the logits of ids that prompt or text hold already (default: 1, which changes nothing)",
    )
    parser.add_argument(
        "--frequency-penalty",
        type=number(-100.0, 100.0),
        metavar="X",
        help="take X from an id's logit for each time that the text holds it (default: 0)",
    )
    parser.add_argument(
        "--presence-penalty",
        type=number(-100.0, 100.0),
        metavar="X",
        help="take X from an id's logit once, if the text holds it (default: 0)",
    )
    parser.add_argument("--valid-utf8", action="store_true", help="draw only bytes that make whole characters")
    parser.add_argument(
        "--stop",
        action="append",
        type=some_text,
        metavar="TEXT",
        help="end the text before this; may be given repeatedly",
    )
    parser.add_argument("--seed", type=at_least(0), metavar="N", help="the same seed draws the same text (default: 0)")
    parser.add_argument(
        "--samples", type=at_least(1), metavar="N", help="texts for each prompt, seeds in a row (default: 1)"
    )
    parser.add_argument(
        "--beams",
        type=at_least(1),
        metavar="N",
        help="the likeliest text that a search with N beams finds; draws nothing",
    )
    parser.add_argument(
        "--score", metavar="FILE", help="write no text, but how likely FILE (- is the standard input) is: bits per byte"
    )
    parser.add_argument("--per-line", action="store_true", help="with --score: of each line as a text of its own, too")
    parser.add_argument(
        "--exit-threshold",
        type=number(1e-9, 1.0),
        metavar="P",
        help="of a model with exits: draw each id from the first exit that gives some id this probability",
    )
    parser.add_argument(
        "--speculative",
        choices=("auto", "self", "ngram", "off"),
        help="draft ids and verify them in one pass: the text stays what it is at temperature 0, and as likely "
        "as it is otherwise; self, of a model with exits: by its first layers; ngram: copied from what was said before "
        "(default: auto, which is ngram at temperature 0 and off otherwise)",
    )
    parser.add_argument(
        "--drafts",
        type=at_least(1),
        metavar="N",
        help="ids drafted at a time, with --speculative (default: 8 copied ones, or 4)",
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "int8"),
        default="fp32",
        help="what the matrices are read as: fewer bits are quicker, and say a little else (default: fp32)",
    )
    args = parser.parse_args(argv)
    refuse_without_effect(parser, args)
    args = argparse.Namespace(**DEFAULTS | {name: value for name, value in vars(args).items() if value is not None})

    import torch  # late, so that --help and usage errors are fast

    from stlm.generation import DecodingStats, Sampling
    from stlm.stlm import STLM

    model = STLM.load(args.model, device="cuda" if torch.cuda.is_available() else "cpu")
    model.optimize_for_decoding(args.precision)
    reconfigure(sys.stdout, encoding="utf-8")  # whatever the locale: the output is valid UTF-8
    if args.score is not None:
        score(model, args.score, args.per_line)
        return 0
    rules = Sampling(**{field.name: getattr(args, field.name) for field in fields(Sampling) if field.name in args})
    conversation = Conversation(model, args.chat)
    talking = args.prompt is None and sys.stdin.isatty()
    for number_of_prompt, line in enumerate(prompts(args.prompt)):
        if talking and is_command(line):
            if line.strip() == "/exit":
                break
            obey(line, conversation)
            continue
        prompt = conversation.prompt(line)
        warn_of_length(model, prompt)
        stats = DecodingStats()
        said: list[str] = []
        seed = args.seed + number_of_prompt * args.samples
        try:
            for pieces in answers(model, prompt, args, replace(rules, seed=seed), conversation.stop, stats):
                said = []
                show("" if args.chat else line, pieces, said)
        except KeyboardInterrupt:
            if not talking:
                raise
            print("\nstopped", file=sys.stderr)
        if talking:
            conversation.add(line, "".join(said))
        if stats.ids and (args.speculative != "auto" or args.exit_threshold is not None):
            print(stats, file=sys.stderr)
    return 0


def answers(
    model: STLM,
    prompt: str,
    args: argparse.Namespace,
    sampling: Sampling,
    chat_stop: Sequence[str],
    stats: DecodingStats,
) -> Iterator[Iterator[str]]:
    """Yield each continuation of a prompt as an iterator of pieces: one, or as many as --samples."""
    stop = [*args.stop, *chat_stop]
    if args.beams is not None:
        (text, log_probability), *_ = model.beam_search(prompt, num_beams=args.beams, max_new_ids=args.max_ids)
        yield iter([text])
        print(f"log-probability {log_probability:.4f}", file=sys.stderr)
    elif args.samples > 1:
        prompts = [prompt] * args.samples
        for text in model.generate_batch(prompts, max_new_ids=args.max_ids, stop=stop, sampling=sampling):
            yield iter([text])
    else:
        yield model.generate_stream(
            prompt,
            max_new_ids=args.max_ids,
            stop=stop,
            sampling=sampling,
            exit_threshold=args.exit_threshold,
            speculative=None if args.speculative == "off" else args.speculative,
            num_drafts=args.drafts,
            stats=stats,
        )


COMMANDS = {
    "/help": "list the commands",
    "/reset": "forget the conversation (/new does the same)",
    "/exit": "end, as Ctrl-D does; Ctrl-C stops an answer",
}


def is_command(line: str) -> bool:
    """Return whether a line is a command: a slash and one word. A leading space makes it text."""
    return re.fullmatch(r"/\w+ *", line) is not None


def obey(line: str, conversation: Conversation) -> None:
    """Execute a command of a conversation, except /exit."""
    command = line.strip()
    if command in ("/reset", "/new"):
        conversation.forget()
        print("forgot the conversation", file=sys.stderr)
    elif command == "/help":
        print("\n".join(f"{name:<8}{what}" for name, what in COMMANDS.items()), file=sys.stderr)
    else:
        print(f"unknown command {command}; /help lists them; to send it as text, begin with a space", file=sys.stderr)


class Conversation:
    """The conversation as the model reads it: one text or, with `chat`, turns in the model's chat template."""

    def __init__(self, model: STLM, chat: bool) -> None:
        self._text = ""
        self._turns: list[dict[str, str]] = []
        self._template = None
        if chat:
            from stlm.serving.chat import ChatTemplate

            self._template = ChatTemplate(model.tokenizer.chat_template)
            if model.tokenizer.chat_template is None:
                print("the model was trained on no conversations; it is asked in plain lines", file=sys.stderr)
        self.stop = self._template.stop if self._template else ()

    def prompt(self, line: str) -> str:
        """Return the text that the model continues."""
        if self._template is None:
            return self._text + line
        return self._template.prompt([*self._turns, {"role": "user", "content": line}])

    def add(self, line: str, said: str) -> None:
        """Append a line and its answer."""
        self._text += f"{line}{said}\n"
        self._turns += [{"role": "user", "content": line}, {"role": "assistant", "content": said}]

    def forget(self) -> None:
        """Clear the conversation."""
        self._text, self._turns = "", []


def score(model: STLM, name: str, per_line: bool) -> None:
    """Print the log-likelihood of a file, read as one document without its end."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        text = data.decode("utf-8")
    except FileNotFoundError:
        raise StlmError(f"--score: there is no file {name}") from None
    except OSError as error:
        raise StlmError(f"--score: {name} cannot be read ({error.strerror}), expected a text file") from None
    except UnicodeDecodeError as error:
        raise StlmError(f"--score: {name} is not UTF-8 at byte {error.start}; convert it first") from None
    if not text:
        raise StlmError(f"--score: {name} is empty, expected a text")
    if per_line:
        for line in filter(None, text.splitlines()):
            print(f"{bits_per_byte(model, line)[1]:.4f}\t{line}")
    nats, bits = bits_per_byte(model, text)
    print(f"log-likelihood {-nats:.4f} nats, {number_of(len(data), 'byte')}, {bits:.4f} bits per byte")


def bits_per_byte(model: STLM, text: str) -> tuple[float, float]:
    """Return the nats and the bits per byte of a text."""
    nats = -model.log_likelihood(text)
    return nats, nats / math.log(2) / len(text.encode())


def warn_of_length(model: STLM, prompt: str) -> None:
    """Print a warning where a prompt is longer than the context."""
    length, most = len(model.tokenizer.encode(prompt)), model.config.context_length - 1
    if length > most:
        print(f"the prompt has {number_of(length, 'id')}; the model reads the last {most}", file=sys.stderr)


def prompts(given: str | None) -> Iterator[str]:
    """Yield the prompt of the command line, or lines as they are typed or piped in."""
    if given is not None:
        yield given
    elif sys.stdin.isatty():
        import readline  # noqa: F401 (what was typed before comes back with the arrow keys)

        reconfigure(sys.stdin, errors="replace")  # an invalid byte does not end the conversation
        print("Type a text and press Enter; /help lists the commands, Ctrl-D ends.", file=sys.stderr)
        while True:
            try:
                yield input("› ")
            except KeyboardInterrupt:
                print("\nCtrl-D or /exit ends", file=sys.stderr)
            except EOFError:
                print(file=sys.stderr)
                return
    else:
        reconfigure(sys.stdin, encoding="utf-8", errors="replace")
        for line in sys.stdin:
            yield line.rstrip("\r\n")


def show(prompt: str, pieces: Iterator[str], said: list[str]) -> None:
    """Print the prompt and its continuation as it is generated, on separate lines; append the pieces to `said`."""
    said.append(next(pieces, ""))  # raises before anything is printed if the model cannot read the prompt
    print(prompt + said[0], end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
        said.append(piece)
    print(flush=True)


def reconfigure(stream: TextIO, encoding: str | None = None, errors: str | None = None) -> None:
    """Change the encoding of a standard stream, unless something else stands in its place."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(encoding=encoding, errors=errors)


def some_text(text: str) -> str:
    """Argparse type for non-empty text."""
    if not text:
        raise argparse.ArgumentTypeError("got '', expected a text that is not empty")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected valid UTF-8")
    return text


def at_least(minimum: int) -> Callable[[str], int]:
    """Return an argparse type for integers of at least `minimum`."""

    def integer(text: str) -> int:
        if not text.isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected an integer of at least {minimum}")
        return int(text)

    return integer


def number(minimum: float, maximum: float) -> Callable[[str], float]:
    """Return an argparse type for numbers from `minimum` to `maximum`."""

    def real(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = float("nan")
        if not minimum <= value <= maximum:
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from {minimum:g} to {maximum:g}")
        return value

    return real
