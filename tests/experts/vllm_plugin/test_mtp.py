"""Speculation by multi-token prediction (MTP) with the experts of the MTP layer on a shard too: the last one holds just
them, so its rows are the guesses'.

Float32, greedy, random weights. Plain vLLM with the same options is the oracle, of tokens and of how many guesses are
right. The MTP layer of these checkpoints guesses right now and then, by its experts (tests/support/mtp_checkpoint.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experts.checkpoint import ExpertCheckpoint
from experts.protocol.membership import Membership, ShardEndpoint
from experts.protocol.settings import ShardSettings
from placement.placement import Placement
from tests.support.zygote.engine_zygote import Zygote

pytestmark = pytest.mark.whole_machine

NUM_SHARDS = 3  # decoder layers on the first two, the MTP layer on the third


@dataclass(frozen=True)
class Mesh:
    """A checkpoint and shards with its experts, the MTP layer's among them."""

    engine: Zygote
    shard: Zygote
    model: str

    @property
    def top_k(self) -> int:
        return ExpertCheckpoint.open(self.model).spec.top_k

    @property
    def decoder_layers(self) -> int:
        return ExpertCheckpoint.open(self.model).spec.num_layers

    def start_shards(self) -> tuple[dict[str, Any], list[int]]:
        """Three shards: a membership of them, and their processes."""
        spec = ExpertCheckpoint.open(self.model, mtp=True).spec
        linear = Placement.linear(spec.num_decoder_layers, spec.num_experts, 2)
        width = linear.slots_per_rank
        map_LRs = np.full((spec.num_layers, NUM_SHARDS, spec.num_experts), -1, np.int32)
        map_LRs[:-1, :2, :width] = linear.physical_to_logical_map.reshape(-1, 2, width)
        map_LRs[-1, 2] = np.arange(spec.num_experts)
        placement = Placement(NUM_SHARDS, 1, spec.num_experts, map_LRs.reshape(spec.num_layers, -1))
        settings = ShardSettings(model_path=self.model, mtp=True, dtype="float32", kernel="torch_loop").model_dump()
        jobs = [
            self.shard.start("shard", settings=settings, placement=placement.to_json(), rank=rank)
            for rank in range(NUM_SHARDS)
        ]
        endpoints = tuple(ShardEndpoint(**self.shard.wait(job, "endpoint")) for job in jobs)
        return Membership(1, placement, endpoints).to_dict(), [endpoint.pid for endpoint in endpoints]

    def generate(self, guesses: int, model: str = "", **arguments: Any) -> list[dict[str, Any]]:
        """The rounds of an engine, with a membership a router's; see `mtp_jobs.generate`."""
        job = self.engine.start("generate", model=model or self.model, guesses=guesses, **arguments)
        rounds = self.engine.wait(job, "rounds")
        assert self.engine.events(job)["error"] is None
        return rounds  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def zygotes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Zygote, Zygote]]:
    folder = tmp_path_factory.mktemp("mtp")
    engine, shard = (Zygote(folder / role, role, "mtp_jobs") for role in ("engine", "shard"))
    yield engine, shard
    shard.close()
    engine.close()


@pytest.fixture(scope="module", params=["glm4_moe", "deepseek_v3", "qwen3_next"])
def mesh(
    request: pytest.FixtureRequest, zygotes: tuple[Zygote, Zygote], tmp_path_factory: pytest.TempPathFactory
) -> Mesh:
    engine, shard = zygotes
    made = engine.start("checkpoint", family=request.param, path=str(tmp_path_factory.mktemp("model") / request.param))
    return Mesh(engine, shard, engine.wait(made, "made"))


