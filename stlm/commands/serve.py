"""Serve a model by the OpenAI protocol: completions and chat completions, streamed or not.

python scripts/serve.py runs/quickstart
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.extras import how_to_install
from stlm.commands.options import PRECISION, add_model, at_least, some_text
from stlm.errors import StlmError


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    try:
        from stlm.serving import (
            Access,
            Scheduler,
            Server,
            ServerLimits,
            build_app,
            checked_origins,
            is_loopback,
            listen_on,
            url_of,
        )  # fmt: skip
    except ImportError as error:
        needed = how_to_install("fastapi", "uvicorn", "prometheus-client")
        raise StlmError(f"{error.name} is not installed: {needed}") from None

    listener = listen_on(args.host, args.port)
    access = Access(is_loopback(listener), checked_origins(args.allow_origin), args.api_key)

    import torch

    from stlm.chat.template import ChatTemplate
    from stlm.checkpoints import locate_model
    from stlm.stlm import STLM

    located = locate_model(args.model)
    model = STLM.load(located, device="cuda" if torch.cuda.is_available() else "cpu")
    template = ChatTemplate(model.tokenizer.chat_template)
    scheduler = Scheduler(model, max_rows=args.max_batch, max_waiting=args.max_waiting, precision=args.precision)
    name = args.name or Path(args.model).resolve().name
    app = build_app(scheduler, name, ServerLimits(max_tokens=args.max_tokens), template, access)

    def ready() -> None:
        url = url_of(listener)
        body = shlex.quote('{"prompt": "The", "max_tokens": 40}')
        key = ' -H "Authorization: Bearer $STLM_API_KEY"' if args.api_key else ""
        lines = [
            f"model  {name}: {located}, {model.num_parameters():,} parameters, tokenizer {model.tokenizer.spec}, "
            f"context {model.config.context_length}",
            f"URL    {url}/v1 (stop with Ctrl-C)",
            f"try    curl {url}/v1/completions{key} -d {body}",
        ]
        if not access.loopback:
            who = "all who have the key" if args.api_key else "anybody (--api-key would require a key)"
            lines.append(
                f"note   other machines can reach port {listener.getsockname()[1]}: open to {who}, without TLS"
            )
        print("\n".join(lines), file=sys.stderr, flush=True)

    try:
        Server(app, scheduler, ready).run(sockets=[listener])
    finally:
        scheduler.close()
    return 0


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Answer POST /v1/completions and /v1/chat/completions as the OpenAI API does (docs/generation.md).",
    )
    add_model(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", default="8000", help="port; 0: a free one (default: 8000)")
    parser.add_argument("--name", type=some_text, help="name of the model for clients (default: that of its folder)")
    parser.add_argument(
        "--max-batch", type=at_least(1), default=16, metavar="N", help="texts decoded together (default: 16)"
    )
    parser.add_argument(
        "--max-waiting", type=at_least(1), default=256, metavar="N",
        help="texts that may wait; further ones are refused with status 429 (default: 256)",
    )  # fmt: skip
    parser.add_argument(
        "--max-tokens", type=at_least(1), default=1024, metavar="N", help="maximum ids of an answer (default: 1024)"
    )
    parser.add_argument("--precision", choices=("fp32", "bf16", "int8"), default="fp32", help=PRECISION)
    parser.add_argument(
        "--allow-origin", action="append", default=[], metavar="ORIGIN",
        help="allow pages of this site, such as http://localhost:3000, to use the server; '*' allows all; may be "
        "repeated (default: none)",
    )  # fmt: skip
    parser.add_argument(
        "--api-key", metavar="KEY", default=os.environ.get("STLM_API_KEY"),
        help="refuse clients that do not send this key (default: STLM_API_KEY of the environment, which other users of "
        "the machine cannot see; else none)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if args.api_key is not None and not (args.api_key.isascii() and args.api_key.strip() == args.api_key != ""):
        raise StlmError("--api-key: expected ASCII characters, no spaces around them")
    return args
