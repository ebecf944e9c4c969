"""The policies as Serve calls them: on what replicas report, with Serve's delays, in a process without our code."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from ray import cloudpickle
from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from cluster.autoscaling import policies
from tests.support.scaling_stats import ROUTER, SHARD

CONFIG = AutoscalingConfig(min_replicas=0, max_replicas=9, upscale_delay_s=0, downscale_delay_s=0)


def context(replicas: list[dict[str, float]], target: int, state: dict[str, Any] | None = None, **more: Any) -> Any:
    """What Serve would hand over, of replicas with these statistics."""
    names = {name for stats in replicas for name in stats}
    means = {name: {i: stats[name] for i, stats in enumerate(replicas) if name in stats} for name in names}
    raw = {
        name: {i: [SimpleNamespace(value=-1.0), SimpleNamespace(value=value)] for i, value in values.items()}
        for name, values in means.items()
    }
    return SimpleNamespace(
        **{"policy_state": state or {}, "target_num_replicas": target, "current_num_replicas": len(replicas)},
        **{"aggregated_metrics": means, "raw_metrics": raw, "config": CONFIG},
        **{"capacity_adjusted_min_replicas": 0, "capacity_adjusted_max_replicas": 9},
        **{"total_queued_requests": 0.0, "total_num_requests": 0.0, **more},
    )


def test_shards_follow_what_they_report() -> None:
    calm, busy = SHARD, {**SHARD, "busy": 0.8}
    assert policies.shards(context([calm] * 2, 2))[0] == 2
    assert policies.shards(context([busy] * 2, 2))[0] == 4
    assert policies.shards(context([calm] * 4, 4))[0] == 3


@pytest.mark.parametrize(
    "replicas",
    [
        [SHARD] * 3,  # one of four is lost
        [SHARD] * 3 + [{**SHARD, "empty": 1.0}],
        [{**SHARD, "moving": 1.0}] * 4,
        [SHARD] * 3 + [{"busy": 0.0, "empty": 0.0}],  # it has not heard of the controller yet
    ],
)
def test_no_shard_goes_while_anything_changes(replicas: list[dict[str, float]]) -> None:
    assert policies.shards(context(replicas, 4))[0] == 4


@pytest.mark.parametrize("policy", [policies.shards, policies.routers])
def test_without_statistics_everything_stays(policy: Any) -> None:
    assert policy(context([], 3, {"balance": 0.9})) == (3, {"balance": 0.9})


def test_the_balance_of_a_settled_mesh_is_remembered_while_a_shard_fills() -> None:
    uneven = [{**SHARD, "busy": busy} for busy in (0.5, 0.3)]
    _, state = policies.shards(context(uneven, 2))
    assert state["balance"] == pytest.approx(0.8)
    filling = [*uneven, {**SHARD, "busy": 0.0, "empty": 1.0}]
    assert policies.shards(context(filling, 3, state))[1]["balance"] == state["balance"]


def test_routers_follow_what_they_report_and_what_waits_for_them() -> None:
    assert policies.routers(context([ROUTER], 1))[0] == 1
    assert policies.routers(context([{**ROUTER, "waiting": 20.0}], 1))[0] == 3
    assert policies.routers(context([ROUTER], 1, total_queued_requests=20.0))[0] == 3
    assert policies.routers(context([{**ROUTER, "kv_cache": 0.9}], 1))[0] == 2
    assert policies.routers(context([{**ROUTER, "queue_ms": 1500.0, "first_token_ms": 1600.0}], 1))[0] == 2


def test_the_last_router_goes_only_without_any_request() -> None:
    idle = {**ROUTER, "running": 0.0, "kv_cache": 0.0, "first_tokens_per_s": 0.0}
    assert policies.routers(context([idle], 1))[0] == 0
    assert policies.routers(context([{**idle, "running": 0.01}], 1))[0] == 1


def test_serve_wakes_the_first_router_for_a_request_that_waits() -> None:
    policy = _apply_autoscaling_config(policies.routers)
    assert policy(context([], 0))[0] == 0
    assert policy(context([], 0, total_num_requests=1.0, total_queued_requests=1.0))[0] == 1


@pytest.mark.parametrize("name", ["shards", "routers"])
def test_serve_pickles_a_policy_with_all_that_it_needs(name: str) -> None:
    """A process that has none of the project's code runs it."""
    definition = AutoscalingPolicy(policy_function=f"cluster.autoscaling.policies:{name}")
    assert callable(_resolve_policy_callable(definition))
    code = (
        "import sys, types, ray.cloudpickle as pickle\n"
        "policy = pickle.loads(sys.stdin.buffer.read())\n"
        "nothing = {'aggregated_metrics': {}, 'raw_metrics': {}}\n"
        "context = types.SimpleNamespace(policy_state={}, target_num_replicas=3, **nothing)\n"
        "print(policy(context), [name for name in sys.modules if name.startswith('cluster')])"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code], input=definition.get_serialized_policy_def(), capture_output=True, cwd="/"
    )
    assert done.stdout.decode().strip() == "(3, {}) []", done.stderr.decode()
    assert cloudpickle.loads(definition.get_serialized_policy_def()).__name__ == name