def test_guesses_and_tokens_are_those_of_vllm(mesh: Mesh) -> None:
    [without], [plain] = mesh.generate(0), mesh.generate(1)
    assert plain["ids"] == without["ids"]
    assert plain["accepted"] > 50, "if no guess were right, nobody would see whether experts computed them"
    membership, pids = mesh.start_shards()
    alive, killed, after = mesh.generate(1, membership=membership, settings={"mtp": True}, victims=[[], pids[1:], []])
    for found in (alive, killed, after):
        assert all(found["finished"])
        assert found["ids"] == plain["ids"]
        assert (found["drafts"], found["accepted"]) == (plain["drafts"], plain["accepted"])
    status, loads = alive["status"], alive["loads"]
    layers = mesh.decoder_layers + 1
    assert (status["failovers"], status["fallback_pairs"]) == (0, 0)
    assert status["dispatches"] == status["steps"] * layers
    assert status["shard_rows"][2] == status["rows"] // layers, "each row of a step is one of the MTP layer too"
    assert loads["picks"] == [loads["tokens"] * mesh.top_k] * layers, "the MTP layer is recorded like others"
    assert killed["status"]["fallback_pairs"] > 0


@pytest.mark.parametrize("mesh", ["glm4_moe"], indirect=True)
def test_routers_that_guess_otherwise_share_the_shards(mesh: Mesh) -> None:
    """Two guesses a step, of which the second has fewer rows; and no guesses. The shard of the MTP layer dies, and no
    time is left to compute its experts: guesses get worse, but no request lacks anything."""
    [plain] = mesh.generate(2)
    membership, pids = mesh.start_shards()
    settings = {"mtp": True, "fallback_max_ms_per_step": 0.0}
    [without] = mesh.generate(0, membership=membership, settings=settings)
    alive, killed = mesh.generate(2, membership=membership, settings=settings, victims=[[], pids[2:]])
    for found in (without, alive, killed):
        assert all(found["finished"])
        assert found["ids"] == plain["ids"]
    layers = mesh.decoder_layers
    assert without["status"]["shard_rows"][2] == 0
    assert without["loads"]["picks"] == [*[without["loads"]["tokens"] * mesh.top_k] * layers, 0]
    assert (alive["drafts"], alive["accepted"]) == (plain["drafts"], plain["accepted"])
    assert alive["status"]["dispatches"] == alive["status"]["steps"] * (layers + 2)
    assert 0 < killed["accepted"] < plain["accepted"]
    assert (killed["status"]["refused_requests"], killed["status"]["fallback_pairs"]) == (0, 0)


@pytest.mark.parametrize("mesh", ["glm4_moe"], indirect=True)
def test_two_workers_guess_together_and_with_adapters(mesh: Mesh, tmp_path: Path) -> None:
    """The MTP layer's rows are shared out as those of other layers are. Adapters are for the decoder alone, so guesses
    are those of the base model's MTP layer after a merged decoder."""
    made = mesh.engine.start("adapted", model=mesh.model, folder=str(tmp_path))
    adapter, merged = mesh.engine.wait(made, "adapter"), mesh.engine.wait(made, "merged")
    [base], [changed] = mesh.generate(1), mesh.generate(1, model=merged)
    assert all(ours != theirs for ours, theirs in zip(base["ids"], changed["ids"], strict=True))
    membership, pids = mesh.start_shards()
    rounds = {"adapters": [adapter, "", adapter], "victims": [[], [], pids[1:]]}
    found = mesh.generate(1, membership=membership, settings={"mtp": True}, workers=2, **rounds)
    layers = mesh.decoder_layers + 1
    for got, plain in zip(found, [changed, base, changed], strict=True):
        assert all(got["finished"])
        assert got["ids"] == plain["ids"]
        assert (got["drafts"], got["accepted"]) == (plain["drafts"], plain["accepted"])
    for statuses in (found[0]["statuses"], found[1]["statuses"]):
        assert [status["failovers"] + status["fallback_pairs"] for status in statuses] == [0, 0]
        assert [status["dispatches"] for status in statuses] == [status["steps"] * layers for status in statuses]
        of_mtp = [status["shard_rows"][2] for status in statuses]
        assert sum(of_mtp) == statuses[0]["rows"] // layers
        assert min(of_mtp) > 0.4 * sum(of_mtp), "each worker has every other row"
