"""Orders against made-up sources that fail in every way: one result for each order, and no slot is lost."""

from __future__ import annotations

import threading
from collections import Counter, deque
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experts.checkpoint.errors import CheckpointError
from experts.model.spec import ExpertWeights
from experts.protocol.errors import ShardLostError
from experts.protocol.membership import ShardEndpoint
from experts.protocol.orders import CopyOrder, CopyResult
from experts.shard import mover as mover_module
from experts.shard.mover import ASKED_AHEAD, MAX_LANES, Mover
from experts.shard.slots import SlotTable
from experts.transports.weights.frames import WeightsHello
from experts.transports.weights.reader import NotCopiedError, SourceLostError

LAYERS, EXPERTS, SLOTS = 2, 6, 4


def endpoint(rank: int) -> ShardEndpoint:
    return ShardEndpoint(rank, f"life {rank}", "host", 1000 + rank, "here", 1)


class Weights:
    """A checkpoint; reading the experts in `broken` fails."""

    spec = SimpleNamespace(num_layers=LAYERS, num_experts=EXPERTS)

    def __init__(self, broken: set[tuple[int, int]] | None = None) -> None:
        self.broken = broken or set()

    def fetch_experts(self, wanted: list[tuple[int, int]]) -> None:
        assert len(wanted) == 1

    def read_expert(self, layer: int, expert: int, dtype: torch.dtype) -> ExpertWeights:
        if (layer, expert) in self.broken:
            raise CheckpointError("damaged")
        return ExpertWeights(torch.full((4, 2), float(layer)), torch.full((2, 2), float(expert)))


class Kernel:
    """What stands in each slot."""

    takes_quantized, layout, slot_device = False, "plain", "cpu"
    shape = SimpleNamespace(expert_bytes=10, device="cpu")

    def __init__(self) -> None:
        self.memory = torch.zeros(LAYERS, SLOTS, 2, dtype=torch.uint8)
        self.loaded: set[tuple[int, int]] = set()

    def slot_views(self, layer: int, slot: int) -> list[torch.Tensor]:
        return [self.memory[layer, slot]]

    def begin_write(self, layer: int, slot: int) -> None:
        self.loaded.discard((layer, slot))

    def finish_write(self, layer: int, slot: int) -> None:
        self.loaded.add((layer, slot))

    def set_slot(self, layer: int, slot: int, weights: ExpertWeights) -> None:
        self.memory[layer, slot] = torch.tensor([layer, int(weights.w2_DI[0, 0])], dtype=torch.uint8)
        self.loaded.add((layer, slot))


class Source:
    """A connection to a source that does, for each expert it is asked for, what its script says next."""

    transport = "shm"
    scripts: dict[int, deque[str]]
    most_asked: int
    open: Counter[int]
    most_open: int

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.asked: deque[tuple[int, int]] = deque()
        self.closed = False
        Source.open[rank] += 1
        assert Source.open[rank] == 1, "one connection to each source"

    @classmethod
    def connect(cls, source: ShardEndpoint, *_: Any) -> Source:
        if cls.step(source.rank) == "refuse":
            raise ShardLostError(source.rank, "cannot connect")
        return cls(source.rank)

    @classmethod
    def step(cls, rank: int) -> str:
        script = cls.scripts.get(rank)
        return script.popleft() if script else "send"

    def ask(self, layer: int, expert: int) -> None:
        self.asked.append((layer, expert))
        assert len(self.asked) <= ASKED_AHEAD

    def receive(self, views: list[torch.Tensor], pieces: Any, pace: Any) -> bytes:
        pace.check()
        layer, expert = self.asked.popleft()
        step = self.step(self.rank)
        views[0][0] = 99
        if step == "miss":
            raise NotCopiedError(f"shard {self.rank} does not hold it")
        if step in ("lose", "refuse"):
            raise SourceLostError(f"shard {self.rank} closed the connection")
        if step == "break":
            raise ZeroDivisionError("a mistake in here")
        views[0][:] = torch.tensor([layer, expert], dtype=torch.uint8)
        return bytes(32)

    def close(self) -> None:
        if not self.closed:
            Source.open[self.rank] -= 1
        self.closed = True


