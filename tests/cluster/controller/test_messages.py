"""What people see of the controller's answers, key by key, and that they travel as Ray carries them."""

from __future__ import annotations

import pickle

from cluster.controller.messages import JoinAnswer, PlacementView
from placement.placement import Placement
from tests.support.serve.statuses import controller_status, shard_status


def test_the_status_as_people_see_it() -> None:
    data = controller_status().to_dict()
    assert data == {
        "term": "life",
        "epoch": 5,
        "complete": False,
        "missing_ranks": [0],
        "num_ranks": 2,
        "placement_digest": "p",
        "routers": {"r1": {"epoch": 4, "lost": {0: "b"}, "silent_s": 0.25}},
        "shards": [
            {"shard_id": "s0", "node_id": "n", "rank": 0, "serving": False, "silent_s": 1.5, "pid": None},
            {
                **{"shard_id": "s1", "node_id": "n", "rank": 1, "serving": True, "silent_s": 0.5, "pid": 11},
                **shard_status(1).to_dict(),
            },
        ],
    }


def test_the_placement_as_people_see_it() -> None:
    placement = Placement.linear(1, 2, 2)
    view = PlacementView(3, "d", placement, [[[0]], [[1]]])
    assert view.to_dict() == {
        "epoch": 3,
        "digest": "d",
        "placement": placement.to_json(),
        "experts_of_rank": [[[0]], [[1]]],
    }


def test_a_placement_arrives_as_it_was_sent() -> None:
    sent = JoinAnswer(1, "", 4, Placement.linear(2, 6, 3))
    assert sent.placement is not None
    assert sent.placement.slots_LER is not None
    got = pickle.loads(pickle.dumps(sent))
    assert got == sent
    assert not got.placement.physical_to_logical_map.flags.writeable
    assert "slots_LER" not in vars(got.placement), "tables that can be made again do not travel"
