"""The target for another set of shards, by as few copies as possible: some left, some are lost, some are new.

L layers, E experts, R ranks of the result, s slots of a rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from placement.placement import Placement
from placement.search.few_copies.even import even_out
from placement.search.few_copies.needed import LackingError, place_hot, place_needed, restore_spare
from placement.search.few_copies.state import Frame, start_map

TOLERANCE = 0.04  # of an even load: a balancedness of 0.96


def resize(
    current: Placement,
    *,
    slots_R: Sequence[int],
    usable_R: Sequence[bool],
    load_LE: np.ndarray | None = None,
    min_replicas: int = 1,
    spare_slots: int = 1,
    nodes: tuple[int, ...] | None = None,
    num_nodes: int = 1,
    successor_of: Mapping[int, int] | None = None,
    protect_LE: np.ndarray | None = None,
    speed_R: Sequence[float] | None = None,
    tolerance: float = TOLERANCE,
    fewer_replicas: bool = False,
) -> Placement:
    """A full placement for the usable ranks, near `current`. The same arguments always give the same placement.

    Args:
        current: what is held, maybe partial. Ranks keep their numbers.
        slots_R: slots of a layer that each rank of the result has; the map is padded to the largest.
        usable_R: False for ranks that leave, are lost, or are holes: they come out empty.
        load_LE: load of each expert [L, E], in any unit; None: all the same. Replicas share it evenly.
        min_replicas: replicas of every expert, on different ranks, and on different nodes if slots and nodes allow.
        spare_slots: slots of each layer and rank to leave empty. They are used for needed replicas that have no other
            slot, not for optional ones.
        nodes, num_nodes: the node of each rank, as in `Placement`.
        successor_of: leaving rank -> the new rank that takes its experts, layer by layer, where it has the slots.
        protect_LE: bool [L, E], experts that need at least 2 replicas.
        speed_R: relative speed; a rank of speed 2 takes twice the load.
        tolerance: loads within this share of even are left alone, and no copy is made that evens out less.
        fewer_replicas: whether to leave out replicas that do not fit, rather than refuse.

    Raises ValueError, with both numbers, if the slots do not hold every expert, or the replicas it needs.
    """
    successor_of = dict(successor_of or {})
    num_ranks = len(slots_R)
    if len(usable_R) != num_ranks or not num_ranks:
        raise ValueError(f"usable_R names {len(usable_R)} ranks, slots_R {num_ranks}")
    usable = np.asarray(usable_R, bool)
    slots = np.where(usable, np.asarray(slots_R, np.int64), 0)
    for name, value, least in (("spare_slots", spare_slots, 0), ("min_replicas", min_replicas, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}, expected at least {least}")
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}, expected above 0 and below 1")
    shape = (current.num_layers, current.num_experts)
    needed_LE = np.full(shape, min_replicas, np.int64)
    if protect_LE is not None:
        needed_LE = np.where(_of_shape("protect_LE", protect_LE, shape), np.maximum(needed_LE, 2), needed_LE)
    node_R = _nodes(num_ranks, nodes, num_nodes)
    speed = np.ones(num_ranks) if speed_R is None else np.asarray(speed_R, float)
    if speed.shape != (num_ranks,) or not (speed > 0).all():
        raise ValueError(f"speed_R is {speed.tolist()}, expected {num_ranks} numbers above 0")
    needed_LE = _check_fit(slots, needed_LE, shape[1], fewer_replicas)

    held_LRs = current.physical_to_logical_map.reshape(current.num_layers, current.num_ranks, -1)
    map_LRW = start_map(held_LRs, slots, num_ranks)
    for rank, successor in sorted(successor_of.items()):
        if not 0 <= successor < num_ranks or not usable[successor] or (rank < num_ranks and usable[rank]):
            raise ValueError(f"rank {successor} cannot succeed rank {rank}: the one must be usable, the other not")
        if 0 <= rank < current.num_ranks:
            _succeed(map_LRW, held_LRs[:, rank], successor, int(slots[successor]))
    load_LE = _loads(load_LE, shape)
    frame = Frame(
        load_LE=load_LE,
        slots_R=slots,
        spare_slots=spare_slots,
        needed_LE=needed_LE,
        kept_LE=needed_LE,
        node_R=node_R,
        num_nodes=num_nodes,
        speed_R=speed,
        spread=1 < int(needed_LE.max()) <= len(np.unique(node_R[slots > 0])),
    )
    frame, map_LRW = _place_needed(frame, map_LRW, fewer_replicas)
    frame = replace(frame, kept_LE=_kept(frame, tolerance))
    map_LRW = restore_spare(frame, place_hot(frame, map_LRW))
    # What evens out may leave a slot free that an expert in a spare one can take.
    map_LRW = restore_spare(frame, even_out(frame, map_LRW, tolerance))
    return Placement(num_ranks, num_nodes, shape[1], map_LRW.reshape(shape[0], -1), nodes=nodes, speeds=tuple(speed))


def copies_between(held: Placement, target: Placement) -> int:
    """How many experts ranks of the target lack, over all layers: the copies to make at least."""
    num_ranks = max(held.num_ranks, target.num_ranks)
    on = np.zeros((2, target.num_layers, num_ranks, target.num_experts), bool)
    for index, placement in enumerate((held, target)):
        map_LRs = placement.physical_to_logical_map.reshape(placement.num_layers, placement.num_ranks, -1)
        layer, rank, slot = np.nonzero(map_LRs >= 0)
        on[index, layer, rank, map_LRs[layer, rank, slot]] = True
    return int((on[1] & ~on[0]).sum())


def _of_shape(name: str, given: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    array = np.asarray(given)
    if array.shape != shape:
        raise ValueError(f"{name} is {list(array.shape)}, expected {list(shape)}: layers, experts")
    return array


def _loads(load_LE: np.ndarray | None, shape: tuple[int, int]) -> np.ndarray:
    """float64 [L, E], the mean of each layer 1, none 0: experts without load are dealt evenly too."""
    if load_LE is None:
        return np.ones(shape)
    load = _of_shape("load_LE", load_LE, shape).astype(float)
    if not np.isfinite(load).all() or load.min() < 0:
        raise ValueError(f"load_LE has {load.min()} to {load.max()}, expected finite numbers of at least 0")
    mean_L1 = load.mean(1, keepdims=True)
    return np.where(mean_L1 > 0, load / np.where(mean_L1 > 0, mean_L1, 1.0), 1.0) + 1e-3


def _nodes(num_ranks: int, nodes: tuple[int, ...] | None, num_nodes: int) -> np.ndarray:
    """int64 [R]."""
    if nodes is None:
        if num_ranks % num_nodes:
            raise ValueError(f"{num_ranks} ranks cannot be dealt evenly to {num_nodes} nodes; give `nodes`")
        return np.arange(num_ranks) // (num_ranks // num_nodes)
    if len(nodes) != num_ranks:
        raise ValueError(f"nodes names {len(nodes)} ranks, slots_R {num_ranks}")
    return np.asarray(nodes, np.int64)


def _check_fit(slots_R: np.ndarray, needed_LE: np.ndarray, num_experts: int, fewer_replicas: bool) -> np.ndarray:
    """The needed replicas, no more than there are ranks. Raises ValueError if the slots are fewer."""
    ranks, most = int((slots_R > 0).sum()), int(needed_LE.max())
    shards = "1 shard has" if ranks == 1 else f"{ranks} shards have"
    if slots_R.sum() < num_experts:
        raise ValueError(
            f"{shards} {slots_R.sum()} slots in a layer for {num_experts} experts: add shards, or give them more slots"
        )
    if most > ranks and not fewer_replicas:
        raise ValueError(f"{most} replicas on different shards need {most} shards, there are {ranks}")
    needed_LE = np.minimum(needed_LE, ranks)
    needed, useful = int(needed_LE.sum(1).max()), int(np.minimum(slots_R, num_experts).sum())
    if needed > useful and not fewer_replicas:
        raise ValueError(
            f"{shards} {useful} slots in a layer for {num_experts} experts with {needed} replicas: "
            "add shards, give them more slots, or ask for fewer replicas"
        )
    return needed_LE


def _succeed(map_LRW: np.ndarray, left_Ls: np.ndarray, successor: int, slots: int) -> None:
    """Put the experts of a leaving rank on its successor, in the layers in which it has the slots."""
    for layer, row in enumerate(left_Ls):
        mine = map_LRW[layer, successor]
        missing = [expert for expert in dict.fromkeys(row[row >= 0].tolist()) if expert not in mine]
        free = np.flatnonzero(mine[:slots] < 0)
        if len(missing) <= len(free):
            mine[free[: len(missing)]] = missing


def _kept(frame: Frame, tolerance: float) -> np.ndarray:
    """int64 [L, E]: replicas that bring every share down to an even load, or as near as the slots allow."""
    slots, most = int(frame.limit_R.sum()), int((frame.limit_R > 0).sum())
    low_L, high_L = np.ones(len(frame.load_LE)), np.full(len(frame.load_LE), float(frame.load_LE.shape[1]))
    kept_LE = frame.needed_LE
    for _ in range(24):
        factor_L = np.where(high_L == low_L, low_L, (low_L + high_L) / 2) if _ else low_L
        share_L1 = (factor_L * frame.even_L * (1 + tolerance))[:, None]
        wanted_LE = np.maximum(np.minimum(np.ceil(frame.load_LE / share_L1), most), frame.needed_LE).astype(np.int64)
        fits_L = wanted_LE.sum(1) <= slots
        kept_LE = np.where(fits_L[:, None], wanted_LE, kept_LE)
        high_L, low_L = np.where(fits_L, factor_L, high_L), np.where(fits_L, low_L, factor_L)
    return kept_LE


def _place_needed(frame: Frame, map_LRW: np.ndarray, fewer_replicas: bool) -> tuple[Frame, np.ndarray]:
    """The map with the needed replicas, and the frame with what of its demands can be met."""
    try:
        return frame, place_needed(frame, map_LRW)
    except LackingError as error:
        layer, expert = error.args
    if frame.spread:
        # The nodes' slots are too uneven: on different ranks is the best there is.
        return _place_needed(replace(frame, spread=False), map_LRW, fewer_replicas)
    if not fewer_replicas:
        raise ValueError(
            f"layer {layer}: the slots of {int(frame.used_R.sum())} shards, {frame.slots_R[frame.used_R].tolist()}, do "
            f"not allow {frame.needed_LE[layer, expert]} replicas of expert {expert} on different shards beside those "
            f"that the other experts need, {int(frame.needed_LE[layer].sum())} in all: add shards, or ask for fewer"
        )
    # One replica of every expert first, then further ones of the hottest, as many as fit.
    one_LE, needed_LE = np.minimum(frame.needed_LE, 1), frame.needed_LE.copy()
    map_LRW = place_needed(replace(frame, needed_LE=one_LE, kept_LE=one_LE), map_LRW)
    map_LRW = place_needed(frame, map_LRW, needed_LE)
    return replace(frame, needed_LE=needed_LE, kept_LE=needed_LE), map_LRW


__all__ = ["TOLERANCE", "copies_between", "resize"]
