"""Several routers and one ledger, in any order of events: never over a limit, and never far under it."""

from __future__ import annotations

import random
from collections import deque
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.keys.accounts import Accounts, Charge
from cluster.keys.keyring import Key, Limits
from cluster.keys.ledger import GONE_S, YOUNG_S, Ledger
from cluster.keys.messages import Answer, Report
from cluster.keys.windows import SLOT_S, SPARE, WINDOW_SLOTS

DAY_S = 1.7e9  # what a clock of day shows


@dataclass
class Router:
    """The state of one router, and its calls, each of which is heard, answered and received when a test says so."""

    index: int
    clock_s: float  # what its monotonic clock shows at the beginning
    heard_s: float = YOUNG_S  # when the ledger heard of it
    sequence: int = 0
    sent: deque[tuple[float, Report]] = field(default_factory=deque)
    answers: deque[tuple[float, int, Answer]] = field(default_factory=deque)
    running: list[Charge] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.accounts = Accounts(DAY_S - self.clock_s)

    def local_s(self, now_s: float) -> float:
        return self.clock_s + now_s


@dataclass
class World:
    """All routers with one key, and the ledger. Times in seconds since the beginning."""

    limits: Limits
    clocks_s: list[float]
    now_s: float = YOUNG_S
    used: list[tuple[float, int]] = field(default_factory=list)  # when, tokens
    lost_a_router: bool = False  # one that was silent for so long that the ledger took it for dead

    def __post_init__(self) -> None:
        self.key = Key("team", limits=self.limits)
        self.ledger = Ledger(DAY_S)
        self.routers = [Router(index, clock_s) for index, clock_s in enumerate(self.clocks_s)]
        for router in self.routers:
            self.call(router)

    def take(self, router: Router, tokens: int) -> Charge | None:
        charge = router.accounts.take(self.key, tokens, router.local_s(self.now_s))
        if charge is not None:
            self.used.append((self.now_s, tokens))
            router.running.append(charge)
        return charge

    def finish(self, router: Router, tokens: int | None = None) -> None:
        if router.running:
            router.accounts.finish(router.running.pop(0), tokens, router.local_s(self.now_s))

    def send(self, router: Router, *needs: int) -> None:
        sent_s = router.local_s(self.now_s)
        router.sequence += 1
        statements = router.accounts.statements({"team": needs} if needs else {}, sent_s)
        router.sent.append((sent_s, Report(str(router.index), router.sequence, statements)))

    def hear(self, router: Router, overtaking: bool = False) -> None:
        if router.sent:
            self.lost_a_router |= any(self.now_s - each.heard_s >= GONE_S for each in self.routers)
            router.heard_s = self.now_s
            sent_s, report = router.sent.pop() if overtaking else router.sent.popleft()
            router.answers.append((sent_s, report.sequence, self.ledger.settle(report, DAY_S + self.now_s)))

    def receive(self, router: Router, lost: bool = False) -> None:
        if router.answers:
            sent_s, sequence, answer = router.answers.popleft()
            if not lost and sequence == router.sequence:  # it has given up on calls before the last
                router.accounts.hear(answer, sent_s)

    def call(self, router: Router, *needs: int) -> None:
        self.send(router, *needs)
        self.hear(router, overtaking=True)
        while router.answers:
            self.receive(router)

    def ask(self, router: Router, tokens: int) -> bool:
        """A request as a router handles it; False if it is refused."""
        if self.take(router, tokens):
            return True
        self.call(router, tokens)
        return self.take(router, tokens) is not None

    def since(self, when_s: float) -> tuple[int, int]:
        """(requests, tokens) let in after an instant."""
        late = [tokens for at_s, tokens in self.used if at_s > when_s]
        return len(late), sum(late)

    def check_never_over(self) -> None:
        begin = requests = tokens = 0
        for at_s, amount in self.used:
            requests, tokens = requests + 1, tokens + amount
            while self.used[begin][0] <= at_s - 60:
                requests, tokens = requests - 1, tokens - self.used[begin][1]
                begin += 1
            assert requests <= (self.limits.requests_per_minute or requests)
            assert tokens <= (self.limits.tokens_per_minute or tokens)


