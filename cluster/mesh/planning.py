"""From the section `placement` to a placement for the shards at hand, checked before anything moves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from cluster.config.apps import ExpertsAppConfig
from cluster.config.live_sections import PlacementSection
from cluster.config.parse import ConfigError
from experts.checkpoint import CheckpointError, ExpertCheckpoint
from experts.model.spec import ExpertSpec
from placement.placement import ModelSize, Placement, check_same_model
from placement.search.few_copies.resize import resize

LEAVE_LOADS_ALONE = 0.9  # a tolerance of `resize`: the policy has balanced them
PLANNING_GRACE_S = 300.0  # beyond placement.max_seconds: a planner that is compiled first, on a busy machine


@dataclass(frozen=True)
class ModelFacts:
    """What planning has to know about a model."""

    num_layers: int  # MoE layers
    num_experts: int  # of a layer


@dataclass(frozen=True)
class ShardsAtHand:
    """The shards to plan for. `slots_per_rank` of a layer; None where they follow from the placement."""

    num_ranks: int
    num_nodes: int  # with equally many ranks each, in order; 1 leaves nodes out
    slots_per_rank: int | None


def read_spec(config: ExpertsAppConfig) -> ExpertSpec:
    """The spec of the checkpoint's experts. Raises ConfigError with the reader's reason, or if an expert is missing.

    Of a model that is not a folder, this fetches config.json and the index.
    """
    try:
        checkpoint = ExpertCheckpoint.open(config.model.path, config.model.mtp)
        checkpoint.check()
        return checkpoint.spec
    except CheckpointError as error:
        raise ConfigError(f"model.path: {error}") from None


def plan_placement(section: PlacementSection, model: ModelSize, shards: ShardsAtHand) -> Placement:
    """A placement, from placement.file or by placement.policy; the same arguments give the same one.

    Raises ConfigError with both numbers if slots do not hold the experts or a file is for other shards.
    """
    num_nodes = _num_nodes(section, shards)
    usable = usable_slots(section, model, shards)
    if section.trace is not None and (section.file is not None or section.policy == "linear"):
        _check_trace(section.trace, model)
    if section.file is not None:
        return _from_file(section, model, shards)
    if section.policy == "linear":
        try:
            placement = Placement.linear(
                model.num_layers, model.num_experts, shards.num_ranks, num_nodes, section.min_replicas
            )
        except ValueError as error:
            raise ConfigError(f"placement: {error}") from None
        if usable is not None and placement.slots_per_rank > usable:
            raise ConfigError(
                f"placement: in linear order {shards.num_ranks} shards need {placement.slots_per_rank} slots in a "
                f"layer, they have {usable}: raise shards.slots_per_rank or the number of shards"
            )
        return placement
    return _by_policy(section, model, shards, num_nodes, usable)


def usable_slots(section: PlacementSection, model: ModelSize, shards: ShardsAtHand) -> int | None:
    """Slots of a layer and shard to plan with: without the spare ones, if the others suffice. None: as needed.

    Raises ConfigError if the slots do not hold `min_replicas` replicas of every expert.
    """
    slots, needed = shards.slots_per_rank, model.num_experts * section.min_replicas
    if slots is None:
        return None
    if slots * shards.num_ranks < needed:
        raise ConfigError(
            f"placement: {shards.num_ranks} shards of {slots} slots have {slots * shards.num_ranks} slots in a layer, "
            f"{model.num_experts} experts of {section.min_replicas} "
            f"{'replica' if section.min_replicas == 1 else 'replicas'} need {needed}: expected shards.slots_per_rank "
            f"{-(-needed // shards.num_ranks) + section.spare_slots}, placement.spare_slots among them, or more shards"
        )
    without_spare = slots - section.spare_slots
    return without_spare if without_spare * shards.num_ranks >= needed else slots


def slots_to_allocate(section: PlacementSection, placement: Placement, shards: ShardsAtHand) -> int:
    """Slots of a layer that each shard allocates."""
    if shards.slots_per_rank is not None:
        return shards.slots_per_rank
    return placement.slots_per_rank + section.spare_slots


@dataclass(frozen=True, eq=False)
class Plan:
    """A placement, and the load of each expert that it was planned for (float64 [L, E]; None: unknown)."""

    placement: Placement
    load_LE: np.ndarray | None


async def plan_in_a_process(section: PlacementSection, model: ModelFacts, shards: ShardsAtHand) -> Plan:
    """`plan_placement`; a search runs in a process of its own, whose memory and imports go with it.

    Raises ConfigError, also if it takes `placement.max_seconds` and five minutes.
    """
    if section.file is None and section.policy == "linear" and section.trace is None:
        return Plan(with_protected(section, plan_placement(section, model, shards), shards, None), None)
    timeout_s = section.max_seconds + PLANNING_GRACE_S
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "cluster.mesh.planning"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    request = {"section": section.model_dump(exclude_unset=True), "model": asdict(model), "shards": asdict(shards)}
    try:
        async with asyncio.timeout(timeout_s):
            answer, log = await process.communicate(json.dumps(request).encode())
    except TimeoutError:
        raise ConfigError(f"placement: no plan within {timeout_s:g} s") from None
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        last = log.decode(errors="replace").strip().splitlines()[-1:] or [f"exit status {process.returncode}"]
        raise ConfigError(f"placement: planning failed: {last[0]}")
    data: dict[str, Any] = json.loads(answer)
    if "error" in data:
        raise ConfigError(data["error"])
    load_LE = None if data["load"] is None else np.array(data["load"], np.float64)
    return Plan(with_protected(section, Placement.from_json(data["placement"]), shards, load_LE), load_LE)


def protected_experts(model: ModelSize, load_LE: np.ndarray | None, share: float) -> np.ndarray | None:
    """bool [L, E]: the most used experts that together make `share` of each layer's traffic; None for a share of 0."""
    if not share:
        return None
    shape = (model.num_layers, model.num_experts)
    load_LE = np.ones(shape) if load_LE is None else load_LE
    order_LE = np.argsort(-load_LE, axis=1, kind="stable")
    sorted_LE = np.take_along_axis(load_LE, order_LE, 1)
    before_LE = np.cumsum(sorted_LE, 1) - sorted_LE
    protected_LE = np.zeros(shape, np.bool_)
    np.put_along_axis(protected_LE, order_LE, before_LE < share * sorted_LE.sum(1, keepdims=True), 1)
    return protected_LE


