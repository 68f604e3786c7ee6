"""Write the pictures of the documentation as SVG.

    python docs/pictures/make.py            # writes the files of this folder
    python docs/pictures/make.py --check    # writes nothing; exits with 1 if a file is not up to date

A picture has a background of its own, and colours for light and for dark mode, so that it is readable on any page.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from html import escape
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
WIDTH = 880
ROWS = ("blue", "orange", "green")

# Class → property and its value in light and in dark mode.
COLOURS = {
    "page": ("fill", "#ffffff", "#161b22"),
    "ink": ("fill", "#1f2328", "#e6edf3"),
    "soft": ("fill", "#59636e", "#9da7b3"),
    "line": ("stroke", "#818b98", "#6e7681"),
    "blue": ("fill", "#d3e5fb", "#1f426e"),
    "orange": ("fill", "#fbdfc2", "#61401b"),
    "green": ("fill", "#d2eed8", "#1f4d2c"),
    "grey": ("fill", "#e8ebef", "#2d343d"),
}
STYLE = """\
text { font: 14px -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
.mono { font-family: ui-monospace, "DejaVu Sans Mono", monospace; font-size: 13px; }
.bold { font-weight: 600; }
.small { font-size: 12px; }
.middle { text-anchor: middle; }
.line { fill: none; stroke-width: 1.2; }
"""


class Picture:
    """An SVG drawing, WIDTH units wide; x grows to the right and y downwards."""

    def __init__(self, height: int, title: str) -> None:
        self.height = height
        self.title = title
        self.parts: list[str] = []
        self.box(0.5, 0.5, WIDTH - 1, height - 1, "page", corner=8)

    def box(self, x: float, y: float, width: float, height: float, colour: str, corner: float = 3) -> None:
        """Draw a rectangle of a colour, with an outline."""
        self.parts.append(
            f'<rect class="{colour} line" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{corner:g}"/>'
        )

    def text(self, x: float, y: float, text: str, classes: str = "ink") -> None:
        """Write a line of text, with its baseline at y."""
        self.parts.append(f'<text class="{classes}" x="{x:g}" y="{y:g}">{escape(text)}</text>')

    def cell(self, x: float, y: float, width: float, height: float, colour: str, text: str = "") -> None:
        """Draw a rectangle with a centred line of text."""
        self.box(x, y, width, height, colour)
        if text:
            self.text(x + width / 2, y + height / 2 + 5, text, "ink mono middle")

    def line(self, *points: tuple[float, float], arrow: bool = False) -> None:
        """Draw a line through points."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        end = ' marker-end="url(#arrow)"' if arrow else ""
        self.parts.append(f'<polyline class="line" points="{path}"{end}/>')

    def svg(self) -> str:
        """Return the text of the file."""
        rules = [
            "".join(f".{name} {{ {key}: {values[mode]}; }}\n" for name, (key, *values) in COLOURS.items())
            for mode in (0, 1)
        ]
        tip = COLOURS["line"]
        rules[0] += f".tip {{ fill: {tip[1]}; }}\n"
        rules[1] += f".tip {{ fill: {tip[2]}; }}\n"
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" '
            f'height="{self.height}" role="img">\n<title>{escape(self.title)}</title>\n'
            f"<style>\n{STYLE}{rules[0]}@media (prefers-color-scheme: dark) {{\n{rules[1]}}}\n</style>\n"
            '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            'orient="auto"><path class="tip" d="M0,0 L8,4 L0,8 z"/></marker></defs>\n'
            + "\n".join(self.parts)
            + "\n</svg>\n"
        )


def stage(picture: Picture, y: float, name: str, *lines: str) -> None:
    """Write the name of a stage and its explanation at the left."""
    picture.text(24, y, name, "ink bold")
    for number, line in enumerate(lines):
        picture.text(24, y + 19 + 16 * number, line, "soft small")


def data_flow() -> Picture:
    """Draw text → documents → shards → windows → order → batch."""
    picture = Picture(560, "From text to a batch: documents, shards, windows, order, rows")
    left, cell = 280, 23
    lengths = {"blue": 6, "orange": 8, "green": 10}  # ids of each document
    ids = [(colour, number == length - 1) for colour, length in lengths.items() for number in range(length)]
    order = (4, 1, 5, 0, 3, 2)

    stage(picture, 42, "Documents", "read and cleaned; a hash of each", "chooses training (here) or validation")
    x = left
    for number, (colour, length) in enumerate(lengths.items(), 1):
        width = length * cell
        picture.cell(x + 8, 24, width - 16, 40, colour, f"document {number}")
        picture.line((x + width / 2, 66), (x + width / 2, 112), arrow=True)
        x += width

    stage(picture, 130, "Shards", "ids of all documents, one after", "another; ∎ ends a document")
    for place, (colour, ends) in enumerate(ids):
        picture.cell(left + place * cell, 116, cell, 30, colour, "∎" if ends else "")

    stage(picture, 218, "Windows", "context_length ids each; here four", "(packing: stream)")
    for window in range(6):
        x = left + 4 * window * cell
        picture.line((x + 3, 158), (x + 3, 166), (x + 4 * cell - 3, 166), (x + 4 * cell - 3, 158))
        picture.text(x + 2 * cell, 186, f"window {window}", "soft small middle")
        for place in range(4):
            picture.box(x + 6 + 20 * place, 200, 20, 26, ids[4 * window + place][0])

    stage(picture, 332, "Order", "computed from (seed, epoch,", "position), never stored")
    for position, window in enumerate(order):
        x = left + 4 * position * cell
        picture.line((left + (4 * window + 2) * cell, 229), (x + 2 * cell, 310), arrow=True)
        picture.cell(x + 6, 314, 80, 30, "grey", str(window))
        picture.text(x + 2 * cell, 362, f"position {position}", "soft small middle")

    stage(picture, 430, "Batches", "ids [B, T] and a mask; the rows of a", "step are divided among the ranks")
    for step in range(3):
        x = left + 8 * step * cell
        picture.line((x + 4 * cell, 370), (x + 4 * cell, 406), arrow=True)
        picture.text(x + 4 * cell, 424, f"step {step + 1}", "ink middle")
        for row in range(2):
            window = order[2 * step + row]
            picture.text(x + 8, 455 + 34 * row, f"row {row}", "soft small")
            for place in range(4):
                picture.cell(x + 50 + cell * place, 436 + 34 * row, cell, 28, ids[4 * window + place][0])
    picture.text(
        left, 536, "Every window is read once per epoch. A run resumes from its step number alone.", "soft small"
    )
    return picture


def byte_patches() -> Picture:
    """Draw bytes → local layers → patches → core → head → bytes, for patches of four."""
    picture = Picture(520, "A byte patch model: local layers, patches, core, and a head that predicts bytes")
    left, cell = 250, 48
    text = "The cat sat "
    shown = ["␣" if letter == " " else letter for letter in text]
    read = ["⌂", *shown[:-1]]

    stage(picture, 42, "Bytes read  [B, T]", "the bytes before each position;", "⌂ starts the text")
    for place, letter in enumerate(read):
        picture.cell(left + place * cell, 24, cell, 32, ROWS[(place + 3) // 4 % 3] if place else "grey", letter)

    stage(picture, 112, "Embedder  [B, T, d]", "narrow local layers: each state sees", "a window of earlier bytes")
    picture.box(left, 88, 12 * cell, 44, "grey")
    picture.text(left + 6 * cell, 115, "local layers", "ink middle")
    for place in range(12):
        picture.line((left + (place + 0.5) * cell, 57), (left + (place + 0.5) * cell, 86), arrow=True)

    stage(picture, 194, "Patches  [B, P, D]", "one vector of the last four states,", "where each patch begins")
    for patch in range(3):
        begins = left + 4 * patch * cell
        x = begins + 12
        for place in range(max(0, 4 * patch - 3), 4 * patch + 1):
            picture.line((left + (place + 0.5) * cell, 133), (x + 20, 173), arrow=True)
        picture.cell(x - 12, 176, 4 * cell - 16, 32, ROWS[patch] if patch else "grey", f"patch {patch + 1}")
        picture.line((begins + 2 * cell - 8, 209), (begins + 2 * cell - 8, 235), arrow=True)

    stage(picture, 262, "Core  [B, P, D]", "wide layers, once per patch:", "most of the compute")
    picture.box(left, 238, 12 * cell, 48, "grey")
    picture.text(left + 6 * cell, 267, "transformer over patches, causal", "ink middle")

    stage(picture, 366, "Head  [B, T, d]", "each byte adds the vector of its", "patch to its own state; local layers")
    for patch in range(3):
        for place in range(4 * patch, 4 * patch + 4):
            picture.line((left + (4 * patch + 2) * cell - 8, 287), (left + (place + 0.5) * cell, 341), arrow=True)
    picture.box(left, 344, 12 * cell, 44, "grey")
    picture.text(left + 6 * cell, 371, "local layers", "ink middle")
    side = left + 12 * cell + 22
    picture.line((left + 12 * cell, 110), (side, 110), (side, 366), (left + 12 * cell + 3, 366), arrow=True)
    picture.parts.append(
        f'<text class="soft small" transform="translate({side + 14},264) rotate(-90)">states of the bytes</text>'
    )

    stage(picture, 442, "Bytes predicted  [B, T]", "four per patch, each after those", "before it")
    for place, letter in enumerate(shown):
        picture.line((left + (place + 0.5) * cell, 389), (left + (place + 0.5) * cell, 419), arrow=True)
        picture.cell(left + place * cell, 422, cell, 32, ROWS[(place // 4 + 1) % 3], letter)
    picture.text(
        left,
        492,
        "Patch 2 holds “The␣” and helps to predict “cat␣”. No position sees a byte at or after its own.",
        "soft small",
    )
    return picture


def run_directory() -> Picture:
    """Draw the files of a run, what they hold, and who reads them."""
    picture = Picture(548, "The folder of a run: its files, and the commands that read them")
    rows = (
        (0, "runs/NAME/", "", ""),
        (1, "config.yaml", "all settings: enough to repeat the run", "blue"),
        (1, "environment.json", "versions, machine and ranks of every start", "grey"),
        (1, "metrics.jsonl", "one line for each logged step and validation", "orange"),
        (1, "train.log", "the printed lines, with the time", "orange"),
        (1, "tensorboard/", "the same numbers for TensorBoard", "orange"),
        (1, "lock", "held while a job uses the folder", "grey"),
        (1, "checkpoints/", "", ""),
        (2, "step_00000500/", "the newest, the best, and those to keep", ""),
        (3, "model/", "free of ranks and ZeRO stages; copy it anywhere", "green"),
        (4, "config.json", "settings of the model", "green"),
        (4, "model.safetensors", "parameters by name, in fp32", "green"),
        (4, "tokenizer/", "files of the tokenizer", "green"),
        (3, "optimizer.safetensors", "moments, by parameter name", "blue"),
        (3, "state.json", "step, ids seen, fingerprints of the data", "blue"),
        (3, "COMPLETE", "written last: size and sha256 of every other file", "blue"),
    )
    for number, (depth, name, about, colour) in enumerate(rows):
        y = 20 + 29 * number
        if colour:
            picture.box(22 + 26 * depth, y, 210, 24, colour)
        picture.text(30 + 26 * depth, y + 17, name, "ink mono" + ("" if colour else " bold"))
        picture.text(366, y + 17, about, "soft small")
    readers = (
        (24, "blue", "read to resume"), (188, "green", "read to resume, evaluate, generate, serve and convert"),
        (592, "orange", "to watch the run"), (752, "grey", "others"),
    )  # fmt: skip
    picture.line((22, 492), (WIDTH - 22, 492))
    for x, colour, about in readers:
        picture.box(x, 506, 20, 20, colour)
        picture.text(x + 28, 521, about, "ink small")
    return picture


PICTURES: dict[str, Callable[[], Picture]] = {
    "data-flow.svg": data_flow,
    "byte-patches.svg": byte_patches,
    "run-directory.svg": run_directory,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if a file is not up to date")
    options = parser.parse_args()
    stale = []
    for name, draw in PICTURES.items():
        path, text = FOLDER / name, draw().svg()
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if not options.check:
                path.write_text(text, encoding="utf-8")
    if stale:
        print(("not up to date: " if options.check else "written: ") + ", ".join(stale))
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
