"""The plug-in in real engines: same tokens, no expert weights, nothing read of them, and refusals with their reasons.

Engines are started as few times as can be: each one's whole life is one job, reported step by step.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from experts.checkpoint import ExpertCheckpoint
from tests.support.small_mesh import Mesh, mesh_of, replicated
from tests.support.zygote.engine_zygote import Zygote
from tests.support.zygote.plugin_jobs import NEW_TOKENS, NUM_PROMPTS

ENGINE_S = 400.0  # a start under torch.compile on a machine that does other things too
NUM_LAYERS, NUM_EXPERTS, HIDDEN, WIDTH = 2, 64, 256, 512
EXPERT_BYTES = NUM_LAYERS * NUM_EXPERTS * 3 * HIDDEN * WIDTH * 4  # 201 MB
OVERRIDES = {
    "hidden_size": HIDDEN,
    "moe_intermediate_size": WIDTH,
    "num_experts": NUM_EXPERTS,
    "num_experts_per_tok": 4,
}
SHARED = {"hidden_size": 128, "moe_intermediate_size": 64, "num_experts": 16, "num_experts_per_tok": 4}
DENSE = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


@pytest.fixture(scope="module")
def model(vllm_zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(vllm_zygote, tmp_path_factory.mktemp("moe") / "model", "qwen3_moe", OVERRIDES)


def make(zygote: Zygote, path: Path, family: str, overrides: dict[str, Any], apart: bool = False) -> Path:
    zygote.wait(zygote.start("checkpoint", family=family, path=str(path), overrides=overrides, apart=apart), "made")
    return path


def outcome(zygote: Zygote, job: int, last: str) -> dict[str, Any]:
    """Everything that a job emitted, once it emitted `last`."""
    zygote.wait(job, last, ENGINE_S)
    return zygote.events(job)


# --- what engines do ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mesh(model: Path) -> Iterator[Mesh]:
    with mesh_of(model, replicated(NUM_LAYERS, NUM_EXPERTS, 3, 2)) as mesh:
        yield mesh


@pytest.fixture(scope="module")
def plain(vllm_zygote: Zygote, model: Path) -> dict[str, Any]:
    return outcome(vllm_zygote, vllm_zygote.start("plain", model=str(model)), "ids")


@pytest.fixture(scope="module")
def with_shared(vllm_zygote: Zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with shared experts."""
    return make(vllm_zygote, tmp_path_factory.mktemp("shared") / "model", "qwen2_moe", SHARED)


@pytest.fixture(scope="module")
def plain_with_shared(vllm_zygote: Zygote, with_shared: Path) -> dict[str, Any]:
    return outcome(vllm_zygote, vllm_zygote.start("plain", model=str(with_shared)), "ids")


@pytest.fixture(scope="module")
def compiled(vllm_zygote: Zygote, with_shared: Path) -> Iterator[dict[str, Any]]:
    """A router under torch.compile, of a model with shared experts; one shard is killed while it generates."""
    num_layers = ExpertCheckpoint.open(with_shared).spec.num_layers
    with mesh_of(with_shared, replicated(num_layers, SHARED["num_experts"], 3, 2)) as mesh:
        memberships = [mesh.membership(epoch=1).to_dict()]
        victim = mesh.shards[1].endpoint.pid
        job = vllm_zygote.start("mesh", model=str(with_shared), memberships=memberships, eager=False, victim=victim)
        yield {**outcome(vllm_zygote, job, "done"), "layers": num_layers}


@pytest.fixture(scope="module")
def eager(vllm_zygote: Zygote, model: Path, mesh: Mesh) -> dict[str, Any]:
    memberships = [mesh.membership(epoch=5).to_dict(), mesh.membership(epoch=4).to_dict()]
    job = vllm_zygote.start(
        "mesh", model=str(model), memberships=memberships, eager=True, victim=mesh.shards[1].endpoint.pid
    )
    return outcome(vllm_zygote, job, "done")


def check_ids(ids: list[list[int]], plain: dict[str, Any]) -> None:
    assert [len(row) for row in ids] == [NEW_TOKENS] * NUM_PROMPTS
    assert ids == plain["ids"]


