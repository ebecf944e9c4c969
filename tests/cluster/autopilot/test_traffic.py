"""Windows of traffic, from reports that may come twice or be of another model; and how sure a difference is."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.autopilot.estimates import Prices, distance, excess, saving
from cluster.autopilot.traffic import LARGEST_SAMPLE, Traffic, pooled
from placement.traces.observation import Observation, SampledStep
from placement.traces.trace import TraceError


def report(tokens: int, steps: int = 1, experts: int = 4) -> Observation:
    """`steps` steps, all of whose `tokens` tokens are sampled."""
    counts_PLE = np.zeros((2, 1, experts), np.int64)
    counts_PLE[0, 0, 0] = tokens * steps
    ids = np.zeros((tokens, 1, 1), np.int16)
    sampled = tuple(SampledStep(n, float(n), tokens, ids, np.zeros(tokens, bool)) for n in range(steps))
    return Observation((0,), counts_PLE, np.array([tokens * steps, 0]), steps, sampled)


def test_a_window_adds_up_what_routers_report_and_no_report_twice() -> None:
    traffic = Traffic()
    assert traffic.close(100.0, 10, 1) is None
    assert traffic.add("a", 1, report(3), 100.0)
    assert not traffic.add("a", 1, report(3), 101.0)
    assert traffic.add("b", 1, report(4, steps=2), 105.0)
    assert traffic.close(109.0, 10, 1) is None
    assert traffic.close(110.0, 10, 12) is None, "too few sampled tokens: it goes on"
    window = traffic.close(110.0, 10, 11)
    assert window is not None
    assert (window.seen.tokens, window.seen.steps, window.seconds) == (11, 3, 10)
    assert (traffic.reports, traffic.tokens, traffic.routers(110.0, 7)) == (2, 11, 1)
    traffic.add("a", 2, report(5), 111.0)
    traffic.restart(112.0)
    assert traffic.close(200.0, 10, 1) is None, "what was before is dropped"
    traffic.add("a", 3, report(5), 201.0)
    with pytest.raises(TraceError, match="observations of"):
        traffic.add("a", 4, report(5, experts=5), 202.0)


def test_old_windows_count_half_and_large_samples_are_thinned() -> None:
    traffic = Traffic()
    for number in (1, 2):
        traffic.add("a", number, report(64, steps=2 * LARGEST_SAMPLE // 64), 10.0 * number)
        traffic.close(10.0 * number + 10, 10, 1)
    first, second = traffic.windows
    assert first.seen.sampled_tokens == LARGEST_SAMPLE
    both = pooled([first, second])
    fade = 0.5**0.25
    assert both.tokens == pytest.approx((1 + fade) * second.seen.tokens, abs=1)
    assert both.sampled[0].weight == pytest.approx(fade * both.sampled[-1].weight)


def prices(seconds_S: np.ndarray) -> Prices:
    ones_S = np.ones(len(seconds_S))
    return Prices(seconds_S[:, None], ones_S, ones_S, ones_S)


@pytest.mark.parametrize("reuse", [1, 4])
def test_noise_covers_what_chance_does_and_no_more(reuse: int) -> None:
    """Of many draws without any difference, 2 standard errors must hold about 95 %: no fewer than 88, not all.

    Sizes of steps, which are the same on both sides, are no noise. With `reuse`, the reference is so much smaller.
    """
    rng = np.random.default_rng(0)
    inside, noises = [], []
    for _ in range(400):
        # Steps near in time are alike: a random level each twenty.
        a = np.repeat(rng.normal(size=20), 20) + rng.normal(size=400)
        b = np.repeat(rng.normal(size=20 // reuse), 20) + rng.normal(size=400 // reuse)
        sizes = 10 + rng.choice([0, 90], 400)
        found = excess(prices(sizes + a), prices(sizes + np.tile(b, reuse)), reuse)
        inside.append(abs(found.value) < 2 * found.noise)
        noises.append(found.noise)
    assert 0.88 < np.mean(inside) < 0.99
    assert np.median(noises) < 0.01 * np.sqrt(1 + reuse)


def test_what_is_saved_on_the_same_steps_is_told_to_the_common_noise() -> None:
    seconds_S = np.random.default_rng(0).uniform(1, 10, 200)
    found = saving(prices(seconds_S), prices(0.9 * seconds_S))
    assert found.value == pytest.approx(0.1)
    assert found.noise < 0.01
    assert saving(prices(seconds_S[:2]), prices(seconds_S[:2])).noise == np.inf


def test_how_many_long_steps_were_sampled_is_no_noise_of_what_is_saved() -> None:
    """Long steps save a third, short ones nothing. The true share is inside two standard errors about 95 % of times,
    and the noise is far below that of the sums, which is what chance makes of the number of long steps."""
    rng = np.random.default_rng(0)
    inside, noises = [], []
    for _ in range(400):
        is_long_S = rng.random(200) < 0.2
        seconds_S = np.where(is_long_S, 100.0, 2.0) * rng.uniform(0.9, 1.1, 200)
        found = saving(prices(seconds_S), prices(np.where(is_long_S, 2 / 3, 1) * seconds_S))
        inside.append(abs(found.value - 0.2 * 100 / 3 / (0.2 * 100 + 0.8 * 2)) < 2 * found.noise)
        noises.append(found.noise)
    assert 0.88 < np.mean(inside) < 0.99
    assert np.median(noises) < 0.01


def test_the_distance_of_mixes_runs_from_0_to_1() -> None:
    here, there = np.array([[1.0, 0, 0]]), np.array([[0, 0.5, 0.5]])
    assert (distance(here, here), distance(here, there)) == (0, 1)
