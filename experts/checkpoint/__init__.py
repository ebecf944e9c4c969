"""Reads routed experts from Hugging Face checkpoints: naming schemes as data, lazy byte ranges, dequantization. What
computes with them is in `experts.kernels`.

`ExpertCheckpoint.open(folder)`, then `.spec`, `.check()` and `.read_expert(layer, expert, dtype)`. `index.py` and
`header.py` can be imported without torch.
"""

from typing import TYPE_CHECKING, Any

from experts.checkpoint.errors import CheckpointError

if TYPE_CHECKING:
    from experts.checkpoint.reader import ExpertCheckpoint

__all__ = ["CheckpointError", "ExpertCheckpoint"]


def __getattr__(name: str) -> Any:
    if name == "ExpertCheckpoint":
        from experts.checkpoint.reader import ExpertCheckpoint

        return ExpertCheckpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
