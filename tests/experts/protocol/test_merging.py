"""One answer of a router from those of its workers."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from experts.protocol.membership import AppliedMembership, Preparation
from experts.protocol.merging import merged_applied, merged_preparation, merged_status
from experts.protocol.status import RouterStatus, StageHistogram, StageHistograms
from tests.support.serve.statuses import router_status

READY = Preparation(3, True, [], False, "")
# Each field's rule. A field that is not here has none, and the test says so.
OF_THE_FIRST = (
    "router_id",
    "num_ranks",
    "layers",
    "steps",
    "dispatches",
    "rows",
    "term",
    "pid",
    "unfinished_requests",
    *("pool", "prompts_handed_over", "prompts_given_up"),
)
SUMS = (
    *("fan_out_sum", "failovers", "fallback_pairs", "bytes_sent", "bytes_received", "no_slot_pairs", "fallback_ms"),
    *("fallback_cached_bytes", "refused_requests", "params", "resident_bytes"),
)
LARGEST = ("uncovered_pairs", "swap_last_us", "swap_max_us")
OTHERS = (
    *("epoch", "connected", "transports", "lost", "balancedness", "shard_rows", "shard_pairs"),
    *("last_success_age_s", "stage_us", "workers"),
)


def test_an_epoch_is_ready_once_all_workers_have_it() -> None:
    assert merged_preparation([READY, READY]) == READY
    assert not merged_preparation([READY, replace(READY, ready=False, connecting=[2])]).ready
    assert not merged_preparation([READY, replace(READY, epoch=2)]).ready
    waiting = [replace(READY, ready=False, connecting=ranks) for ranks in ([2, 5], [1, 2])]
    assert merged_preparation(waiting) == Preparation(3, False, [1, 2, 5], False, "")


def test_what_one_worker_lacks_the_router_lacks() -> None:
    failed = replace(READY, ready=False, needs_whole=True, error="unknown epoch")
    for answers in ([READY, failed], [failed, READY]):
        merged = merged_preparation(answers)
        assert merged.needs_whole
        assert not merged.ready
        assert merged.error == f"worker {answers.index(failed)}: unknown epoch"


def test_a_shard_is_connected_if_all_workers_are() -> None:
    first = AppliedMembership(3, [0, 1, 2], {3: "gone"}, [])
    second = AppliedMembership(3, [0, 2], {1: "refused", 3: "no answer"}, [1])
    merged = merged_applied([first, second])
    assert merged == AppliedMembership(3, [0, 2], {1: "worker 1: refused", 3: "gone"}, [1])


def test_a_router_whose_workers_are_all_refused_is_refused() -> None:
    refused = AppliedMembership(3, [], {0: "other weights", 1: "other weights"}, [0, 1])
    merged = merged_applied([refused, refused])
    assert merged.refused_by_all
    assert merged.refusal == "no shard takes this router: other weights"


@pytest.mark.parametrize("merge", [merged_preparation, merged_applied, merged_status])
def test_one_worker_speaks_for_itself(merge) -> None:  # type: ignore[no-untyped-def]
    one = {merged_preparation: READY, merged_applied: AppliedMembership(3, [0], {}, []), merged_status: router_status()}
    assert merge([one[merge]]) is one[merge]


def test_every_field_of_a_status_has_a_rule() -> None:
    names = [field.name for field in fields(RouterStatus)]
    assert sorted(names) == sorted([*OF_THE_FIRST, *SUMS, *LARGEST, *OTHERS])
    first = router_status()
    raised = {name: 3 * getattr(first, name) + 1 for name in (*OF_THE_FIRST[1:6], *SUMS, *LARGEST)}
    second = replace(first, **raised, router_id="other", term="", pid=0, unfinished_requests=0)
    merged = merged_status([first, second])
    assert merged.workers == 2
    for name in OF_THE_FIRST:
        assert getattr(merged, name) == getattr(first, name), name
    for name in SUMS:
        assert getattr(merged, name) == 4 * getattr(first, name) + 1, name
    for name in LARGEST:
        assert getattr(merged, name) == 3 * getattr(first, name) + 1, name


def test_links_loads_and_times_of_a_status() -> None:
    def stage(sum_us: float, *buckets: int) -> StageHistogram:
        return StageHistogram(sum_us, sum(buckets), list(buckets), [10])

    first = router_status(
        connected=[0, 1],
        transports={0: "shm", 1: "tcp"},
        lost={},
        shard_rows=[30, 50],
        shard_pairs=[60, 100],
        last_success_age_s=None,
        stage_us=StageHistograms(plan_pack=stage(5.0, 1, 0), wait=stage(6.0, 0, 2), combine=stage(7.0, 1, 1)),
    )
    second = replace(
        first,
        epoch=first.epoch - 1,
        connected=[1],
        transports={1: "tcp"},
        lost={0: "gone"},
        shard_rows=[1, 2, 3],
        shard_pairs=[40, 0, 60],
        last_success_age_s=0.25,
    )
    merged = merged_status([first, second])
    assert merged.epoch == first.epoch - 1
    assert (merged.connected, merged.transports, merged.lost) == ([1], {1: "tcp"}, {0: "worker 1: gone"})
    assert (merged.shard_rows, merged.shard_pairs) == ([31, 52, 3], [100, 100, 60])
    assert merged.balancedness == pytest.approx(260 / 3 / 100)
    assert merged.last_success_age_s == 0.25
    assert merged.stage_us.wait == stage(12.0, 0, 4)
    assert merged.stage_us.combine == stage(14.0, 2, 2)
    assert merged_status([first, first]).last_success_age_s is None
    idle = router_status(shard_pairs=[0, 0])
    assert merged_status([idle, idle]).balancedness == 1.0
