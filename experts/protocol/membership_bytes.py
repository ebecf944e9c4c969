"""The bytes of memberships: of a whole one, or of what changed since an epoch that the receiver knows.

`Membership.to_bytes`, `delta_from` and `from_bytes` are the way in; here endpoints are plain data.

Legend: L MoE layers, S slots, R ranks, N changed slots.

    header  magic, version, bytes of the JSON, epoch, the epoch it builds on (-1: none), CRC-32 of the map
    JSON    sizes, nodes, speeds, whether the placement is partial, endpoints: all, or those that changed by rank
    map     whole:  int16 [L, S], or int32 where there are more experts than int16 counts
            change: int32 [N] places in the flat map | int16 or int32 [N] the experts there now

While experts move, epochs follow one another several times a second and differ in a few slots. The CRC-32 is of the map
as int32 bytes; a difference that does not lead to it was applied to the wrong thing.
"""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

import numpy as np

from placement.placement import Placement

_HEADER = struct.Struct("<4sIIqqI")
_MAGIC, _VERSION = b"EMSH", 1


class UnknownEpochError(ValueError):
    """A difference builds on an epoch that is not at hand; ask for the whole membership."""


def epochs_in(data: bytes) -> tuple[int, int]:
    """(epoch, the epoch that it builds on or -1) without reading the rest. ValueError for other bytes."""
    _, epoch, base, _ = _header(data)
    return epoch, base


def whole(epoch: int, placement: Placement, endpoints: list[Any]) -> bytes:
    """All of a membership; `endpoints` by rank."""
    map_LS = placement.physical_to_logical_map.astype(_dtype(placement.num_experts))
    return _message(epoch, -1, placement, {**_shape(placement), "endpoints": endpoints}, map_LS.tobytes())


def difference(epoch: int, placement: Placement, changed: dict[int, Any], base: int, before: Placement) -> bytes | None:
    """What changed since the epoch `base`, whose placement was `before`; None where ranks or slots are others.

    `changed` are the endpoints that changed, by rank.
    """
    if _shape(placement) | {"partial": 0} != _shape(before) | {"partial": 0}:
        return None
    now_S, then_S = placement.physical_to_logical_map.ravel(), before.physical_to_logical_map.ravel()
    places_N = np.flatnonzero(now_S != then_S).astype(np.int32)
    experts_N = now_S[places_N].astype(_dtype(placement.num_experts))
    told = {"partial": placement.partial, "endpoints": {str(rank): one for rank, one in changed.items()}}
    return _message(epoch, base, placement, told, places_N.tobytes() + experts_N.tobytes())


def read(data: bytes, known_epoch: int, known: Placement | None) -> tuple[int, Placement, dict[int, Any]]:
    """(epoch, placement, endpoints by rank: all of them, or those that changed) of what `whole` or `difference` wrote.

    `known` is the placement of `known_epoch`, for a difference to build on. UnknownEpochError if that is not the one it
    needs; ValueError for anything that is no membership.
    """
    told_bytes, epoch, base, crc = _header(data)
    try:
        told = json.loads(data[_HEADER.size : _HEADER.size + told_bytes])
    except ValueError as error:
        raise ValueError(f"the JSON of membership {epoch} cannot be read: {error}") from None
    body = memoryview(data)[_HEADER.size + told_bytes :]
    if base < 0:
        nodes = None if told["nodes"] is None else tuple(told["nodes"])
        speeds = None if told.get("speeds") is None else tuple(told["speeds"])  # older controllers tell none
        sizes = (told["num_ranks"], told["num_nodes"], told["num_experts"])
        placement = Placement(*sizes, _whole_map(told, body), nodes, told["partial"], speeds)
        endpoints = dict(enumerate(told["endpoints"]))
    else:
        if known is None or known_epoch != base:
            raise UnknownEpochError(f"epoch {epoch} is told as a difference from epoch {base}, here is {known_epoch}")
        sizes = (known.num_ranks, known.num_nodes, known.num_experts)
        placement = Placement(*sizes, _changed_map(known, body), known.nodes, told["partial"], known.speeds)
        endpoints = {int(rank): endpoint for rank, endpoint in told["endpoints"].items()}
    if _crc(placement) != crc:
        if base < 0:
            raise ValueError(f"the map of membership {epoch} arrived damaged")
        raise UnknownEpochError(f"epoch {epoch} builds on another epoch {base} than the one known here")
    return epoch, placement, endpoints


def _message(epoch: int, base: int, placement: Placement, told: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(told, separators=(",", ":")).encode()
    return _HEADER.pack(_MAGIC, _VERSION, len(text), epoch, base, _crc(placement)) + text + body


def _header(data: bytes) -> tuple[int, int, int, int]:
    """(bytes of the JSON, epoch, base, CRC). ValueError for other bytes."""
    if len(data) < _HEADER.size or bytes(data[:4]) != _MAGIC:
        raise ValueError(f"{len(data)} bytes that are no membership")
    _, version, told_bytes, epoch, base, crc = _HEADER.unpack_from(data)
    if version != _VERSION or told_bytes > len(data) - _HEADER.size:
        raise ValueError(
            f"a membership of version {version}, {len(data)} bytes; expected version {_VERSION}, all of it"
        )
    return told_bytes, epoch, base, crc


def _shape(placement: Placement) -> dict[str, Any]:
    return {
        "num_layers": placement.num_layers,
        "num_slots": placement.num_slots,
        "num_ranks": placement.num_ranks,
        "num_nodes": placement.num_nodes,
        "num_experts": placement.num_experts,
        "nodes": None if placement.nodes is None else list(placement.nodes),
        "speeds": None if placement.speeds is None else list(placement.speeds),
        "partial": placement.partial,
    }


def _whole_map(told: dict[str, Any], body: memoryview) -> np.ndarray:
    dtype, shape = _dtype(told["num_experts"]), (told["num_layers"], told["num_slots"])
    expected = shape[0] * shape[1] * dtype.itemsize
    if len(body) != expected:
        raise ValueError(f"a map of {len(body)} bytes, expected {expected} for {shape[0]} layers of {shape[1]} slots")
    return np.frombuffer(body, dtype).reshape(shape)


def _changed_map(before: Placement, body: memoryview) -> np.ndarray:
    dtype = _dtype(before.num_experts)
    count, rest = divmod(len(body), 4 + dtype.itemsize)
    if rest:
        raise ValueError(f"{len(body)} bytes of changed slots, expected a multiple of {4 + dtype.itemsize}")
    places_N = np.frombuffer(body, np.int32, count)
    map_LS = before.physical_to_logical_map.copy()
    if count and not 0 <= int(places_N.min()) <= int(places_N.max()) < map_LS.size:
        raise ValueError(f"changed slots {places_N.min()} to {places_N.max()}, expected 0 to {map_LS.size - 1}")
    map_LS.ravel()[places_N] = np.frombuffer(body, dtype, count, 4 * count)
    return map_LS


def _dtype(num_experts: int) -> np.dtype[Any]:
    return np.dtype(np.int16 if num_experts <= 1 << 15 else np.int32)


def _crc(placement: Placement) -> int:
    return zlib.crc32(placement.physical_to_logical_map.data)
