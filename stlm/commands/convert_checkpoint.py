"""Convert a trained model to another format, or a model of another format to a run; logits are compared.

python scripts/convert_checkpoint.py runs/quickstart --to safetensors --output exported
python scripts/convert_checkpoint.py runs/quickstart --to artifact --bits 6 --output quickstart.stlm
python scripts/convert_checkpoint.py DIR --from huggingface --output runs/imported

Start --to deepspeed like training, with as many ranks as will resume from the checkpoint:
deepspeed --num_accelerators 2 scripts/convert_checkpoint.py runs/quickstart --to deepspeed --output exported
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from stlm.commands.options import add_local_rank, refuse

TARGETS = {
    "safetensors": "the model directory alone, as STLM reads it",
    "huggingface": "a folder that transformers loads",
    "onnx": "a folder with model.onnx for ONNX Runtime",
    "deepspeed": "a checkpoint for DeepSpeed's load_checkpoint, for the number of ranks that write it",
    "universal": "a checkpoint for any number of ranks, with DeepSpeed's checkpoint.load_universal",
    "gguf": "a folder with model.gguf for llama.cpp",
    "artifact": "one small file with quantized matrices, which all commands read like a model",
}
SOURCES = {
    "huggingface": "a folder of transformers: GPT-2, Llama, Qwen3 and similar, and the output of --to huggingface",
    "deepspeed": "a checkpoint that DeepSpeed wrote, native or universal, with its moments",
}
ZERO_2 = {"zero_optimization": {"stage": 2}}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with these arguments; None: those of the process. Returns the exit code, if any."""
    parser = argparse.ArgumentParser(
        description="Convert a model. The logits of both forms are compared on a text, and the largest difference\n"
        "is printed. If they differ, nothing is written.",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="RUN_OR_CHECKPOINT|DIR",
        help="run (its newest checkpoint), checkpoint or model; with --from, a folder in that format",
    )  # fmt: skip
    formats = parser.add_mutually_exclusive_group(required=True)
    formats.add_argument("--to", choices=TARGETS, help=f"format to write\n{listed(TARGETS)}")
    formats.add_argument("--from", dest="source", choices=SOURCES, help=f"format to make a run of\n{listed(SOURCES)}")
    parser.add_argument(
        "--output", required=True, metavar="DIR|FILE", help="folder that is new or empty; for an artifact a new file"
    )
    artifact = parser.add_argument_group("with --to artifact")
    artifact.add_argument("--bits", type=int, choices=(8, 6, 4), help="bits per entry of a matrix (default: 6)")
    artifact.add_argument(
        "--calibration",
        metavar="TEXTFILE",
        help="text that rounding is optimized for (default: the run's training data)",
    )
    gguf = parser.add_argument_group("with --to gguf")
    gguf.add_argument("--type", choices=("f32", "f16", "q8_0"), help="type of the matrices (default: f32)")
    native = parser.add_argument_group("with deepspeed and universal")
    native.add_argument(
        "--ds_config", metavar="FILE", help="--to: configuration with the ZeRO stage (default: stage 2)"
    )
    native.add_argument("--bf16", action="store_true", help="--to: for an engine whose configuration has a bf16 block")
    native.add_argument(
        "--config", metavar="PRESET|FILE", help="--from: config of the model (default: the one in the folder)"
    )
    add_local_rank(parser)
    args = parser.parse_args(argv)
    chosen = f"--to {args.to}" if args.to else f"--from {args.source}"
    for options, needed in (
        (("bits", "calibration"), ("--to artifact",)),
        (("type",), ("--to gguf",)),
        (("ds_config", "bf16"), ("--to deepspeed", "--to universal")),
        (("config",), ("--from deepspeed",)),
    ):
        if chosen not in needed:
            refuse(parser, args, options, chosen, f"only with {' or '.join(needed)}")
    if "deepspeed" in (args.to, args.source) or args.to == "universal":
        return convert_deepspeed(args)

    # Imported late, so that --help and usage errors are fast.
    from stlm.export import convert_from, convert_to, convert_to_artifact, convert_to_gguf
    from stlm.training.run.run_directory import begin_run

    if args.to == "artifact":
        print(convert_to_artifact(args.model, args.output, args.bits or 6, args.calibration))
    elif args.to == "gguf":
        print(convert_to_gguf(args.model, args.output, args.type or "f32"))
    elif args.to:
        print(convert_to(args.to, args.model, args.output))
    else:
        print(convert_from(args.source, args.model, args.output, begin_run))
    return 0


def convert_deepspeed(args: argparse.Namespace) -> int:
    """Convert to or from checkpoints that DeepSpeed resumes from, on every rank."""
    from stlm.config import load_deepspeed_config
    from stlm.export.conversion import check_output
    from stlm.training.deepspeed.formats import import_deepspeed, write_deepspeed
    from stlm.training.distributed.connection import Distributed

    if args.source:
        print(import_deepspeed(Path(args.model), check_output(args.output), args.config))
        return 0
    deepspeed_config = load_deepspeed_config(args.ds_config) if args.ds_config else ZERO_2
    distributed = Distributed.join()
    with distributed.naming_lost_ranks():
        output = distributed.on_rank_zero(lambda: check_output(args.output))
        line = write_deepspeed(args.to, args.model, output, deepspeed_config, distributed, args.bf16)
    if distributed.rank == 0:
        print(line)
    distributed.leave()
    return 0


def listed(formats: dict[str, str]) -> str:
    """Return one line for each format."""
    return "\n".join(f"{name}: {what}" for name, what in formats.items())