@pytest.fixture(autouse=True)
def sources(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mover_module, "WeightsReader", Source)
    reset({})


def reset(scripts: dict[int, list[str]]) -> None:
    Source.scripts = {rank: deque(steps) for rank, steps in scripts.items()}
    Source.open = Counter()


def new_mover(weights: Weights | None = None) -> Mover:
    checkpoint: Any = weights or Weights()
    kernel: Any = Kernel()
    return Mover(SlotTable(checkpoint, kernel, SLOTS, torch.float32), WeightsHello("", "plain"))


def copy(mover: Mover, orders: list[CopyOrder], cancelled: Any = lambda: False) -> list[CopyResult]:
    results: list[CopyResult] = []
    lock = threading.Lock()

    def note(result: CopyResult) -> None:
        assert lock.acquire(blocking=False), "one call at a time"
        results.append(result)
        lock.release()

    mover.copy(orders, note, None, cancelled)
    return results


def check_slots(mover: Mover, held: set[tuple[int, int]]) -> None:
    """The table has these experts, each with its own weights, and all other slots are free."""
    slots = mover.slots
    table_LE = slots.slot_of_expert_LE
    assert {
        (layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS) if table_LE[layer, expert] >= 0
    } == held
    assert slots.num_free == LAYERS * SLOTS - len(held)
    for layer, expert in held:
        slot = int(table_LE[layer, expert])
        assert slots.kernel.slot_views(layer, slot)[0].tolist() == [layer, expert]
        assert (layer, slot) in slots.kernel.loaded  # type: ignore[attr-defined]
    assert mover.counters.in_flight == 0


STEPS = st.lists(st.sampled_from(["send", "miss", "lose", "break", "refuse"]), max_size=8)
ORDERS = st.lists(
    st.tuples(st.integers(-1, LAYERS), st.integers(-1, EXPERTS), st.lists(st.integers(0, 4), max_size=3, unique=True)),
    max_size=16,
)


@settings(max_examples=150)
@given(
    scripts=st.dictionaries(st.integers(0, 4), STEPS),
    rounds=st.lists(ORDERS, min_size=1, max_size=3),
    broken=st.sets(st.tuples(st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1)), max_size=4),
    released=st.lists(st.tuples(st.integers(0, LAYERS - 1), st.integers(0, EXPERTS - 1)), max_size=8),
)
def test_every_order_gets_one_result_and_no_slot_is_lost(
    scripts: dict[int, list[str]],
    rounds: list[list[tuple[int, int, list[int]]]],
    broken: set[tuple[int, int]],
    released: list[tuple[int, int]],
) -> None:
    reset(scripts)
    mover = new_mover(Weights(broken))
    held: set[tuple[int, int]] = set()
    for orders in rounds:
        results = copy(mover, [CopyOrder(la, ex, tuple(map(endpoint, ranks))) for la, ex, ranks in orders])
        assert Counter((r.layer, r.expert) for r in results) == Counter((la, ex) for la, ex, _ in orders)
        for result in results:
            pair = (result.layer, result.expert)
            if not result.error:
                assert (result.source != "") == (result.size_bytes > 0)
                assert result.source == "" or pair not in held or len([r for r in results if r.layer == pair[0]]) > 1
                held.add(pair)
            assert "\n" not in result.error
        check_slots(mover, held)
        held -= set(released)
        mover.slots.release(released)
        check_slots(mover, held)
    mover.close()
    assert sum(Source.open.values()) == 0


def orders_from(*ranks: int, experts: int = SLOTS) -> list[CopyOrder]:
    return [CopyOrder(0, expert, tuple(map(endpoint, ranks))) for expert in range(experts)]


