"""Small checkpoints, shards in processes of their own, and mesh clients without vLLM, for the data plane's tests.

Legend: T tokens, K top-k, D hidden size, I expert intermediate size.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import json
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from experts.checkpoint import ExpertCheckpoint
from experts.dispatch.fallback import FallbackExperts
from experts.dispatch.layer_shape import LayerShape
from experts.dispatch.mesh_client import MeshClient
from experts.protocol.membership import Membership, ShardEndpoint
from experts.protocol.orders import CopyOrder, CopyResult
from experts.protocol.settings import RouterSettings, ShardSettings
from experts.protocol.status import ShardStatus
from experts.shard import request
from experts.transports import atomics
from placement.placement import Placement
from tests.support import signals
from tests.support.waiting import AWAIT_S

SPAWN_S = 300.0

# Sums of at most 100 float32 products in another order differ by some 1e-6; a wrong expert or row by some 1e-1.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}

torch.set_num_threads(1)  # too small to share
atomics.warm_up(), request.warm_up()  # once in the fork server rather than in every shard


def write_checkpoint(
    folder: Path,
    *,
    num_layers: int = 2,
    num_experts: int = 6,
    top_k: int = 3,
    hidden_size: int = 24,
    intermediate_size: int = 40,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **config: Any,
) -> Path:
    """The routed experts of a Qwen3-MoE without the rest of the model; `config` goes into config.json."""
    D, I = hidden_size, intermediate_size
    generator = torch.Generator().manual_seed(seed)
    shapes = {"gate_proj": (I, D), "up_proj": (I, D), "down_proj": (D, I)}
    tensors = {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}.weight": (
            torch.randn(shape, generator=generator) * (2.0 / shape[1] ** 0.5)
        ).to(dtype)
        for layer in range(num_layers)
        for expert in range(num_experts)
        for name, shape in shapes.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    settings = {
        "model_type": "qwen3_moe",
        "hidden_act": "silu",
        "num_hidden_layers": num_layers,
        "num_experts": num_experts,
        "num_experts_per_tok": top_k,
        "hidden_size": D,
        "moe_intermediate_size": I,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


@functools.cache
def forked_context() -> Any:
    """Starts processes by forking one that has imported what shards need and has no threads to inherit."""
    forkserver = multiprocessing.get_context("forkserver")
    forkserver.set_forkserver_preload(["tests.support.small_mesh", "experts.shard.server"])
    # Python 3.11's fork server does not inherit sys.path, and silently skips what it cannot import.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
        patch.setenv("OMP_NUM_THREADS", "1")
        multiprocessing.forkserver.ensure_running()
    return forkserver


def _serve(settings: dict[str, Any], placement: dict[str, Any], rank: int, epoch: int, pipe: Any) -> None:
    """Process body: a shard that executes what arrives through the pipe."""
    from experts.shard.server import ShardServer

    server = ShardServer(ShardSettings.model_validate(settings))
    pipe.send(server.start(Placement.from_json(placement), rank, epoch))
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            results: list[CopyResult] = []
            answer = getattr(server, name)(*arguments, *([results.append] if name == "copy" else []))
            pipe.send(results or answer)
        except Exception as error:
            pipe.send(error)


def in_processes(body: Callable[..., None], arguments: list[tuple]) -> list[Any]:
    """What `body(*arguments, pipe)` sends from one process for each of `arguments`, all running in parallel."""
    running = []
    for one in arguments:
        ours, theirs = multiprocessing.Pipe()
        process = forked_context().Process(target=body, args=(*one, theirs), daemon=True)
        process.start()
        theirs.close()
        running.append((process, ours))
    try:
        answers = []
        for process, pipe in running:
            assert pipe.poll(SPAWN_S), f"process {process.pid} sent nothing"
            answers.append(pipe.recv())
        return answers
    finally:
        for process, pipe in running:
            process.kill()
            process.join(AWAIT_S)
            pipe.close()


@dataclass
class Shard:
    """A shard's process as the tests see it."""

    process: Any
    pipe: Any
    endpoint: ShardEndpoint

    def call(self, name: str, *arguments: Any) -> Any:
        """A method of the ShardServer, called there."""
        self.pipe.send((name, arguments))
        assert self.pipe.poll(AWAIT_S), f"the shard did not answer {name}"
        answer = self.pipe.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer

    def status(self) -> ShardStatus:
        """ShardServer.status()."""
        return self.call("status")

    def copy(self, orders: list[CopyOrder]) -> list[CopyResult]:
        return self.call("copy", orders)

    def signal(self, number: int) -> None:
        """Send a signal; after SIGKILL wait until its sockets are closed, after SIGSTOP until it stopped."""
        if number == signal.SIGSTOP:
            signals.stop(self.endpoint.pid)
            return
        os.kill(self.endpoint.pid, number)
        if number == signal.SIGKILL:
            self.process.join(AWAIT_S)

    def end(self) -> None:
        """Kill it in any state."""
        self.process.kill()
        self.process.join(AWAIT_S)
        self.pipe.close()


