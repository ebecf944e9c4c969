"""What a running service takes on: `deployments` of the application `experts`, and what used to be arguments."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config.deployments import DeploymentOverrides
from cluster.config.live_sections import LiveConfig, MembershipSection, MigrationSection, PlacementSection
from cluster.config.parse import MOVED, ConfigError, parse, portable
from cluster.config.replicas import SHARD_POLICY
from cluster.config.serve_file import MeshConfig
from placement.placement import Placement

TINY = Path(__file__).parents[3] / "configs" / "tiny-cpu.yaml"
TRACE = "examples/tiny-moe/trace.npz"
SHARD, CONTROLLER = 0, 1  # positions in `deployments`
HERE = "config: applications[0]"
POLICY = {"policy": {"policy_function": SHARD_POLICY}}


def tiny() -> dict[str, Any]:
    return yaml.safe_load(TINY.read_text())


def with_live(**sections: Any) -> dict[str, Any]:
    """The shipped config with other sections of the controller's user_config."""
    data = tiny()
    data["applications"][0]["deployments"][CONTROLLER]["user_config"] = sections
    return data


def refusal(data: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        MeshConfig.from_serve_config(data)
    return str(caught.value)


# Where things are -----------------------------------------------------------------------------------------------------


def test_the_number_of_shards_and_the_policy_are_those_of_the_deployments() -> None:
    mesh = MeshConfig.from_file(TINY)
    assert mesh.num_shards == 3
    assert mesh.live.placement.min_replicas == 2
    assert (mesh.live.membership.heartbeat_s, mesh.live.membership.lost_after_s) == (1, 5)
    assert mesh.live.migration == MigrationSection()


def test_without_deployments_there_is_one_shard_and_every_default() -> None:
    data = tiny()
    del data["applications"][0]["deployments"]
    mesh = MeshConfig.from_serve_config(data)
    assert (mesh.num_shards, mesh.live) == (1, LiveConfig())
    assert "deployments" not in mesh.serve["applications"][0]
    assert DeploymentOverrides.of([], "here", None) == DeploymentOverrides()


@pytest.mark.parametrize(
    ("deployment", "shards"),
    [
        ({}, 1),
        ({"num_replicas": 7}, 7),
        ({"autoscaling_config": {**POLICY, "min_replicas": 2, "max_replicas": 9}}, 2),
        ({"autoscaling_config": {**POLICY, "min_replicas": 2, "initial_replicas": 4, "max_replicas": 9}}, 4),
        ({"autoscaling_config": {**POLICY, "max_replicas": 9}}, 1),
    ],
)
def test_serve_says_how_many_shards_there_are(deployment: dict[str, Any], shards: int) -> None:
    data = tiny()
    data["applications"][0]["deployments"][SHARD] = {"name": "ExpertShard", **deployment}
    mesh = MeshConfig.from_serve_config(data)
    assert mesh.num_shards == shards
    assert mesh.serve["applications"][0]["deployments"][SHARD] == {"name": "ExpertShard", **deployment}


def test_what_may_change_live_changes_no_argument() -> None:
    """Serve replaces every replica of an application whose arguments differ."""
    changed = with_live(placement={"policy": "optimized", "trace": TRACE}, migration={"round_s": 2})
    changed["applications"][0]["deployments"][SHARD]["num_replicas"] = 5
    before, after = (MeshConfig.from_serve_config(data).serve["applications"][0] for data in (tiny(), changed))
    assert before["args"] == after["args"]
    assert before["deployments"] != after["deployments"]


# What moved -----------------------------------------------------------------------------------------------------------

OLD = {
    "shards.count": 3,
    "placement": {"policy": "linear"},
    "membership": {"heartbeat_s": 1},
    "membership.join_timeout_s": 60,
    "membership.ray_actor_options": {"num_cpus": 1},
}
WRITE_INSTEAD = {
    "shards.count": "deployments: [{name: ExpertShard, num_replicas: N}] beside args",
    "placement": "deployments: [{name: PlacementController, user_config: {placement: {...}}}] beside args",
    "membership": "deployments: [{name: PlacementController, user_config: {membership: {...}}}] beside args; "
    "join_timeout_s is shards.join_timeout_s, ray_actor_options is controller.ray_actor_options",
    "membership.join_timeout_s": "shards.join_timeout_s among the args",
    "membership.ray_actor_options": "controller.ray_actor_options among the args",
}


def test_every_key_that_moved_is_tested_here() -> None:
    assert MOVED.keys() == OLD.keys() == WRITE_INSTEAD.keys()


@pytest.mark.parametrize("old", OLD)
def test_a_key_that_moved_is_answered_with_the_line_to_write(old: str) -> None:
    data = tiny()
    place, section = "args", data["applications"][0]["args"]
    if old.startswith("membership."):  # written where the section is now
        place = "deployments[1].user_config"
        section = data["applications"][0]["deployments"][CONTROLLER]["user_config"]
    *path, last = old.split(".")
    for part in path:
        section = section.setdefault(part, {})
    section[last] = OLD[old]
    assert refusal(data) == f"{HERE}.{place}.{old}: moved; write {WRITE_INSTEAD[old]}"


def test_what_is_to_be_written_instead_is_accepted() -> None:
    data = with_live(placement={"policy": "linear"}, membership={"heartbeat_s": 1})
    app = data["applications"][0]
    app["deployments"][SHARD] = {"name": "ExpertShard", "num_replicas": 4}
    app["args"]["shards"]["join_timeout_s"] = 60
    app["args"]["controller"] = {"ray_actor_options": {"num_cpus": 1}}
    mesh = MeshConfig.from_serve_config(data)
    assert (mesh.num_shards, mesh.experts.shards.join_timeout_s) == (4, 60)
    assert mesh.experts.controller.ray_actor_options == {"num_cpus": 1}


@pytest.mark.parametrize(
    ("key", "value", "instead"),
    [
        ("num_replicas", 2, "deployments: [{name: ExpertShard, num_replicas: N}] beside args"),
        ("autoscaling_config", {}, "deployments: [{name: ExpertShard, autoscaling_config: {...}}] beside args"),
        ("ray_actor_options", {}, "shards.ray_actor_options"),
    ],
)
def test_options_with_a_place_of_their_own_are_not_in_deployment_config(key: str, value: Any, instead: str) -> None:
    data = tiny()
    data["applications"][0]["args"]["shards"]["deployment_config"][key] = value
    place = f"{HERE}.args.shards.deployment_config"
    assert refusal(data) == f"{place}: {key} does not belong here; write {instead}"


# What is refused in `deployments` -------------------------------------------------------------------------------------

NOT_A_LIST = ": expected a list of deployments, each with a name"


@pytest.mark.parametrize(
    ("deployments", "expected"),
    [
        (3, NOT_A_LIST),
        ({"name": "ExpertShard"}, NOT_A_LIST),
        (["ExpertShard"], NOT_A_LIST),
        ([{"num_replicas": 3}], "[0].name is None, expected one of ExpertShard, PlacementController"),
        ([{"name": "Shard"}], "[0].name is 'Shard', expected one of ExpertShard, PlacementController"),
        ([{"name": "ExpertShard", "num_replicas": 0}], "[0].num_replicas is 0, expected a number of shards of 1 or"),
        ([{"name": "ExpertShard", "num_replicas": -2}], "[0].num_replicas is -2, expected"),
        ([{"name": "ExpertShard", "num_replicas": "3"}], "[0].num_replicas is '3', expected"),
        ([{"name": "ExpertShard", "num_replicas": 2.5}], "[0].num_replicas is 2.5, expected"),
        ([{"name": "ExpertShard", "num_replicas": True}], "[0].num_replicas is True, expected"),
        (
            [{"name": "ExpertShard", "user_config": {"placement": {}}}],
            "[0].user_config: a shard has none; the sections belong to PlacementController",
        ),
        (
            [{"name": "ExpertShard"}, {"name": "PlacementController", "num_replicas": 2}],
            "[1]: there is one PlacementController: remove num_replicas and autoscaling_config",
        ),
        (
            [{"name": "PlacementController", "autoscaling_config": {"max_replicas": 2}}],
            "[0]: there is one PlacementController: remove num_replicas and autoscaling_config",
        ),
        ([{"name": "PlacementController", "user_config": [1]}], "[0].user_config: expected a mapping, got list"),
        (
            [{"name": "ExpertShard"}, {"name": "ExpertShard", "num_replicas": 3}],
            "[1].name: ExpertShard is listed twice",
        ),
        (
            [{"name": "ExpertShard", "autoscaling_config": {"min_replicas": "x"}}],
            "[0].autoscaling_config.min_replicas is 'x', expected a number of shards of 1 or more",
        ),
        (
            [{"name": "ExpertShard", "autoscaling_config": {"min_replicas": 0, "max_replicas": 3}}],
            "[0].autoscaling_config.min_replicas is 0, expected a number of shards of 1 or more",
        ),
        ([{"name": "ExpertShard", "autoscaling_config": 3}], "[0].autoscaling_config is 3, expected a mapping"),
        (
            [{"name": "ExpertShard", "num_replicas": 3, "autoscaling_config": {"min_replicas": 2}}],
            "[0]: num_replicas and autoscaling_config exclude each other: remove one",
        ),
    ],
)
def test_a_bad_entry_of_deployments_is_named(deployments: Any, expected: str) -> None:
    data = tiny()
    data["applications"][0]["deployments"] = deployments
    assert refusal(data).startswith(f"{HERE}.deployments{expected}")


AT_LEAST_1, AT_LEAST_0 = (f"Input should be greater than or equal to {number}" for number in (1, 0))
ABOVE_0 = "Input should be greater than 0"


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"placements": {}}, "placements: unknown key"),
        ({"shards": {"count": 3}}, "shards: unknown key"),
        ({"placement": {"police": "linear"}}, "placement.police: unknown key"),
        (
            {"placement": {"policy": "magic"}},
            "placement.policy: Input should be 'linear', 'greedy' or 'optimized', got",
        ),
        ({"placement": {"file": "nope.json"}}, "placement.file: 'nope.json' does not exist; looked at"),
        ({"placement": {"policy": "greedy", "trace": "no.npz"}}, "placement.trace: 'no.npz' does not exist; looked at"),
        ({"placement": {"min_replicas": 0}}, f"placement.min_replicas: {AT_LEAST_1}, got 0"),
        ({"placement": {"spare_slots": -1}}, f"placement.spare_slots: {AT_LEAST_0}, got -1"),
        ({"placement": {"protect": 1.1}}, "placement.protect: Input should be less than or equal to 1, got 1.1"),
        ({"placement": {"num_nodes": 0}}, f"placement.num_nodes: {AT_LEAST_1}, got 0"),
        (
            {"placement": {"policy": "optimized", "trace": TRACE, "load_cap": 0.5}},
            f"placement.load_cap: {AT_LEAST_1}, got 0.5",
        ),
        (
            {"placement": {"policy": "optimized", "trace": TRACE, "max_seconds": 0}},
            f"placement.max_seconds: {ABOVE_0}, got 0",
        ),
        (
            {"placement": {"policy": "optimized"}},
            "placement: policy is 'optimized', which plans for a trace, and trace is not set; a running service "
            "returns one at GET /expertmesh/trace",
        ),
        (
            {"placement": {"policy": "greedy", "trace": TRACE, "seed": 1, "load_cap": 1.1, "max_seconds": 5}},
            "placement: policy is greedy, so load_cap, max_seconds would have no effect: remove",
        ),
        (
            {"placement": {"file": TRACE, "seed": 0, "load_cap": 1.1, "prefer_local_replicas": True, "num_nodes": 1}},
            "placement: file is given, so load_cap, num_nodes, prefer_local_replicas, seed would have no effect",
        ),
        ({"migration": {"max_bytes": 1}}, "migration.max_bytes: unknown key"),
        ({"migration": {"max_bytes_per_s": 0}}, f"migration.max_bytes_per_s: {ABOVE_0}, got 0"),
        ({"migration": {"max_bytes_per_s": "1 GB"}}, "migration.max_bytes_per_s: Input should be a valid number"),
        ({"migration": {"round_s": -1}}, f"migration.round_s: {ABOVE_0}, got -1"),
        ({"membership": {"lost_after": 1}}, "membership.lost_after: unknown key"),
        ({"membership": {"heartbeat_s": 0}}, f"membership.heartbeat_s: {ABOVE_0}, got 0"),
        (
            {"membership": {"lost_after_s": 1.5}},
            "membership: lost_after_s is 1.5, expected at least twice heartbeat_s (1.0)",
        ),
        ({"membership": {"replace_after_s": -1}}, f"membership.replace_after_s: {AT_LEAST_0}, got -1"),
        ({"membership": {"retry_lost_after_s": 0}}, f"membership.retry_lost_after_s: {ABOVE_0}, got 0"),
        ({"membership": {"drain_s": -1}}, f"membership.drain_s: {AT_LEAST_0}, got -1"),
    ],
)
def test_a_mistake_in_user_config_is_named(sections: dict[str, Any], expected: str) -> None:
    assert refusal(with_live(**sections)).startswith(f"{HERE}.deployments[1].user_config.{expected}")


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ("migration", "max_bytes_per_s"),
        ("migration", "round_s"),
        ("membership", "heartbeat_s"),
        ("placement", "protect"),
    ],
)
def test_what_is_no_number_is_refused(section: str, key: str) -> None:
    assert f"user_config.{section}.{key}: " in refusal(with_live(**{section: {key: float("nan")}}))


