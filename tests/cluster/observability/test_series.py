"""The tables of series against made-up statuses: each value by its name and labels, told nowhere else."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from cluster.keys.messages import Totals
from cluster.observability.controller_series import CONTROLLER_SERIES, STATES
from cluster.observability.key_series import KEY_SERIES, KeysView
from cluster.observability.reference import SECTIONS
from cluster.observability.router_series import ROUTER_SERIES
from cluster.observability.series import Series
from cluster.observability.shard_series import SHARD_SERIES, ShardFacts
from experts.protocol.status import OffloadStatus
from tests.support.serve.statuses import (
    autopilot_view,
    controller_status,
    migration_view,
    router_status,
    seat_view,
    shard_status,
)

Found = dict[tuple[str, ...], float]


def read(table: Sequence[Series[Any]], facts: Any) -> Found:
    """Values by (name without prefixes, values of the labels in their order)."""
    found = {}
    for series in table:
        for labels, value in series.samples(facts).items():
            assert len(labels) == len(series.labels)
            found[series.exported_name.removeprefix("ray_expertmesh_"), *labels] = value
    return found


def test_every_figure_of_a_router() -> None:
    found = read(ROUTER_SERIES, router_status())
    stages = {key: value for key, value in found.items() if key[0].startswith("dispatch_stage")}
    assert {key: value for key, value in found.items() if key not in stages} == {
        ("steps_total",): 10,
        ("dispatches_total",): 40,
        ("rows_total",): 80,
        ("visits_total",): 120,
        ("failovers_total",): 1,
        ("fallback_pairs_total",): 2,
        ("no_slot_pairs_total",): 5,
        ("fallback_seconds_total",): 0.0025,
        ("refused_requests_total",): 6,
        ("sent_bytes_total",): 1000,
        ("received_bytes_total",): 900,
        ("sent_rows_total", "0"): 30,
        ("sent_rows_total", "1"): 50,
        ("sent_pairs_total", "0"): 60,
        ("sent_pairs_total", "1"): 100,
        ("epoch",): 4,
        ("uncovered_pairs",): 12,
        ("fallback_cached_bytes",): 4096,
        ("swap_max_seconds",): pytest.approx(70.5e-6),
        ("balancedness",): 0.75,
        ("requests_unfinished",): 3,
        ("router_resident_bytes",): 8,
        ("shard_connected", "0"): 0,
        ("shard_connected", "1"): 1,
    }
    for stage in ("wait", "combine"):
        assert found["dispatch_stage_seconds_total", stage] == pytest.approx(10.000035, abs=1e-9)
        within = {bound: found["dispatch_stages_within_total", stage, bound] for bound in ("1e-05", "2e-05", "5.0")}
        assert (within, found["dispatch_stages_within_total", stage, "+Inf"]) == ({"1e-05": 1, "2e-05": 3, "5.0": 3}, 4)
    assert found["dispatch_stages_within_total", "plan_pack", "+Inf"] == 0
    assert len(stages) < 100


def test_every_figure_of_a_shard() -> None:
    status = shard_status(errors=9, compute_ns=6_500_000_000)
    found = read(SHARD_SERIES, ShardFacts(status, resident_bytes=1234, device_bytes=None))
    by_source = {
        "shard_copies_total": {"process": 0, "shm": 6, "tcp": 0, "checkpoint": 1},
        "shard_copied_bytes_total": {"process": 0, "shm": 600, "tcp": 0, "checkpoint": 100},
    }
    expected: Found = {
        (name, "1", source): value for name, values in by_source.items() for source, value in values.items()
    }
    assert found == expected | {
        ("shard_requests_total", "1"): 40,
        ("shard_rows_total", "1"): 50,
        ("shard_pairs_total", "1"): 100,
        ("shard_errors_total", "1"): 9,
        ("shard_compute_seconds_total", "1"): 6.5,
        ("shard_resident_bytes", "1"): 1234,
        ("shard_loaded_bytes", "1"): 77,
        ("shard_experts", "1"): 12,
        ("shard_slots", "1"): 8,
        ("shard_slots_free", "1"): 3,
        ("shard_routers", "1"): 1,
        ("shard_copies_in_flight", "1"): 1,
        ("shard_failed_copies_total", "1"): 2,
        ("shard_copy_seconds_total", "1"): 1.25,
        ("shard_handed_out_total", "1"): 14,
        ("shard_handed_out_bytes_total", "1"): 1400,
    }
    offload = OffloadStatus("native", 4, 4000, 5000, 60, 20, 9000, 2.5, 1.5, 7, 3, 1e9)
    offloading = read(SHARD_SERIES, ShardFacts(replace(status, offload=offload), 1234, None))
    assert dict(offloading.items() - found.items()) == {
        ("shard_offload_resident_bytes", "1"): 4000,
        ("shard_offload_hits_total", "1"): 60,
        ("shard_offload_misses_total", "1"): 20,
        ("shard_offload_copied_bytes_total", "1"): 9000,
        ("shard_offload_copy_seconds_total", "1"): 2.5,
        ("shard_offload_wait_seconds_total", "1"): 1.5,
        ("shard_offload_prefetched_total", "1"): 7,
        ("shard_offload_prefetches_wasted_total", "1"): 3,
    }
    on_gpu = read(SHARD_SERIES, ShardFacts(status, 1234, device_bytes=99))
    assert on_gpu.items() - found.items() == {(("shard_device_bytes", "1"), 99)}


def test_every_figure_of_the_controller(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.time", lambda: 1e9)
    states = {("rank_state", str(rank), state): 0.0 for rank in (0, 1) for state in STATES}
    states |= {("rank_state", "0", "joining"): 1, ("rank_state", "1", "filling"): 1}
    assert read(CONTROLLER_SERIES, controller_status()) == states | {
        ("controller_looked_timestamp_seconds",): 1e9,
        ("controller_epoch",): 5,
        ("ranks",): 2,
        ("ranks_missing",): 1,
        ("rank_experts_held", "0"): 0,
        ("rank_experts_held", "1"): 12,
        ("rank_experts_missing", "0"): 0,
        ("rank_experts_missing", "1"): 7,
        ("experts_sole",): 13,
        ("experts_unserved",): 5,
        ("placement_target_version",): 6,
        ("migration_paused",): 0,
        ("migration_copies_in_flight",): 2,
        ("migration_copies_left",): 9,
        ("migration_left_bytes",): 900_000,
        ("migration_rounds_total",): 3,
        ("migration_copies_total",): 21,
        ("migration_copied_bytes_total",): 2_100_000,
        ("migration_failed_copies_total",): 4,
        ("autopilot_frozen",): 1,
        ("autopilot_drifting_windows",): 2,
        ("autopilot_drift",): 0.125,
        ("autopilot_fan_out",): 2.5,
        ("autopilot_balancedness",): 0.75,
        ("autopilot_predicted_gain",): 0.0625,
        ("autopilot_measured_gain",): 0.03125,
        ("autopilot_reports_total",): 14,
        ("autopilot_observed_tokens_total",): 15_000,
        ("autopilot_windows_total",): 16,
        ("autopilot_plans_total",): 5,
        ("autopilot_moves_total",): 4,
        ("autopilot_undone_total",): 1,
        ("autopilot_failures_total",): 3,
    }


def test_what_is_not_known_has_no_sample() -> None:
    status = controller_status(
        shards=[],
        migration=migration_view(target_version=0, paused=True),
        autopilot=autopilot_view(window=None, last=None),
    )
    found = read(CONTROLLER_SERIES, status)
    assert found["migration_paused",] == 1
    assert not found.keys() & {("autopilot_drift",), ("autopilot_measured_gain",), ("rank_state",)}
    one_more = controller_status(shards=[seat_view(rank) for rank in range(4)], autopilot=status.autopilot)
    assert len(read(CONTROLLER_SERIES, one_more)) - len(found) == 4 * (len(STATES) + 2), "few series a rank"


def test_every_figure_of_keys() -> None:
    found = read(KEY_SERIES, KeysView({"team": Totals(5, 50, 9, refused=2)}, current=False))
    assert found == {
        ("key_requests_total", "team"): 5,
        ("key_refused_total", "team"): 2,
        ("key_prompt_tokens_total", "team"): 50,
        ("key_completion_tokens_total", "team"): 9,
        ("keys_current",): 0,
    }


def test_names_are_unique_have_base_units_and_leave_serves_labels_alone() -> None:
    """https://prometheus.io/docs/practices/naming/"""
    tables = [series for table in SECTIONS.values() for series in table]
    names = [series.name for series in tables]
    assert len(names) == len(set(names)) > 50
    wrong = re.compile(r"_(ms|us|ns|milliseconds|kb|mb|gb|kib|mib|percent|total)$|_bytes_|_seconds_")
    assert [name for name in names if wrong.search(name)] == []
    assert not {"application", "deployment", "replica"} & {label for series in tables for label in series.labels}
