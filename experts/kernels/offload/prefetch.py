"""The thread that brings slots into places before they are asked for: as routers say, else as earlier calls suggest."""

from __future__ import annotations

import logging
import os
import select
import threading
from collections.abc import Callable

import numpy as np

from experts.kernels.offload.kernel import OffloadedKernel
from experts.kernels.offload.transitions import Transitions
from experts.native.structs import NativeHints

logger = logging.getLogger(__name__)

AT_ONCE_S = 0.001
"""Of copies that come early in one go: a call that needs the first waits for the last."""
LEAST_SHARE = 0.25
"""Of calls in which a slot has to follow to be brought in early: a copy without use delays one that is waited for."""


class Prefetcher:
    """Hears of each call of a kernel, learns from it, and copies what the next layer will probably use meanwhile."""

    def __init__(self, kernel: OffloadedKernel, hinted: Callable[[int, np.ndarray], np.ndarray]) -> None:
        """`hinted`: the slots of a layer that a router's words name."""
        self._kernel, self._hinted = kernel, hinted
        self._hints = kernel.hints = NativeHints()
        self._seen_hints = 0
        shape = kernel.shape
        self._transitions = Transitions(shape.num_layers, shape.num_slots)
        self._versions_LS = kernel.versions_LS.copy()
        self._heard = -1
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="shard-prefetch", daemon=True)

    def start(self) -> None:
        """Until the kernel is closed. What it has been called for so far counts."""
        self._kernel.before_close(self._stop)
        self._thread.start()

    def _stop(self) -> None:
        self._stopping = True
        os.eventfd_write(self._kernel.places.called, 1)
        self._thread.join()

    def _run(self) -> None:
        called = self._kernel.places.called
        poll = select.poll()
        poll.register(called, select.POLLIN)
        while not self._stopping:
            poll.poll()
            try:
                os.eventfd_read(called)
                self._follow()
            except Exception:  # calls do not depend on this thread
                logger.exception("experts were not brought in early")

    def _follow(self) -> None:
        """Act on the newest call; one that comes meanwhile is another turn."""
        places = self._kernel.places
        clock, layer = places.clock, places.last_layer
        slots_U = np.flatnonzero(places.last_use_LS[layer] == clock)
        if clock == self._heard or not slots_U.size:
            return
        self._heard = clock
        self._forget_changes(layer)
        following = (layer + 1) % self._kernel.shape.num_layers
        likely_N = self._told(layer, following)
        if likely_N is None:
            likely_N = self._transitions.likely(layer, slots_U, LEAST_SHARE)
        self._bring(following, likely_N)
        self._transitions.note(layer, slots_U)

    def _told(self, layer: int, following: int) -> np.ndarray | None:
        """What the router of the newest request says of the following layer, the hottest first; None if nothing."""
        newest = self._hints.newest(self._seen_hints)
        self._seen_hints = self._hints.written
        if newest is None or newest[0] != layer or not newest[1].any():
            return None
        hinted_N = self._hinted(following, newest[1])
        return hinted_N[np.argsort(-self._kernel.places.heat_LS[following, hinted_N], kind="stable")]

    def _bring(self, layer: int, likely_N: np.ndarray) -> None:
        kernel = self._kernel
        wanted_N = likely_N[: kernel.most_at_once]
        keep_S = np.zeros(kernel.shape.num_slots, np.bool_)
        keep_S[wanted_N] = True
        missing = wanted_N[kernel.residency.place_of_slot_LS[layer, wanted_N] < 0].tolist()
        at_once = max(int(AT_ONCE_S / max(kernel.copy_s, 1e-6)), kernel.together)
        for first in range(0, len(missing), at_once):
            if self._stopping or kernel.places.last_layer == layer:
                return  # it is too late for this layer
            kernel.bring_early(layer, missing[first : first + at_once], keep_S)

    def _forget_changes(self, layer: int) -> None:
        changed = np.flatnonzero(self._versions_LS[layer] != self._kernel.versions_LS[layer])
        for slot in changed.tolist():
            self._transitions.forget(layer, slot)
        self._versions_LS[layer, changed] = self._kernel.versions_LS[layer, changed]
