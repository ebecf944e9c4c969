"""An offloaded kernel computes what one with memory for all slots does, whatever stands in its places meanwhile."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experts.kernels import KERNELS, ExpertKernel
from experts.kernels.native import placed
from experts.kernels.native.kernel import NativeKernel
from experts.kernels.offload import FileBacking, OffloadedKernel
from tests.support.offloading import LAYERS, SHAPE, SLOTS, Call, offloaded, set_all, set_one

NOBODY = np.zeros(SLOTS, np.bool_)
ONE_LAYER = replace(SHAPE, num_layers=1)
NAMES = [name for name in ("native", "torch_loop") if KERNELS[name].supports(SHAPE) is None]
needs_native = pytest.mark.skipif(NativeKernel.supports(SHAPE) is not None, reason=str(NativeKernel.supports(SHAPE)))


@pytest.fixture(scope="module", params=NAMES)
def whole(request: pytest.FixtureRequest) -> ExpertKernel:
    """A kernel with memory for all slots."""
    kernel = KERNELS[request.param](SHAPE)
    set_all(kernel)
    return kernel


@pytest.fixture
def kernels(whole: ExpertKernel) -> Iterator[list[OffloadedKernel]]:
    """Offloaded ones with 1, 2, ... places."""
    made = [offloaded(whole.name, places) for places in range(1, SLOTS)]
    set_all(*made)
    yield made
    for kernel in made:
        kernel.close()


CALLS = st.lists(
    st.tuples(
        st.integers(0, LAYERS - 1), st.sampled_from([0, 1, 2, 5, 40]), st.integers(1, SLOTS), st.integers(0, 999)
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=CALLS, early=st.lists(st.tuples(st.integers(0, LAYERS - 1), st.integers(0, SLOTS - 1)), max_size=8))
def test_any_calls_give_the_same_rows(
    kernels: list[OffloadedKernel],
    whole: ExpertKernel,
    calls: list[tuple[int, int, int, int]],
    early: list[tuple[int, int]],
) -> None:
    for number, (layer, rows, most, seed) in enumerate(calls):
        call = Call.random(layer, rows, seed, most=most)
        for kernel in kernels:
            call.check(kernel, whole)
            for early_layer, slot in early[number : number + 1]:
                kernel.bring_early(early_layer, [slot, (slot + 1) % SLOTS], NOBODY)
    for kernel in kernels:
        in_layer = (kernel.residency.place_of_slot_LS >= 0).sum(1)
        assert kernel.residency.count() == in_layer.sum() <= LAYERS * kernel.places.layer_places
        assert kernel.places.shares_places or (in_layer <= kernel.places.layer_places).all()


@needs_native
@pytest.mark.parametrize("apart_bytes", [0, 1 << 20], ids=["slots rise", "any order"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("on_input", [False, True], ids=["weighted output", "weighted input"])
def test_parts_have_the_bits_of_one_call_whether_products_are_kept_apart_or_not(
    monkeypatch: pytest.MonkeyPatch, apart_bytes: int, dtype: torch.dtype, on_input: bool
) -> None:
    monkeypatch.setattr(placed, "_MOST_APART_BYTES", apart_bytes)
    shape = replace(SHAPE, dtype=dtype, weight_on_input=on_input, has_bias=True)
    whole = NativeKernel(shape)
    threads = torch.get_num_threads()
    with contextlib.closing(offloaded("native", 2, shape)) as kernel:
        set_all(whole, kernel, shape=shape)
        try:
            for seed in range(12):
                torch.set_num_threads(1 + seed % 2)
                Call.random(seed % LAYERS, 30, seed, shape, most=SLOTS).check(kernel, whole)
        finally:
            torch.set_num_threads(threads)
        assert kernel.places.takes_any_order(30 * SLOTS) is (apart_bytes > 0)


@needs_native
def test_slots_that_are_here_are_computed_first() -> None:
    """In rising order each part would make room for itself by what a later part of the same call needs."""
    with contextlib.closing(offloaded("native", 4, ONE_LAYER)) as kernel:
        set_all(kernel, shape=ONE_LAYER)
        everything = torch.arange(SLOTS, dtype=torch.int32)
        pairs = (torch.arange(SLOTS + 1, dtype=torch.int32), everything, torch.ones(SLOTS))
        call = Call(0, torch.randn(SLOTS, SHAPE.hidden_size), pairs)
        call.by(kernel)
        for _ in range(5):
            before = kernel.counts.misses
            call.by(kernel)
            assert kernel.counts.misses - before == SLOTS - 4


@needs_native
def test_sixteen_bits_are_rounded_once_even_in_parts() -> None:
    shape = replace(SHAPE, dtype=torch.bfloat16)
    whole, kernel = NativeKernel(shape), offloaded("native", 1, shape)
    set_all(whole, kernel, shape=shape)
    Call.random(0, 30, 1, shape, most=SLOTS).check(kernel, whole)
    assert kernel.counts.misses == SLOTS, "each slot came once"
    kernel.close()


def test_the_slot_that_few_calls_use_leaves(whole: ExpertKernel) -> None:
    """What was used often stays; what was used often long ago leaves."""
    kernel = offloaded(whole.name, 2, ONE_LAYER)
    set_all(kernel, shape=ONE_LAYER)
    for slots, misses in (([0], 1), ([0], 1), ([1], 2), ([2], 3), ([0], 3), ([1], 4), ([0, 1], 4), ([2, 0], 5)):
        _one_row(slots).check(kernel, whole)
        assert kernel.counts.misses == misses, slots
    assert (kernel.hits, kernel.counts.copied) == (10 - 5, 5)
    for _ in range(20):
        _one_row([2]).check(kernel, whole)
    _one_row([1]).check(kernel, whole)
    assert [kernel.residency.is_in(0, slot) for slot in range(3)] == [False, True, True]
    kernel.close()


def test_shared_places_go_to_the_layer_that_is_called_next(whole: ExpertKernel) -> None:
    """All slots of a layer come early, though there is room for half of all; others get their share."""
    kernel = offloaded(whole.name, SLOTS // 2)
    set_all(kernel)
    came_then = SLOTS if kernel.places.shares_places else SLOTS // 2
    everything = [list(range(SLOTS)), [SLOTS - 1]]
    for number in range(4):
        layer = number % LAYERS
        kernel.bring_early(layer, range(SLOTS), np.zeros(SLOTS, np.bool_))
        assert (kernel.residency.place_of_slot_LS[layer] >= 0).sum() == came_then
        before = kernel.counts.misses
        for slots in everything:
            _one_row(slots, layer).check(kernel, whole)
        assert (kernel.counts.misses == before) is kernel.places.shares_places
    kernel.close()


def _one_row(slots: list[int], layer: int = 0) -> Call:
    call = Call.random(layer, 1, 0)
    pairs = (torch.tensor([0, len(slots)]).int(), torch.tensor(slots).int(), torch.ones(len(slots)))
    return replace(call, pairs=pairs)


@needs_native
def test_what_compiled_code_refused_is_made_ready_for_it() -> None:
    whole, kernel = NativeKernel(ONE_LAYER), offloaded("native", 2, ONE_LAYER)
    set_all(whole, kernel, shape=ONE_LAYER)

    def compiled(call: Call) -> torch.Tensor:
        out_MD = torch.full_like(call.rows_MD, torch.nan)
        kernel.places.forward_part(call.layer, call.rows_MD, *call.pairs, out_MD, True, True)
        return out_MD

    call, too_many, none = _one_row([1, 3]), _one_row([0, 1, 2]), _one_row([5])
    assert not kernel.make_ready(), "nothing was refused"
    with pytest.raises(ValueError, match="slot 1 holds no expert"):
        compiled(call)
    assert kernel.make_ready()
    assert kernel.bring_early(0, [4], NOBODY) == 0, "it would take what is to be used"
    assert torch.equal(compiled(call), call.by(whole))
    kernel.end_ready()
    assert not kernel.make_ready(), "nothing was refused since"
    assert kernel.bring_early(0, [4], NOBODY) == 1
    kernel.begin_write(0, 5)
    for left_to_python in (too_many, none):
        with pytest.raises(ValueError, match="holds no expert"):
            compiled(left_to_python)
        assert not kernel.make_ready()
    assert (kernel.counts.misses, kernel.hits) == (2, 0)
    kernel.close()


def test_what_is_written_anew_is_computed_anew(whole: ExpertKernel) -> None:
    """A slot that is resident, as migration writes it; and its bytes are those that other shards copy."""
    kernel, fresh = offloaded(whole.name, 2), KERNELS[whole.name](SHAPE)
    set_all(kernel, fresh)
    call = _one_row([1, 3])
    call.check(kernel, fresh)
    set_one(0, 1, 7, kernel, fresh)
    call.check(kernel, fresh)
    for slot in range(SLOTS):
        pairs = zip(kernel.slot_views(0, slot), fresh.slot_views(0, slot), strict=True)
        assert all(torch.equal(mine, theirs) for mine, theirs in pairs)
    kernel.begin_write(0, 3)
    with pytest.raises(ValueError, match="slot 3 holds no expert"):
        call.by(kernel)
    for view, source in zip(kernel.slot_views(0, 3), fresh.slot_views(0, 5), strict=True):
        view.copy_(source)
    kernel.finish_write(0, 3)
    assert torch.equal(_one_row([3]).by(kernel), _one_row([5]).by(fresh))
    assert kernel.layout == fresh.layout
    kernel.close()


def test_a_slot_that_changes_while_it_comes_early_is_not_used(whole: ExpertKernel) -> None:
    kernel, fresh = offloaded(whole.name, 2), KERNELS[whole.name](SHAPE)
    set_all(kernel, fresh)
    copy = kernel._backing.copy

    def change_meanwhile(slots: list[tuple[int, int]], targets: list[list[torch.Tensor]]) -> None:
        copy(slots, targets)
        kernel._backing.copy = copy  # type: ignore[method-assign]
        set_one(*slots[0], 7, kernel, fresh)

    kernel._backing.copy = change_meanwhile  # type: ignore[method-assign, assignment]
    assert kernel.bring_early(0, [4], NOBODY) == 0
    assert not kernel.residency.is_in(0, 4)
    _one_row([4, 1]).check(kernel, fresh)
    kernel.close()


def test_what_came_early_is_used_or_wasted(whole: ExpertKernel) -> None:
    kernel = offloaded(whole.name, 2, ONE_LAYER)
    set_all(kernel, shape=ONE_LAYER)
    assert kernel.bring_early(0, [4], NOBODY) == 1
    assert kernel.bring_early(0, [4], NOBODY) == 0, "it is there"
    _one_row([4]).check(kernel, whole)
    assert kernel.counts.misses == 0
    assert kernel.bring_early(0, [4, 5], NOBODY) == 1
    _one_row([1]).check(kernel, whole)
    _one_row([2]).check(kernel, whole)
    assert (kernel.counts.prefetched, kernel.residency.wasted) == (2, 1), "4 was used, 5 was not"
    kernel.close()


def test_a_copy_that_fails_refuses_one_call(whole: ExpertKernel) -> None:
    kernel = offloaded(whole.name, 2)
    set_all(kernel)
    copy = kernel._backing.copy

    def fail(slots: list[tuple[int, int]], targets: list[list[torch.Tensor]]) -> None:
        if (0, 3) in slots:
            raise OSError(errno.EIO, "broken")
        copy(slots, targets)

    kernel._backing.copy = fail  # type: ignore[method-assign, assignment]
    with pytest.raises(OSError, match="broken"):
        _one_row([1, 3]).by(kernel)
    with pytest.raises(OSError, match="broken"):
        kernel.bring_early(0, [2, 3], NOBODY)
    _one_row([1, 2]).check(kernel, whole)
    kernel._backing.copy = copy  # type: ignore[method-assign]
    _one_row([1, 3]).check(kernel, whole)
    kernel.close()


def test_slots_may_come_early_while_calls_run(whole: ExpertKernel) -> None:
    """Two places: every call and every early one push out what the other may want."""
    kernel = offloaded(whole.name, 2)
    set_all(kernel)
    done = threading.Event()
    came = [0]

    def hurry() -> None:
        number = 0
        while not done.is_set():
            came[0] += kernel.bring_early(number // SLOTS % LAYERS, [number % SLOTS, 0], NOBODY)
            number += 1

    thread = threading.Thread(target=hurry)
    thread.start()
    try:
        seed = 0
        while seed < 300 or came[0] < 50:
            Call.random(seed % LAYERS, 1 + seed % 3, seed, most=1 + seed % 4).check(kernel, whole)
            seed += 1
    finally:
        done.set()
        thread.join()
    kernel.close()


def test_what_comes_later_takes_free_places_and_nobody_elses(whole: ExpertKernel) -> None:
    """As a shard that starts empty gets its experts by migration, the most urgent first."""
    kernel = offloaded(whole.name, 2)
    kernel.fill([])
    set_all(kernel)
    for layer in range(LAYERS):
        assert [kernel.residency.is_in(layer, slot) for slot in range(SLOTS)] == [True, True] + [False] * (SLOTS - 2)
    _one_row([0, 1]).check(kernel, whole)
    assert kernel.counts.misses == 0
    set_one(0, 1, 0, kernel)
    assert kernel.residency.is_in(0, 1), "written anew, it is back in its place"
    kernel.close()


def test_the_step_at_hand_loses_nothing_to_what_comes_early(whole: ExpertKernel) -> None:
    """While a call waits for its second slot, neither that one nor its first can be pushed out."""
    kernel = offloaded(whole.name, 2, ONE_LAYER)
    set_all(kernel, shape=ONE_LAYER)
    copy, tried = kernel._backing.copy, []

    def meanwhile(slots: list[tuple[int, int]], targets: list[list[torch.Tensor]]) -> None:
        if not tried:
            tried.append(slots[0][1])
            tried.extend(kernel.bring_early(0, [other], NOBODY) for other in (4, 5))
        copy(slots, targets)

    _one_row([1]).check(kernel, whole)
    kernel._backing.copy = meanwhile  # type: ignore[method-assign, assignment]
    _one_row([1, 3]).check(kernel, whole)
    assert tried == [3, 0, 0]
    assert kernel.bring_early(0, [4], NOBODY) == 1, "when the call is over, it can"
    kernel.close()


def test_eviction_takes_no_copy_of_an_expert(whole: ExpertKernel) -> None:
    """Each slot is the sole copy of its expert. What leaves the one place is still there for calls and migration."""
    kernel = offloaded(whole.name, 1, ONE_LAYER)
    set_all(kernel, shape=ONE_LAYER)
    for slot in [*range(SLOTS), *range(SLOTS)]:
        _one_row([slot]).check(kernel, whole)
        for each in range(SLOTS):
            pairs = zip(kernel.slot_views(0, each), whole.slot_views(0, each), strict=True)
            assert all(torch.equal(mine, theirs.cpu()) for mine, theirs in pairs)
    assert kernel.residency.count() == 1
    kernel.close()


def test_a_full_disk_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"1000000\.00 GB of experts do not fit") as told:
        FileBacking(tmp_path, 10, 100, [10**12])
    assert told.value.filename == str(tmp_path)
    with pytest.raises(OSError, match="do not fit: No such file"):
        FileBacking(tmp_path / "missing", 1, 1, [1])
