"""Which experts leave a shard's memory when others come: one rule for shards and for what predicts their hits.

Each layer's calls keep the heat of its experts, the share of late calls that used them. The coldest leave. Layers are
called in turn, so where they share places, the heat of a layer that is called later counts for less.

Legend: L MoE layers, S slots of a layer (or its experts, for what predicts), N any of them, U distinct ones, C those
that leave.
"""

from __future__ import annotations

import numpy as np

HEAT_STEP = 0.1
"""How much a call counts in the heat: half of it comes from a layer's last seven calls."""
LATER_IS_WORTH = 0.65
"""What a slot of the layer called last is worth beside one of the layer called next that is used as often."""


def note_use(heat_S: np.ndarray, slots_N: np.ndarray, first_part: bool) -> None:
    """A call, or one of the parts of a call, used these slots, each once. float32 [S], changed; int."""
    if first_part:
        heat_S *= 1 - HEAT_STEP
    heat_S[slots_N] += HEAT_STEP


def worth_of_layers(num_layers: int) -> np.ndarray:
    """float32 [L, L]: what heat is worth after a call of one layer (the row) in each layer, 1 in the next one."""
    layers_L = np.arange(num_layers)
    calls_LL = (layers_L - 1 - layers_L[:, None]) % num_layers  # between the last call and the layer's next one
    return (1 - (1 - LATER_IS_WORTH) / max(num_layers - 1, 1) * calls_LL).astype(np.float32)


def coldest(heat_LS: np.ndarray, worth_L: np.ndarray, leaving_LS: np.ndarray, count: int) -> np.ndarray:
    """int64 [C] of layer * S + slot: `count` of the slots that may leave (bool [L, S]), all of them if they are fewer.

    `worth_L` is the row of `worth_of_layers` for the last call.
    """
    candidates = np.flatnonzero(leaving_LS)
    if len(candidates) <= count:
        return candidates
    worth = (heat_LS * worth_L[:, None]).ravel()[candidates]
    return candidates[np.argpartition(worth, count - 1)[:count]]


def most_at_once(layer_places: int, num_layers: int, shared: bool) -> int:
    """Slots of one layer that a call may have in memory; one that needs more is computed in parts.

    Where layers share their places, half of all: the other half is for what comes early.
    """
    return max(layer_places, num_layers * layer_places // 2) if shared else layer_places


def in_parts(slots_U: np.ndarray, here_S: np.ndarray | None, most: int) -> list[np.ndarray]:
    """The parts of a call that needs these slots (int), of at most `most` each. Those in memory (bool) come first: else
    they would make room for others. None: in the order given.
    """
    if len(slots_U) > most and here_S is not None:
        here_U = here_S[slots_U]
        slots_U = np.concatenate([slots_U[here_U], slots_U[~here_U]])
    return np.split(slots_U, range(most, len(slots_U), most))
