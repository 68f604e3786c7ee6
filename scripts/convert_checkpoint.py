#!/usr/bin/env python
"""A trained model in another form, proven to be the same.

python scripts/convert_checkpoint.py runs/quickstart --to safetensors --output exported
"""

from __future__ import annotations

import argparse

from _command import run


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Convert a model. The logits of both forms are compared on a text, and the largest difference is "
        "printed; where they are not the same, nothing is written.",
    )
    parser.add_argument("model", metavar="RUN_OR_CHECKPOINT", help="run (its newest checkpoint), checkpoint or model")
    parser.add_argument(
        "--to", required=True, choices=("safetensors",), help="safetensors: the model directory alone, as STLM reads it"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="a folder that does not exist yet, or is empty")
    args = parser.parse_args()

    from stlm.export import convert_to  # only now: --help and misspelt options answer at once

    print(convert_to(args.to, args.model, args.output))
    return 0


if __name__ == "__main__":
    run(main)