def with_protected(
    section: PlacementSection, placement: Placement, shards: ShardsAtHand, load_LE: np.ndarray | None
) -> Placement:
    """The placement with second replicas of what `placement.protect` asks for, as far as slots allow."""
    protect_LE = protected_experts(placement, load_LE, section.protect)
    if protect_LE is None:
        return placement
    lacking_L = (protect_LE & (placement.logical_replica_count < 2)).sum(1)
    needed = int(((placement.physical_to_logical_map >= 0).sum(1) + lacking_L).max())
    slots = shards.slots_per_rank
    if slots is None:
        slots = max(placement.slots_per_rank, -(-needed // placement.num_ranks)) + section.spare_slots
    return resize(
        placement,
        slots_R=[slots] * placement.num_ranks,
        usable_R=[True] * placement.num_ranks,
        load_LE=load_LE,
        min_replicas=section.min_replicas,
        spare_slots=section.spare_slots,
        nodes=tuple(placement.node_of_rank_R.tolist()),
        num_nodes=placement.num_nodes,
        speed_R=placement.speed_R.tolist(),
        protect_LE=protect_LE,
        tolerance=LEAVE_LOADS_ALONE,
        fewer_replicas=True,
    )


def _num_nodes(section: PlacementSection, shards: ShardsAtHand) -> int:
    if section.num_nodes is None:
        return shards.num_nodes
    if shards.num_ranks % section.num_nodes:
        raise ConfigError(
            f"placement.num_nodes is {section.num_nodes}, but {shards.num_ranks} shards cannot be dealt evenly to so "
            "many nodes"
        )
    return section.num_nodes


def _from_file(section: PlacementSection, model: ModelSize, shards: ShardsAtHand) -> Placement:
    assert section.file is not None
    try:
        placement = Placement.load(section.file)
        check_same_model("it", placement, "the model", model)
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(f"placement.file: {section.file}: {error}") from None
    check_fits(f"placement.file: {section.file}", placement, shards.num_ranks, shards.slots_per_rank)
    fewest = int(placement.logical_replica_count.min())
    if fewest < section.min_replicas:
        raise ConfigError(
            f"placement.min_replicas is {section.min_replicas}, the placement in {section.file} has experts of "
            f"{fewest} {'replica' if fewest == 1 else 'replicas'}"
        )
    return placement


def _check_trace(trace: str, model: ModelSize) -> None:
    """A policy that plans for the trace checks it by itself."""
    from placement.traces.trace import ActivationTrace

    try:
        check_same_model("it", ActivationTrace.load_npz(trace), "the model", model)
    except (ValueError, OSError) as error:
        raise ConfigError(f"placement.trace: {trace}: {error}") from None


def check_fits(name: str, placement: Placement, num_ranks: int, slots: int | None) -> None:
    """Raise ConfigError with both numbers unless a placement is for so many ranks and slots."""
    if placement.num_ranks != num_ranks:
        raise ConfigError(f"{name}: it is for {placement.num_ranks} ranks, there are {num_ranks} shards")
    if slots is not None and placement.slots_per_rank > slots:
        raise ConfigError(f"{name}: it needs {placement.slots_per_rank} slots in a layer, the shards have {slots}")


def _by_policy(
    section: PlacementSection, model: ModelSize, shards: ShardsAtHand, num_nodes: int, usable: int | None
) -> Placement:
    # Here, since they import numba, which takes seconds and memory.
    from placement.policy import build_placement, fewest_slots
    from placement.precompile import ensure_compiled
    from placement.search.problem import PlanRequest
    from placement.traces.trace import ActivationTrace

    assert section.trace is not None
    try:
        request = PlanRequest(
            num_ranks=shards.num_ranks,
            num_nodes=num_nodes,
            slots_per_rank=usable or fewest_slots(model, shards.num_ranks, num_nodes, section.min_replicas),
            load_cap=section.load_cap,
            min_replicas=section.min_replicas,
            prefer_local_replicas=section.prefer_local_replicas,
            seed=section.seed,
            seconds=section.max_seconds,
        )
        if section.policy == "optimized":
            ensure_compiled()
        return build_placement(section.policy, request, model, ActivationTrace.load_npz(section.trace))
    except (ValueError, OSError) as error:
        raise ConfigError(f"placement: {error}") from None


def check_plan(section: PlacementSection, model: ModelSize, shards: ShardsAtHand) -> None:
    """Raise ConfigError for everything `plan_placement` refuses, without a search."""
    if section.policy == "optimized":
        # Takes the same request and trace, and is done in no time.
        section = section.model_copy(update={"policy": "greedy"})
    plan_placement(section, model, shards)


def main() -> None:
    """Plan what standard input asks for; the answer is one JSON object on standard output."""
    request = json.loads(sys.stdin.read())
    try:
        placement = plan_placement(
            PlacementSection.model_validate(request["section"]),
            ModelFacts(**request["model"]),
            ShardsAtHand(**request["shards"]),
        )
    except ConfigError as error:
        print(json.dumps({"error": str(error)}))
    else:
        print(json.dumps({"placement": placement.to_json(), "load": _load(request["section"].get("trace"))}))


def _load(trace: str | None) -> list[list[float]] | None:
    if trace is None:
        return None
    from placement.traces.trace import ActivationTrace

    load: list[list[float]] = ActivationTrace.load_npz(trace).load().tolist()
    return load


if __name__ == "__main__":
    main()
