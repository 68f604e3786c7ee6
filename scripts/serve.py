#!/usr/bin/env python
"""A model behind the OpenAI protocol: completions and chat completions, streamed or not.

python scripts/serve.py runs/quickstart
"""

from __future__ import annotations

import argparse
from pathlib import Path

from _command import run

from data_pipeline.extras import how_to_install
from stlm.errors import StlmError


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Answer POST /v1/completions and /v1/chat/completions as the OpenAI API does.",
    )
    parser.add_argument("model", metavar="RUN_OR_CHECKPOINT", help="run (its newest checkpoint), checkpoint or model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=8000, help="port; 0 takes a free one (default: 8000)")
    parser.add_argument("--name", help="what clients call the model (default: the name of its folder)")
    parser.add_argument("--max-batch", type=int, default=16, metavar="N", help="texts decoded together (default: 16)")
    parser.add_argument(
        "--max-waiting", type=int, default=256, metavar="N", help="texts that may wait; more get a 429 (default: 256)"
    )
    parser.add_argument("--max-tokens", type=int, default=1024, metavar="N", help="longest answer (default: 1024)")
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "int8"),
        default="fp32",
        help="what the matrices are read as: fewer bits are quicker, and say a little else (default: fp32)",
    )
    args = parser.parse_args()
    for name in ("max_batch", "max_waiting", "max_tokens"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')}: got {getattr(args, name)}, expected at least 1")
    try:
        import uvicorn

        from stlm.serving import ChatTemplate, Limits, Scheduler, build_app
    except ImportError as error:
        raise StlmError(f"{error.name} is not installed: {how_to_install('fastapi', 'uvicorn')}") from None

    import torch

    from stlm.stlm import STLM

    model = STLM.load(args.model, device="cuda" if torch.cuda.is_available() else "cpu")
    template = ChatTemplate(model.tokenizer.chat_template)
    scheduler = Scheduler(model, max_rows=args.max_batch, max_waiting=args.max_waiting, precision=args.precision)
    name = args.name or Path(args.model).resolve().name
    app = build_app(scheduler, name, Limits(max_tokens=args.max_tokens), template)
    uvicorn.run(app, host=args.host, port=args.port, log_level="info", access_log=False, timeout_graceful_shutdown=5)
    scheduler.close()
    return 0


if __name__ == "__main__":
    run(main)
