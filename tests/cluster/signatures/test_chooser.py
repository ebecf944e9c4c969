"""Which router a request gets, whatever came before: within the bound of loads, the same each time, within memory."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cluster.config.llm_sections import SignaturesSection
from cluster.signatures.chooser import Chooser
from cluster.signatures.loads import Loads
from cluster.signatures.partition import assign_evenly, distances, partition
from tests.support.signature_scene import report_of, text_of_kind

KINDS = st.integers(0, 3)


def chooser(routers: list[str], max_lead: int = 1000, seed: int = 0) -> Chooser:
    made = Chooser(SignaturesSection(max_lead=max_lead, remembered_prompts=64), random.Random(seed))
    made.keep(routers)
    return made


def taught(routers: list[str], max_lead: int = 1000) -> Chooser:
    """One that was told 16 prompts of each kind by each router."""
    made = chooser(routers, max_lead)
    for place, router in enumerate(routers):
        made.learn(router, report_of(1, [0, 1, 2, 3] * 16, seed=100 * place))
    return made


@pytest.mark.parametrize("count", [2, 4])
def test_kinds_of_prompts_are_shared_out_evenly(count: int) -> None:
    routers = [f"r{number}" for number in range(count)]
    choosing = taught(routers)
    homes = {kind: {choosing.choose(text_of_kind(kind, 9000 + n), routers) for n in range(20)} for kind in range(4)}
    assert all(len(home) == 1 for home in homes.values()), homes
    assert set(Counter(next(iter(home)) for home in homes.values()).values()) == {4 // count}


def test_kinds_stay_where_they_are_when_more_is_learnt_and_others_take_over_from_a_router_that_goes() -> None:
    routers = ["a", "b"]
    choosing = taught(routers)

    def home(kind: int, among: list[str]) -> str:
        return choosing.choose(text_of_kind(kind, 5000), among)

    before = [home(kind, routers) for kind in range(4)]
    for number in range(2, 6):
        for router in routers:  # each computed what it was sent
            mine = [kind for kind in range(4) if before[kind] == router]
            choosing.learn(router, report_of(number, mine * 16, seed=1000 * number))
    assert [home(kind, routers) for kind in range(4)] == before
    choosing.keep(["b"])
    assert {home(kind, ["b"]) for kind in range(4)} == {"b"}
    choosing.keep(["b", "c"])
    assert {home(kind, ["b", "c"]) for kind in range(4)} == {"b", "c"}, "prompts are remembered, a new router is no gap"


def test_without_knowledge_the_less_loaded_of_two_by_chance_gets_it() -> None:
    choosing = chooser(["a", "b", "c"])
    choosing.loads.answered("a", 5)
    chosen = Counter(choosing.choose(text_of_kind(0, n), ["a", "b", "c"]) for n in range(6))
    assert chosen["b"] + chosen["c"] >= 5
    known = taught(["a", "b"])
    spread = Counter(known.choose("", ["a", "b"]) for _ in range(40))
    assert spread == {"a": 20, "b": 20}, "a request without text"
    unlike = Counter(known.choose("\u4e00\u4e8c\u4e09" * 40, ["a", "b"]) for _ in range(40))
    assert unlike == {"a": 20, "b": 20}, "a text unlike all others"


def test_a_report_is_learnt_from_once() -> None:
    choosing = chooser(["a", "b"])
    report = report_of(1, [0] * 20)
    assert not choosing.learn("a", report)
    assert not choosing.learn("a", report), "40 prompts would have made groups"
    assert not choosing.learn("x", report_of(2, [1] * 40)), "a router that is gone"
    assert choosing.learn("b", report_of(1, [1] * 20))


def test_nobody_to_choose_is_an_error() -> None:
    with pytest.raises(ValueError, match="no router"):
        chooser([]).choose("abc", [])


def test_a_load_is_the_answer_and_what_may_not_be_in_it() -> None:
    loads = Loads()
    for _ in range(3):
        loads.sent("a")
    loads.asked("a")
    loads.sent("a")
    assert loads.of("a") == 4
    loads.answered("a", 1)
    assert loads.of("a") == 1 + 3 + 1, "the three may be on their way"
    loads.asked("a")
    loads.answered("a", 4)
    assert loads.of("a") == 4 + 1, "they have arrived by now"
    loads.asked("a")
    loads.answered("a", 2)
    assert loads.of("a") == 2
    loads.sent("a")
    loads.asked("a")
    loads.sent("a")
    loads.asked("a")  # the question before was lost
    loads.answered("a", 2)
    assert loads.of("a") == 4
    loads.keep(["b"])
    assert loads.of("a") == 0


class Choosing(RuleBasedStateMachine):
    """Requests, reports, answers and routers that come and go, in any order."""

    @initialize(max_lead=st.integers(1, 6), seed=st.integers(0, 9))
    def start(self, max_lead: int, seed: int) -> None:
        self.max_lead, self.number, self.count = max_lead, 0, 2
        self.routers = ["r0", "r1"]
        self.twins = [chooser(self.routers, max_lead, seed) for _ in range(2)]

    @rule(kind=KINDS, seed=st.integers(0, 99), some=st.booleans())
    def request(self, kind: int, seed: int, some: bool) -> None:
        among = self.routers if some else list(reversed(self.routers))
        if not among:
            return
        loads = {router: self.twins[0].loads.of(router) for router in among}
        text = text_of_kind(kind, seed) if seed else ""
        chosen = self.twins[0].choose(text, among)
        assert self.twins[1].choose(text, among) == chosen, "the same state chooses the same"
        assert loads[chosen] + 1 - min(loads.values()) <= self.max_lead
        assert self.twins[0].loads.of(chosen) == loads[chosen] + 1

    @precondition(lambda self: self.routers)
    @rule(pick=st.integers(0, 9), kinds=st.lists(KINDS, min_size=1, max_size=40))
    def report(self, pick: int, kinds: list[int]) -> None:
        self.number += 1
        for twin in self.twins:
            twin.learn(self.routers[pick % len(self.routers)], report_of(self.number, kinds, seed=self.number))

    @precondition(lambda self: self.routers)
    @rule(pick=st.integers(0, 9), count=st.integers(0, 20), answers=st.booleans())
    def ask(self, pick: int, count: int, answers: bool) -> None:
        router = self.routers[pick % len(self.routers)]
        for twin in self.twins:
            known = twin.loads.of(router)
            twin.loads.asked(router)
            assert twin.loads.of(router) == known, "asking changes nothing"
            if answers:
                twin.loads.answered(router, count)
                assert count <= twin.loads.of(router) <= count + known

    @rule(comes=st.booleans(), pick=st.integers(0, 9))
    def change(self, comes: bool, pick: int) -> None:
        if comes and len(self.routers) < 6:
            self.routers = [*self.routers, f"r{self.count}"]
            self.count += 1
        elif not comes and self.routers:
            gone = self.routers[pick % len(self.routers)]
            self.routers = [router for router in self.routers if router != gone]
            for twin in self.twins:
                twin.keep(self.routers)
                assert twin.loads.of(gone) == 0, "nothing is kept of it"
        for twin in self.twins:
            twin.keep(self.routers)

    @invariant()
    def memory_is_bounded(self) -> None:
        for twin in getattr(self, "twins", []):
            sizes = [len(each) for each in (*vars(twin.loads).values(), twin._computed, twin._numbers)]
            assert max(sizes) <= len(self.routers)
            arrays = [each for each in vars(twin._memory).values() if isinstance(each, np.ndarray)]
            assert sum(each.nbytes for each in arrays) <= 64 * 4 * (2 * 256 + 64) + 4 * 256


Choosing.TestCase.settings = settings(max_examples=30, stateful_step_count=30)
test_choosing = Choosing.TestCase


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 1000))
def test_groups_are_even_and_nobody_would_exchange_places(points: int, groups: int, seed: int) -> None:
    distance_MR = np.random.default_rng(seed).random((points, groups))
    group_M = assign_evenly(distance_MR)
    sizes = np.bincount(group_M, minlength=groups)
    assert sizes.max() - sizes.min() <= 1
    if groups == 1:
        return
    # Who had most to lose chose first, so it has the nearest group that had room: the very nearest, if any was free.
    first = int(np.argmax(np.diff(np.sort(distance_MR, axis=1)[:, :2])[:, 0]))
    assert group_M[first] == distance_MR[first].argmin()


@given(st.integers(2, 5), st.integers(0, 1000))
def test_groups_are_the_same_for_who_knows_the_same_and_keep_the_order_of_routers(groups: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    centres_RW = 100 * np.eye(groups, 64, dtype=np.float32)
    points_MW = np.repeat(centres_RW, 10, axis=0) + rng.normal(size=(10 * groups, 64)).astype(np.float32)
    order = rng.permutation(groups)
    found_RW = partition(points_MW, centres_RW[order])
    np.testing.assert_array_equal(found_RW, partition(points_MW.copy(), centres_RW[order]))
    assert distances(found_RW, centres_RW).argmin(1).tolist() == order.tolist()


def test_groups_from_afar_replace_near_ones_that_mix_kinds() -> None:
    """Routers that computed everything alike tell nothing; the kinds themselves do."""
    rng = np.random.default_rng(0)
    centres_RW = 100 * np.eye(2, 64, dtype=np.float32)
    points_MW = np.repeat(centres_RW, 20, axis=0) + rng.normal(size=(40, 64)).astype(np.float32)
    found_RW = partition(points_MW, np.repeat(points_MW.mean(0, keepdims=True), 2, axis=0))
    assert sorted(distances(found_RW, centres_RW).argmin(1).tolist()) == [0, 1]
    with pytest.raises(ValueError, match="no signatures"):
        partition(points_MW[:0], centres_RW)
