"""What routers saw of their traffic in a stretch of time: exact counts by phase, and steps whose tokens went together.

P phases, L layers, E experts, T sampled tokens of a step, K experts of one token.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from placement.traces.trace import ActivationTrace, TraceError

PHASES = ("decode", "prefill")
DECODE, PREFILL = range(len(PHASES))

_VERSION = 1
_NO_EXPERT_8 = 255  # in ids of one byte
_LARGEST_BYTES = 256 * 2**20  # of an observation once unpacked


@dataclass(frozen=True, eq=False)
class SampledStep:
    """One step of a router. `topk_ids` int16 [T, L, K] has some of its tokens, evenly spaced; -1 is no expert.

    `prefill_T` bool: which of them are of prompts. `at_s` in seconds since 1970; `weight`: how many of the router's
    steps this one stands for.
    """

    number: int
    at_s: float
    num_tokens: int
    topk_ids: np.ndarray
    prefill_T: np.ndarray
    weight: float = 1.0

    @property
    def token_weight(self) -> float:
        """How many tokens of the traffic each sampled one stands for."""
        return self.weight * self.num_tokens / max(len(self.topk_ids), 1)


@dataclass(frozen=True, eq=False)
class Observation:
    """Counts are of all tokens. `counts_PLE` int64 [P, L, E], `tokens_P` int64 [P]; `layers` as the model numbers them.

    Raises TraceError if shapes contradict one another.
    """

    layers: tuple[int, ...]
    counts_PLE: np.ndarray
    tokens_P: np.ndarray
    steps: int = 0
    sampled: tuple[SampledStep, ...] = field(default=())

    def __post_init__(self) -> None:
        shape = self.counts_PLE.shape
        if self.counts_PLE.ndim != 3 or shape[:2] != (len(PHASES), len(self.layers)):
            raise TraceError(
                f"counts are {list(shape)}, expected [{len(PHASES)} phases, {len(self.layers)} layers, experts]"
            )
        if self.tokens_P.shape != (len(PHASES),):
            raise TraceError(f"tokens are {list(self.tokens_P.shape)}, expected one number for each of {PHASES}")
        for step in self.sampled:
            ids = step.topk_ids
            if ids.ndim != 3 or ids.shape[1] != shape[1] or step.prefill_T.shape != ids.shape[:1]:
                raise TraceError(
                    f"step {step.number}: ids are {list(ids.shape)} and phases {list(step.prefill_T.shape)}, "
                    f"expected [tokens, {shape[1]}, k] and [tokens]"
                )
            if ids.size and (ids.max() >= shape[2] or ids.min() < -1):
                raise TraceError(f"step {step.number}: ids from {ids.min()} to {ids.max()} for {shape[2]} experts")

    @classmethod
    def nothing(cls, layers: tuple[int, ...], num_experts: int) -> Observation:
        """Of no traffic."""
        counts_PLE = np.zeros((len(PHASES), len(layers), num_experts), np.int64)
        return cls(layers, counts_PLE, np.zeros(len(PHASES), np.int64))

    @property
    def num_experts(self) -> int:
        return int(self.counts_PLE.shape[2])

    @property
    def counts_LE(self) -> np.ndarray:
        """int64 [L, E]: of both phases."""
        return self.counts_PLE.sum(0)

    @property
    def tokens(self) -> int:
        return int(self.tokens_P.sum())

    @property
    def sampled_tokens(self) -> int:
        return sum(len(step.topk_ids) for step in self.sampled)

    def to_bytes(self, level: int = 0) -> bytes:
        """Header and arrays, packed by zlib at `level`; 0 is a copy, for whoever is in a hurry."""
        narrow = self.num_experts <= _NO_EXPERT_8
        header = {
            "version": _VERSION,
            "layers": list(self.layers),
            "num_experts": self.num_experts,
            "steps": self.steps,
            "narrow": narrow,
            "sampled": [
                [s.number, s.at_s, s.num_tokens, s.topk_ids.shape[0], s.topk_ids.shape[2], s.weight]
                for s in self.sampled
            ],
        }
        head = json.dumps(header).encode()
        # -1 becomes 255.
        ids = [s.topk_ids.astype(np.uint8 if narrow else np.int16, casting="unsafe").tobytes() for s in self.sampled]
        parts = [
            len(head).to_bytes(4, "little"),
            head,
            np.ascontiguousarray(self.counts_PLE, "<i8").tobytes(),
            np.ascontiguousarray(self.tokens_P, "<i8").tobytes(),
            *(part for step, of_step in zip(self.sampled, ids, strict=True) for part in (of_step, _bits(step))),
        ]
        return zlib.compress(b"".join(parts), level)

    @classmethod
    def from_bytes(cls, packed: bytes) -> Observation:
        """Inverse of `to_bytes`. TraceError for anything else."""
        try:
            unpack = zlib.decompressobj()
            data = unpack.decompress(packed, _LARGEST_BYTES)
            if not unpack.eof:
                raise TraceError(f"it is cut off, or more than {_LARGEST_BYTES} bytes")
            return cls._from_plain(data)
        except TraceError:
            raise
        except (zlib.error, ValueError, KeyError, TypeError, IndexError) as error:
            raise TraceError(f"not an observation: {error}") from None

    @classmethod
    def _from_plain(cls, data: bytes) -> Observation:
        size = int.from_bytes(data[:4], "little")
        header: dict[str, Any] = json.loads(data[4 : 4 + size])
        if header["version"] != _VERSION:
            raise TraceError(f"observation of version {header['version']}, this program reads {_VERSION}")
        layers, num_experts = tuple(map(int, header["layers"])), int(header["num_experts"])
        at = 4 + size

        def take(dtype: str, *shape: int) -> np.ndarray:
            nonlocal at
            array = np.frombuffer(data, dtype, int(np.prod(shape)), at).reshape(shape)
            at += array.nbytes
            return array

        counts_PLE = take("<i8", len(PHASES), len(layers), num_experts)
        tokens_P = take("<i8", len(PHASES))
        sampled = []
        for number, at_s, num_tokens, kept, top_k, weight in header["sampled"]:
            ids = take("u1" if header["narrow"] else "<i2", kept, len(layers), top_k).astype(np.int16)
            if header["narrow"]:
                ids[ids == _NO_EXPERT_8] = -1
            prefill_T = np.unpackbits(take("u1", (kept + 7) // 8), count=kept).astype(bool)
            sampled.append(SampledStep(number, at_s, num_tokens, ids, prefill_T, weight))
        if at != len(data):
            raise TraceError(f"{len(data) - at} bytes are left over")
        return cls(layers, counts_PLE, tokens_P, int(header["steps"]), tuple(sampled))


def _bits(step: SampledStep) -> bytes:
    return np.packbits(step.prefill_T).tobytes()


def merge_observations(observations: Sequence[Observation], fades: Sequence[float] | None = None) -> Observation:
    """All of it as one. `fades`: a factor for the counts of each, and for what its steps stand for; default 1.

    TraceError for none, or if they are of different models.
    """
    if not observations:
        raise TraceError("no observations to merge")
    first = observations[0]
    factors = [1.0] * len(observations) if fades is None else list(fades)
    for each in observations[1:]:
        if (each.layers, each.num_experts) != (first.layers, first.num_experts):
            raise TraceError(
                f"observations of {len(first.layers)} layers of {first.num_experts} experts and of "
                f"{len(each.layers)} layers of {each.num_experts}"
            )

    def faded(name: str) -> np.ndarray:
        parts = zip(observations, factors, strict=True)
        total = sum(getattr(each, name) * factor for each, factor in parts)
        return np.rint(total).astype(np.int64)

    return Observation(
        first.layers,
        faded("counts_PLE"),
        faded("tokens_P"),
        sum(each.steps for each in observations),
        tuple(
            SampledStep(s.number, s.at_s, s.num_tokens, s.topk_ids, s.prefill_T, s.weight * factor)
            for each, factor in zip(observations, factors, strict=True)
            for s in each.sampled
        ),
    )


def as_trace(observation: Observation, max_tokens: int | None = None) -> ActivationTrace:
    """A trace of the sampled steps, in which every token of the traffic has the same chance to be, with all counts.

    Steps stand for different numbers of tokens, so tokens are drawn by systematic sampling; those that stand for more
    than the average may come more than once. TraceError if there is no traffic at all.
    """
    steps = [step for step in observation.sampled if len(step.topk_ids)]
    if not steps:
        top_k = observation.sampled[0].topk_ids.shape[2] if observation.sampled else 1
        ids_TLK = np.zeros((0, len(observation.layers), top_k), np.int16)
    else:
        ids_TLK = np.concatenate([step.topk_ids for step in steps])
        weight_T = np.repeat([step.token_weight for step in steps], [len(step.topk_ids) for step in steps])
        wanted = len(ids_TLK) if max_tokens is None else min(max_tokens, len(ids_TLK))
        edges_T = np.cumsum(weight_T)
        points = (np.arange(wanted) + 0.5) * (edges_T[-1] / wanted)
        ids_TLK = ids_TLK[np.minimum(np.searchsorted(edges_T, points), len(ids_TLK) - 1)]
    counts_LE = observation.counts_LE
    if not len(ids_TLK) and not counts_LE.any():
        raise TraceError("no traffic was observed")
    return ActivationTrace(ids_TLK, observation.num_experts, observation.layers, counts=counts_LE)
