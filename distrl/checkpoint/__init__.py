"""The run directory, and checkpoints in it that are whole or not there."""

from distrl.checkpoint.run_dir import RunDir, RunDirError
from distrl.checkpoint.store import Checkpoint, CheckpointError, Checkpoints

__all__ = ["Checkpoint", "CheckpointError", "Checkpoints", "RunDir", "RunDirError"]
