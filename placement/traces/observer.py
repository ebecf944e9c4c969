"""Observes a stream of steps, cheaply: counts every token by phase, and keeps some steps until they are taken.

P phases, T tokens of a step, L layers, K experts of one token, E experts.
"""

from __future__ import annotations

import numpy as np

from placement.compiled import compiled
from placement.traces.observation import PHASES, Observation, SampledStep

MOST_STEPS = 256  # of one observation


# Compiled for the same reason as the recorder's loop.
@compiled()
def _count(ids_TLK: np.ndarray, prefill_T: np.ndarray, counts_PLE: np.ndarray, tokens_P: np.ndarray) -> int:
    """Count a step; returns how many tokens picked an expert, or -1 - id, with nothing done, for a bad id."""
    num_tokens, num_layers, top_k = ids_TLK.shape
    for t in range(num_tokens):
        for layer in range(num_layers):
            for k in range(top_k):
                if ids_TLK[t, layer, k] >= counts_PLE.shape[2]:
                    return -1 - np.int64(ids_TLK[t, layer, k])  # type: ignore[return-value]
    real = 0
    for t in range(num_tokens):
        phase = 1 if len(prefill_T) > 0 and prefill_T[t] else 0
        wanted = 0
        for layer in range(num_layers):
            for k in range(top_k):
                expert = ids_TLK[t, layer, k]
                if expert >= 0:
                    counts_PLE[phase, layer, expert] += 1
                    wanted += 1
        if wanted > 0:
            tokens_P[phase] += 1
            real += 1
    return real


class StepObserver:
    """Everything since the last `take`. For one thread at a time.

    Every `stride`-th step is kept, with at most `step_tokens` of its tokens. When more than `sample_tokens` tokens or
    MOST_STEPS steps are kept, every other one of these steps is dropped and the stride doubles, so that the steps kept
    are evenly spaced, however many there were.
    """

    def __init__(
        self,
        num_layers: int,
        num_experts: int,
        top_k: int,
        sample_tokens: int,
        step_tokens: int = 512,
        layers: tuple[int, ...] = (),
    ) -> None:
        if min(num_layers, num_experts, top_k, sample_tokens, step_tokens) < 1:
            raise ValueError(
                f"{num_layers} layers, {num_experts} experts, top-{top_k}, samples of {sample_tokens} tokens and "
                f"{step_tokens} of a step: each must be at least 1"
            )
        self.layers = layers or tuple(range(num_layers))
        self._shape = (num_layers, top_k)
        self._sample_tokens, self._step_tokens = sample_tokens, min(step_tokens, sample_tokens)
        self._counts_PLE = np.zeros((len(PHASES), num_layers, num_experts), np.int64)
        self._tokens_P = np.zeros(len(PHASES), np.int64)
        self._steps = 0  # since the router started
        self._taken = 0  # of those, before this observation
        self._stride = 1
        self._kept: list[SampledStep] = []
        self._kept_tokens = 0
        self._no_prefill_T = np.zeros(0, np.bool_)
        # Load or compile the machine code now, for the layout of live steps.
        self.add(np.full((num_layers, 1, top_k), -1, np.int16).transpose(1, 0, 2), None, 0.0)

    def add(self, topk_ids_TLK: np.ndarray, prefill_T: np.ndarray | None, at_s: float) -> None:
        """Observe a step: int16 [T, L, K], -1 for none; `prefill_T` bool: tokens of prompts, None for none.

        A token without experts is padding. The arrays are not kept. ValueError if a shape or an id does not fit.
        """
        if topk_ids_TLK.shape[1:] != self._shape:
            raise ValueError(f"a step must be [tokens, {self._shape[0]}, {self._shape[1]}], got {topk_ids_TLK.shape}")
        if prefill_T is not None and len(prefill_T) < len(topk_ids_TLK):
            raise ValueError(f"{len(prefill_T)} phases for {len(topk_ids_TLK)} tokens")
        phases_T = self._no_prefill_T if prefill_T is None else prefill_T
        real = _count(topk_ids_TLK, phases_T, self._counts_PLE, self._tokens_P)
        if real < 0:
            raise ValueError(f"expert {-1 - real} is not one of {self._counts_PLE.shape[2]}")
        if not real:
            return
        number = self._steps
        self._steps += 1
        if (number - self._taken) % self._stride == 0:
            self._keep(number, topk_ids_TLK, prefill_T, at_s, real)

    def take(self) -> Observation:
        """What was observed since the last call; begins anew."""
        steps = self._steps - self._taken
        kept = tuple(
            SampledStep(s.number, s.at_s, s.num_tokens, s.topk_ids, s.prefill_T, steps / len(self._kept))
            for s in self._kept
        )
        observation = Observation(self.layers, self._counts_PLE.copy(), self._tokens_P.copy(), steps, kept)
        self._counts_PLE[:] = 0
        self._tokens_P[:] = 0
        self._taken, self._stride, self._kept, self._kept_tokens = self._steps, 1, [], 0
        return observation

    def _keep(
        self, number: int, ids_TLK: np.ndarray, prefill_T: np.ndarray | None, at_s: float, num_tokens: int
    ) -> None:
        real_J = np.flatnonzero((ids_TLK >= 0).any((1, 2))) if num_tokens < len(ids_TLK) else np.arange(num_tokens)
        if num_tokens > self._step_tokens:
            real_J = real_J[np.arange(self._step_tokens) * num_tokens // self._step_tokens]
        phases = np.zeros(len(real_J), np.bool_) if prefill_T is None else prefill_T[real_J].astype(np.bool_)
        self._kept.append(SampledStep(number, at_s, num_tokens, ids_TLK[real_J], phases))
        self._kept_tokens += len(real_J)
        while len(self._kept) > 1 and (self._kept_tokens > self._sample_tokens or len(self._kept) > MOST_STEPS):
            self._stride *= 2
            self._kept = [s for s in self._kept if (s.number - self._taken) % self._stride == 0]
            self._kept_tokens = sum(len(s.topk_ids) for s in self._kept)
