"""Which version gets a request: shares, and who stays with one version."""

from __future__ import annotations

import itertools
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from cluster.config.gateway.sections import VersionsSection
from cluster.gateway.split import Split

WEIGHTS = st.dictionaries(st.sampled_from("abcde"), st.integers(0, 9), min_size=1).filter(lambda w: any(w.values()))


def split(weights: dict[str, int]) -> Split:
    versions = {name: {"app": f"app-{name}", "weight": weight} for name, weight in weights.items()}
    return Split(VersionsSection.model_validate({"versions": versions}))


@given(WEIGHTS, st.integers(1, 3))
def test_every_version_gets_exactly_its_share_of_each_round(weights: dict[str, int], rounds: int) -> None:
    chooser, total = split(weights), sum(weights.values())
    for _ in range(rounds):
        chosen = Counter(chooser.order(None)[0] for _ in range(total))
        assert chosen == Counter({name: weight for name, weight in weights.items() if weight})


@given(WEIGHTS, st.one_of(st.none(), st.text(max_size=8)))
def test_all_versions_are_in_the_order_and_the_heaviest_is_asked_next(
    weights: dict[str, int], sticky: str | None
) -> None:
    first, *others = split(weights).order(sticky)
    assert sorted([first, *others]) == sorted(weights)
    assert weights[first] > 0
    assert [weights[name] for name in others] == sorted((weights[name] for name in others), reverse=True)


def test_a_small_share_comes_evenly_and_not_in_a_row() -> None:
    chooser = split({"stable": 9, "canary": 1})
    drawn = [chooser.order(None)[0] for _ in range(40)]
    at = [index for index, name in enumerate(drawn) if name == "canary"]
    assert [after - before for before, after in itertools.pairwise(at)] == [10, 10, 10]


@given(WEIGHTS, st.text(max_size=8))
def test_what_is_alike_goes_to_one_version_whatever_came_between(weights: dict[str, int], sticky: str) -> None:
    chooser = split(weights)
    first = chooser.order(sticky)[0]
    chooser.order(None)
    assert chooser.order(sticky)[0] == first == split(weights).order(sticky)[0], "in every gateway"


def test_keys_are_spread_by_weight() -> None:
    chooser = split({"stable": 3, "canary": 1})
    drawn = Counter(chooser.order(f"key-{index}")[0] for index in range(4000))
    # 1,000 expected; the standard deviation of a binomial is 27, and hashes do not change.
    assert 890 < drawn["canary"] < 1110


def test_a_growing_share_takes_keys_over_and_gives_none_back() -> None:
    keys = [f"key-{index}" for index in range(500)]
    at = {share: {k for k in keys if split({"s": 100 - share, "c": share}).order(k)[0] == "c"} for share in (0, 5, 50)}
    assert at[0] < at[5] < at[50]
    assert len(split({"s": 0, "c": 1}).order("x")) == 2
