"""Statuses as plain data: which keys people see, and that a misspelt one is an error."""

from __future__ import annotations

import json

import pytest

from experts.protocol.membership import AppliedMembership, Membership, ShardEndpoint
from experts.protocol.status import RouterStatus
from placement.placement import Placement
from tests.support.serve.statuses import router_status, shard_status

ROUTER_KEYS = (
    "router_id epoch num_ranks connected transports lost layers steps dispatches rows fan_out_sum failovers "
    "fallback_pairs bytes_sent bytes_received balancedness shard_rows shard_pairs last_success_age_s stage_us "
    "no_slot_pairs uncovered_pairs fallback_ms fallback_cached_bytes refused_requests swap_last_us swap_max_us "
    "params resident_bytes term pid unfinished_requests pool prompts_handed_over prompts_given_up workers"
)
SHARD_KEYS = (
    "rank epoch pid incarnation endpoint alive fault routers kernel loaded_experts loaded_bytes weights_digest "
    "requests rows pairs errors compute_ns last_error last_epoch num_slots free_slots copies copied_bytes "
    "copies_failed copies_in_flight copy_seconds handed_out handed_out_bytes offload"
)


def test_the_keys_that_people_see_stay() -> None:
    router, shard = router_status().to_dict(), shard_status().to_dict()
    assert list(router) == ROUTER_KEYS.split()
    assert list(router["stage_us"]) == ["plan_pack", "wait", "combine"]
    assert set(router["stage_us"]["wait"]) == {"sum", "count", "buckets", "bounds"}
    assert list(shard) == SHARD_KEYS.split()
    assert list(shard["endpoint"]) == ["rank", "incarnation", "host", "port", "host_id", "pid", "device"]


def test_a_router_status_survives_json() -> None:
    """Which makes the ranks strings, as some channels of vLLM may."""
    status = router_status()
    data = json.loads(json.dumps(status.to_dict()))
    assert list(data["lost"]) == ["0"]
    assert RouterStatus.from_dict(data) == status


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda data: data.pop("failovers"), r"RouterStatus: missing keys \['failovers'\], unknown keys \[\]"),
        (lambda data: data.update(failover=1), r"RouterStatus: missing keys \[\], unknown keys \['failover'\]"),
        (lambda data: data["stage_us"].pop("wait"), r"StageHistograms: missing keys \['wait'\]"),
        (lambda data: data["stage_us"]["wait"].update(mean=1), r"StageHistogram: missing .* unknown keys \['mean'\]"),
        (lambda data: data.update(stage_us=3), "StageHistograms: expected a mapping, got int"),
    ],
)
def test_a_missing_or_unknown_key_is_named(change: object, told: str) -> None:
    data = router_status().to_dict()
    change(data)  # type: ignore[operator]
    with pytest.raises(ValueError, match=told):
        RouterStatus.from_dict(data)


def test_memberships_and_what_became_of_them_survive_json() -> None:
    endpoint = ShardEndpoint(0, "a", "127.0.0.1", 1000, "host", 1)
    membership = Membership(3, Placement.linear(2, 6, 2), (endpoint, None))
    data = json.loads(json.dumps(membership.to_dict()))
    assert list(data) == ["epoch", "placement", "endpoints"]
    assert Membership.from_dict(data) == membership
    with pytest.raises(ValueError, match=r"Membership: missing keys \[\], unknown keys \['term'\]"):
        Membership.from_dict({**data, "term": "x"})
    del data["endpoints"][0]["port"]
    with pytest.raises(ValueError, match=r"ShardEndpoint: missing keys \['port'\]"):
        Membership.from_dict(data)

    applied = AppliedMembership(3, [0], {1: "gone"}, [1])
    data = json.loads(json.dumps(applied.to_dict()))
    assert AppliedMembership.from_dict(data) == applied
    with pytest.raises(ValueError, match=r"AppliedMembership: missing keys \['refused'\]"):
        AppliedMembership.from_dict({key: value for key, value in data.items() if key != "refused"})
