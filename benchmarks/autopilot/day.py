"""A day of shifting traffic, simulated: the autopilot against linear order, hourly EPLB, and a plan for every window.

    python -m benchmarks.autopilot [--quick] [--layers 4] [--windows 72]

DeepSeek-V3's shapes (256 experts of 44 MB, 8 of a token; some of its 58 layers) on 64 ranks of 5 slots. Four domains
have their hours of the day, as `traffic.py` makes them up. The pilot, its judge and its planner are the real ones, in
this process; routers, moves and the clock are not. A move is over when the next window begins, its cost is what the
pilot counts for it. Every placement is priced on the same steps of each window: as the slowest shard of each layer, by
nominal figures of an H100.

- `eplb`: the greedy balancing of loads, made each hour from the loads of the hour before, free of cost.
- `oracle`: a plan from nothing for each window, made of other tokens of the same mix, free of cost.
- the last table: the same with a mix that does not change, where every copy after the first plan follows noise.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field, replace

import numpy as np

from benchmarks.autopilot.traffic import DAY_S, ModelTraffic
from benchmarks.common import print_table, save
from cluster.autopilot.background import do
from cluster.autopilot.jobs import JudgeJob, Model, PlanJob, Proposal, Verdict
from cluster.autopilot.pilot import Change, Facts, Pilot
from cluster.autopilot.pricing import StepPrice, price_steps
from cluster.config.autopilot_section import AutopilotSection
from placement.placement import Placement
from placement.policy import build_placement, pad_slots
from placement.search.eplb import packed_slots
from placement.search.few_copies.resize import copies_between
from placement.search.problem import PlanRequest
from placement.traces.observation import Observation
from placement.traces.trace import ActivationTrace

RANKS, SLOTS = 64, 5
EXPERT_BYTES = 3 * 7168 * 2048
MODEL = Model(EXPERT_BYTES, 1.0, EXPERT_BYTES * SLOTS * 58, "cuda")
MESH_BYTES_PER_S = 8 * 25e9  # eight nodes
GOAL = 1.05
PLAN_TOKENS = 16_384  # that the oracle plans with


@dataclass
class Simulated:
    """The pilot's side of the day."""

    section: AutopilotSection
    placement: Placement
    fresh_s: float
    pilot: Pilot = field(default_factory=Pilot)
    version: int = 1
    now_s: float = 0.0
    copies: int = 0

    def __post_init__(self) -> None:
        self.pilot.configure(self.section)
        self.pilot.next_job(self.facts())  # it takes the first target in
        self.pilot.traffic.restart(0.0)

    def facts(self) -> Facts:
        return Facts(
            now_s=self.now_s,
            now=self.now_s,
            target_version=self.version,
            placement=self.placement,
            moving=False,
            frozen="",
            model=MODEL,
            slots_per_rank=SLOTS,
            min_replicas=1,
            load_cap=1.05,
            fresh_s=self.fresh_s,
            bytes_per_s=MESH_BYTES_PER_S,
        )

    def see(self, seen: Observation, now_s: float, number: int) -> None:
        """A window is over: let the pilot do all that it wants to."""
        self.now_s = now_s
        self.pilot.traffic.add("router", number, seen, now_s)
        job: JudgeJob | PlanJob | Change | None = self.pilot.next_job(self.facts())
        while isinstance(job, JudgeJob | PlanJob):
            result = do(job)
            if isinstance(result, Verdict):
                job = self.pilot.judged(result, self.facts())
            else:
                assert isinstance(result, Proposal)
                size_bytes = result.copies * EXPERT_BYTES
                job = self.pilot.proposed(result, self.facts(), size_bytes / MESH_BYTES_PER_S, size_bytes)
        if isinstance(job, Change):
            self.copies += copies_between(self.placement, job.placement)
            self.placement, self.version = job.placement, self.version + 1
            self.pilot.begun(self.version, self.facts())

    @property
    def cost_s(self) -> float:
        """What the moves cost in serving time."""
        moved = [each for each in self.pilot.decisions if each.target_version]
        return sum(each.cost_s or 0.0 for each in moved)


