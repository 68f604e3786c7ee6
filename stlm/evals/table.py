"""Tables for terminals and plain-text files."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = (), align: str = "") -> str:
    """Format rows as a table with columns as wide as their widest cell. `align`: l or r for each column, l by default.

    Example: `table([["xz", "2.1"], ["gzip", "12.3"]], ["name", "bits"], "lr")`
    """
    lines = [list(header), *map(list, rows)] if header else [list(row) for row in rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    sides = align.ljust(len(widths), "l")
    if header:
        lines.insert(1, ["─" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.rjust(width) if side == "r" else cell.ljust(width)
            for cell, width, side in zip(line, widths, sides, strict=True)
        ).rstrip()
        for line in lines
    )
