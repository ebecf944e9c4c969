"""A day of a service's traffic, made up: domains that come and go, whose tokens prefer groups of experts.

T tokens, L layers, E experts, K experts of one token, D domains, P topics.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from placement.traces.observation import PREFILL, Observation, SampledStep

DAY_S = 86_400.0
TOPICS, AFFINITY = 32, 2.0  # as `benchmarks.placement.synthetic`
DOMAIN_AFFINITY, SIGMA = 1.0, 0.5
STEP_S = 0.03
DECODE_TOKENS, PREFILL_TOKENS = 256, 16_384
SAMPLED_OF_PREFILL = 1024
DECODE_STEPS, PREFILL_STEPS = 36, 9  # sampled of a window
PREFILL_SHARE = 0.2  # of all steps


@dataclass(frozen=True)
class ModelTraffic:
    """Routing of one model: loads that are lognormal, and topics, each of one domain, that like some experts.

    Topics of a domain like some experts in common, so loads shift with the hours and not only what goes together.

    Domain d has most traffic at hour 24 d / D; what it has at night is a quarter of that. `steady`: at all hours alike.
    """

    num_layers: int = 4
    num_experts: int = 256
    top_k: int = 8
    num_domains: int = 4
    steady: bool = False
    seed: int = 0

    def mix(self, at_s: float) -> np.ndarray:
        """float64 [P]: each topic's share of the tokens."""
        domain_P = np.arange(TOPICS) % self.num_domains
        phase_P = 2 * np.pi * ((0.0 if self.steady else at_s / DAY_S) - domain_P / self.num_domains)
        share_P = (1 + 0.6 * np.cos(phase_P)) ** 2
        return share_P / share_P.sum()

    def tokens(self, at_s: float, count: int, seed: int) -> np.ndarray:
        """int16 [T, L, K]: consecutive tokens of eight are of one topic."""
        model = np.random.default_rng((self.seed, self.num_layers, self.num_experts))
        logit_LE = model.normal(0, SIGMA, (self.num_layers, self.num_experts))
        likes_LPE = AFFINITY * (model.random((self.num_layers, TOPICS, self.num_experts)) < 1.5 / np.sqrt(TOPICS))
        of_domains_LDE = model.random((self.num_layers, self.num_domains, self.num_experts)) < 1 / self.num_domains
        likes_LPE += DOMAIN_AFFINITY * of_domains_LDE[:, np.arange(TOPICS) % self.num_domains]
        rng = np.random.default_rng((self.seed, seed, 1))
        topic_T = np.repeat(rng.choice(TOPICS, -(-count // 8), p=self.mix(at_s)), 8)[:count]
        ids = np.empty((count, self.num_layers, self.top_k), np.int16)
        for layer in range(self.num_layers):
            score_PE = (logit_LE[layer] + likes_LPE[layer]).astype(np.float32)
            score_TE = rng.gumbel(size=(count, self.num_experts)).astype(np.float32) + score_PE[topic_T]
            ids[:, layer] = np.argpartition(-score_TE, self.top_k, axis=1)[:, : self.top_k]
        return ids

    def window(self, at_s: float, seconds: float, seed: int) -> Observation:
        """What routers report of a window that ends at `at_s`."""
        sizes = [DECODE_TOKENS] * DECODE_STEPS + [SAMPLED_OF_PREFILL] * PREFILL_STEPS
        ids_TLK = self.tokens(at_s - seconds / 2, sum(sizes), seed)
        order = np.random.default_rng(seed).permutation(len(sizes))
        stops = np.cumsum(sizes)
        num_steps = seconds / STEP_S
        steps = []
        for number, which in enumerate(order.tolist()):
            ids = ids_TLK[stops[which] - sizes[which] : stops[which]]
            prefill = which >= DECODE_STEPS
            share = PREFILL_SHARE / PREFILL_STEPS if prefill else (1 - PREFILL_SHARE) / DECODE_STEPS
            when_s = at_s - seconds * (1 - number / len(sizes))
            num_tokens = PREFILL_TOKENS if prefill else DECODE_TOKENS
            steps.append(
                SampledStep(number, when_s, num_tokens, ids, np.full(len(ids), prefill, np.bool_), share * num_steps)
            )
        counts_PLE = np.zeros((2, self.num_layers, self.num_experts), np.int64)
        tokens_P = np.zeros(2, np.int64)
        for step in steps:
            phase = PREFILL if step.prefill_T[0] else 1 - PREFILL
            tokens_P[phase] += round(step.token_weight * len(step.topk_ids))
            for layer in range(self.num_layers):
                counts_E = np.bincount(step.topk_ids[:, layer].ravel(), minlength=self.num_experts)
                counts_PLE[phase, layer] += np.rint(counts_E * step.token_weight).astype(np.int64)
        return Observation(tuple(range(self.num_layers)), counts_PLE, tokens_P, round(num_steps), tuple(steps))
