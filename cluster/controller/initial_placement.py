"""From a config to the placement that its shards load, checked against the checkpoint before anything is started."""

from __future__ import annotations

from cluster.config.apps import ExpertsAppConfig
from cluster.config.experts_sections import PlacementSection
from cluster.config.parse import ConfigError
from experts.checkpoint import CheckpointError, ExpertCheckpoint
from experts.model.spec import ExpertSpec
from placement.placement import Placement
from placement.policy import build_placement
from placement.traces.trace import ActivationTrace


def read_spec(config: ExpertsAppConfig) -> ExpertSpec:
    """What the checkpoint says of its experts, all of which are there. ConfigError with the reader's reason."""
    try:
        checkpoint = ExpertCheckpoint.open(config.model.path)
        checkpoint.check()
        return checkpoint.spec
    except CheckpointError as error:
        raise ConfigError(f"model.path: {error}") from None


def plan_placement(config: ExpertsAppConfig) -> Placement:
    """The placement of a config: read from placement.file, or made by placement.policy. Same config, same placement.

    Raises ConfigError naming both numbers where slots do not hold the experts or a file is for another model.
    """
    spec = read_spec(config)
    num_ranks = config.shards.count
    check_slots(config, spec.num_experts)
    if config.placement.file is not None:
        placement = _from_file(config.placement.file)
        _check_file(config.placement, placement)
    else:
        placement = _by_policy(config, spec)
    for what, found, expected in (
        ("layers", placement.num_layers, spec.num_layers),
        ("experts", placement.num_experts, spec.num_experts),
        ("ranks", placement.num_ranks, num_ranks),
    ):
        if found != expected:
            raise ConfigError(f"placement: it is for {found} {what}, expected {expected}")
    if config.shards.slots_per_rank is not None and placement.slots_per_rank > config.shards.slots_per_rank:
        raise ConfigError(
            f"placement: it needs {placement.slots_per_rank} slots a rank, shards.slots_per_rank is "
            f"{config.shards.slots_per_rank}"
        )
    return placement


def check_plan(config: ExpertsAppConfig) -> None:
    """Raises ConfigError for whatever `plan_placement` refuses, without a search."""
    section = config.placement
    if section.policy == "optimized":
        # Both plan for the same request and trace; the greedy one is at once done with them.
        section = section.model_copy(update={"policy": "greedy"})
    plan_placement(config.model_copy(update={"placement": section}))


def check_slots(config: ExpertsAppConfig, num_experts: int) -> None:
    """Raises ConfigError unless the shards' slots hold `min_replicas` of every expert of a layer."""
    slots, num_ranks = config.shards.slots_per_rank, config.shards.count
    needed = num_experts * config.placement.min_replicas
    if slots is not None and slots * num_ranks < needed:
        raise ConfigError(
            f"shards.slots_per_rank is {slots}, so {num_ranks} shards have {slots * num_ranks} slots in a layer for "
            f"{num_experts} experts of {config.placement.min_replicas} replicas; expected {-(-needed // num_ranks)}"
        )


def _from_file(path: str) -> Placement:
    try:
        return Placement.load(path)
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(f"placement.file: {path}: {error}") from None


def _check_file(section: PlacementSection, placement: Placement) -> None:
    """Raises ConfigError where the section says other than the placement in its file."""
    if "num_nodes" in section.model_fields_set and section.num_nodes != placement.num_nodes:
        raise ConfigError(
            f"placement.num_nodes is {section.num_nodes}, the placement in {section.file} is for "
            f"{placement.num_nodes}; leave it out"
        )
    fewest = int(placement.logical_replica_count.min())
    if fewest < section.min_replicas:
        raise ConfigError(
            f"placement.min_replicas is {section.min_replicas}, the placement in {section.file} has experts of "
            f"{fewest} {'replica' if fewest == 1 else 'replicas'}"
        )


def _by_policy(config: ExpertsAppConfig, spec: ExpertSpec) -> Placement:
    section = config.placement
    try:
        return build_placement(
            section.policy,
            num_layers=spec.num_layers,
            num_experts=spec.num_experts,
            num_ranks=config.shards.count,
            num_nodes=section.num_nodes,
            slots_per_rank=config.shards.slots_per_rank,
            min_replicas=section.min_replicas,
            trace=None if section.trace is None else ActivationTrace.load_npz(section.trace),
            seed=section.seed,
            time_budget_s=section.max_seconds,
            load_cap=section.load_cap,
            prefer_local_replicas=section.prefer_local_replicas,
        )
    except (ValueError, OSError) as error:
        raise ConfigError(f"placement: {error}") from None
