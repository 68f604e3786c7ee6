"""The section `evals`: which tasks a model is asked while it is trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stlm.config.fields import Conflict, setting


@dataclass(frozen=True)
class EvalsConfig:
    """Tasks of scripts/evaluate.py, asked of the model in training. They do not change what it learns."""

    every_steps: int | None = setting(
        None, "steps between two evaluations, which also come before the first step and behind the last; null: none",
        minimum=1, may_change=True,
    )  # fmt: skip
    tasks: str = setting("minimal_pairs", "tasks to ask, with commas between them", may_change=True)
    tasks_dir: str | None = setting(None, "folder of NAME.jsonl, the items of tasks that need them", may_change=True)

    def check(self) -> Iterator[Conflict]:
        """Conflicts between these settings."""
        if not all(name.strip() for name in self.tasks.split(",")):
            yield Conflict(
                "tasks",
                f"got {self.tasks!r}, expected names of tasks with commas between them; minimal_pairs would work",
            )