LIMITS = st.builds(
    Limits,
    st.none() | st.integers(1, 300),
    st.none() | st.integers(50, 20_000),
    st.none() | st.integers(1, 60),
)
CLOCKS = st.lists(st.floats(0, 1e6), min_size=1, max_size=5)
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["take", "send", "hear", "overtake", "receive", "lose", "finish", "ask", "ask", "ask"]),
        st.integers(0, 4),
        st.sampled_from([0.0, 0.0, 0.0, 0.01, 0.3, 1.0, 1.9, 7.0, 31.0]),
        st.integers(0, 500),
    ),
    max_size=60,
)


@settings(max_examples=60)
@given(limits=LIMITS, clocks_s=CLOCKS, events=EVENTS)
def test_no_order_of_events_takes_a_key_over_its_limits(
    limits: Limits, clocks_s: list[float], events: list[tuple[str, int, float, int]]
) -> None:
    """Calls are slow, lost and overtaken; requests end at any time; clocks differ."""
    world = World(limits, clocks_s)
    for what, index, wait_s, tokens in events:
        world.now_s += wait_s
        router = world.routers[index % len(world.routers)]
        match what:
            case "take":
                world.take(router, tokens)
            case "send" if len(router.sent) < 3:
                world.send(router, tokens)
            case "hear":
                world.hear(router)
            case "overtake":
                world.hear(router, overtaking=True)
            case "receive":
                world.receive(router)
            case "lose":
                world.receive(router, lost=True)
            case "finish":
                world.finish(router)
            case "ask":
                for _ in range(5):
                    world.ask(router, tokens)
        if limits.concurrency and not world.lost_a_router:
            assert sum(len(router.running) for router in world.routers) <= limits.concurrency
    world.check_never_over()


@settings(max_examples=30)
@given(
    limit=st.integers(20, 300),
    clocks_s=CLOCKS,
    events=st.lists(
        st.tuples(st.integers(0, 4), st.sampled_from([0.0, 0.0, 0.1, 0.9, 4.0]), st.integers(1, 25)), max_size=25
    ),
)
def test_a_refusal_means_that_at_least_95_percent_are_used(
    limit: int, clocks_s: list[float], events: list[tuple[int, float, int]]
) -> None:
    """Of the requests of a window, at any router, whoever used them."""
    world = World(Limits(requests_per_minute=limit), clocks_s)
    for index, wait_s, count in events * 3:
        world.now_s += wait_s
        router = world.routers[index % len(world.routers)]
        for _ in range(count):
            if not world.ask(router, 0):
                used, _ = world.since(world.now_s - WINDOW_SLOTS * SLOT_S)
                assert used + 1 > limit * (1 - SPARE)
    world.check_never_over()


@pytest.mark.parametrize(("routers", "requests", "per_request"), [(1, 120, 7), (2, 60, 30), (5, 300, 1), (8, 100, 40)])
def test_under_load_at_least_90_percent_of_a_limit_are_used(routers: int, requests: int, per_request: int) -> None:
    """Minutes of more requests than allowed, at routers drawn at random."""
    clocks_s, seed = [index * 1.7 for index in range(routers)], routers
    draw, tokens = random.Random(seed), requests * per_request
    world = World(Limits(requests_per_minute=requests, tokens_per_minute=tokens), clocks_s)
    minutes, begin_s = 6, world.now_s
    while world.now_s < begin_s + minutes * 60:
        world.now_s += 60 / requests * draw.uniform(0.3, 0.7)
        world.ask(draw.choice(world.routers), per_request)
    used, used_tokens = world.since(0)
    assert 0.9 * requests * minutes <= used
    assert 0.9 * tokens * minutes <= used_tokens
    world.check_never_over()


