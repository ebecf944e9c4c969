"""What the request router by signature makes of what there is to win: the real one, before made-up engines.

    python -m benchmarks.serving.request_routing.simulate

Texts are the prompts of the tiny model, and the experts of a request are drawn from the recorded routing of its domain.
So many requests are open all the time; when one ends, which is by chance, the next one comes. Routers say without delay
how many they have. It learns from one half of the prompts and is judged on the other. Last, how long a choice takes.
"""

from __future__ import annotations

import random
import time
from collections import Counter

import numpy as np

from benchmarks.common import TINY_MODEL, median, print_table, save
from cluster.config.llm_sections import SignaturesSection
from cluster.signatures.chooser import Chooser
from cluster.signatures.messages import SignatureReport
from cluster.signatures.text import features
from cluster.signatures.usage import signature
from placement.traces.importers import load_trace
from placement.traces.profile import Prompt, read_prompts

ROUTERS = ("a", "b")
OPEN, LEADS = (16, 32, 64), (2, 4, 8, 16)
REPORTS, PAIRS, ROWS = 6, 32, 32
REQUESTS, WARM = 1500, 300


class Engines:
    """What routers computed, by domain: int [T, L, K] of each."""

    def __init__(self) -> None:
        trace = load_trace(TINY_MODEL / "trace.npz")
        self._num_experts = trace.num_experts
        self._ids = {name: np.asarray(trace.of_domain(name).topk_ids) for name in trace.domains}
        self._random = np.random.default_rng(0)

    def report(self, number: int, prompts: list[Prompt]) -> SignatureReport:
        """What a router says that computed PAIRS of the prompts."""
        chosen = [prompts[place] for place in self._random.integers(0, len(prompts), PAIRS)]
        signatures_NW = np.stack([self._signature(str(prompt.domain)) for prompt in chosen])
        features_NF = np.stack([features(str(prompt.text)) for prompt in chosen])
        return SignatureReport(number, np.rint(signatures_NW.mean(0)).astype(np.int8), features_NF, signatures_NW)

    def distinct(self, domains: list[str]) -> float:
        """Distinct experts a layer of a step with a token of each request."""
        step_TLK = np.stack([self._ids[name][self._random.integers(len(self._ids[name]))] for name in domains])
        return float(np.mean([len(np.unique(step_TLK[:, layer])) for layer in range(step_TLK.shape[1])]))

    def _signature(self, domain: str) -> np.ndarray:
        begin = self._random.integers(0, len(self._ids[domain]) - ROWS)
        return signature(self._ids[domain][begin : begin + ROWS], self._num_experts)


def run(engines: Engines, most_open: int, max_lead: int | None) -> tuple[float, float, float]:
    """(distinct experts a layer of a step, requests of the busier router, microseconds a choice).

    `max_lead` None: by load alone.
    """
    known, unseen = (read_prompts(TINY_MODEL / f"{name}.jsonl") for name in ("prompts", "prompts-unseen"))
    choosing = Chooser(SignaturesSection(max_lead=max_lead or 1), random.Random(0))
    choosing.keep(ROUTERS)
    for number in range(REPORTS):
        for router in ROUTERS:
            choosing.learn(router, engines.report(number, known))
    chance = random.Random(1)
    requests: list[tuple[str, str]] = []
    found, busier, took_us = [], [], []
    for count in range(REQUESTS):
        if len(requests) == most_open:
            requests.pop(chance.randrange(most_open))
        loads = Counter(router for router, _ in requests)
        for router in 2 * ROUTERS:
            choosing.loads.asked(router)
            choosing.loads.answered(router, loads[router])
        prompt = chance.choice(unseen)
        begin_s = time.perf_counter()
        chosen = choosing.choose("" if max_lead is None else str(prompt.text), ROUTERS)
        took_us.append(1e6 * (time.perf_counter() - begin_s))
        requests.append((chosen, str(prompt.domain)))
        if count >= WARM:
            found += [engines.distinct([d for r, d in requests if r == router]) for router in ROUTERS]
            busier.append(max(Counter(router for router, _ in requests).values()))
    return float(np.mean(found)), float(np.mean(busier)), median(took_us)


def main() -> None:
    """Print the table and write bench-results/request_routing_simulated.json."""
    engines, rows = Engines(), []
    for most_open in OPEN:
        by_load = run(engines, most_open, None)
        rows.append([most_open, "load alone", *by_load[:2], "", by_load[2]])
        for lead in LEADS:
            distinct, busier, took_us = run(engines, most_open, lead)
            rows.append([most_open, str(lead), distinct, busier, f"{100 * (1 - distinct / by_load[0]):.1f} %", took_us])
    header = ["open requests", "max_lead", "distinct experts", "busier router", "fewer", "us a choice"]
    print_table("two routers, four domains of the tiny model, simulated", header, rows)
    save("request_routing_simulated", {"header": header, "rows": rows})


if __name__ == "__main__":
    main()
