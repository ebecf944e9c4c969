"""What people see of the controller's answers, key by key, and that they travel as Ray carries them."""

from __future__ import annotations

import pickle

import numpy as np

from cluster.mesh.messages import (
    ControllerStatus,
    CopyReport,
    HistoryEntry,
    JoinAnswer,
    MigrationView,
    PlacementView,
    PlanView,
    RouterView,
    SeatView,
    ShardOrder,
    Times,
)
from experts.protocol.orders import CopyOrder, CopyResult
from placement.placement import Placement
from tests.support.rosters import endpoint
from tests.support.serve.statuses import shard_status

MIGRATION = MigrationView(4, "command", "copying", True, False, 2, 5, 50, 3, 7, 70, 1, 8, 0, "")


COUNTERS = ("reports", "tokens", "windows", "plans", "moves", "undone", "failures")  # of the autopilot


def test_the_status_as_people_see_it() -> None:
    starting = SeatView("s0", "n", 0, False, "joining", 0, 0, 0, 1.5, None, None)
    serving = SeatView("s1", "n", 1, True, "filling", 5, 6, 2, 0.5, 11, shard_status(1))
    status = ControllerStatus(
        "life", 5, False, [0], 2, MIGRATION, {"r1": RouterView(4, {0: "b"}, 0.25)}, [starting, serving]
    )
    seat = {"shard_id": "s0", "node_id": "n", "rank": 0, "serving": False, "state": "joining", "num_slots": 0}
    seat |= {"experts_held": 0, "experts_missing": 0, "silent_s": 1.5, "pid": None}
    of_the_other = {"shard_id": "s1", "rank": 1, "serving": True, "state": "filling", "num_slots": 5}
    of_the_other |= {"experts_held": 6, "experts_missing": 2, "silent_s": 0.5, "pid": 11}
    assert status.to_dict() == {
        "term": "life",
        "epoch": 5,
        "complete": False,
        "missing_ranks": [0],
        "num_ranks": 2,
        "migration": {
            **{"target_version": 4, "origin": "command", "phase": "copying", "moving": True, "paused": False},
            **{"copies_in_flight": 2, "copies_left": 5, "bytes_left": 50, "rounds": 3, "copies": 7},
            **{"copied_bytes": 70, "failed_copies": 1, "sole_copies": 8, "unserved": 0, "problem": ""},
        },
        "routers": {"r1": {"epoch": 4, "lost": {0: "b"}, "silent_s": 0.25}},
        "shards": [seat, {**shard_status(1).to_dict(), **seat, **of_the_other}],
        "refusal": "",
        "autopilot": {
            **{"mode": "off", "state": "off", "frozen": "", "routers": 0, "drifting": 0, "cool_down_left_s": 0.0},
            **{"window": None, "last": None, "problem": "", "counters": dict.fromkeys(COUNTERS, 0)},
        },
    }


def test_the_placement_as_people_see_it() -> None:
    published, target = Placement.linear(1, 2, 2), Placement.linear(1, 2, 1)
    view = PlacementView(3, published, [[[0]], [[1]]], 2, target)
    assert view.to_dict() == {
        "epoch": 3,
        "placement": published.to_json(),
        "experts_of_rank": [[[0]], [[1]]],
        "target_version": 2,
        "target": target.to_json(),
    }
    assert PlacementView(3, published, [], 0, None).to_dict()["target"] is None


def test_a_plan_and_the_history_as_people_see_them() -> None:
    assert PlanView(True, 0, 2, 3, {"node": 30}, 0.5, "").to_dict() == {
        **{"accepted": True, "target_version": 0, "rounds": 2, "copies": 3, "bytes_by_nearness": {"node": 30}},
        **{"expected_s": 0.5, "reason": ""},
    }
    assert HistoryEntry(2, "command", 1.0, None, "under way", 3, 30).to_dict() == {
        **{"version": 2, "origin": "command", "begun": 1.0, "ended": None, "outcome": "under way"},
        **{"copies": 3, "copied_bytes": 30},
    }


def test_a_placement_arrives_as_it_was_sent() -> None:
    sent = JoinAnswer(1, "", False, 4, 3, Placement.linear(2, 6, 3), Times(1, 5, 3))
    assert sent.placement is not None
    assert sent.placement.slots_LER is not None
    got = pickle.loads(pickle.dumps(sent))
    assert got == sent
    assert not got.placement.physical_to_logical_map.flags.writeable
    assert "slots_LER" not in vars(got.placement), "tables that can be made again do not travel"


def test_orders_and_reports_arrive_as_they_were_sent() -> None:
    order = ShardOrder(3, ((0, 1),), (CopyOrder(1, 2, (endpoint(0), endpoint(2))),), 1e9)
    assert pickle.loads(pickle.dumps(order)) == order
    report = CopyReport("s", np.array([[True, False]]), (CopyResult(0, 1, "shm", 7, 0.5),))
    got = pickle.loads(pickle.dumps(report))
    assert (got.shard_id, got.results) == (report.shard_id, report.results)
    assert np.array_equal(got.held_LE, report.held_LE)
