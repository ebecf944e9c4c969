"""Percentiles of times that are counted by bucket, against those of the times themselves."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.autoscaling.measure import EngineMeasure
from cluster.autoscaling.pulse import BOUNDS_S, MOST_S, STEP, TimeCounts, quantile_s


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
@pytest.mark.parametrize("middle_s", [0.0004, 0.03, 7.0])
def test_a_percentile_is_right_to_a_bucket(share: float, middle_s: float) -> None:
    times_s = np.random.default_rng(1).lognormal(np.log(middle_s), 0.5, 5000)
    counts = TimeCounts()
    for part in np.split(times_s, 10):
        counts.add(part.tolist())
    found_s = quantile_s(np.array(counts.counts), share)
    assert found_s is not None
    exact_s = float(np.quantile(times_s, share))
    assert exact_s / STEP <= found_s <= exact_s * STEP, "buckets are a tenth wide"


def test_nothing_has_no_percentile_and_what_is_beyond_counts_as_the_last_bound() -> None:
    counts = TimeCounts()
    counts.add([])
    assert quantile_s(np.array(counts.counts), 0.99) is None
    counts.add([10 * MOST_S, 0.0])
    assert sum(counts.counts) == 2
    assert quantile_s(np.array(counts.counts), 0.99) == pytest.approx(BOUNDS_S[-1])
    assert BOUNDS_S[-1] == pytest.approx(MOST_S, rel=STEP - 1)


def test_an_engine_that_counted_nothing_says_so() -> None:
    measure = EngineMeasure()
    assert not measure.pulse().counted
    measure.record(3, 2, 0.25)
    measure.add(between_s=[0.02, 0.04], first_s=[0.5], queue_s=[])
    pulse = measure.pulse()
    assert (pulse.counted, pulse.tokens, pulse.running, pulse.waiting, pulse.kv_cache) == (True, 3, 3, 2, 0.25)
    assert (sum(pulse.between), sum(pulse.first)) == (2, 1)
