"""The section `evals`: tasks that evaluate a model during training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from stlm.config.yaml.fields import Conflict, setting

WHOLE_TEXT = ("bits_per_byte", "extrapolation", "calibration", "text_quality")  # tasks without items
OWN_ITEMS = (*WHOLE_TEXT, "corruptions", "minimal_pairs")  # tasks that read no file


@dataclass(frozen=True)
class EvalsConfig:
    """Tasks of scripts/evaluate.py, run on the model during training. They do not affect training."""

    every_steps: int | None = setting(
        None, "steps between two evaluations; the last follows the last step; null: none", unit="steps",
        minimum=1, may_change=True,
    )  # fmt: skip
    tasks: str = setting(
        "minimal_pairs", "names of tasks, separated by commas", may_change=True, needs=("every_steps", 500)
    )
    tasks_dir: str | None = setting(
        None, "folder of NAME.jsonl files, for tasks that read items", may_change=True, needs=("every_steps", 500)
    )
    items: int | None = setting(
        None,
        "items of each task to score, the same sample every time; null: all. Tasks over the whole "
        "validation text (bits_per_byte, extrapolation, calibration) and text_quality have no items",
        unit="items",
        minimum=1,
        may_change=True,
        needs=("every_steps", 500),
    )
    at_start: bool = setting(False, "also evaluate before the first step", may_change=True, needs=("every_steps", 500))

    def check(self) -> Iterator[Conflict]:
        """Yield the conflicts between these settings."""
        names = [name.strip() for name in self.tasks.split(",")]
        if not all(names):
            yield Conflict(
                "tasks",
                f"got {self.tasks!r}, expected names of tasks with commas between them; minimal_pairs would work",
            )
            return
        for key, without in (("items", WHOLE_TEXT), ("tasks_dir", OWN_ITEMS)):
            value = getattr(self, key)
            if self.every_steps is not None and value is not None and set(names) <= set(without):
                what = "has no items" if key == "items" else "reads no file"
                yield Conflict(
                    key,
                    f"got {value!r}, which has no effect: each task of evals.tasks = {self.tasks} {what}; "
                    "expected null, or another task",
                    ("tasks",),
                    idle=True,
                )
