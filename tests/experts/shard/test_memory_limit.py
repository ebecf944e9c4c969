"""A shard that offloads in a memory cgroup where its experts do not fit: it loads and serves, and no row is wrong."""

from __future__ import annotations

import contextlib
import json
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.memory_group import MemoryGroup, memory_group, why_no_group
from experts.checkpoint import ExpertCheckpoint
from experts.kernels.native.kernel import NativeKernel
from experts.protocol.membership import Membership, ShardEndpoint
from tests.support.command import ROOT
from tests.support.kernel_cases import BASE
from tests.support.small_mesh import (
    assert_matches,
    make_router,
    oracle,
    random_batch,
    replicated,
    run,
    write_checkpoint,
)

LAYERS, EXPERTS, HIDDEN, WIDTH = 2, 32, 256, 512
ALL_BYTES = LAYERS * EXPERTS * 3 * HIDDEN * WIDTH * 4
SLACK_BYTES = 16 << 20  # what loading takes for a moment, buffers of pairs, and pages on their way to the disk

pytestmark = [
    pytest.mark.whole_machine,  # pages that come and go over and over keep the disk from others
    pytest.mark.skipif(why_no_group() is not None, reason=f"no memory limit can be set: {why_no_group()}"),
    pytest.mark.skipif(NativeKernel.supports(BASE) is not None, reason="the native kernel cannot be built"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"num_layers": LAYERS, "num_experts": EXPERTS, "hidden_size": HIDDEN, "intermediate_size": WIDTH}
    return write_checkpoint(tmp_path_factory.mktemp("model"), **shape)


@contextlib.contextmanager
def shard_in(group: MemoryGroup, model: Path) -> Iterator[tuple[subprocess.Popen[bytes], ShardEndpoint]]:
    """A shard whose every byte is counted in the group, with a quarter of the experts in its own memory."""
    settings = {"model_path": str(model), "dtype": "float32", "kernel": "native"}
    settings["offload"] = {"resident_fraction": 0.25}
    replicated(LAYERS, EXPERTS, 1, 1).save(model / "placement.json")
    command = [sys.executable, "-m", "experts.shard.server", "--settings", json.dumps(settings), "--rank", "0"]
    command += ["--placement", str(model / "placement.json"), "--epoch", "1", "--until-stdin-closes"]
    join = f'echo $$ > {group.folder}/cgroup.procs && exec "$@"'
    process = subprocess.Popen(
        ["sh", "-c", join, "sh", *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    try:
        assert process.stdout is not None
        assert select.select([process.stdout], [], [], 120)[0], "the shard printed no endpoint"
        line = process.stdout.readline()
        assert line, f"the shard ended with {process.wait(60)}"
        yield process, ShardEndpoint(**json.loads(line))
    finally:
        process.kill()
        process.communicate(timeout=60)


def test_a_limit_that_is_hit_ends_nothing(model: Path) -> None:
    assert ALL_BYTES > 5 * SLACK_BYTES
    with memory_group() as free, shard_in(free, model):
        kept_bytes = free.kept_bytes
    placement, checkpoint = replicated(LAYERS, EXPERTS, 1, 1), ExpertCheckpoint.open(model)
    with memory_group() as group, contextlib.closing(make_router(model)) as router:
        group.limit(kept_bytes + SLACK_BYTES)
        with shard_in(group, model) as (process, endpoint):
            assert group.times_limited > 0, "loading alone takes more than there is"
            assert router.apply_membership(Membership(1, placement, (endpoint,))).lost == {}
            before = read_bytes(process.pid)
            for seed in range(8):
                layer = seed % LAYERS
                batch = random_batch(16, num_experts=EXPERTS, top_k=3, hidden_size=HIDDEN, seed=seed)
                assert_matches(run(router, layer, batch), oracle(checkpoint, layer, batch))
            assert router.status().lost == {}
            assert read_bytes(process.pid) - before > ALL_BYTES // 2, "what did not fit came from the disk"


def read_bytes(pid: int) -> int:
    """What a process has made the disk read."""
    told = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return int(told["read_bytes"])
