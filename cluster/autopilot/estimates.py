"""How much one placement costs more than another, and how sure that is. Plain numpy.

S sampled steps, L layers, E experts, B batches of steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

BATCHES = 10  # steps near in time have the same requests: only means of stretches are taken as independent
SURE = 2.0  # standard errors


@dataclass(frozen=True)
class Estimate:
    """A share, with its standard error (infinite: of too few steps to tell)."""

    value: float
    noise: float

    @property
    def surely_above(self) -> float:
        """What the share is above, but for noise."""
        return self.value - SURE * self.noise


@dataclass(frozen=True, eq=False)
class Prices:
    """A placement on sampled steps: seconds float64 [S, L]; shards a token visits and balancedness of shards [S].

    `weight_S`: how many steps of the traffic each stands for. Where shards offload: `found_S`, the share of the experts
    that were in memory, and `copy_S`, the part of the seconds that goes into waiting for the others.
    """

    seconds_SL: np.ndarray
    fan_out_S: np.ndarray
    balancedness_S: np.ndarray
    weight_S: np.ndarray
    found_S: np.ndarray | None = None
    copy_S: np.ndarray | None = None

    @property
    def seconds_S(self) -> np.ndarray:
        """float64 [S]: all layers together."""
        return self.seconds_SL.sum(1)

    def mean(self, name: str = "seconds_S") -> float:
        """Over the traffic's steps."""
        return float(np.average(getattr(self, name), weights=self.weight_S))


def saving(before: Prices, after: Prices) -> Estimate:
    """The share of `before`'s seconds that `after` saves on the same steps, in the same order."""
    return share_of(before.seconds_S - after.seconds_S, before.seconds_S, before.weight_S)


def excess(measured: Prices, planned: Prices, reuse: float = 1.0) -> Estimate:
    """How much more the measured steps cost than others of the same sizes, in the same order, as a share of those.

    Differences of steps bear the noise of both. `reuse`: how often a token is in `planned`, whose noise is then as much
    larger in variance than that of as many tokens.
    """
    share = share_of(measured.seconds_S - planned.seconds_S, planned.seconds_S, measured.weight_S)
    return Estimate(share.value, share.noise * float(np.sqrt((1 + max(reuse, 1.0)) / 2)))


def share_of(part_S: np.ndarray, whole_S: np.ndarray, weight_S: np.ndarray) -> Estimate:
    """Weighted sum of `part_S` over that of `whole_S`, with the noise of a ratio (Cochran, Sampling Techniques, 6.3).

    Long steps have more of both. How many of them happened to be sampled moves each sum much and their ratio little, so
    noise is that of what each step is off the ratio.
    """
    whole = float(np.average(whole_S, weights=weight_S))
    if not whole > 0:
        return Estimate(0.0, float("inf"))
    value = float(np.average(part_S, weights=weight_S)) / whole
    return Estimate(value, noise_of(part_S - value * whole_S, weight_S) / whole)


def noise_of(values_S: np.ndarray, weight_S: np.ndarray) -> float:
    """Standard error of the weighted mean, from the means of stretches (batch means; Law and Kelton 1984)."""
    stretches = [part for part in np.array_split(np.arange(len(values_S)), BATCHES) if len(part)]
    if len(stretches) < 3:
        return float("inf")
    mean_B = np.array([np.average(values_S[part], weights=weight_S[part]) for part in stretches])
    share_B = np.array([weight_S[part].sum() for part in stretches])
    share_B = share_B / share_B.sum()
    center = float((share_B * mean_B).sum())
    variance = float((share_B**2 * (mean_B - center) ** 2).sum()) * len(stretches) / (len(stretches) - 1)
    return float(np.sqrt(variance))


def distance(shares_LE: np.ndarray, others_LE: np.ndarray) -> float:
    """How much two mixes of traffic differ, 0 to 1: total variation, mean over layers."""
    return float(np.abs(shares_LE - others_LE).sum(1).mean() / 2)
