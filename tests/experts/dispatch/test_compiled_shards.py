"""Shards that compute in C++ and serve routers over shared memory and over TCP at the same time."""

from __future__ import annotations

from pathlib import Path

import pytest

from experts.kernels.native.kernel import NativeKernel
from tests.support.kernel_cases import BASE
from tests.support.small_mesh import assert_matches, mesh_of, oracle, random_batch, replicated, run, write_checkpoint

pytestmark = pytest.mark.skipif(NativeKernel.supports(BASE) is not None, reason=str(NativeKernel.supports(BASE)))


def test_pairs_of_both_kinds_share_a_shard(tmp_path: Path) -> None:
    with mesh_of(write_checkpoint(tmp_path / "model"), replicated(2, 6, 2, 1), kernel="native") as mesh:
        routers = [mesh.router(transport=transport) for transport in ("shm", "tcp", "shm")]
        for seed, num_tokens in enumerate([0, 1, 5, 40]):
            for router in routers:
                for layer in range(2):
                    batch = random_batch(num_tokens, seed=seed)
                    assert_matches(run(router, layer, batch), oracle(mesh.checkpoint, layer, batch))
        assert all(router.status().failovers == 0 for router in routers)
        assert all(not router.status().lost for router in routers)
