"""How good a saved model is: bits per byte of prepared text, beside what compressors reach on the same bytes."""

from stlm.evals.bits_per_byte import SplitScore, score_split
from stlm.evals.compression import COMPRESSORS, compressed_bits_per_byte
from stlm.evals.subject import Subject
from stlm.evals.table import table
from stlm.evals.tasks import TASKS, TaskResult, select_tasks

__all__ = [
    "Subject",
    "TASKS",
    "TaskResult",
    "select_tasks",
    "SplitScore",
    "score_split",
    "COMPRESSORS",
    "compressed_bits_per_byte",
    "table",
]
