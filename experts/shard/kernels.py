"""Which kernel a shard computes with: one for all its slots, or for some of them, where it offloads the others."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from experts.checkpoint import ExpertCheckpoint
from experts.kernels import ExpertKernel, KernelShape, keep_quantized, pick_kernel
from experts.kernels.offload import FileBacking, Link, OffloadedKernel, PinnedBacking, Prefetcher
from experts.protocol.settings import OffloadSettings, ShardSettings
from experts.protocol.status import OffloadStatus
from experts.protocol.wire import hinted_experts
from experts.shard.slots import SlotTable
from placement.placement import Placement

logger = logging.getLogger(__name__)


def kernel_for(checkpoint: ExpertCheckpoint, settings: ShardSettings, num_slots: int) -> ExpertKernel:
    """A kernel with so many slots in each layer, none of them set. ValueError or OSError says why there is none."""
    spec = checkpoint.spec
    shape = KernelShape(
        num_layers=spec.num_layers,
        num_slots=num_slots,
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        activation=spec.activation,
        has_bias=spec.has_bias,
        weight_on_input=spec.weight_on_input,
        dtype=getattr(torch, settings.dtype),
        device=settings.device,
    )
    num_places = num_slots if settings.offload is None else places_of(settings.offload, num_slots)
    fewer = num_places < num_slots
    shape = keep_quantized(shape, checkpoint.weight_format, settings.kernel, as_bytes=fewer)
    if checkpoint.scheme is not None and not shape.quantized:
        logger.info("experts stored as %s become %s when they are loaded", checkpoint.scheme.text, settings.dtype)
    picked = pick_kernel(replace(shape, num_slots=num_places), settings.kernel, as_bytes=fewer)
    if settings.offload is None or not fewer:
        return picked
    return _offloaded(picked, shape, settings.offload)


def places_of(offload: OffloadSettings, num_slots: int) -> int:
    """Slots of a layer that are in the kernel's memory at a time, at least one."""
    return max(math.ceil(offload.resident_fraction * num_slots), 1)


def _offloaded(picked: ExpertKernel, shape: KernelShape, offload: OffloadSettings) -> OffloadedKernel:
    view_bytes = [view.numel() for view in picked.slot_views(0, 0)]
    if shape.device_type == "cpu":
        folder = None if offload.folder is None else Path(offload.folder)
        backing: FileBacking | PinnedBacking = FileBacking(folder, shape.num_layers, shape.num_slots, view_bytes)
    else:
        backing = PinnedBacking(shape.device, shape.num_layers, shape.num_slots, view_bytes)
    kernel = OffloadedKernel(picked, shape, backing, Link(offload.max_copy_bytes_per_s))
    logger.info(
        "%d of %d slots of a layer are resident, %.1f MB; all take %.1f MB",
        picked.shape.num_slots, shape.num_slots, kernel.resident_bytes / 1e6,
        shape.num_layers * shape.num_slots * kernel.slot_bytes / 1e6,
    )  # fmt: skip
    return kernel


def start_prefetch(kernel: ExpertKernel, slots: SlotTable, offload: OffloadSettings | None) -> None:
    """Start what brings experts in before they are needed, if that is asked for; the kernel's `close` ends it."""
    if isinstance(kernel, OffloadedKernel) and offload is not None and offload.prefetch:
        Prefetcher(kernel, lambda layer, words: _hinted_slots(slots.slot_of_expert_LE[layer], words)).start()


def fill_hot_first(
    kernel: ExpertKernel, slots: SlotTable, placement: Placement, load_LE: np.ndarray | None = None
) -> None:
    """Fill the memory of a kernel that has not served yet, with slots of the experts that have most tokens here.

    `load_LE` (float [L, E]) says how many each expert has on all shards together. Without it those with most replicas
    come first, since a planner gives replicas to hot experts; the others follow in order. ValueError if `load_LE` is of
    another model.
    """
    if isinstance(kernel, OffloadedKernel):
        kernel.fill(_hot_first(slots.slot_of_expert_LE, placement, load_LE))


def _hinted_slots(slot_of_expert_E: np.ndarray, words: np.ndarray) -> np.ndarray:
    slots_N = slot_of_expert_E[hinted_experts(words, len(slot_of_expert_E))]
    return slots_N[slots_N >= 0]


def _hot_first(
    slot_of_expert_LE: np.ndarray, placement: Placement, load_LE: np.ndarray | None
) -> Iterable[tuple[int, int]]:
    if load_LE is not None and load_LE.shape != slot_of_expert_LE.shape:
        raise ValueError(f"loads are of {load_LE.shape} layers and experts, the model has {slot_of_expert_LE.shape}")
    for layer, slot_of_expert_E in enumerate(slot_of_expert_LE):
        map_S = placement.physical_to_logical_map[layer]
        replicas_E = np.bincount(map_S[map_S >= 0], minlength=placement.num_experts)
        heat_E = replicas_E if load_LE is None else load_LE[layer] / np.maximum(replicas_E, 1)
        held = np.flatnonzero(slot_of_expert_E >= 0)
        for expert in held[np.argsort(-heat_E[held], kind="stable")]:
            yield layer, int(slot_of_expert_E[expert])


def offload_status(kernel: ExpertKernel) -> OffloadStatus | None:
    """What the offloading of a kernel's slots has cost so far; None where all are in its memory."""
    if not isinstance(kernel, OffloadedKernel):
        return None
    counts = kernel.counts
    return OffloadStatus(
        kernel=kernel.kernel_name,
        resident_experts=kernel.residency.count(),
        resident_bytes=kernel.residency.count() * kernel.slot_bytes,
        room_bytes=kernel.resident_bytes,
        hits=kernel.hits,
        misses=counts.misses,
        copied_bytes=counts.copied * kernel.slot_bytes,
        copy_seconds=counts.copy_ns / 1e9,
        wait_seconds=counts.wait_ns / 1e9,
        prefetched=counts.prefetched,
        prefetches_wasted=kernel.residency.wasted,
        copy_bytes_per_s=kernel.slot_bytes / kernel.copy_s if kernel.copy_s else 0.0,
    )
