"""From config to placement, on the tiny model's real checkpoint."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from cluster.config.apps import ExpertsAppConfig
from cluster.config.parse import ConfigError, parse
from cluster.config.serve_file import MeshConfig
from cluster.controller.initial_placement import check_plan, plan_placement
from cluster.controller.roster import placement_digest
from placement import policy
from placement.placement import Placement
from placement.rule.evaluate import evaluate
from placement.traces.recorder import TraceRecorder
from placement.traces.trace import ActivationTrace

TINY = Path(__file__).parents[3] / "examples" / "tiny-moe"
CONFIGS = Path(__file__).parents[3] / "configs"


def config(shards: dict[str, Any] | None = None, placement: dict[str, Any] | None = None) -> ExpertsAppConfig:
    args = {
        "model": {"id": "tiny", "path": str(TINY), "dtype": "float32"},
        "shards": {"count": 3, **(shards or {})},
        "placement": placement or {},
    }
    return parse(ExpertsAppConfig, args)


def trace_file(tmp_path: Path, num_experts: int = 32) -> Path:
    """Tokens that pick four neighbours, so that there is something to plan."""
    rng = np.random.default_rng(0)
    first_TL = rng.integers(0, num_experts // 4, (500, 4)) * 4
    ids_TLK = (first_TL[:, :, None] + np.arange(4)).astype(np.int16)
    recorder = TraceRecorder(4, num_experts, 4, 1000)
    recorder.add(ids_TLK)
    path = tmp_path / "trace.npz"
    path.write_bytes(recorder.snapshot().to_bytes())
    return path


def test_linear_gives_every_expert_a_slot_though_shards_do_not_divide_them() -> None:
    placement = plan_placement(config())
    assert (placement.num_layers, placement.num_experts, placement.num_ranks) == (4, 32, 3)
    assert placement.slots_per_rank == 11


def test_more_slots_and_replicas_are_used_as_asked() -> None:
    placement = plan_placement(config({"slots_per_rank": 24}, {"min_replicas": 2}))
    assert placement.slots_per_rank == 24
    assert (placement.logical_replica_count >= 2).all()


def test_a_plan_for_near_replicas_first_fetches_less_from_afar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "search_seconds", lambda *_: 0.1)  # no time limit is hit: the plan is always the same
    trace = ActivationTrace.load_npz(TINY / "trace.npz").take(np.arange(0, 25_000, 10))
    trace.save(tmp_path / "trace.npz")
    section = {
        "policy": "optimized",
        "trace": str(tmp_path / "trace.npz"),
        "num_nodes": 2,
        "load_cap": 1.2,
        "max_seconds": 600.0,
    }
    shards = {"count": 4, "slots_per_rank": 10}
    plain, near = (
        evaluate(
            plan_placement(config(shards, {**section, "prefer_local_replicas": near})),
            trace,
            prefer_local_replicas=True,
        )
        for near in (False, True)
    )
    assert near.far_fan_out.mean() < plain.far_fan_out.mean()


@pytest.mark.parametrize("search", [{"policy": "greedy"}, {"policy": "optimized", "max_seconds": 2.0, "load_cap": 1.2}])
def test_policies_plan_for_the_trace(tmp_path: Path, search: dict[str, Any]) -> None:
    section = {**search, "trace": str(trace_file(tmp_path))}
    planned = plan_placement(config({"count": 4}, section))
    assert (planned.num_ranks, planned.slots_per_rank) == (4, 8)
    assert (planned.logical_replica_count == 1).all()


def test_the_planned_config_plans_for_the_trace_that_the_model_comes_with() -> None:
    experts = MeshConfig.from_file(CONFIGS / "tiny-cpu-planned.yaml").experts
    planned = plan_placement(experts)
    assert (planned.num_ranks, planned.slots_per_rank) == (experts.shards.count, experts.shards.slots_per_rank)
    trace = ActivationTrace.load_npz(TINY / "trace.npz")
    assert trace.domains == ("code", "prose", "unicode", "bytecode")
    assert np.bincount(trace.domain).min() > 4000
    found, linear = (evaluate(p, trace) for p in (planned, Placement.linear(4, 32, experts.shards.count)))
    assert found.fan_out.mean() < 0.9 * linear.fan_out.mean()
    assert found.balancedness.min() > linear.balancedness.min()


def test_the_digest_tells_placements_apart() -> None:
    three, again, four = (Placement.linear(4, 32, ranks) for ranks in (3, 3, 4))
    assert placement_digest(three) == placement_digest(again) != placement_digest(four)


def test_a_file_is_used_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    saved = Placement.linear(4, 32, 3, min_replicas=2)
    saved.save(path)
    assert plan_placement(config(placement={"file": str(path)})) == saved


def test_a_checkpoint_that_lacks_an_expert_is_refused_before_anything_starts(tmp_path: Path) -> None:
    tensors = load_file(TINY / "model.safetensors")
    name = "model.layers.2.mlp.experts.7.down_proj.weight"
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(TINY / "config.json", tmp_path)
    whole = config()
    spoiled = whole.model_copy(update={"model": whole.model.model_copy(update={"path": str(tmp_path)})})
    with pytest.raises(ConfigError, match=f"model.path: .*{re.escape(name)}"):
        plan_placement(spoiled)


@pytest.mark.parametrize(
    ("shards", "section", "expected"),
    [
        ({"slots_per_rank": 10}, {}, "slots_per_rank is 10, so 3 shards have 30 slots .* 32 experts .*; expected 11"),
        ({}, {"num_nodes": 2}, "placement: .*3 ranks"),
        (
            {},
            {"policy": "optimized", "prefer_local_replicas": True},
            "placement: prefer_local_replicas is set on 1 node, expected at least 2",
        ),
        ({}, {"min_replicas": 4}, "placement: .*4 ranks, there are 3"),
    ],
)
@pytest.mark.parametrize("plan", [plan_placement, check_plan])
def test_what_does_not_fit_is_named(
    tmp_path: Path,
    shards: dict[str, Any],
    section: dict[str, Any],
    expected: str,
    plan: Callable[[ExpertsAppConfig], object],
) -> None:
    if "policy" in section:
        section = {**section, "trace": str(trace_file(tmp_path))}
    with pytest.raises(ConfigError, match=expected):
        plan(config(shards, section))


def test_a_file_that_says_other_than_its_section_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    Placement.linear(4, 32, 4, num_nodes=2).save(path)
    with pytest.raises(ConfigError, match=r"placement\.num_nodes is 1, the placement in .* is for 2; leave it out"):
        plan_placement(config({"count": 4}, {"file": str(path), "num_nodes": 1}))
    with pytest.raises(ConfigError, match=r"placement\.min_replicas is 2, the placement in .* experts of 1 replica"):
        plan_placement(config({"count": 4}, {"file": str(path), "min_replicas": 2}))
    assert plan_placement(config({"count": 4}, {"file": str(path), "num_nodes": 2})).num_nodes == 2


def test_a_plan_is_checked_without_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []
    monkeypatch.setattr(policy, "optimize", lambda *args, **options: searches.append(args))
    check_plan(config({"count": 4}, {"policy": "optimized", "trace": str(trace_file(tmp_path)), "load_cap": 1.2}))
    other = str(trace_file(tmp_path, num_experts=16))
    with pytest.raises(ConfigError, match="the trace is for 4 layers of 16 experts, the model for 4 of 32"):
        check_plan(config({"count": 4}, {"policy": "optimized", "trace": other}))
    assert searches == []


def test_files_of_another_model_or_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "placement.json"
    Placement.linear(4, 16, 3).save(path)
    with pytest.raises(ConfigError, match="it is for 4 layers of 16 experts, the model for 4 of 32"):
        plan_placement(config(placement={"file": str(path)}))
    Placement.linear(4, 32, 2).save(path)
    with pytest.raises(ConfigError, match="it is for 2 ranks, expected 3"):
        plan_placement(config(placement={"file": str(path)}))
    path.write_text("{}")
    with pytest.raises(ConfigError, match=r"placement\.file"):
        plan_placement(config(placement={"file": str(path)}))
    trace = trace_file(tmp_path, num_experts=16)
    with pytest.raises(ConfigError, match="the trace is for 4 layers of 16 experts, the model for 4 of 32"):
        plan_placement(config(placement={"policy": "greedy", "trace": str(trace)}))


def test_a_policy_that_needs_a_trace_says_where_one_comes_from() -> None:
    with pytest.raises(ConfigError, match=r"policy is 'optimized', which plans for a trace.*/expertmesh/trace"):
        config(placement={"policy": "optimized"})


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    broken = config().model_copy(update={"model": config().model.model_copy(update={"path": str(tmp_path)})})
    with pytest.raises(ConfigError, match=r"model\.path: .*config\.json"):
        plan_placement(broken)
