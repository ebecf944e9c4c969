"""LoRA adapters in a router: the tokens of plain vLLM over a checkpoint with the adapter merged into its weights.

Float32. An adapter is half as large as the weights that it changes, so that nearly every token is another one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from experts.checkpoint import ExpertCheckpoint
from placement.placement import Placement
from tests.support.random_adapters import write_files
from tests.support.small_mesh import mesh_of
from tests.support.spoiled_checkpoints import TINY
from tests.support.zygote.adapter_jobs import NEW_TOKENS
from tests.support.zygote.engine_zygote import Zygote
from tests.support.zygote.parity_jobs import TWO_WORKERS

pytestmark = pytest.mark.whole_machine

ENGINE_S = 400.0
TIE = 1e-4  # sums of the same products in different orders move a log-probability by about 1e-5
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]  # of dense layers and of shared experts
CASES: dict[str, tuple[str | None, dict[str, list[str]]]] = {
    "tiny-moe": (None, {"head": [*ATTENTION, "lm_head"], "gate": ["o_proj", "gate"]}),
    "qwen2_moe": ("qwen2_moe", {"all": [*ATTENTION, *MLP, "gate"]}),
    "deepseek_v3": ("deepseek_v3", {"all": ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj", *MLP, "gate"]}),
}
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
# What else an engine does while it has adapters, for a head and for shared experts that two workers have half of each.
TOGETHER = {"speculative_config": NGRAM, **TWO_WORKERS}
TOGETHER_CASES = ("tiny-moe", "qwen2_moe")
LAYER = "base_model.model.model.layers.1."
WITHOUT_EFFECT = {
    "routed": "mlp.experts.3.gate_proj",
    "fused": "mlp.experts",
    "latent": "self_attn.kv_b_proj",
    "shared gate": "mlp.shared_expert_gate",
    "no layer": "self_attn.q_proj_of_another_model.q_proj",
}


@dataclass
class Run:
    """What plain vLLM says of a model with each adapter merged, and the router with the adapters apart."""

    plain: dict[str, dict[str, Any]]
    router: dict[str, Any]
    together: dict[str, Any] | None


@pytest.fixture(scope="module", params=CASES)
def run(vllm_zygote: Zygote, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Run:
    family, adapters = CASES[request.param]
    folder = tmp_path_factory.mktemp("adapters")
    job = vllm_zygote.start(
        "adapter_checkpoint", family=family, source=str(TINY), folder=str(folder), adapters=adapters
    )
    made, base = vllm_zygote.wait(job, "made"), vllm_zygote.wait(job, "base")
    refused = {name: str(folder / "refused" / name) for name in WITHOUT_EFFECT}
    for name, path in refused.items():
        pair = {f"{LAYER}{WITHOUT_EFFECT[name]}.lora_{side}.weight": torch.ones(4, 4) for side in "AB"}
        write_files(Path(path), pair, [WITHOUT_EFFECT[name].rpartition(".")[2]])
    spec = ExpertCheckpoint.open(base).spec
    models = {"": base, **{name: files["merged"] for name, files in made.items()}}
    references = {name: vllm_zygote.start("adapter_plain", model=model) for name, model in models.items()}
    with mesh_of(Path(base), Placement.linear(spec.num_layers, spec.num_experts, 2)) as mesh:
        paths = {name: files["adapter"] for name, files in made.items()}
        job = vllm_zygote.start(
            "adapter_router", model=base, membership=mesh.membership().to_dict(), adapters=paths, refused=refused
        )
        vllm_zygote.wait(job, "turns", ENGINE_S)
        together = None
        if request.param in TOGETHER_CASES:
            other = vllm_zygote.start(
                "adapter_together", model=base, membership=mesh.membership().to_dict(), adapters=paths, options=TOGETHER
            )
            vllm_zygote.wait(other, "turns", ENGINE_S)
            together = vllm_zygote.events(other)
    plain = {}
    for name, reference in references.items():
        vllm_zygote.wait(reference, "ids", ENGINE_S)
        plain[name] = vllm_zygote.events(reference)
    return Run(plain, vllm_zygote.events(job), together)


def check_tokens(got: list[list[int]], plain: dict[str, Any]) -> None:
    """Equal up to the first place where the two best candidates are closer than `TIE`."""
    for ours, theirs, gaps in zip(got, plain["ids"], plain["gaps"], strict=True):
        apart = next((place for place, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
        assert apart is None or gaps[apart] <= TIE, f"token {apart} of {ours}, expected {theirs}"


def check_mixed(mixed: dict[str, list[int]], plain: dict[str, dict[str, Any]]) -> None:
    """One prompt's tokens with each adapter and with none, made at a time."""
    assert mixed.keys() == plain.keys()
    for name, ids in mixed.items():
        check_tokens([ids], {"ids": [plain[name]["ids"][-1][:NEW_TOKENS]], "gaps": plain[name]["gaps"][-1:]})


def test_each_adapter_gives_the_tokens_of_its_merged_model(run: Run) -> None:
    """Twice, with room for one adapter: in between another one took its place."""
    assert len(run.router["turns"]) == 2 * (len(run.plain) - 1)
    for name, ids in run.router["turns"]:
        check_tokens(ids, run.plain[name])
    assert run.router["status"]["fallback_pairs"] == 0
    assert all(rows > 0 for rows in run.router["status"]["shard_rows"])


def test_the_adapters_change_what_is_said(run: Run) -> None:
    for name in run.plain.keys() - {""}:
        pairs = zip(run.plain[name]["ids"], run.plain[""]["ids"], strict=True)
        assert all(merged != base for merged, base in pairs), name


def test_requests_without_an_adapter_get_the_base_model(run: Run) -> None:
    check_tokens(run.router["base"], run.plain[""])
    check_tokens(run.router["base_again"], run.plain[""])


def test_requests_of_several_adapters_at_a_time_keep_to_theirs(run: Run) -> None:
    check_mixed(run.router["mixed"], run.plain)


@pytest.mark.parametrize("run", TOGETHER_CASES, indirect=True)
def test_adapters_go_with_speculation_and_two_workers(run: Run) -> None:
    """In one engine: guesses are made and checked for each adapter, and each worker has half of every adapter."""
    assert run.together is not None
    assert {name for name, _ in run.together["turns"]} == run.plain.keys()
    for name, ids in run.together["turns"]:
        plain = run.plain[name]
        check_tokens(ids, {**plain, "ids": [whole[:NEW_TOKENS] for whole in plain["ids"]]})
    check_mixed(run.together["mixed"], run.plain)
    assert run.together["counters"]["vllm:spec_decode_num_accepted_tokens"] > 0
    assert len(run.together["statuses"]) == 2
    for status in run.together["statuses"]:
        assert (status["failovers"], status["fallback_pairs"]) == (0, 0)
        assert sum(status["shard_pairs"]) > 0


def test_an_adapter_that_could_not_be_applied_is_refused_by_name(run: Run) -> None:
    refusals = run.router["refusals"]
    for name in ("routed", "fused"):
        assert "UnsupportedModelError" in refusals[name]
        assert f"changes routed experts, which stand on shards and serve every adapter alike: {LAYER}" in refusals[name]
        assert f"{WITHOUT_EFFECT[name]}.lora_A.weight" in refusals[name]
        assert "possible are attention, shared experts, dense MLPs" in refusals[name]
    assert "changes kv_b_proj, which would have no effect (vLLM folds it into multi-head latent" in refusals["latent"]
    assert "changes shared_expert_gate, which would have no effect" in refusals["shared gate"]
    assert "q_proj_of_another_model" in refusals["no layer"]