def test_eager_gives_the_tokens_of_plain_vllm(eager: dict[str, Any], plain: dict[str, Any]) -> None:
    check_ids(eager["ids"], plain)
    status = eager["status"]
    assert (status["epoch"], status["connected"], status["lost"]) == (5, [0, 1, 2], {})
    assert (status["failovers"], status["fallback_pairs"]) == (0, 0)
    assert all(rows > 0 for rows in status["shard_rows"])
    assert status["layers"] == NUM_LAYERS
    assert status["dispatches"] == NUM_LAYERS * status["steps"] > 0


def test_compiled_gives_the_tokens_of_plain_vllm(compiled: dict[str, Any], plain_with_shared: dict[str, Any]) -> None:
    assert compiled["compilation"] != "NONE"
    check_ids(compiled["ids"], plain_with_shared)
    assert compiled["status"]["dispatches"] == compiled["layers"] * compiled["status"]["steps"] > 0
    assert compiled["status"]["failovers"] == 0


def test_compiled_repeats_the_rows_of_a_killed_shard(
    compiled: dict[str, Any], plain_with_shared: dict[str, Any]
) -> None:
    check_ids(compiled["ids_of_killed"], plain_with_shared)
    assert list(compiled["after_kill"]["lost"]) == ["1"]
    assert (compiled["after_kill"]["failovers"], compiled["after_kill"]["fallback_pairs"]) == (1, 0)


@pytest.mark.parametrize("apart", [False, True])
def test_the_compiler_keeps_shared_experts_between_begin_and_finish(vllm_zygote: Zygote, apart: bool) -> None:
    """And the rows as they were sent: `finish` may have to send them again. `apart`: not the same input for both."""
    job = vllm_zygote.start("compiled_layer", apart=apart)
    found = outcome(vllm_zygote, job, "compiled")
    assert found["eager"] == found["compiled"] == ["begin", "shared", "finish"] * 2
    assert found["intact"] == [True, True]
    assert found["difference"] < 1e-5


def test_layers_answer_zeros_before_the_first_epoch_and_never_after(
    eager: dict[str, Any], compiled: dict[str, Any], plain: dict[str, Any], plain_with_shared: dict[str, Any]
) -> None:
    """With zeros for experts the model says something else, so that equal tokens mean that shards were asked."""
    for run, full in ((eager, plain), (compiled, plain_with_shared)):
        assert run["before"]["epoch"] == run["still_before"]["epoch"] == -1
        assert run["still_before"]["dispatches"] == 0
        assert run["ids_of_zeros"] != full["ids"]
        assert run["applied"]["lost"] == {}


def test_a_shard_killed_while_it_generates_changes_no_token(eager: dict[str, Any], plain: dict[str, Any]) -> None:
    check_ids(eager["ids_of_killed"], plain)
    status = eager["after_kill"]
    assert list(status["lost"]) == ["1"]
    assert (status["failovers"], status["fallback_pairs"]) == (1, 0)


def test_an_older_epoch_is_refused_and_the_engine_lives_on(eager: dict[str, Any], plain: dict[str, Any]) -> None:
    assert "epoch 4 is older than the current epoch 5" in eager["refused"]
    check_ids(eager["ids_after_refusal"], plain)


def test_a_second_engine_in_the_process_is_refused(eager: dict[str, Any], plain: dict[str, Any]) -> None:
    assert "needs a process of its own" in eager["second_engine"]
    check_ids(eager["again"], plain)


def test_the_router_holds_exactly_the_dense_half(eager: dict[str, Any], plain: dict[str, Any]) -> None:
    num_expert_params = NUM_LAYERS * NUM_EXPERTS * 3 * HIDDEN * WIDTH
    assert eager["status"]["params"] == plain["params"] - num_expert_params
    assert eager["expert_parameters"] == []


def test_the_routers_memory_lacks_the_experts(eager: dict[str, Any], plain: dict[str, Any]) -> None:
    """Of anonymous memory. The plug-in itself takes some 45 MB, most of it numba; all else is the same in both."""
    assert plain["grown_bytes"] - eager["grown_bytes"] > EXPERT_BYTES - 90e6
    assert eager["status"]["resident_bytes"] > 0


