"""From the section `placement` to a placement for the shards at hand, on the tiny model's real checkpoint and trace."""

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
from cluster.mesh.planning import (
    ModelFacts,
    ShardsAtHand,
    check_fits,
    check_plan,
    plan_placement,
    read_spec,
    slots_to_allocate,
    usable_slots,
)
from placement import policy
from placement.placement import Placement
from placement.rule.evaluate import evaluate
from placement.traces.trace import ActivationTrace
from tests.support.mtp_checkpoint import make_mtp_checkpoint
from tests.support.planning import MODEL, section, shards, trace_file

ROOT = Path(__file__).parents[3]
TINY = ROOT / "examples" / "tiny-moe"


# The model ------------------------------------------------------------------------------------------------------------


def experts_config(path: Path) -> ExpertsAppConfig:
    return parse(ExpertsAppConfig, {"model": {"id": "tiny", "path": str(path), "dtype": "float32"}})


def test_the_model_is_read_from_its_checkpoint() -> None:
    spec = read_spec(experts_config(TINY))
    assert (spec.num_layers, spec.num_experts) == (MODEL.num_layers, MODEL.num_experts)


def test_the_layer_for_guesses_is_one_more_to_plan_for(tmp_path: Path) -> None:
    """And an expert of it that the checkpoint lacks is refused as any other."""
    folder = make_mtp_checkpoint("glm4_moe", tmp_path)
    model = {"id": "tiny", "path": str(folder), "dtype": "float32"}
    without, spec = (read_spec(parse(ExpertsAppConfig, {"model": {**model, "mtp": mtp}})) for mtp in (False, True))
    assert (spec.num_layers, spec.layer_ids[:-1]) == (without.num_layers + 1, without.layer_ids)
    facts = ModelFacts(spec.num_layers, spec.num_experts)
    check_plan(section(), facts, shards(3))
    tensors = load_file(folder / "model.safetensors")
    name = f"model.layers.{spec.layer_ids[-1]}.mlp.experts.3.up_proj.weight"
    del tensors[name]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=f"model.path: .*{re.escape(name)}"):
        read_spec(parse(ExpertsAppConfig, {"model": {**model, "mtp": True}}))


def test_a_checkpoint_that_lacks_an_expert_is_refused_before_anything_starts(tmp_path: Path) -> None:
    tensors = load_file(TINY / "model.safetensors")
    name = "model.layers.2.mlp.experts.7.down_proj.weight"
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(TINY / "config.json", tmp_path)
    with pytest.raises(ConfigError, match=f"model.path: .*{re.escape(name)}"):
        read_spec(experts_config(tmp_path))


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path: .*config\.json"):
        read_spec(experts_config(tmp_path))


# Slots ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slots", "keys", "usable"),
    [
        (None, {}, None),
        (12, {}, 11),  # one is spare
        (11, {}, 11),  # 3 x 10 would not hold 32
        (14, {"spare_slots": 3}, 11),
        (13, {"spare_slots": 3}, 13),
        (12, {"spare_slots": 0}, 12),
        (23, {"min_replicas": 2}, 22),
        (22, {"min_replicas": 2}, 22),
    ],
)
def test_spare_slots_are_left_out_where_the_others_suffice(
    slots: int | None, keys: dict[str, Any], usable: int | None
) -> None:
    assert usable_slots(section(**keys), MODEL, shards(3, slots)) == usable


@pytest.mark.parametrize(
    ("slots", "keys", "told"),
    [
        (
            10,
            {},
            "placement: 3 shards of 10 slots have 30 slots in a layer, 32 experts of 1 replica need 32: expected "
            "shards.slots_per_rank 12, placement.spare_slots among them, or more shards",
        ),
        (
            21,
            {"min_replicas": 2, "spare_slots": 2},
            "2 replicas need 64: expected shards.slots_per_rank 24",
        ),
    ],
)
def test_fewer_slots_than_experts_need_are_refused_with_the_number_to_write(
    slots: int, keys: dict[str, Any], told: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(told)):
        usable_slots(section(**keys), MODEL, shards(3, slots))
    enough = int(re.search(r"slots_per_rank (\d+)", told).group(1))  # type: ignore[union-attr]
    assert usable_slots(section(**keys), MODEL, shards(3, enough)) == enough - section(**keys).spare_slots


