"""The digest of what a shard holds: it changes with the weights, however they came there."""

from __future__ import annotations

import pytest

from tests.support.noted_slots import (
    EVERYTHING,
    EXPERTS,
    HALVES,
    LAYERS,
    NotingKernel,
    Weights,
    placement,
    table,
)


def digest(changed: dict[tuple[int, int], tuple[str, int]] | None = None, quantized: bool = False) -> str:
    slots = table(6, NotingKernel(takes_quantized=quantized), Weights(changed))
    slots.load(placement([0, 1, 2, 3, 4, 5]), 0)
    return slots.digest()


def test_the_digest_is_sixteen_hex_digits_and_the_same_for_the_same_weights() -> None:
    assert digest() == digest()
    assert len(digest()) == 16
    assert int(digest(), 16) >= 0


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("place", [("w13", 0), ("w13", 15), ("w2", -16), ("w2", -1)])
def test_the_digest_tells_other_weights_in_any_expert_of_any_layer(place: tuple[str, int], quantized: bool) -> None:
    found = {digest({(layer, expert): place}, quantized) for layer in range(LAYERS) for expert in range(EXPERTS)}
    assert len(found | {digest(quantized=quantized)}) == LAYERS * EXPERTS + 1


def test_the_digest_tells_floats_apart_that_bytes_alone_would_not() -> None:
    assert digest({(0, 0): ("w13", 3)}) != digest({(0, 0): ("w13", 4)})


def test_the_digest_says_what_is_held_however_it_came_there() -> None:
    first, second, both, none = table(6), table(6), table(6), table(6)
    first.load(HALVES, 0)
    second.load(HALVES, 1)
    both.load(HALVES, 1)
    both.load(HALVES, 0)
    assert len({first.digest(), second.digest(), both.digest(), none.digest()}) == 4, "all experts are of equal weights"
    whole = table(6)
    whole.load(placement([0, 1, 2, 3, 4, 5]), 0)
    assert both.digest() == whole.digest()
    narrow = table(3)
    narrow.load(HALVES, 0)
    narrow.release(EVERYTHING)
    assert narrow.digest() == none.digest()
    narrow.load(HALVES, 1)
    assert narrow.digest() == second.digest(), "what was released counts no more"
