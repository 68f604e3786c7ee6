"""Random joins and leaves of rows in a batch, to compare with the model's output for each row alone."""

import random
from collections.abc import Iterator

import torch

ROWS, STEPS = 6, 20
PREFIXES = (0, 3, 3, 4, 8)  # few, so that rows that joined at different times have often read equally many ids


def some_ids(length: int, seed: int) -> torch.Tensor:
    """Ids of text: [ROWS, length]."""
    return torch.randint(32, 127, (ROWS, length), generator=torch.Generator().manual_seed(seed))


def joins_and_leaves(model, ids: torch.Tensor, seed: int) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(row of `ids`, number of its ids that were read before, logits of those that follow: [N, V]), for every row and
    every step of a batch that rows join and leave at random: several at once, one of them twice, or none."""
    rng, length = random.Random(seed), ids.size(1)
    state, rows, read = None, [], []
    for _ in range(STEPS):
        parts, stays = [], rng.choice((0.5, 0.9))
        kept = [place for place in range(len(rows)) if read[place] < length - 1 and rng.random() < stays]
        rng.shuffle(kept)
        if kept and rng.random() < 0.2:
            kept.append(rng.choice(kept))
        rows, read = [rows[place] for place in kept], [read[place] for place in kept]
        if kept:
            parts.append((state, torch.tensor(kept)))
        while not rows or (len(rows) < ROWS and rng.random() < 0.3):
            number, new = rng.choice(PREFIXES), rng.choices(range(ROWS), k=rng.choice((1, 1, 2)))
            parts.append((model.begin(len(new), ids[new, :number])[1], torch.arange(len(new))))
            rows, read = rows + new, read + [number] * len(new)
        state = model.join(parts)
        assert state.lengths == read
        number = rng.choice([n for n in (1, 1, 1, 2, 3) if n < length - max(read)])
        logits = model.step(torch.stack([ids[r, n : n + number] for r, n in zip(rows, read, strict=True)]), state)
        yield from zip(rows, read, logits, strict=True)
        read = [n + number for n in read]
