"""The configs that ship: schema, Serve's own schema, and whether the model fits the GPUs that they ask for."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.serve.schema import ServeDeploySchema

from cluster.config import parse as parse_module
from cluster.config.serve_file import MeshConfig
from experts.transports.device_memory import router_device_bytes
from tests.support.serve.shipped_configs import CONFIGS, SERVED, SHAPES, serve_config

# Those whose opening comment says how large a shard is; KubeRay's speaks of pods.
CLAIMING = [
    name
    for name in SHAPES
    if " GB" in (CONFIGS / name).read_text().split("proxy_location")[0] and "kuberay" not in name
]

GPU_GB = {"L4": 24, "H100": 80, "H200": 141}
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@pytest.fixture
def checkpoints_are_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parse_module, "find_path", lambda value, where, folder: Path(value))


def test_every_config_that_ships_is_checked_here() -> None:
    found = {str(path.relative_to(CONFIGS)) for path in SERVED}
    assert found == {
        *SHAPES,
        "tiny-autopilot.yaml",
        "tiny-autoscaling.yaml",
        "tiny-cpu.yaml",
        "tiny-cpu-planned.yaml",
        "tiny-offload.yaml",
        "tiny-tp.yaml",
        "tiny-pools.yaml",
        "tiny-signatures.yaml",
        "tiny-lora.yaml",
        "tiny-two-models.yaml",
        "tiny-embeddings.yaml",
    }


@pytest.mark.usefixtures("checkpoints_are_elsewhere")
@pytest.mark.parametrize("name", SHAPES)
def test_config_is_valid_and_the_model_fits(name: str) -> None:
    shape, data = SHAPES[name], serve_config(name)
    ServeDeploySchema.model_validate({"applications": data["applications"]})
    mesh = MeshConfig.from_serve_config(data, source=name)
    shards, routers = mesh.experts.shards, mesh.llm.routers
    assert shards.slots_per_rank is not None
    needed = shape.experts * mesh.live.placement.min_replicas
    usable = shards.slots_per_rank - mesh.live.placement.spare_slots
    assert mesh.num_shards * usable >= needed, "every expert has its replicas, and every shard its spare slots"

    options = shards.ray_actor_options
    router_gpus = routers.placement_group_config["bundles"][0]["GPU"] if routers.placement_group_config else 1
    num_routers = routers.count or 1
    gpus = mesh.num_shards * options["num_gpus"] + num_routers * router_gpus
    assert shape.num_gpus - 1 < gpus <= shape.num_gpus, f"asks for {gpus} GPUs"

    expert_bytes = 3 * shape.hidden * shape.width * BYTES[mesh.experts.model.dtype]
    shard_gb = shards.slots_per_rank * shape.layers * expert_bytes / 1e9
    assert {options.get("accelerator_type", shape.gpu), routers.accelerator_type or shape.gpu} == {shape.gpu}
    share_gb = GPU_GB[shape.gpu] * options["num_gpus"]
    assert shard_gb < 0.93 * share_gb, f"a shard holds {shard_gb:.1f} GB on {share_gb:.1f} GB"

    engine_gb = GPU_GB[shape.gpu] * routers.engine_kwargs["gpu_memory_utilization"]
    assert engine_gb <= GPU_GB[shape.gpu] * router_gpus, "the engine keeps within its share"
    settings = mesh.llm.router_settings()
    cache_gb = routers.engine_kwargs.get("kv_cache_memory_bytes", 0) / 1e9
    if cache_gb:  # router and shards on the same GPUs of one host
        settings = settings.model_copy(update={"transport": "cuda_ipc"})
    pairs_gb = router_device_bytes(settings, 8, shape.hidden * BYTES[mesh.llm.model.dtype], shape.hidden) / 1e9
    assert engine_gb > shape.dense_gb + pairs_gb + 3, "room for the dense half, a cache of keys and values, and pairs"
    assert shape.dense_gb + cache_gb + pairs_gb + 2 < engine_gb, "activations beside them"


@pytest.mark.usefixtures("checkpoints_are_elsewhere")
@pytest.mark.parametrize("name", SHAPES)
def test_routers_are_replaced_with_a_surge_where_a_gpu_has_room_for_one_more(name: str) -> None:
    mesh = MeshConfig.from_serve_config(serve_config(name), source=name)
    shards, routers = mesh.experts.shards, mesh.llm.routers
    of_shard = shards.ray_actor_options["num_gpus"]
    of_router = routers.placement_group_config["bundles"][0]["GPU"] if routers.placement_group_config else 1
    free = [1 - of_shard] * mesh.num_shards + [1.0] * (SHAPES[name].num_gpus - mesh.num_shards)
    for _ in range(routers.count or 1):
        free.remove(place := min(share for share in free if share > of_router - 1e-6))
        free.append(place - of_router)
    text = (CONFIGS / name).read_text()
    room = max(free) > of_router - 1e-6 or "max_nodes: 5" in text or "maxReplicas: 5" in text
    assert routers.deployment_config.get("max_surge_percent", 100) == (100 if room else 0)


@pytest.mark.usefixtures("checkpoints_are_elsewhere")
@pytest.mark.parametrize("name", SHAPES)
def test_shards_wait_for_routers_as_long_as_routers_for_shards(name: str) -> None:
    mesh = MeshConfig.from_serve_config(serve_config(name), source=name)
    ours, theirs = mesh.llm.router_settings(), mesh.experts.shard_settings("127.0.0.1", 1)
    assert ours.connect_timeout_s == theirs.connect_timeout_s


@pytest.mark.usefixtures("checkpoints_are_elsewhere")
@pytest.mark.parametrize("name", CLAIMING)
def test_files_give_numbers_that_their_comments_claim(name: str) -> None:
    """The comment above each config says how large a shard is; it must be what the numbers give."""
    shape, mesh = SHAPES[name], MeshConfig.from_serve_config(serve_config(name), source=name)
    assert mesh.experts.shards.slots_per_rank is not None
    expert_bytes = 3 * shape.hidden * shape.width * BYTES[mesh.experts.model.dtype]
    shard_gb = mesh.experts.shards.slots_per_rank * shape.layers * expert_bytes / 1e9
    text = (CONFIGS / name).read_text()
    assert any(f"{shard_gb:.{digits}f} GB" in text for digits in (0, 1)), f"{shard_gb:.1f} GB"
