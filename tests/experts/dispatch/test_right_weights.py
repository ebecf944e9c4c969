"""A pair opens only between the same weights; what differs is named at both ends."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from experts.protocol.errors import UnsupportedModelError
from experts.protocol.membership import Membership
from experts.protocol.settings import ShardSettings
from experts.shard.server import ShardServer
from placement.placement import Placement
from tests.support.small_mesh import (
    Mesh,
    assert_matches,
    make_router,
    mesh_of,
    oracle,
    random_batch,
    replicated,
    run,
    start_shards,
    write_checkpoint,
)

NUM_LAYERS, NUM_EXPERTS = 2, 6
NAME = "model.layers.1.mlp.experts.4.down_proj.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def changed(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same but for one value of one matrix."""
    folder = tmp_path_factory.mktemp("changed")
    tensors = load_file(model / "model.safetensors")
    tensors[NAME][7, 3] += 1.0
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((model / "config.json").read_bytes())
    return folder


@pytest.fixture(scope="module")
def mesh(model: Path) -> Iterator[Mesh]:
    with mesh_of(model, Placement.linear(NUM_LAYERS, NUM_EXPERTS, 2)) as mesh:
        yield mesh


def test_a_router_with_another_matrix_is_refused_by_its_name(mesh: Mesh, changed: Path) -> None:
    router = make_router(changed)
    applied = router.apply_membership(mesh.membership())
    router.close()
    assert (applied.connected, applied.refused) == ([], [0, 1])
    for rank in (0, 1):  # also the shard that does not hold this expert: it may, after the next placement
        assert f"has other weights than this shard, which reads {mesh.model}: {NAME}; give both" in applied.lost[rank]
    assert str(applied.refusal).startswith("no shard takes this router: router ")


def test_the_shard_says_it_too(model: Path, changed: Path, caplog: pytest.LogCaptureFixture) -> None:
    placement = Placement.linear(NUM_LAYERS, NUM_EXPERTS, 1)
    server = ShardServer(ShardSettings(model_path=str(model), dtype="float32", kernel="torch_loop"))
    router = make_router(changed, router_id="wrong")
    try:
        endpoint = server.start(placement, 0, 1)
        with caplog.at_level(logging.WARNING):
            applied = router.apply_membership(Membership(1, placement, (endpoint,)))
    finally:
        router.close()
        server.stop()
    assert applied.refused == [0]
    assert any("refused a router or shard: router wrong" in text and NAME in text for text in caplog.messages)


def test_many_differing_tensors_are_counted(mesh: Mesh, tmp_path: Path) -> None:
    router = make_router(write_checkpoint(tmp_path, seed=1))
    applied = router.apply_membership(mesh.membership())
    router.close()
    total = NUM_LAYERS * NUM_EXPERTS * 3
    assert f"experts.0.up_proj.weight and {total - 3} more; give both" in applied.lost[0]


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("hidden_act", "gelu", r"activation \['gelu', 1.702, None\], this shard has \['silu', 1.702, None\]"),
        ("num_experts_per_tok", 2, "experts for a token 2, this shard has 3"),
        ("rms_norm_eps", 1e-5, "config.json's rms_norm_eps 1e-05, this shard has None"),
    ],
)
def test_a_router_with_another_config_is_refused_by_its_key(
    mesh: Mesh, tmp_path: Path, key: str, value: object, text: str
) -> None:
    folder = write_checkpoint(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    router = make_router(folder)
    applied = router.apply_membership(mesh.membership())
    router.close()
    assert applied.refused == [0, 1]
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(applied.lost[0])


def test_an_engine_whose_dtype_no_shard_has_does_not_start(mesh: Mesh, model: Path) -> None:
    """It would compute the whole model by itself."""
    router = make_router(model, torch.bfloat16, membership=mesh.membership().to_dict())
    with pytest.raises(UnsupportedModelError, match=r"no shard takes this router: .* dtype bfloat16, this shard has"):
        router.attach_static()
    router.close()


def test_a_shard_of_another_folder_is_left_out_and_the_others_serve(model: Path, changed: Path) -> None:
    """Its experts have a replica, so that the router need not compute them."""
    placement = replicated(NUM_LAYERS, NUM_EXPERTS, 3, 2)
    shards = start_shards(model, placement, [0, 2]) | start_shards(changed, placement, [1])
    mesh = Mesh(model, placement, shards)
    try:
        router = mesh.router(apply=False)
        applied = router.apply_membership(mesh.membership())
        assert (applied.connected, applied.refused, applied.refusal) == ([0, 2], [1], None)
        for layer in range(NUM_LAYERS):
            batch = random_batch(33, seed=layer)
            assert_matches(run(router, layer, batch), oracle(mesh.checkpoint, layer, batch))
        assert router.status().fallback_pairs == 0
    finally:
        mesh.close()


def test_a_router_whose_own_files_break_is_refused_by_itself(mesh: Mesh, tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path)
    (folder / "more.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"more\.safetensors: .*is it a partial download"):
        make_router(folder)