@pytest.mark.parametrize(("given", "spare", "slots"), [(None, 1, 12), (None, 0, 11), (None, 3, 14), (20, 3, 20)])
def test_shards_allocate_what_is_given_or_what_is_needed_and_spare(given: int | None, spare: int, slots: int) -> None:
    placement = Placement.linear(4, 32, 3)
    assert slots_to_allocate(section(spare_slots=spare), placement, shards(3, given)) == slots


def test_a_placement_fits_its_own_ranks_and_slots_only() -> None:
    placement = Placement.linear(4, 32, 3)
    for slots in (11, 12, None):
        check_fits("it", placement, 3, slots)
    with pytest.raises(ConfigError, match=r"^a plan: it is for 3 ranks, there are 4 shards$"):
        check_fits("a plan", placement, 4, None)
    with pytest.raises(ConfigError, match=r"^a plan: it needs 11 slots in a layer, the shards have 10$"):
        check_fits("a plan", placement, 3, 10)


# Policies -------------------------------------------------------------------------------------------------------------


def test_linear_gives_every_expert_a_slot_though_shards_do_not_divide_them() -> None:
    placement = plan_placement(section(), MODEL, shards(3))
    assert placement == Placement.linear(4, 32, 3)
    assert plan_placement(section(), MODEL, shards(3, 12)) == placement, "the slots that are left stay empty"


def test_linear_keeps_to_replicas_and_nodes() -> None:
    placement = plan_placement(section(min_replicas=2), MODEL, shards(4, 24, num_nodes=2))
    assert placement.num_nodes == 2
    assert (placement.logical_replica_count >= 2).all()


@pytest.mark.parametrize("keys", [{"policy": "greedy"}, {"policy": "optimized", "max_seconds": 2.0, "load_cap": 1.2}])
def test_policies_plan_for_the_trace(tmp_path: Path, keys: dict[str, Any]) -> None:
    planned = plan_placement(section(trace=trace_file(tmp_path), **keys), MODEL, shards(4))
    assert (planned.num_ranks, planned.slots_per_rank) == (4, 8)
    assert (planned.logical_replica_count == 1).all()


def test_policies_leave_the_spare_slots_empty(tmp_path: Path) -> None:
    keys = section(policy="greedy", trace=trace_file(tmp_path), spare_slots=2)
    assert plan_placement(keys, MODEL, shards(4, 12)).slots_per_rank == 10


def test_a_plan_for_local_replicas_fetches_less_from_afar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy, "search_seconds", lambda *_: 0.1)  # no time limit is hit: the plan is always the same
    trace = ActivationTrace.load_npz(TINY / "trace.npz").take(np.arange(0, 25_000, 10))
    trace.save(tmp_path / "trace.npz")
    keys = {"policy": "optimized", "trace": str(tmp_path / "trace.npz"), "num_nodes": 2, "load_cap": 1.2}
    plain, near = (
        evaluate(
            plan_placement(section(**keys, max_seconds=600.0, prefer_local_replicas=prefer), MODEL, shards(4, 11)),
            trace,
            prefer_local_replicas=True,
        )
        for prefer in (False, True)
    )
    assert near.far_fan_out.mean() < plain.far_fan_out.mean()


def test_the_planned_config_plans_for_the_trace_that_the_model_comes_with() -> None:
    mesh = MeshConfig.from_file(ROOT / "configs" / "tiny-cpu-planned.yaml")
    slots = mesh.experts.shards.slots_per_rank
    planned = plan_placement(mesh.live.placement, MODEL, shards(mesh.num_shards, slots))
    assert slots is not None
    assert (planned.num_ranks, planned.slots_per_rank) == (mesh.num_shards, slots - mesh.live.placement.spare_slots)
    trace = ActivationTrace.load_npz(TINY / "trace.npz")
    assert trace.domains == ("code", "prose", "unicode", "bytecode")
    assert np.bincount(trace.domain).min() > 4000
    found, linear = (evaluate(p, trace) for p in (planned, Placement.linear(4, 32, mesh.num_shards)))
    assert found.fan_out.mean() < 0.95 * linear.fan_out.mean()
    assert found.balancedness.min() > linear.balancedness.min()


