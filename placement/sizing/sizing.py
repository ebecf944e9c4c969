"""The answer to a question of size: the layout, others near it, plain expert parallelism, whether the split pays."""

from __future__ import annotations

from dataclasses import dataclass

from placement.sizing.demand import Demand
from placement.sizing.gpus import Gpu
from placement.sizing.model import ModelFacts
from placement.sizing.plan import Engines, Layout, best_layouts, engines_on, largest_rate, plan_engines
from placement.sizing.speed import StepTime

SECONDS_AN_HOUR = 3600


@dataclass(frozen=True)
class Verdict:
    """Whether the split pays against plain expert parallelism on GPUs of the same kind; lines for a person say why."""

    pays: bool
    why: tuple[str, ...]


@dataclass(frozen=True)
class Sizing:
    """One answer.

    Attributes:
        layouts: the best one first, then others near it.
        carries: requests a second that the best one carries within the limits.
        engines: plain expert parallelism on the fewest GPUs, None if it does not serve the demand.
        engines_equal: the fastest on as many GPUs as the best layout, None likewise.
        price_per_gpu_hour: in whatever currency.
    """

    facts: ModelFacts
    gpu: Gpu
    demand: Demand
    layouts: tuple[Layout, ...]
    carries: float
    engines: Engines | None
    engines_equal: Engines | None
    price_per_gpu_hour: float | None

    @property
    def layout(self) -> Layout:
        return self.layouts[0]

    @property
    def answered_per_s(self) -> float:
        """Tokens of answers a second under the demand."""
        return self.demand.rate * self.demand.osl

    def price_per_hour(self, gpus: int) -> float | None:
        return None if self.price_per_gpu_hour is None else gpus * self.price_per_gpu_hour

    def price_per_million(self, gpus: int) -> float | None:
        """Price of a million tokens of answers under the demand, their prompts included."""
        hourly = self.price_per_hour(gpus)
        return None if hourly is None else hourly / (self.answered_per_s * SECONDS_AN_HOUR) * 1e6

    @property
    def verdict(self) -> Verdict:
        """The split against the fewest GPUs of plain expert parallelism, then on equal GPUs."""
        split, plain, equal = self.layout, self.engines, self.engines_equal
        kept = f"{self.demand.lost_shards} lost shard(s) survived and {self.demand.spare_slots} spare slot(s) a layer"
        if plain is None:
            return Verdict(
                True, (f"plain expert parallelism serves this on no number of GPUs up to {self.demand.max_gpus}",)
            )
        why = []
        pays = split.gpus < plain.gpus
        if split.gpus != plain.gpus:
            why.append(f"{split.gpus} GPUs with the split, {plain.gpus} with plain expert parallelism")
        else:
            pays = split.point.tpot_s < plain.point.tpot_s
            why.append(f"{split.gpus} GPUs either way")
        if equal is not None:
            with_split, without = (
                f"{point.tpot_s * 1e3:.1f} ms a token and {point.ttft_s * 1e3:.0f} ms to the first"
                for point in (split.point, equal.point)
            )
            why.append(f"on {split.gpus} GPUs {with_split} with the split, {without} without")
        else:
            why.append(f"on {split.gpus} GPUs plain expert parallelism does not serve this")
        if not pays:
            name, share = max(shares(split.point.step).items(), key=lambda each: each[1])
            why.append(f"most of the split's step is {name} ({share:.0%})")
            why.append(
                f"for it the split has {kept}, which plain expert parallelism has not, and halves that grow apart"
            )
        return Verdict(pays, tuple(why))


def size(
    facts: ModelFacts, gpu: Gpu, demand: Demand, *, price_per_gpu_hour: float | None = None, alternatives: int = 4
) -> Sizing:
    """Answer a question. SizingError for one that makes no sense, NoLayoutError if nothing serves the demand."""
    layouts = best_layouts(facts, gpu, demand, 1 + alternatives)
    best = layouts[0]
    return Sizing(
        facts,
        gpu,
        demand,
        tuple(layouts),
        largest_rate(facts, gpu, demand, best),
        plan_engines(facts, gpu, demand),
        engines_on(facts, gpu, demand, best.gpus),
        price_per_gpu_hour,
    )


def shares(step: StepTime) -> dict[str, float]:
    """What a step's time goes to, as shares of it."""
    layers, experts = step.moe_layers, step.experts
    seconds = {
        "dense weights": step.weights_s,
        "attention": step.attention_s,
        "adding up among a router's GPUs": step.reduce_s,
        "launches and scheduling": step.fixed_s,
        "a router's dispatch and combine": layers * experts.router_s,
        "the wire": layers * experts.wire_s,
        "experts on the slowest shard": layers * experts.shard_s,
        "waiting for shards that serve others": layers * experts.wait_s,
    }
    return {name: value / step.total_s for name, value in seconds.items()}
