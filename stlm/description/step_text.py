"""The text of a training step."""

from __future__ import annotations

import re
from typing import Any

from data_pipeline.loading.loaders import open_data
from data_pipeline.plurals import number_of
from stlm.config import RunConfig
from stlm.errors import StlmError
from stlm.training.loaders import batch_sizes_of, build_loaders

SHOWN = 200  # characters shown of a row


def text_of_step(config: RunConfig, step: int, rows: str | None, progress: dict[str, Any]) -> str:
    """Return the shortened text of each row of a step, one a line.

    `rows`: "A-B" or "A", counted from 0; None: all. `progress`: the state of the newest checkpoint, which holds earlier
    batch sizes. Raises StlmError if the run has no such step or rows.
    """
    last_step = config.training.max_steps
    if step > last_step:
        raise StlmError(f"--step: got {step}, expected a step of the run, 1 to {last_step}; {last_step} would work")
    data = open_data(config.data)
    loader = build_loaders(config, data).train
    loader.batch_sizes = batch_sizes_of(progress, config.training.batch_size)
    size = loader.batch_size(step)
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", rows or f"0-{size - 1}")
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not first <= last < size:
        raise StlmError(f"--rows: got {rows!r}, expected rows of a step within 0-{size - 1}; 0-{size - 1} would work")
    batch = loader.rows(step, first, last + 1)
    lines = []
    for number, ids, counted in zip(range(first, last + 1), batch.ids, batch.loss_mask, strict=True):
        text = data.tokenizer.decode(ids[counted])
        shown = text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} … {text[-SHOWN // 2 :]}"
        lines.append(f"{number:>{len(str(size))}}  {number_of(int(counted.sum()), 'id')}  {shown!r}")
    return "\n".join(lines)
