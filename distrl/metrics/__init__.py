"""What a run tells about itself: metric names, and the sinks that they go to.

The driver hands each step's values to one `Sink`. `metrics.jsonl` is the truth;
the console and W&B are copies that may lag, drop rows or be missing altogether.
"""

from distrl.metrics.console import ConsoleSink, StageProgress, stage_progress
from distrl.metrics.jsonl import JSONLSink, MetricsError, read_jsonl, rewind, rewind_run
from distrl.metrics.names import METRICS, unknown_names
from distrl.metrics.sinks import Cell, ListSink, MultiSink, Sink, Value
from distrl.metrics.wandb_sink import WandbSink, new_run_id

__all__ = [
    "METRICS",
    "Cell",
    "ConsoleSink",
    "JSONLSink",
    "ListSink",
    "MetricsError",
    "MultiSink",
    "Sink",
    "StageProgress",
    "Value",
    "WandbSink",
    "new_run_id",
    "read_jsonl",
    "rewind",
    "rewind_run",
    "stage_progress",
    "unknown_names",
]
