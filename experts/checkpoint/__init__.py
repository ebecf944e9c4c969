"""Reads routed experts from Hugging Face checkpoints: naming schemes as data, lazy byte ranges, dequantization. What
computes with them is in `experts.kernels`.

`ExpertCheckpoint.open(folder)`, then `.spec`, `.check()` and `.read_expert(layer, expert, dtype)`.
"""

from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.reader import ExpertCheckpoint

__all__ = ["CheckpointError", "ExpertCheckpoint"]