def test_a_lost_source_is_followed_by_the_next_and_at_last_by_the_checkpoint() -> None:
    reset({0: ["send", "send", "lose"], 1: ["send", "miss", "send", "lose"]})
    mover = new_mover()
    results = copy(mover, orders_from(0, 1))
    # Shard 0 sends expert 0 and is lost with 1; shard 1 does not hold 1, sends 2, and is lost with 3.
    assert {r.expert: r.source for r in results} == {0: "shm", 1: "checkpoint", 2: "shm", 3: "checkpoint"}
    assert mover.counters.copies == {"shm": 2, "checkpoint": 2}
    assert mover.counters.copied_bytes == {"shm": 4, "checkpoint": 20}
    check_slots(mover, {(0, expert) for expert in range(SLOTS)})


def test_an_error_names_all_that_was_tried() -> None:
    reset({0: ["refuse"], 1: ["send", "miss"]})
    mover = new_mover(Weights({(0, 0)}))
    (result,) = copy(mover, orders_from(0, 1, experts=1))
    assert result.error == ("shard 0: cannot connect; shard 1 does not hold it; checkpoint: CheckpointError: damaged")
    assert (result.source, result.size_bytes, mover.counters.failed) == ("", 0, 1)
    check_slots(mover, set())


def test_a_full_layer_is_an_error_of_those_that_do_not_fit_alone() -> None:
    results = copy(new_mover(), orders_from(0, experts=SLOTS + 2))
    errors = [result.error for result in results if result.error]
    assert len(errors) == 2
    assert all(error.startswith("layer 0 has no free slot for expert ") for error in errors)


def test_what_is_held_already_and_what_is_ordered_twice_is_copied_once() -> None:
    mover = new_mover()
    results = copy(mover, orders_from(0, experts=2) + orders_from(0, experts=2))
    assert [(r.expert, r.source, r.error) for r in results] == [
        (0, "shm", ""),
        (0, "", ""),
        (1, "shm", ""),
        (1, "", ""),
    ]
    assert [(r.expert, r.source, r.size_bytes, r.error) for r in copy(mover, orders_from(1, experts=1))] == [
        (0, "", 0, "")
    ]


def test_a_call_that_is_cancelled_answers_all_orders() -> None:
    mover = new_mover()
    done: list[CopyResult] = []
    mover.copy([*orders_from(0), CopyOrder(1, 0)], done.append, None, lambda: len(done) > 0)
    assert len(done) == SLOTS + 1
    held = {(r.layer, r.expert) for r in done if not r.error}
    assert {r.error for r in done if r.error} == {"cancelled"}
    check_slots(mover, held)
    assert not any(r.error for r in copy(mover, orders_from(0)))


def test_a_listener_that_fails_does_not_stop_the_copies() -> None:
    mover = new_mover()

    def refuse(result: CopyResult) -> None:
        raise RuntimeError("nobody listens")

    mover.copy(orders_from(0), refuse, None, lambda: False)
    check_slots(mover, {(0, expert) for expert in range(SLOTS)})


def test_only_one_call_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    mover = new_mover()
    errors: list[str] = []

    def again(result: CopyResult) -> None:
        try:
            mover.copy([], lambda result: None, None, lambda: False)
        except RuntimeError as error:
            errors.append(str(error))

    mover.copy(orders_from(0, experts=1), again, None, lambda: False)
    assert errors == ["another copy of this shard still runs; cancel it, or wait for it to return"]
    mover.copy([], again, None, lambda: False)


def test_different_sources_are_read_side_by_side_but_not_all_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(MAX_LANES, timeout=60)
    receive = Source.receive

    def meet(self: Source, *arguments: Any) -> bytes:
        assert sum(Source.open.values()) <= MAX_LANES + 2
        if self.rank < MAX_LANES:
            together.wait()
        return receive(self, *arguments)

    monkeypatch.setattr(Source, "receive", meet)
    orders = [CopyOrder(n % 2, n // 2, (endpoint(n),)) for n in range(MAX_LANES + 2)]
    assert [r.error for r in copy(new_mover(), orders)] == [""] * (MAX_LANES + 2)
