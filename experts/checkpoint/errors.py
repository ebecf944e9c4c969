"""What a checkpoint can have wrong with it."""

from __future__ import annotations


class CheckpointError(ValueError):
    """The checkpoint cannot be read as asked; the message names the file, key or tensor and what was expected."""