def test_every_mistake_has_a_line_of_its_own() -> None:
    lines = refusal(with_live(migration={"round_s": 0, "speed": 1}, membership={"drain_s": -1})).splitlines()
    places = [line.split(": ")[1].removeprefix("applications[0].deployments[1].user_config.") for line in lines]
    assert sorted(places) == ["membership.drain_s", "migration.round_s", "migration.speed"]


def test_a_policy_for_local_replicas_needs_routers_that_prefer_them() -> None:
    placement = {"policy": "optimized", "trace": TRACE, "num_nodes": 3, "prefer_local_replicas": True}
    data = with_live(placement=placement)
    assert "but transport.prefer_local_replicas is not" in refusal(data)
    data["applications"][1]["args"]["transport"]["prefer_local_replicas"] = True
    assert MeshConfig.from_serve_config(data).live.placement.prefer_local_replicas


def test_what_is_at_the_border_is_accepted() -> None:
    assert parse(LiveConfig, {"migration": {"max_bytes_per_s": None}}).migration.max_bytes_per_s is None
    section = PlacementSection(file="f", min_replicas=2, protect=0.5, spare_slots=0)
    assert (section.min_replicas, section.protect, section.spare_slots) == (2, 0.5, 0), "limits hold for a file too"
    assert MembershipSection(heartbeat_s=5, lost_after_s=10).lost_after_s == 10


