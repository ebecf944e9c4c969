"""Chooses what plans, packs and combines for the links of an epoch."""

from __future__ import annotations

import importlib.util

import torch

from experts.dispatch.rows.base import RowMover
from experts.dispatch.rows.torch_mover import TorchRowMover


def pick_row_mover(device: torch.device) -> RowMover:
    """The quickest mover that runs on `device`."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from experts.dispatch.rows.triton_mover import TritonRowMover

        return TritonRowMover(device)
    return TorchRowMover()