@settings(max_examples=25)
@given(
    most=st.integers(1, 100),
    clocks_s=CLOCKS,
    events=st.lists(st.tuples(st.booleans(), st.integers(0, 4), st.sampled_from([0.0, 0.1, 1.0])), max_size=20),
)
def test_so_many_run_at_a_time_and_five_percent_less_at_worst(
    most: int, clocks_s: list[float], events: list[tuple[bool, int, float]]
) -> None:
    world = World(Limits(concurrency=most), clocks_s)
    for begins, index, wait_s in events * 3:
        world.now_s += wait_s
        router = world.routers[index % len(world.routers)]
        for _ in range(5):
            if not begins:
                world.finish(router)
                world.call(router)  # a router that gives something back says so at once
            elif not world.ask(router, 0):
                assert sum(len(each.running) for each in world.routers) >= most * (1 - SPARE)
            assert sum(len(each.running) for each in world.routers) <= most


def test_tokens_that_were_not_taken_come_back_and_others_are_charged() -> None:
    world = World(Limits(tokens_per_minute=1000), [0.0, 5e5])
    first, second = world.routers
    assert world.ask(first, 900)
    assert not world.ask(second, 200)
    world.finish(first, tokens=100)
    world.call(first)
    assert world.ask(second, 200)
    assert not world.ask(second, 800)
    world.finish(second, tokens=1500)  # it took more than it was let in for
    world.call(second)
    assert not world.ask(first, 100), "more than it may have in advance"
    assert world.ledger.settle(Report("x", 1), DAY_S + world.now_s).routers == 3


def test_a_refusal_says_when_there_is_room_again() -> None:
    world = World(Limits(requests_per_minute=10), [0.0])
    (router,) = world.routers
    for _ in range(10):
        assert world.ask(router, 0)
        world.now_s += 3
    world.send(router, 0)
    world.hear(router)
    retry_s = router.answers[0][2].grants["team"].retry_s
    assert retry_s[1:] == (0, 0)
    world.receive(router)
    begin_s = world.now_s
    world.now_s = begin_s + retry_s[0] - 0.01
    assert not world.ask(router, 0)
    world.now_s = begin_s + retry_s[0] + 0.01
    assert world.ask(router, 0)
    assert 28 < retry_s[0] < 34, "the first request was 30 s ago"


def test_a_new_ledger_learns_what_was_used_before_it_grants() -> None:
    world = World(Limits(requests_per_minute=100), [0.0, 7.0, 9.0])
    for index in range(90):
        assert world.ask(world.routers[index % 3], 0)
    world.ledger = Ledger(DAY_S + world.now_s)
    for router in world.routers:
        world.call(router)
        assert router.accounts.by_share
    world.now_s += YOUNG_S
    for router in world.routers:
        world.call(router)
        assert not router.accounts.by_share
    let_in = sum(world.ask(world.routers[index % 3], 0) for index in range(60))
    assert 5 <= let_in <= 10
    world.check_never_over()


def test_without_a_ledger_routers_keep_to_their_shares() -> None:
    world = World(Limits(requests_per_minute=100, tokens_per_minute=1000, concurrency=40), [0.0, 7.0])
    for router in world.routers:
        world.call(router)  # so that each knows of the other
        router.accounts.by_share = True
    for router in world.routers:
        let_in = [world.take(router, 30) for _ in range(100)]
        assert sum(charge is not None for charge in let_in) == 500 // 30
        for _ in range(16):
            world.finish(router, tokens=0)
        assert sum(world.take(router, 0) is not None for _ in range(100)) == 20, "half of what may run at a time"
        assert router.accounts.retry_s(world.key, 0, router.local_s(world.now_s)) == (0, 0, 1)
        standing = router.accounts.standing(world.key, router.local_s(world.now_s))
        assert standing.remaining == (50 - 16 - 20, 500)
    world.check_never_over()


def test_a_router_that_has_died_lets_others_run_what_it_ran() -> None:
    world = World(Limits(concurrency=2), [0.0, 7.0])
    dead, alive = world.routers
    assert world.ask(dead, 0)
    assert world.ask(dead, 0)
    assert not world.ask(alive, 0)
    world.now_s += GONE_S
    assert world.ask(alive, 0)
