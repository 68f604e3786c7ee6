"""Expected efficiency of many GPUs, on paper: the time to compute a step against the time to communicate.

    python benchmarks/cost_model.py [--config 10m-byte 50m-byte 100m-byte] [--rows 32] [--flops 5e13]

Every rank has the same rows, so the global batch grows with the ranks. A step takes

    seconds = FLOPs of the rank's rows / FLOP/s of a GPU
            + bytes sent by a rank / bandwidth of its link  +  messages x (ranks - 1) x delay of the link

and nothing of it overlaps: gradients are sent after the last backward pass. Bytes are fp32, sent in rings (Patarasuk &
Yuan 2009), for the collectives that DeepSpeed 0.19 calls: see `volume`. Efficiency is the first term's share.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


class Link(NamedTuple):
    name: str
    bytes_per_second: float  # sent by one rank, in one direction
    delay_s: float  # of a message to the next rank


LINKS = (
    Link("1 Gb/s Ethernet", 0.11e9, 50e-6),
    Link("10 Gb/s Ethernet", 1.1e9, 30e-6),
    Link("100 Gb/s InfiniBand, 8 ranks share it", 1.4e9, 5e-6),
    Link("400 Gb/s InfiniBand for each rank", 45e9, 5e-6),
)
RANKS = (2, 8, 64, 1024)
MESSAGE = 50_000_000  # numbers in a bucket, of gradients and of weights


def volume(stage: int, ranks: int, accumulation: int = 1) -> float:
    """Return the volume that a rank sends in a step, in units of the model's size.

    Stage 0 all-reduces gradients: 2 (ranks - 1) / ranks. So do stages 1 and 2 in DeepSpeed 0.19, which then all-gather
    the updated weights: once more. Stage 3 reduce-scatters gradients, and gathers the weights for every forward and
    every backward. (In Rajbhandari et al. 2020, arXiv 1910.02054, section 7, stages 1 and 2 need no more than 2.)
    """
    share = (ranks - 1) / ranks
    return share * (2, 3, 3, 1 + 2 * accumulation)[stage]


def communication_seconds(link: Link, parameters: int, layers: int, stage: int, ranks: int) -> float:
    """Return the seconds that a rank spends on communication in a step of one micro-batch."""
    buckets = -(-parameters // MESSAGE)
    messages = buckets * (2, 3, 3, 1)[stage] + (2 * layers if stage == 3 else 0)  # stage 3: layer by layer
    sending = 4 * parameters * volume(stage, ranks) / link.bytes_per_second
    return sending + messages * (ranks - 1) * link.delay_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--config", nargs="+", default=["10m-byte", "50m-byte", "100m-byte"], help="presets or files with byte ids"
    )
    parser.add_argument("--rows", type=int, default=32, help="rows of each rank and step (%(default)s)")
    parser.add_argument("--flops", type=float, default=5e13, help="what a GPU reaches, per second (%(default)g)")
    arguments = parser.parse_args()

    from data_pipeline.tokenizers import build_tokenizer
    from stlm.config import load_run_config
    from stlm.model import account
    from stlm.stlm import STLM

    for name in arguments.config:
        config = load_run_config(name)
        tokenizer, length = build_tokenizer("byte"), config.model.context_length
        facts = account(lambda: STLM(config.model, tokenizer), tokenizer.vocab_size, length, 1)  # noqa: B023
        seconds = arguments.rows * length * (facts.forward_flops + facts.backward_flops) / arguments.flops
        layers = config.model.core.num_layers
        print(
            f"{name}: {facts.parameters / 1e6:.1f} M parameters, {arguments.rows} x {length} ids a rank and step, "
            f"computed in {seconds * 1e3:.1f} ms at {arguments.flops:.3g} FLOP/s. Efficiency in %:"
        )
        print(f"  {'link':40}{'ZeRO':>5}" + "".join(f"{ranks:>7,}" for ranks in RANKS) + "  ranks")
        for link in LINKS:
            for stage in (0, 2, 3):
                waits = [communication_seconds(link, facts.parameters, layers, stage, ranks) for ranks in RANKS]
                cells = "".join(f"{100 * seconds / (seconds + wait):7.0f}" for wait in waits)
                print(f"  {link.name if stage == 0 else '':40}{stage if stage != 2 else '1, 2':>5}{cells}")
        print()


if __name__ == "__main__":
    main()
