"""Differences against a brute-force count, tables and units, wrong usage, and clusters that are not there."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.placement_command import session
from cluster.placement_command.difference import difference
from cluster.placement_command.tables import count, seconds, size, table
from cluster.placement_command.views import autopilot_lines
from cluster.serve_environment import free_ports
from placement.placement import Placement
from tests.support.command import run_command, run_here
from tests.support.serve.statuses import autopilot_view


@st.composite
def placements(draw: st.DrawFn) -> tuple[Placement, Placement]:
    """Two of one model, which may lack experts and have different numbers of ranks and slots."""
    num_layers, num_experts = draw(st.integers(1, 3)), draw(st.integers(1, 5))

    def one() -> Placement:
        num_ranks, slots = draw(st.integers(1, 4)), draw(st.integers(1, 4))
        cells = st.lists(st.integers(-1, num_experts - 1), min_size=num_ranks * slots, max_size=num_ranks * slots)
        map_LS = np.array([draw(cells) for _ in range(num_layers)])
        return Placement(num_ranks, 1, num_experts, map_LS, partial=True)

    return one(), one()


@given(placements())
def test_a_difference_is_what_counting_gives(both: tuple[Placement, Placement]) -> None:
    current, wanted = both
    found = difference(current, wanted)

    def held(placement: Placement, layer: int, rank: int) -> set[int]:
        if rank >= placement.num_ranks:
            return set()
        return {int(expert) for expert in placement.experts_of_rank(rank)[layer]} - {-1}

    for layer in range(current.num_layers):
        for rank in range(max(current.num_ranks, wanted.num_ranks)):
            had, gets = held(current, layer, rank), held(wanted, layer, rank)
            assert found.gained_LR[layer, rank] == len(gets - had)
            assert found.lost_LR[layer, rank] == len(had - gets)
    told = found.to_dict(10)
    assert (told["copies"], told["bytes"]) == (found.gained_LR.sum(), 10 * found.gained_LR.sum())
    assert found.to_dict(None)["bytes"] is None


def test_a_difference_between_models_is_refused() -> None:
    with pytest.raises(ValueError, match="the placement is for 1 layers of 4 experts, what is published for 2 of 4"):
        difference(Placement.linear(2, 4, 2), Placement.linear(1, 4, 2))


def test_numbers_in_a_table_are_set_to_the_right() -> None:
    assert table(("rank", "state"), [(0, "serving"), (10, "x")]).splitlines() == [
        "rank  state",
        "   0  serving",
        "  10  x",
    ]
    assert table(("a", "b"), []) == "a  b"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (9_437_184, "9.44 MB"),
        (999_400, "999 kB"),
        (999_600, "1 MB"),
        (58e9, "58 GB"),
        (1.2e12, "1.2 TB"),
        (2e15, "2000 TB"),
    ],
)
def test_sizes_have_three_digits(value: float, text: str) -> None:
    assert size(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (185, "3 min 5 s"),
        (7380, "2 h 3 min"),
    ],
)
def test_durations_are_rounded(value: float, text: str) -> None:
    assert seconds(value) == text


def test_what_copies_cost_is_told_where_shards_offload() -> None:
    plain = autopilot_view()
    assert plain.window is not None
    assert not any("offload" in line for line in autopilot_lines(plain))
    offloaded = replace(plain, window=replace(plain.window, found=0.875, copy_cost_us=120.0))
    assert autopilot_lines(offloaded)[:-1] == autopilot_lines(plain)
    assert autopilot_lines(offloaded)[-1] == (
        "offload     87.5% of the experts asked for in memory; copies of others take 120 of 300 us a step (predicted)"
    )


def test_one_is_singular() -> None:
    assert (count(1, "copy", "copies"), count(0, "copy", "copies"), count(2, "round")) == (
        "1 copy",
        "0 copies",
        "2 rounds",
    )


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["placement", "move"], "No such command 'move'"),
        (["placement", "apply"], "Missing argument 'FILE'"),
        (["placement", "drain"], "Missing argument 'SHARD'"),
        (["placement", "apply", "f", "--timeout-s", "0"], "0 is no number of seconds above 0"),
        (["placement", "apply", "f", "--timeout-s", "inf"], "inf is no number of seconds above 0"),
        (["placement", "apply", "f", "--timeout-s", "soon"], "'soon' is no number of seconds"),
        (["placement", "show", "--fast"], "No such option: --fast"),
    ],
)
def test_wrong_usage_ends_with_status_2(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here(*words) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert told in line


def test_a_cluster_that_is_not_there_is_one_line_and_status_3() -> None:
    [port] = free_ports(1)
    done = run_command("placement", "show", RAY_ADDRESS=f"127.0.0.1:{port}")
    told = f"error: nothing listens at 127.0.0.1:{port}: [Errno 111] Connection refused; name the Ray cluster with "
    assert (done.returncode, done.stdout, done.stderr) == (3, "", f"{told}--address\n")


def test_a_shutdown_of_ray_that_does_not_end_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, never = threading.Event(), threading.Event()
    monkeypatch.setattr("ray.shutdown", lambda: begun.set() or never.wait())
    monkeypatch.setattr(session, "SHUTDOWN_TIMEOUT_S", 0.1)
    session._disconnect()
    assert begun.wait(60)
    never.set()
