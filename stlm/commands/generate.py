"""Generate text with a trained model, or score a text.

python scripts/generate.py runs/quickstart --prompt "The module"
python scripts/generate.py runs/quickstart --score FILE
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import fields

from stlm.commands.options import PRECISION, add_model, at_least, number, refuse, some_text

# Options by what they affect. Each defaults to None, so that one without effect is noticed.
TEXT = ("prompt", "chat", "max_ids", "stop", "samples", "beams")
FILTERS = ("top_k", "top_p", "min_p", "typical_p")
DRAWING = ("temperature", *FILTERS, "repetition_penalty", "frequency_penalty", "presence_penalty", "valid_utf8", "seed")
DRAFTING = ("exit_threshold", "speculative", "drafts")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments; None: those of the process. Returns the exit code, if any."""
    parser = build_parser()
    args = parser.parse_args(argv)
    refuse_without_effect(parser, args)

    import torch  # late, so that --help and usage errors are fast

    from stlm.chat.terminal import GenerationOptions, Streams, answer_prompts
    from stlm.evals.text_file import score_file
    from stlm.generation import Sampling
    from stlm.stlm import STLM

    model = STLM.load(args.model, device="cuda" if torch.cuda.is_available() else "cpu")
    model.optimize_for_decoding(args.precision)
    if args.score is not None:
        sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
        for line in score_file(model, args.score, args.per_line):
            print(line)
        return 0
    given = {name: value for name, value in vars(args).items() if value is not None}
    rules = {field.name: given[field.name] for field in fields(Sampling) if field.name in given}
    options = GenerationOptions(
        max_new_ids=given.get("max_ids", 256), sampling=Sampling(**{"temperature": 0.8, **rules}),
        stop=tuple(given.get("stop", ())), samples=given.get("samples", 1), beams=args.beams,
        exit_threshold=args.exit_threshold, num_drafts=args.drafts,
        speculative=None if args.speculative == "off" else given.get("speculative", "auto"),
        print_stats=args.speculative not in (None, "auto") or args.exit_threshold is not None,
    )  # fmt: skip
    answer_prompts(model, args.prompt, options, Streams(sys.stdin, sys.stdout, sys.stderr), args.chat)
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the options."""
    parser = argparse.ArgumentParser(
        description="Continue a prompt. Without --prompt, continue each line of the standard input; at a terminal, "
        "lines and answers are one conversation. The model reads the end of a prompt longer than its context.",
    )
    add_model(parser)
    text = parser.add_argument_group("text").add_argument
    text("--prompt", metavar="TEXT", help="text to continue; may be empty")
    text("--chat", action="store_true", help="each prompt is a user's message, and the model answers as the assistant")
    text("--max-ids", type=at_least(0), metavar="N", help="maximum number of generated ids (default: 256)")
    text("--stop", action="append", type=some_text, metavar="TEXT", help="end before TEXT; may be repeated")
    text("--samples", type=at_least(1), metavar="N", help="texts for each prompt, from consecutive seeds (default: 1)")
    text("--beams", type=at_least(1), metavar="N", help="beam search with N beams, instead of sampling")
    text("--score", metavar="FILE", help="print the log-likelihood of FILE (-: standard input), generate nothing")
    text("--per-line", action="store_true", help="with --score: also score each line as a text of its own")
    rule = parser.add_argument_group("sampling").add_argument
    share, penalty = number(0.0, 1.0), number(-100.0, 100.0)
    rule("--temperature", type=number(0.0, 100.0), metavar="T",
         help="divide logits by T; 0 takes the most probable id (default: 0.8)")  # fmt: skip
    rule("--top-k", type=at_least(1), metavar="K", help="keep the K most probable ids (default: all)")
    rule("--top-p", type=share, metavar="P", help="nucleus sampling: keep this probability mass (default: all)")
    rule("--min-p", type=share, metavar="P", help="keep ids at least P times as probable as the most probable")
    rule("--typical-p", type=share, metavar="P", help="locally typical sampling: keep this probability mass")
    rule("--repetition-penalty", type=number(0.01, 100.0), metavar="X",
         help="divide positive logits of ids in prompt or text by X, multiply others (default: 1)")  # fmt: skip
    rule("--frequency-penalty", type=penalty, metavar="X",
         help="subtract X from an id's logit for each occurrence in the text (default: 0)")  # fmt: skip
    rule("--presence-penalty", type=penalty, metavar="X",
         help="subtract X once from the logits of ids in the text (default: 0)")  # fmt: skip
    rule("--valid-utf8", action="store_true", help="draw only ids that keep the text valid UTF-8")
    rule("--seed", type=at_least(0), metavar="N", help="the same seed draws the same text (default: 0)")
    speed = parser.add_argument_group("speed").add_argument
    speed("--precision", choices=("fp32", "bf16", "int8"), default="fp32", help=PRECISION)
    speed("--speculative", choices=("auto", "self", "ngram", "off"),
          help="draft several ids and verify them in one pass, which keeps the distribution of texts. self: draft with "
          "the first layers of a model with exits; ngram: copy from the text so far (default: auto, which is ngram at "
          "temperature 0, otherwise off)")  # fmt: skip
    speed("--drafts", type=at_least(1), metavar="N",
          help="with --speculative: ids drafted at a time (default: 8 for ngram, 4 for self)")  # fmt: skip
    speed("--exit-threshold", type=number(1e-9, 1.0), metavar="P",
          help="models with exits: draw from the first exit that gives an id this probability")  # fmt: skip
    return parser


def refuse_without_effect(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with a usage error where an option has no effect with the others."""
    if args.score is not None:
        refuse(parser, args, (*TEXT, *DRAWING, *DRAFTING), "--score", "which generates no text")
    elif args.per_line:
        parser.error("--per-line: got no --score FILE, which it needs")
    if args.beams is not None:
        refuse(parser, args, (*DRAWING, "samples", *DRAFTING), "--beams", "which searches and draws nothing")
        refuse(parser, args, ("stop", "chat"), "--beams", "whose texts end only with the document")
    if args.temperature == 0:
        refuse(parser, args, (*FILTERS, "seed", "samples"), "--temperature 0", "which takes the most probable id")
    if (args.samples or 1) > 1:
        refuse(parser, args, DRAFTING, f"--samples {args.samples}", "whose texts are decoded together, id by id")
    if args.exit_threshold is not None:
        refuse(parser, args, ("speculative", "drafts"), "--exit-threshold", "which drafts nothing")
    if args.speculative == "off" or (args.speculative in (None, "auto") and args.temperature != 0):
        refuse(parser, args, ("drafts",), f"--speculative {args.speculative or 'auto'}", "which drafts nothing here")
