"""The conductor under random targets, answers and losses: what must hold at every step, and that it ends."""

from __future__ import annotations

from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from cluster.mesh.way import Pace
from tests.support.simulated.conducted import Conducted, Rows

LAYERS, EXPERTS = 2, 4
RANKS = range(3)


@st.composite
def rows(draw: st.DrawFn, slots: dict[int, int]) -> Rows:
    """Every expert on some rank, within the slots of each; up to one more replica."""
    row: Rows = {rank: [[] for _ in range(LAYERS)] for rank in RANKS}
    for layer in range(LAYERS):
        for expert in [
            *draw(st.permutations(range(EXPERTS))),
            *draw(st.lists(st.integers(0, EXPERTS - 1), max_size=2)),
        ]:
            free = [rank for rank in RANKS if len(row[rank][layer]) < slots[rank] and expert not in row[rank][layer]]
            if free:
                row[draw(st.sampled_from(free))][layer].append(expert)
    return row


EVENTS = st.sampled_from(
    ["routers move on", "carry out", "carry out", "fail", "lose a result", "wait", "target", "pause", "resume", "lost"]
)


@settings(max_examples=150, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(data=st.data(), slots=st.tuples(*[st.integers(2, 4)] * 3), events=st.lists(EVENTS, max_size=25))
def test_any_answers_lead_to_the_target_and_no_expert_is_dropped(
    data: st.DataObject, slots: tuple[int, int, int], events: list[str]
) -> None:
    """`Conducted` checks with each step that no last replica leaves the map, that what is published is held, that
    nothing is released that a router uses, and that copies find free slots.
    """
    slots_of = dict(enumerate(slots))
    mesh = Conducted(EXPERTS, data.draw(rows(slots_of)), slots_of, LAYERS)
    mesh.conductor.pace = Pace(data.draw(st.sampled_from([10.0, 30.0, None])), 1.0)
    target = data.draw(rows(slots_of))
    mesh.aim(target)
    for event in events:
        mesh.step()
        if event == "routers move on":
            mesh.move_routers()
        elif event in ("carry out", "fail", "lose a result"):
            rank = data.draw(st.sampled_from(RANKS))
            failing = {(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)}
            mesh.carry_out(rank, failing if event == "fail" else (), lose_results=event == "lose a result")
        elif event == "wait":
            mesh.late_copies = True
            mesh.step(data.draw(st.sampled_from([0.3, 5.0, 200.0])))
        elif event == "target":
            target = data.draw(rows(slots_of))
            mesh.aim(target)
        elif event in ("pause", "resume"):
            mesh.conductor.pause(event == "pause")
        else:
            rank = data.draw(st.sampled_from(RANKS))
            mesh.down(rank)
            if data.draw(st.booleans()):
                mesh.move_routers()
            mesh.up(rank)
    mesh.conductor.pause(False)
    mesh.finish()
    if mesh.conductor.problem:  # full shards: there may be no legal order
        assert "spare slot" in mesh.conductor.problem
        return
    assert mesh.published == {rank: [sorted(experts) for experts in row] for rank, row in target.items()}
    for rank, held_LE in mesh.held.items():
        assert held_LE.sum() == sum(map(len, target[rank])), f"rank {rank} leaks slots: {mesh.leaks}"