@pytest.mark.parametrize("run", ["eager", "compiled"])
def test_tokens_of_requests_are_recorded_and_no_others(run: str, request: pytest.FixtureRequest) -> None:
    """Each token that was computed once: the last one of an answer never is. Warm-up is dispatched, but not counted."""
    facts = request.getfixturevalue(run)
    computed = facts["num_prompt_tokens"] + NUM_PROMPTS * (NEW_TOKENS - 1)
    before, after, after_warm_up, cleared = facts["recorded"]
    assert (before, cleared) == (0, 0)
    assert after == after_warm_up == computed
    assert facts["dispatches_warmed_up"] == facts["status"]["dispatches"] + NUM_LAYERS


@pytest.mark.parametrize("run", ["eager", "compiled"])
def test_tokens_of_prompts_are_told_from_those_generated(run: str, request: pytest.FixtureRequest) -> None:
    """Once observation was asked for. The last token of an answer is never computed; a prompt of one counts as such."""
    facts = request.getfixturevalue(run)
    alone = facts["num_prompts_of_one_token"]
    generated, of_prompts = NUM_PROMPTS * (NEW_TOKENS - 1) + alone, facts["num_prompt_tokens"] - alone
    assert alone
    assert facts["observed"] == [0, generated, of_prompts, generated, of_prompts]


def test_padding_rows_are_told_apart(vllm_zygote: Zygote) -> None:
    facts = outcome(vllm_zygote, vllm_zygote.start("steps"), "steps")["steps"]
    assert facts["no engine"] == [True, None]
    assert facts["warm-up"] == [False, None]
    assert facts["eager"] == [True, None]
    assert facts["graph"] == [True, [False, False, True, True]]


# --- what loading reads -------------------------------------------------------------------------------------------


def test_no_bytes_of_experts_are_read(vllm_zygote: Zygote, model: Path) -> None:
    """The kernel maps up to half a megabyte around a page that is touched; the tensors that are read are few."""
    facts = outcome(vllm_zygote, vllm_zygote.start("reading", model=str(model)), "resident")
    assert facts["names"]
    assert not [name for name in facts["names"] if ".experts." in name]
    assert any(name.endswith("mlp.gate.weight") for name in facts["names"])
    assert set(facts["resident"]) == {"model.safetensors"}
    assert facts["resident"]["model.safetensors"] < facts["read_bytes"] + (1 << 19) * len(facts["names"])
    assert facts["resident"]["model.safetensors"] < EXPERT_BYTES / 10


def test_files_of_nothing_but_experts_are_left_alone(vllm_zygote: Zygote, tmp_path: Path) -> None:
    model = make(vllm_zygote, tmp_path / "apart", "qwen3_moe", {}, apart=True)
    facts = outcome(vllm_zygote, vllm_zygote.start("reading", model=str(model)), "resident")
    assert ExpertCheckpoint.open(model).spec.num_experts == 8
    assert facts["resident"]["dense.safetensors"] > 0
    assert facts["resident"].get("experts.safetensors", 0) == 0


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answers(vllm_zygote: Zygote, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str | None]:
    cases = {
        "fine": {},
        "tensor": {"tensor_parallel_size": 2},
        "slow": {"tensor_parallel_size": 2, "dispatch_timeout_ms": 300_000.0},
        "pipeline": {"pipeline_parallel_size": 2},
        "data": {"data_parallel_size": 2},
        "expert": {"enable_expert_parallel": True},
        "lora": {"enable_lora": True},
        "lora of experts": {"enable_lora": True, "lora_target_modules": ["q_proj", "experts"]},
        "plain": {"plain": True},
        "shardless": {"membership_by_rpc": False},
        "elsewhere": {"model_path": str(tmp_path_factory.mktemp("elsewhere"))},
    }
    job = vllm_zygote.start("refusals", model=str(model), cases=cases)
    return outcome(vllm_zygote, job, "answers")["answers"]


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("slow", "a dispatch may take 300 s, but vLLM gives up an engine of several workers whose step takes 300 s"),
        ("sequence", "model.layers.3.mlp.experts is sequence-parallel: every worker has rows of its own there"),
        (
            "whole",
            "model.layers.3.mlp.experts is not split over the engine's 2 workers (its tensor-parallel size is 1)",
        ),
        ("pipeline", "pipeline_parallel_size=2 is not supported, expected 1"),
        ("data", "data_parallel_size=2 is not supported, expected 1"),
        ("expert", "enable_expert_parallel is not supported: experts live on shards"),
        ("lora of experts", "lora_target_modules has 'experts', but the shards hold the experts: leave it out"),
        ("plain", "the engine has no additional_config['expertmesh']"),
        ("shardless", "names no shards, so nobody would compute the experts"),
        ("elsewhere", "but its experts are those of"),
    ],
)
def test_an_engine_setting_is_refused_by_name(answers: dict[str, str | None], case: str, text: str) -> None:
    assert str(answers[case]).startswith("UnsupportedModelError: ")
    assert text in str(answers[case])