def start_shards(
    model: Path, placement: Placement, ranks: list[int] | None = None, epoch: int = 1, **settings: Any
) -> dict[int, Shard]:
    """Shards for `ranks` (None: all), started in parallel; the caller ends each."""
    given = {"model_path": str(model), "dtype": "float32", "kernel": "torch_loop", **settings}
    data = ShardSettings(**given).model_dump()
    started: dict[int, tuple[Any, Any]] = {}
    for rank in range(placement.num_ranks) if ranks is None else ranks:
        ours, theirs = multiprocessing.Pipe()
        arguments = (data, placement.to_json(), rank, epoch, theirs)
        process = forked_context().Process(target=_serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        started[rank] = (process, ours)
    shards: dict[int, Shard] = {}
    try:
        for rank, (process, pipe) in started.items():
            assert pipe.poll(SPAWN_S), f"shard {rank} did not start"
            shards[rank] = Shard(process, pipe, pipe.recv())
    except BaseException:
        for process, _ in started.values():
            process.kill()
        raise
    return shards


@dataclass
class Mesh:
    """A checkpoint, its shards, and what a mesh client needs to find them."""

    model: Path
    placement: Placement
    shards: dict[int, Shard]
    epoch: int = 1
    routers: list[MeshClient] = field(default_factory=list)

    @property
    def checkpoint(self) -> ExpertCheckpoint:
        """The experts."""
        return ExpertCheckpoint.open(self.model)

    def membership(self, epoch: int | None = None, without: tuple[int, ...] = ()) -> Membership:
        """The shards as they are now, except those `without`."""
        endpoints = tuple(
            self.shards[rank].endpoint if rank in self.shards and rank not in without else None
            for rank in range(self.placement.num_ranks)
        )
        return Membership(self.epoch if epoch is None else epoch, self.placement, endpoints)

    def router(self, apply: bool = True, dtype: torch.dtype = torch.float32, **settings: Any) -> MeshClient:
        """A mesh client, connected to the shards if `apply`; closed with the mesh."""
        router = make_router(self.model, dtype, **settings)
        self.routers.append(router)
        if apply:
            answer = router.apply_membership(self.membership())
            assert answer.lost == {}, answer
        return router

    def restart(self, rank: int, **settings: Any) -> Shard:
        """A new incarnation at a rank."""
        if rank in self.shards:
            self.shards[rank].end()
        self.shards[rank] = start_shards(self.model, self.placement, [rank], self.epoch, **settings)[rank]
        return self.shards[rank]

    def close(self) -> None:
        """End everything."""
        for router in self.routers:
            router.close()
        for shard in self.shards.values():
            shard.end()


def make_router(model: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> MeshClient:
    """A mesh client of a checkpoint, not connected yet."""
    spec = (checkpoint := ExpertCheckpoint.open(model)).spec
    shape = LayerShape(spec.num_layers, spec.num_experts, spec.top_k, spec.hidden_size, dtype)
    # 30 s: no test waits for it, and no loaded machine reaches it.
    values = {"dispatch_timeout_ms": 30_000, "fallback_max_ms_per_step": 60_000, "trace_tokens": 0, "transport": "shm"}
    values |= settings
    return MeshClient(RouterSettings(model_path=str(model), **values), checkpoint, shape, "cpu")


@functools.cache
def identity_of(model: Path) -> dict[str, Any]:
    """The fields of a Hello by which a shard knows that a router has its weights."""
    checkpoint = ExpertCheckpoint.open(model)
    weights = checkpoint.start_fingerprint().result(AWAIT_S).to_bytes()
    return {"facts": checkpoint.facts, "weights": base64.b64encode(weights).decode()}


@contextlib.contextmanager
def mesh_of(model: Path, placement: Placement, **settings: Any) -> Iterator[Mesh]:
    """A mesh with all its shards running."""
    mesh = Mesh(model, placement, start_shards(model, placement, **settings))
    try:
        yield mesh
    finally:
        mesh.close()


def replicated(num_layers: int, num_experts: int, num_ranks: int, replicas: int) -> Placement:
    """Expert e is on `replicas` ranks: e, e + 1, ... (modulo the ranks)."""
    held: list[list[int]] = [[] for _ in range(num_ranks)]
    for expert in range(num_experts):
        for replica in range(replicas):
            held[(expert + replica) % num_ranks].append(expert)
    slots_per_rank = max(map(len, held))
    row = [expert for experts in held for expert in experts + [-1] * (slots_per_rank - len(experts))]
    return Placement(num_ranks, 1, num_experts, np.array([row] * num_layers, np.int32))


@dataclass
class Batch:
    """One layer's input."""

    x_TD: torch.Tensor
    weights_TK: torch.Tensor
    ids_TK: torch.Tensor


def random_batch(
    num_tokens: int,
    *,
    num_experts: int = 6,
    top_k: int = 3,
    hidden_size: int = 24,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    among: list[int] | None = None,
) -> Batch:
    """Distinct experts for each token, of those in `among` if given; weights that add up to 1."""
    generator = torch.Generator().manual_seed(seed)
    experts = torch.arange(num_experts) if among is None else torch.tensor(among)
    order = torch.rand(num_tokens, len(experts), generator=generator).argsort(1)[:, :top_k]
    weights_TK = torch.rand(num_tokens, top_k, generator=generator).softmax(-1)
    x_TD = torch.randn(num_tokens, hidden_size, generator=generator).to(dtype)
    return Batch(x_TD, weights_TK, experts[order].to(torch.int32))


def oracle(checkpoint: ExpertCheckpoint, layer: int, batch: Batch) -> torch.Tensor:
    """The layer's output in float64, pair by pair from the definition."""
    spec = checkpoint.spec
    assert spec.activation.kind == "silu"
    read = functools.cache(lambda expert: checkpoint.read_expert(layer, expert, torch.float32))
    y_TD = torch.zeros(batch.x_TD.shape, dtype=torch.float64)
    for token, (ids, weights) in enumerate(zip(batch.ids_TK.tolist(), batch.weights_TK.tolist(), strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            if expert >= 0:
                stored = read(expert)
                gate, up = (stored.w13_2ID.double() @ batch.x_TD[token].double()).chunk(2)
                y_TD[token] += weight * (stored.w2_DI.double() @ (torch.nn.functional.silu(gate) * up))
    return y_TD


def one_process(model: Path, dtype: torch.dtype = torch.float32) -> FallbackExperts:
    """Any layer of the checkpoint, computed in this process."""
    return FallbackExperts(ExpertCheckpoint.open(model), dtype)


def run(router: MeshClient, layer: int, batch: Batch) -> torch.Tensor:
    """One layer through a mesh client."""
    return router.finish(router.begin(layer, batch.x_TD, batch.weights_TK, batch.ids_TK))


def assert_matches(got_TD: torch.Tensor, expected_TD: torch.Tensor) -> None:
    torch.testing.assert_close(got_TD, expected_TD.to(got_TD.dtype), **TOLERANCE)
