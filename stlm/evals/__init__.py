"""Evaluation of saved models: bits per byte of text, compared with general compressors; choices between texts by their
probability; probes and fine-tuning on top of a model."""

from stlm.evals.likelihood import Likelihood, Likelihoods, Row, log_likelihoods
from stlm.evals.live import LiveTasks
from stlm.evals.probing import METHODS
from stlm.evals.probing.glue import GLUE_TASKS, GlueData, load_glue
from stlm.evals.probing.protocol import Method, ProbeOptions, probe
from stlm.evals.probing.report import probe_markdown, probe_text
from stlm.evals.registry import DATA_TASKS, TASKS, Options, TaskResult, load_tasks
from stlm.evals.report import curve_text, markdown, overview_text, table
from stlm.evals.sharding import EvalShard
from stlm.evals.subject import Subject, complete_checkpoints
from stlm.evals.tasks.bits_per_byte import SplitScore, score_split
from stlm.evals.tasks.choices import CHOICE_TASKS, ChoiceTask, LoadedTask, ScoredItem
from stlm.evals.tasks.compression import COMPRESSORS, compressed_bits_per_byte

__all__ = [
    "Subject",
    "complete_checkpoints",
    "TASKS",
    "DATA_TASKS",
    "Options",
    "TaskResult",
    "load_tasks",
    "LiveTasks",
    "EvalShard",
    "CHOICE_TASKS",
    "ChoiceTask",
    "LoadedTask",
    "ScoredItem",
    "Row",
    "Likelihood",
    "Likelihoods",
    "log_likelihoods",
    "GLUE_TASKS",
    "GlueData",
    "load_glue",
    "METHODS",
    "Method",
    "ProbeOptions",
    "probe",
    "probe_text",
    "probe_markdown",
    "SplitScore",
    "score_split",
    "COMPRESSORS",
    "compressed_bits_per_byte",
    "overview_text",
    "curve_text",
    "markdown",
    "table",
]