def test_ordinary_settings_are_taken(answers: dict[str, str | None]) -> None:
    assert (answers["fine"], answers["tensor"], answers["split"], answers["lora"]) == (None, None, None, None)


def test_layers_that_were_not_replaced_are_named(vllm_zygote: Zygote) -> None:
    facts = outcome(vllm_zygote, vllm_zygote.start("verification"), "graphs_on_cpu")
    assert "MoE layer 1 (OwnExperts) was not replaced by expertmesh" in facts["own_experts"]
    assert "MoE layer 1 (SomebodysExperts) was not replaced by expertmesh" in facts["subclass"]
    assert "Sequential has no routed experts: a dense model gains nothing here" in facts["dense"]
    assert "cudagraph_mode FULL_AND_PIECEWISE would capture the dispatch" in facts["full_graphs"]
    split = ["vllm::attention", "vllm::moe_forward", "vllm::moe_forward_shared"]
    assert facts["piecewise_graphs"] == split
    assert facts["eager_on_gpu"] == facts["graphs_on_cpu"] == ["vllm::attention"]


def spoil_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


def start_error(zygote: Zygote, model: Path, experts: Path | None = None) -> str:
    job = zygote.start("start", model=str(model), model_path=str(experts or model))
    error = outcome(zygote, job, "error")["error"]
    assert error is not None, "the engine started"
    return error


def test_a_dense_model_is_refused_at_start(vllm_zygote: Zygote, tmp_path: Path) -> None:
    error = start_error(vllm_zygote, make(vllm_zygote, tmp_path / "dense", "qwen3", DENSE))
    assert "UnsupportedModelError: the experts of this model cannot be served apart" in error
    assert "qwen3" in error


def test_an_unsupported_quantization_is_refused_at_start(vllm_zygote: Zygote, tmp_path: Path) -> None:
    model = make(vllm_zygote, tmp_path / "quantized", "qwen3_moe", {})
    spoil_config(
        model, quantization_config={"quant_method": "compressed-tensors", "config_groups": {}, "format": "dense"}
    )
    error = start_error(vllm_zygote, model)
    assert "quantization compressed-tensors is not supported with several precisions or none" in error
    assert "found 0 groups of settings" in error


def test_a_model_without_moe_layers_left_is_refused_at_start(vllm_zygote: Zygote, tmp_path: Path) -> None:
    """Its type has experts, but every layer of it is dense."""
    model = make(vllm_zygote, tmp_path / "all-dense", "qwen3_moe", {"mlp_only_layers": [0, 1]})
    assert "no layer of this qwen3_moe has routed experts" in start_error(vllm_zygote, model)


def test_a_checkpoint_without_a_dense_tensor_is_refused_at_start(vllm_zygote: Zygote, tmp_path: Path) -> None:
    """vLLM's own check passes over linear layers: it would serve what memory holds."""
    model = make(vllm_zygote, tmp_path / "lacking", "qwen3_moe", {})
    tensors = load_file(model / "model.safetensors")
    lacking = "model.layers.1.self_attn.o_proj.weight"
    del tensors[lacking]
    save_file(tensors, model / "model.safetensors")
    assert f"CheckpointError: {model}: {lacking} missing" in start_error(vllm_zygote, model)
