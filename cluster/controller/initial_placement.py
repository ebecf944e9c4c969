"""From a config to the placement its shards load, checked against the checkpoint before anything starts."""

from __future__ import annotations

from cluster.config.apps import ExpertsAppConfig
from cluster.config.experts_sections import PlacementSection
from cluster.config.parse import ConfigError
from experts.checkpoint import CheckpointError, ExpertCheckpoint
from experts.model.spec import ExpertSpec
from placement.placement import ModelSize, Placement, check_same_model
from placement.policy import build_placement, fewest_slots
from placement.search.problem import PlanRequest
from placement.traces.trace import ActivationTrace


def read_spec(config: ExpertsAppConfig) -> ExpertSpec:
    """The spec of the checkpoint's experts. Raises ConfigError with the reader's reason, or if an expert is missing.

    Of a model that is not a folder, this fetches config.json and the index.
    """
    try:
        checkpoint = ExpertCheckpoint.open(config.model.path)
        checkpoint.check()
        return checkpoint.spec
    except CheckpointError as error:
        raise ConfigError(f"model.path: {error}") from None


def plan_placement(config: ExpertsAppConfig) -> Placement:
    """The placement of a config, from placement.file or by placement.policy. The same config gives the same placement.

    Raises ConfigError with both numbers if slots do not hold the experts or a file is for another model.
    """
    spec = read_spec(config)
    check_slots(config, spec.num_experts)
    if config.placement.file is not None:
        placement = _from_file(config.placement.file)
        _check_file(config.placement, placement)
    else:
        placement = _by_policy(config, spec)
    try:
        check_same_model("it", placement, "the model", spec)
    except ValueError as error:
        raise ConfigError(f"placement: {error}") from None
    if placement.num_ranks != config.shards.count:
        raise ConfigError(f"placement: it is for {placement.num_ranks} ranks, expected {config.shards.count}")
    if config.shards.slots_per_rank is not None and placement.slots_per_rank > config.shards.slots_per_rank:
        raise ConfigError(
            f"placement: it needs {placement.slots_per_rank} slots a rank, shards.slots_per_rank is "
            f"{config.shards.slots_per_rank}"
        )
    return placement


def check_plan(config: ExpertsAppConfig) -> None:
    """Raise ConfigError for everything `plan_placement` refuses, without a search."""
    section = config.placement
    if section.policy == "optimized":
        # Takes the same request and trace, and is done in no time.
        section = section.model_copy(update={"policy": "greedy"})
    plan_placement(config.model_copy(update={"placement": section}))


def check_slots(config: ExpertsAppConfig, num_experts: int) -> None:
    """Raise ConfigError unless the shards' slots hold `min_replicas` replicas of every expert of a layer."""
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
    """Raise ConfigError if the section contradicts the placement in its file."""
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


def plan_request(config: ExpertsAppConfig, model: ModelSize) -> PlanRequest:
    """What the config asks of a policy. Raises ValueError where its settings contradict one another."""
    section, num_ranks = config.placement, config.shards.count
    slots = config.shards.slots_per_rank
    if slots is None:
        slots = fewest_slots(model, num_ranks, section.num_nodes, section.min_replicas)
    return PlanRequest(
        num_ranks=num_ranks,
        num_nodes=section.num_nodes,
        slots_per_rank=slots,
        load_cap=section.load_cap,
        min_replicas=section.min_replicas,
        prefer_local_replicas=section.prefer_local_replicas,
        seed=section.seed,
        seconds=section.max_seconds,
    )


def _by_policy(config: ExpertsAppConfig, model: ModelSize) -> Placement:
    trace_path = config.placement.trace
    try:
        request = plan_request(config, model)
        trace = None if trace_path is None else ActivationTrace.load_npz(trace_path)
        return build_placement(config.placement.policy, request, model, trace)
    except (ValueError, OSError) as error:
        raise ConfigError(f"placement: {error}") from None