# Paths ----------------------------------------------------------------------------------------------------------------


def test_paths_of_user_config_are_relative_to_the_files_folder(tmp_path: Path) -> None:
    Placement.linear(4, 32, 3).save(tmp_path / "placement.json")
    path = tmp_path / "mesh.yaml"
    path.write_text(yaml.safe_dump(with_live(placement={"file": "placement.json"})))
    mesh = MeshConfig.from_file(path)
    assert mesh.live.placement.file == str(tmp_path / "placement.json")
    handed = mesh.serve["applications"][0]["deployments"][CONTROLLER]["user_config"]
    assert handed == {"placement": {"file": str(tmp_path / "placement.json")}}
    assert MeshConfig.from_serve_config(mesh.serve).live == mesh.live, "what is handed to Serve needs no folder"


def test_user_config_stays_as_written_where_that_means_the_same() -> None:
    """So that serve deploy of the same file finds no change."""
    live = {"placement": {"policy": "greedy", "trace": TRACE}, "membership": {"heartbeat_s": 2}}
    mesh = MeshConfig.from_serve_config(with_live(**live))
    assert mesh.live.placement.trace == str(TINY.parents[1] / TRACE)
    assert mesh.serve["applications"][0]["deployments"][CONTROLLER]["user_config"] == live


def test_reading_a_config_leaves_it_as_it_is() -> None:
    data = with_live(placement={"policy": "greedy", "trace": TRACE})
    before = copy.deepcopy(data)
    MeshConfig.from_serve_config(data)
    assert data == before


def test_portable_gives_what_was_written_or_the_same_with_absolute_paths(tmp_path: Path) -> None:
    (tmp_path / "trace.npz").touch()
    near, far = ({"placement": {"policy": "greedy", "trace": path}} for path in (TRACE, "trace.npz"))
    assert portable(near, parse(LiveConfig, near)) is near
    config = parse(LiveConfig, far, folder=tmp_path)
    assert portable(far, config) == {"placement": {"policy": "greedy", "trace": str(tmp_path / "trace.npz")}}
    assert parse(LiveConfig, portable(far, config)) == config
