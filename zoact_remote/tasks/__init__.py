"""Tasks: how records of data become rows, and by what figure a model is judged on them."""

from zoact_remote.tasks.library import BUILTIN
from zoact_remote.tasks.records import Record, RecordError, load_jsonl, load_records
from zoact_remote.tasks.task import Example, Metric, Task

__all__ = [
    "BUILTIN",
    "Example",
    "Metric",
    "Record",
    "RecordError",
    "Task",
    "load_jsonl",
    "load_records",
]
