"""Every fault in the tests, its promised outcome, and how the test observes it; docs/faults.md shows them as a table.

Run as a script, this file writes the table into the docs: python tests/faults/matrix.py
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from launchpad import STOPPED

from data_pipeline.storage.atomic import TEMPORARY_PREFIX

DOCS = Path(__file__).parents[2] / "docs" / "faults.md"
BEGIN, END = "<!-- made by tests/faults/matrix.py -->", "<!-- end of what is made -->"
STAGES = (0, 2, 3)
KILLED = -9
LOST = "lost"  # an unknown exit code, since the launcher is gone
SAME = "an uninterrupted run, digit for digit"


@dataclass(frozen=True)
class Fault:
    """One row of the table."""

    name: str
    what: str  # described for readers
    codes: tuple[tuple[object, ...], ...]  # possible exit codes of the two ranks
    inject: str | None = None  # in injections.py; None: applied to a stopped run
    damage: Callable[[Path, Path], None] | None = None  # to run directory and data
    says: str = ""  # a pattern in the printed output
    restore_data: bool = False  # before the command is rerun
    ends_as: str = SAME
    ranks_after: int = 2
    settings: tuple[str, ...] = ()


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step_*"))


def flip(path: Path, position: float) -> None:
    contents = bytearray(path.read_bytes())
    contents[int(len(contents) * position)] ^= 1
    path.write_bytes(contents)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def half_written(run: Path, data: Path) -> None:
    """Leave the files of processes killed while they write or delete a checkpoint."""
    shutil.copytree(newest(run), run / f"checkpoints/{TEMPORARY_PREFIX}abandoned")
    (run / f"checkpoints/{TEMPORARY_PREFIX}abandoned/COMPLETE").unlink()


def two_damaged(run: Path, data: Path) -> None:
    for path in sorted((run / "checkpoints").glob("step_*")):
        flip(path / "model/model.safetensors", 0.9)


def torn_line(run: Path, data: Path) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 9, "split": "tra')


def shard(data: Path) -> Path:
    return data / "train/shard_00000.bin"


def stale_lock(run: Path, data: Path) -> None:
    (run / "lock").write_text("process 999999999 on a node that is gone\n\0\xff")


STOP = ((3, 3),)
LOSS_OF_0 = ((KILLED, 1),)
LOSS_OF_1 = ((1, KILLED),)
GONE_0, GONE_1 = (rf"(?m)^error: rank {rank} is gone; rerun the command to resume the run" for rank in (0, 1))
BOTH = ((2, 2),)
CUT_OFF = ("--set", "training.recovery.spike_factor=1.2", "training.recovery.spike_steps=2",
           "training.recovery.spike_window=3")  # fmt: skip
HANG = ("--set", "training.hang_timeout_s=3")

FAULTS = (
    # lost ranks
    Fault("kill_rank_0", "rank 0 is killed (SIGKILL) in a step", LOSS_OF_0, "kill_rank_0",
          says=GONE_0),
    Fault("kill_rank_1", "rank 1 is killed in a step", LOSS_OF_1, "kill_rank_1",
          says=GONE_1),
    Fault("kill_all", "all ranks are killed, as when the power fails", ((KILLED, KILLED),), "kill_all"),
    Fault("kill_rank_0_in_save", "rank 0 is killed while it writes a checkpoint", LOSS_OF_0, "kill_rank_0_in_save",
          says=GONE_0),
    Fault("kill_rank_1_in_save", "rank 1 is killed while the state is gathered", LOSS_OF_1, "kill_rank_1_in_save",
          says=GONE_1),
    Fault("kill_rank_0_in_validation", "rank 0 is killed in a validation", LOSS_OF_0, "kill_rank_0_in_validation",
          says=GONE_0),
    Fault("kill_rank_1_in_validation", "rank 1 is killed in a validation", LOSS_OF_1, "kill_rank_1_in_validation",
          says=GONE_1),
    Fault("lost_for_good", "rank 1 is killed, and one rank alone continues", LOSS_OF_1, "kill_rank_1", says=GONE_1,
          ranks_after=1, ends_as="an uninterrupted run, within 1e-5"),
    Fault("stop_rank_0", "rank 0 hangs (SIGSTOP) in a step", ((STOPPED, 1),), "stop_rank_0",
          says=r"made no progress for 3 s.*stacks in .*rank_1\.txt", settings=HANG),
    Fault("stop_rank_1", "rank 1 hangs in a step", ((1, STOPPED),), "stop_rank_1",
          says=r"made no progress for 3 s.*stacks in .*rank_0\.txt", settings=HANG),
    Fault("stop_rank_1_in_validation", "rank 1 hangs in a validation", ((1, STOPPED),),
          "stop_rank_1_in_validation", says=r"made no progress for 3 s.*stacks in .*rank_0\.txt", settings=HANG),
    Fault("pause_rank_1", "rank 1 is slow for a while", ((0, 0),), "pause_rank_1", settings=HANG),
    Fault("clock_skew", "the clock of rank 1 is a day ahead", ((0, 0),), "clock_skew", settings=HANG),
    # requests to stop
    Fault("terminate_rank_1", "SIGTERM to rank 1", STOP, "terminate_rank_1", says="at step 7 after saving"),
    Fault("terminate_rank_0_twice", "SIGTERM to rank 0, twice", STOP, "terminate_rank_0_twice",
          says="stopped by SIGTERM at step 7 after saving"),
    Fault("interrupt_rank_0", "SIGINT (Ctrl-C) to rank 0", STOP, "interrupt_rank_0",
          says="stopped by SIGINT at step 7"),
    Fault("usr1_to_rank_1", "SIGUSR1 to rank 1", STOP, "usr1_to_rank_1", says="at step 7 after saving"),
    Fault("hang_up", "SIGHUP to rank 0", STOP, "hang_up", says="stopped by SIGHUP at step 7"),
    Fault("terminate_rank_1_in_validation", "SIGTERM to rank 1 in a validation", STOP,
          "terminate_rank_1_in_validation", says="at step 6 after saving"),
    Fault("terminate_the_group", "SIGTERM to the launcher and all ranks", ((LOST,),), "terminate_the_group",
          says="at step 7 after saving"),
    Fault("terminate_the_launcher", "SIGTERM to a launcher that leaves its ranks", ((LOST,),),
          "terminate_the_launcher", says="after saving"),
    Fault("kill_the_launcher", "SIGKILL to the launcher", ((LOST,),), "kill_the_launcher", says="after saving"),
    # numbers
    Fault("nan_loss", "the loss of a step is NaN on one rank", ((0, 0),), "nan_loss",
          says=r"the loss of step 7 is not finite \(rows 4-7 of its batch\); its update is left out",
          ends_as="a run without that update"),
    Fault("infinite_gradient", "the gradient of a step is infinite on one rank", ((0, 0),), "infinite_gradient",
          says="the gradient of step 7 is not finite .* its update is left out", ends_as="a run without that update"),
    Fault("nan_losses", "the loss is NaN for four steps in a row", ((0, 0),), "nan_losses",
          says="going back to the weights of step 4, and on with the data after step 9",
          ends_as="a run from that checkpoint, past these data"),
    Fault("nan_for_good", "the loss stays NaN", ((1, 1),), "nan_for_good",
          says=r"error: the loss of step \d+ is not finite .* nothing is left to try",
          settings=("--set", "training.recovery.max_skipped_in_a_row=1"), ends_as="a run from its last checkpoint"),
    Fault("spike", "the loss is high for several steps", ((0, 0),), "spike",
          says="going back to the weights of step 4, and on with the data after step 8", settings=CUT_OFF,
          ends_as="a run from that checkpoint, past these data"),
    # errors
    Fault("out_of_memory_on_rank_1", "rank 1 runs out of memory", ((1, 1),), "out_of_memory_on_rank_1",
          says="OutOfMemoryError: tried to allocate"),
    Fault("exception_on_rank_0", "rank 0 alone raises an exception", ((1, 1),), "exception_on_rank_0",
          says="RuntimeError: something that nobody thought of"),
    # disks
    Fault("disk_full_in_save", "the disk is full when a checkpoint is written", BOTH, "disk_full_in_save",
          says="error: cannot save .*step_0000000[48].*File too large"),
    Fault("disk_full_in_log", "the disk is full when a line of metrics is written", BOTH, "disk_full_in_log",
          says=r"error: .*metrics\.jsonl"),
    Fault("read_only_in_save", "the run directory has become read-only", BOTH, "read_only_in_save",
          says="error: cannot save .*step_00000008.*Read-only file system"),
    Fault("slow_disk", "a checkpoint takes longer than ranks may hang", ((0, 0),), "slow_disk", settings=HANG),
    Fault("data_deleted_while_running", "the data are deleted during a run", ((0, 0),), "data_deleted_while_running"),
    # found when a run resumes
    Fault("truncated_checkpoint", "the newest checkpoint is cut short", ((0, 0),),
          damage=lambda run, data: cut(newest(run) / "optimizer.safetensors"), says="is damaged: .*trying"),
    Fault("bit_flip_in_model", "a bit of its weights has changed", ((0, 0),),
          damage=lambda run, data: flip(newest(run) / "model/model.safetensors", 0.9), says="is damaged: .*trying"),
    Fault("bit_flip_in_optimizer", "a bit of its optimizer state has changed", ((0, 0),),
          damage=lambda run, data: flip(newest(run) / "optimizer.safetensors", 0.9), says="is damaged: .*trying"),
    Fault("no_complete", "its file COMPLETE is missing", ((0, 0),),
          damage=lambda run, data: (newest(run) / "COMPLETE").unlink(), says="is damaged: .*trying"),
    Fault("corrupt_state", "its state.json is no JSON", ((0, 0),),
          damage=lambda run, data: (newest(run) / "state.json").write_text("{"), says="is damaged: .*trying"),
    Fault("all_damaged", "all checkpoints are damaged", ((0, 0),), damage=two_damaged, says="is damaged"),
    Fault("half_written", "a half-written checkpoint is left over", ((0, 0),), damage=half_written),
    Fault("torn_line", "the last line of metrics.jsonl is torn", ((0, 0),), damage=torn_line),
    Fault("stale_lock", "a lock file is left of a process that has ended", ((0, 0),), damage=stale_lock),
    Fault("deleted_shard", "a shard of the data is gone", BOTH, damage=lambda run, data: shard(data).unlink(),
          says=r"error: .*shard_00000\.bin", restore_data=True),
    Fault("truncated_shard", "a shard of the data is cut short", BOTH, damage=lambda run, data: cut(shard(data)),
          says=r"error: .*shard_00000\.bin", restore_data=True),
    Fault("bit_flip_in_data", "a bit of the data has changed", BOTH, damage=lambda run, data: flip(shard(data), 0.5),
          says=r"error: .*shard_00000\.bin is damaged", restore_data=True),
)  # fmt: skip


def table() -> str:
    """Return the table as Markdown: the fault, the exit codes of the ranks, how the run ends."""
    lines = ["| what happens | exit codes of ranks 0, 1 | then | the run ends as |", "|---|---|---|---|"]
    for fault in FAULTS:
        codes = " or ".join(", ".join(str(code) for code in each) for each in fault.codes)
        shown = codes.replace("-9", "SIGKILL").replace(LOST, "not seen")
        continues = fault.codes == ((0, 0),)
        then = "it continues" if continues else "the same command" if fault.ranks_after == 2 else "the same, one rank"
        if fault.restore_data:
            then += ", with the data back"
        lines.append(f"| {fault.what} | {shown} | {then} | {fault.ends_as} |")
    return "\n".join(lines)


def in_docs() -> str:
    """Return the table in the docs, between the two marks."""
    found = re.search(f"{re.escape(BEGIN)}\n(.*?)\n?{re.escape(END)}", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    assert found is not None, f"{DOCS} has lost its marks"
    return found[1]


def metrics_of(run: Path) -> list[dict]:
    """Return the records of metrics.jsonl without fields that depend on the clock."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key != "timing"} for record in records]


if __name__ == "__main__":
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    DOCS.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")
