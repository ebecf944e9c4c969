"""Chooses what plans, packs and combines for the links of an epoch."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import torch
from numba import config

from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.rows.base import RowMover
from experts.dispatch.rows.host_mover import HostRowMover
from experts.dispatch.rows.native_mover import NativeFloat16Mover, NativeRowMover
from experts.dispatch.rows.torch_mover import TorchRowMover
from experts.native.library import data_plane
from experts.protocol.membership import Membership
from experts.transports.base import RouterLink


def pick_row_mover(
    shape: LayerShape, max_rows: int, membership: Membership, links: Mapping[int, RouterLink]
) -> RowMover:
    """The quickest mover for these links. ValueError if only some of them carry rows from a device."""
    devices = {None if link.send_tensor is None else link.send_tensor.device.type for link in links.values()}
    if None in devices and len(devices) > 1:
        raise ValueError("some links carry rows from a device and some from host memory; use one transport for all")
    if "cuda" in devices:
        from experts.dispatch.rows.cuda.mover import cuda_row_mover

        mover = cuda_row_mover(shape, max_rows, membership, links)
        if mover is not None:
            return mover
    if "cuda" in devices and importlib.util.find_spec("triton") is not None:
        from experts.dispatch.rows.triton_mover import TritonRowMover

        return TritonRowMover(shape, max_rows, membership, links)
    if devices <= {None}:
        is_float16 = shape.dtype == torch.float16
        if data_plane() is not None and not config.DISABLE_JIT:
            return (NativeFloat16Mover if is_float16 else NativeRowMover)(shape, max_rows, membership, links)
        if not is_float16:  # which numba does not know
            return HostRowMover(shape, max_rows, membership, links)
    return TorchRowMover(shape, max_rows, membership, links)
