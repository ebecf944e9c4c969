"""Shards killed, stopped and continued at random moments while a router dispatches: every result stays right."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path

import pytest

from experts.dispatch.mesh_client import MeshClient
from experts.protocol.membership import Membership
from tests.support.small_mesh import (
    Mesh,
    assert_matches,
    mesh_of,
    oracle,
    random_batch,
    replicated,
    run,
    write_checkpoint,
)
from tests.support.waiting import AWAIT_S

NUM_LAYERS, NUM_EXPERTS, NUM_RANKS = 2, 6, 3
EPOCHS, SIGNALS_PER_EPOCH = 6, 6
SILENCE_MS = 200  # on a loaded machine a sound shard may be given up, too: another way to the same result
LONGEST_PAUSE_S = 0.1


class Gremlin(threading.Thread):
    """Sends signals to shards, at moments that have nothing to do with what they compute."""

    def __init__(self, mesh: Mesh, seed: int) -> None:
        super().__init__()
        self.sent: list[signal.Signals] = []
        self._mesh = mesh
        self._random = random.Random(seed)
        self._pause = threading.Event()

    def run(self) -> None:
        for _ in range(SIGNALS_PER_EPOCH):
            self._pause.wait(self._random.uniform(0, LONGEST_PAUSE_S))
            shard = self._mesh.shards[self._random.randrange(NUM_RANKS)]
            number = self._random.choice([signal.SIGSTOP, signal.SIGCONT, signal.SIGCONT, signal.SIGKILL])
            if shard.process.is_alive():
                os.kill(shard.endpoint.pid, number)  # and does not wait for what comes of it
                if number == signal.SIGKILL:
                    shard.process.join(AWAIT_S)
            self.sent.append(number)


def heal(mesh: Mesh) -> None:
    for rank, shard in list(mesh.shards.items()):
        if shard.process.is_alive():
            shard.signal(signal.SIGCONT)
        else:
            mesh.restart(rank)


def check_step(mesh: Mesh, router: MeshClient, chance: random.Random) -> None:
    for layer in range(NUM_LAYERS):
        batch = random_batch(chance.choice([0, 1, 5, 20]), seed=chance.randrange(1000))
        assert_matches(run(router, layer, batch), oracle(mesh.checkpoint, layer, batch))


@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_every_result_is_right_whatever_happens_to_shards(tmp_path: Path, transport: str) -> None:
    """Epochs with one to three replicas, steps in messages of at most eight rows, late answers of given-up shards."""
    chance = random.Random(7)
    everywhere = replicated(NUM_LAYERS, NUM_EXPERTS, NUM_RANKS, NUM_RANKS)
    with mesh_of(write_checkpoint(tmp_path / "model"), everywhere) as mesh:
        router = mesh.router(
            apply=False,
            transport=transport,
            dispatch_timeout_ms=SILENCE_MS,
            connect_timeout_s=1.0,
            max_rows_per_dispatch=8,
        )
        for epoch in range(1, EPOCHS + 1):
            heal(mesh)
            placement = replicated(NUM_LAYERS, NUM_EXPERTS, NUM_RANKS, chance.randint(1, NUM_RANKS))
            gremlin = Gremlin(mesh, seed=epoch)
            gremlin.start()
            try:
                router.apply_membership(Membership(epoch, placement, mesh.membership().endpoints))
                while gremlin.is_alive():
                    check_step(mesh, router, chance)
            finally:
                gremlin.join(AWAIT_S)
            assert len(gremlin.sent) == SIGNALS_PER_EPOCH
        heal(mesh)
        router.apply_membership(mesh.membership(epoch=EPOCHS + 1))
        check_step(mesh, router, chance)
        assert router.status().failovers > 0