def planned(ids_TLK: np.ndarray, model: ModelTraffic, seconds: float) -> Placement:
    """A plan from nothing for these tokens, within about that time."""
    request = PlanRequest(num_ranks=RANKS, num_nodes=1, slots_per_rank=SLOTS, load_cap=1.05, seconds=seconds)
    trace = ActivationTrace(ids_TLK, model.num_experts)
    return build_placement("optimized", request, trace, trace)


def balanced(seen: list[Observation], model: ModelTraffic) -> Placement:
    """EPLB for the loads of some windows."""
    load_LE = sum(each.counts_LE for each in seen)
    map_LS = np.stack([packed_slots(load_E, RANKS, SLOTS).ravel() for load_E in np.asarray(load_LE, float)])
    return Placement(RANKS, 1, model.num_experts, map_LS)


def simulate(model: ModelTraffic, windows: int, fresh_s: float, days: float = 1.0) -> list[dict[str, object]]:
    """A row for each way to place experts."""
    seconds = days * DAY_S / windows
    section = AutopilotSection(mode="auto", window_s=seconds, cool_down_s=seconds / 2, horizon_s=3600.0)
    linear = pad_slots(Placement.linear(model.num_layers, model.num_experts, RANKS, 1, 1), SLOTS)
    pilot = Simulated(section, linear, fresh_s)
    placements = {"linear": linear, "eplb": linear, "autopilot": linear, "oracle": linear}
    step_s: dict[str, list[float]] = {name: [] for name in placements}
    copies = dict.fromkeys(placements, 0)
    hour: list[Observation] = []
    price = StepPrice.of(MODEL)
    begun_s, told_s = time.monotonic(), time.monotonic()
    for number in range(1, windows + 1):
        now_s = number * seconds
        seen = model.window(now_s, seconds, 2 * number)
        before = dict(placements)
        if len(hour) * seconds >= 3600:
            placements["eplb"], hour = balanced(hour, model), []
        placements["autopilot"] = pilot.placement
        placements["oracle"] = planned(model.tokens(now_s - seconds / 2, PLAN_TOKENS, 2 * number + 1), model, fresh_s)
        for name, placement in placements.items():
            step_s[name].append(price_steps(placement, seen.sampled, price).mean())
            copies[name] += copies_between(before[name], placement)
        hour.append(seen)
        pilot.see(seen, now_s, number)
        if time.monotonic() - told_s > 20:
            told_s = time.monotonic()
            print(f"window {number} of {windows} after {told_s - begun_s:.0f} s, {pilot.copies} copies", flush=True)
    copies["autopilot"] = pilot.copies
    best_s = float(np.mean(step_s["oracle"]))
    rows = []
    for name, taken_s in step_s.items():
        mean_s = float(np.mean(taken_s))
        if name == "autopilot":  # moves make steps longer; what they cost is spread over the day
            mean_s *= 1 + pilot.cost_s / (days * DAY_S)
        worst = max(taken / best for taken, best in zip(taken_s, step_s["oracle"], strict=True))
        rows.append(
            {
                "placement": name,
                "step_us": mean_s * 1e6,
                "of_oracle": mean_s / best_s,
                "worst_window": worst,
                "copies_a_layer": copies[name] / model.num_layers,
                "copies_a_window": copies[name] / model.num_layers / windows,
            }
        )
    outcomes = [each.outcome for each in pilot.pilot.decisions]
    print({name: outcomes.count(name) for name in sorted(set(outcomes))})
    return rows


def main() -> None:
    """Print two tables and write bench-results/autopilot_day.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--windows", type=int)
    args = parser.parse_args()
    layers = args.layers or (2 if args.quick else 4)
    windows = args.windows or (24 if args.quick else 72)
    fresh_s = 1.0 * layers
    shifting = ModelTraffic(num_layers=layers)
    day = simulate(shifting, windows, fresh_s)
    header = list(day[0])
    print_table(
        f"A day, {windows} windows; goal: autopilot at most {GOAL} of oracle", header, [list(r.values()) for r in day]
    )
    still = simulate(replace(shifting, steady=True), windows // 2, fresh_s, days=0.5)
    print_table("Half a day without drift", header, [list(row.values()) for row in still])
    save("autopilot_day", {"day": day, "still": still, "layers": layers, "windows": windows})


if __name__ == "__main__":
    main()