# Files ----------------------------------------------------------------------------------------------------------------


def test_a_file_is_used_as_it_is(tmp_path: Path) -> None:
    saved = Placement.linear(4, 32, 3, min_replicas=2)
    saved.save(tmp_path / "p.json")
    assert plan_placement(section(file=str(tmp_path / "p.json")), MODEL, shards(3, 23)) == saved


@pytest.mark.parametrize(
    ("saved", "at_hand", "keys", "told"),
    [
        (Placement.linear(4, 16, 3), shards(3), {}, "it is for 4 layers of 16 experts, the model for 4 of 32"),
        (Placement.linear(4, 32, 2), shards(3), {}, "it is for 2 ranks, there are 3 shards"),
        (Placement.linear(4, 32, 2), shards(2, 16), {}, None),
        (Placement.linear(4, 32, 2, min_replicas=2), shards(2, 20), {}, "it needs 32 slots in a layer, the shards"),
        (
            Placement.linear(4, 32, 4, num_nodes=2),
            shards(4),
            {"min_replicas": 2},
            "placement.min_replicas is 2, the placement in {path} has experts of 1 replica",
        ),
    ],
)  # fmt: skip
def test_a_file_for_something_else_is_refused(
    tmp_path: Path, saved: Placement, at_hand: ShardsAtHand, keys: dict[str, Any], told: str | None
) -> None:
    path = tmp_path / "p.json"
    saved.save(path)
    for plan in (plan_placement, check_plan):
        if told is None:
            plan(section(file=str(path), **keys), MODEL, at_hand)
            continue
        with pytest.raises(ConfigError, match=re.escape(told.format(path=path))):
            plan(section(file=str(path), **keys), MODEL, at_hand)


def test_a_file_that_is_no_placement_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text("{}")
    with pytest.raises(ConfigError, match=f"^placement.file: {re.escape(str(path))}: .*'num_ranks'"):
        plan_placement(section(file=str(path)), MODEL, shards(3))


# Refusals without a search --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("at_hand", "keys", "told"),
    [
        (shards(3, 10), {}, "placement: 3 shards of 10 slots"),
        (shards(3), {"num_nodes": 2}, "placement.num_nodes is 2, but 3 shards cannot be dealt evenly to so many nodes"),
        (shards(3), {"min_replicas": 4}, "placement: 4 replicas on different ranks need 4 ranks, there are 3"),
        (
            shards(3),
            {"policy": "optimized", "prefer_local_replicas": True},
            "placement: prefer_local_replicas is set on 1 node, expected at least 2",
        ),
        (
            shards(4),
            {"policy": "greedy", "trace": 16},
            "the trace is for 4 layers of 16 experts, the model for 4 of 32",
        ),
        (shards(4), {"policy": "optimized", "trace": 16}, "the trace is for 4 layers of 16 experts, the model for 4"),
    ],
)
@pytest.mark.parametrize("plan", [plan_placement, check_plan])
def test_what_does_not_fit_is_named(
    tmp_path: Path, at_hand: ShardsAtHand, keys: dict[str, Any], told: str, plan: Callable[..., object]
) -> None:
    if "policy" in keys:
        keys = {**keys, "trace": trace_file(tmp_path, keys.get("trace", 32))}
    with pytest.raises(ConfigError, match=re.escape(told)):
        plan(section(**keys), MODEL, at_hand)


def test_a_plan_is_checked_without_a_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searches = []
    monkeypatch.setattr(policy, "optimize", lambda *args, **options: searches.append(args))
    check_plan(section(policy="optimized", trace=trace_file(tmp_path), load_cap=1.2), MODEL, shards(4))
    assert searches == []
