"""Convert a trained model to another format, checked by its logits, or a model of another format to a run.

python scripts/convert_checkpoint.py runs/quickstart --to safetensors --output exported
python scripts/convert_checkpoint.py runs/quickstart --to artifact --bits 6 --output quickstart.stlm
python scripts/convert_checkpoint.py DIR --from huggingface --output runs/imported

Start --to deepspeed as training, with the number of ranks that the checkpoint is for:
deepspeed --num_accelerators 2 scripts/convert_checkpoint.py runs/quickstart --to deepspeed --output exported
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

TARGETS = {
    "safetensors": "the model directory alone, as STLM reads it",
    "huggingface": "a folder that transformers loads",
    "onnx": "a folder with model.onnx, which ONNX Runtime runs",
    "deepspeed": "a checkpoint that DeepSpeed's load_checkpoint continues from, on as many ranks as there are now",
    "universal": "one for any number of ranks, with DeepSpeed's checkpoint.load_universal",
    "gguf": "a folder with model.gguf, which llama.cpp runs",
    "artifact": "one small file, with matrices in few bits, that everything here reads like a model",
}
SOURCES = {
    "huggingface": "a folder of transformers: GPT-2, Llama, Qwen3 and the like, and what --to huggingface wrote",
    "deepspeed": "a checkpoint that DeepSpeed wrote, native or universal, with its moments",
}
DEFAULT_DS_CONFIG = Path(__file__).resolve().parents[2] / "ds_configs/zero2.json"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Convert a model. The logits of both forms are compared on a text, and the largest\n"
        "difference is printed; where they are not the same, nothing is written.",
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "model", metavar="RUN_OR_CHECKPOINT|DIR",
        help="run (its newest checkpoint), checkpoint or model; with --from, a folder of that form",
    )  # fmt: skip
    forms = parser.add_mutually_exclusive_group(required=True)
    forms.add_argument("--to", choices=TARGETS, help=listed(TARGETS))
    forms.add_argument("--from", dest="source", choices=SOURCES, help=f"make a run of what is\n{listed(SOURCES)}")
    parser.add_argument(
        "--output", required=True, metavar="DIR|FILE", help="a folder that does not exist yet, or is empty; a new file"
    )
    packing = parser.add_argument_group("with --to artifact")
    packing.add_argument("--bits", type=int, choices=(8, 6, 4), help="of an entry of a matrix (default: 6)")
    packing.add_argument(
        "--calibration", metavar="TEXTFILE", help="text to round the matrices for (default: training data of the run)"
    )
    parser.add_argument("--type", choices=("f32", "f16", "q8_0"), help="with --to gguf: of the matrices (default: f32)")
    native = parser.add_argument_group("with deepspeed and universal")
    native.add_argument("--ds_config", metavar="FILE", help="to: its ZeRO stage (default: ds_configs/zero2.json)")
    native.add_argument("--bf16", action="store_true", help="to: for an engine that has a bf16 block")
    native.add_argument("--config", metavar="PRESET|FILE", help="from: what model it is, unless it was written here")
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers add it
    args = parser.parse_args(argv)
    if args.to != "artifact" and (args.bits or args.calibration):
        parser.error("--bits and --calibration go with --to artifact")
    if args.to != "gguf" and args.type:
        parser.error("--type goes with --to gguf")
    if args.to not in ("deepspeed", "universal") and (args.ds_config or args.bf16):
        parser.error("--ds_config and --bf16 go with --to deepspeed or universal")
    if args.source != "deepspeed" and args.config:
        parser.error("--config goes with --from deepspeed")
    if "deepspeed" in (args.to, args.source) or args.to == "universal":
        return convert_deepspeed(args)

    # Imported late, so that --help and usage errors are fast.
    from stlm.export import convert_from, convert_to, convert_to_artifact, convert_to_gguf

    if args.to == "artifact":
        print(convert_to_artifact(args.model, args.output, args.bits or 6, args.calibration))
        return 0
    if args.to == "gguf":
        print(convert_to_gguf(args.model, args.output, args.type or "f32"))
        return 0
    if args.to:
        print(convert_to(args.to, args.model, args.output))
        return 0
    from stlm.training.run.run_directory import begin_run

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
    distributed = Distributed.join()
    with distributed.naming_lost_ranks():
        output = distributed.on_rank_zero(lambda: check_output(args.output))
        told = write_deepspeed(
            args.to, args.model, output, load_deepspeed_config(args.ds_config or DEFAULT_DS_CONFIG), distributed,
            args.bf16,
        )  # fmt: skip
    if distributed.rank == 0:
        print(told)
    distributed.leave()
    return 0


def listed(forms: dict[str, str]) -> str:
    """Return one line for each format."""
    return "\n".join(f"{name}: {what}" for name, what in forms.items())
