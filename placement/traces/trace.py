"""A record of routing: the top-k sets of sampled tokens, and how often each expert was picked.

T tokens, L layers, K experts of one token, E experts, D domains.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

SCHEMA_VERSION = 1
# Sampled sets and counts pass as one population if they differ by no more than sampling explains.
FREQUENCY_TRUE_DISTANCE = 3.0
MAX_COUNT = 2**47


class TraceError(ValueError):
    """A trace that cannot be used as asked. The message is one line for a person."""


@dataclass(frozen=True, eq=False)
class ActivationTrace:
    """Sampled top-k sets and, if kept, counts over all tokens.

    Attributes:
        topk_ids: int16 [T, L, K], the experts each sampled token picked in each layer, -1 for none. A trace of counts
            alone has T = 0.
        num_experts: E.
        layers: the index of each of the L layers in the model.
        domain: int8 [T], index into `domains`, or None.
        domains: names of the domains.
        counts: int64 [L, E], how often each expert was picked by all tokens seen, or None if only sets were kept.
    """

    topk_ids: np.ndarray
    num_experts: int
    layers: tuple[int, ...] = ()
    domain: np.ndarray | None = None
    domains: tuple[str, ...] = ()
    counts: np.ndarray | None = None
    source: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        ids = np.asarray(self.topk_ids)
        if ids.ndim != 3 or not np.issubdtype(ids.dtype, np.integer):
            raise TraceError(f"topk_ids must be integers [tokens, layers, k], got {ids.dtype} {list(ids.shape)}")
        object.__setattr__(self, "num_experts", whole_number("num_experts", self.num_experts))
        if not 0 < self.num_experts <= np.iinfo(np.int16).max:
            raise TraceError(f"num_experts is {self.num_experts}, expected 1 to {np.iinfo(np.int16).max}")
        if ids.size and (ids.max() >= self.num_experts or ids.min() < -1):
            wrong = np.argwhere((ids >= self.num_experts) | (ids < -1))[0]
            raise TraceError(
                f"token {wrong[0]}, layer {wrong[1]}: expert {ids[tuple(wrong)]} is not one of {self.num_experts}"
            )
        object.__setattr__(self, "topk_ids", np.ascontiguousarray(ids, dtype=np.int16))
        layers = tuple(whole_number("a layer", layer) for layer in self.layers) or tuple(range(ids.shape[1]))
        if len(layers) != ids.shape[1]:
            raise TraceError(f"topk_ids has {ids.shape[1]} layers, {len(layers)} are named")
        if len(set(layers)) != len(layers):
            raise TraceError(f"layers are {list(layers)}, expected each once")
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "domains", tuple(str(name) for name in self.domains))
        if self.domain is not None:
            domain = np.asarray(self.domain)
            if (
                domain.shape != (len(ids),)
                or not np.issubdtype(domain.dtype, np.integer)
                or (domain.size and not 0 <= domain.min() <= domain.max() < len(self.domains))
            ):
                raise TraceError(f"domain must be [{len(ids)}] with indices into {len(self.domains)} domains")
            object.__setattr__(self, "domain", domain.astype(np.int8))
        if self.counts is not None:
            counts = np.asarray(self.counts)
            if counts.shape != (ids.shape[1], self.num_experts) or counts.dtype.kind not in "iuf":
                raise TraceError(
                    f"counts must be numbers [{ids.shape[1]}, {self.num_experts}], "
                    f"got {counts.dtype} {list(counts.shape)}"
                )
            # A sum over all experts has to fit in int64.
            wrong = ~((counts >= 0) & (counts <= MAX_COUNT) & (counts == np.rint(counts)))
            if wrong.any():
                layer, expert = np.argwhere(wrong)[0]
                raise TraceError(
                    f"layer {layer}: the count of expert {expert} is {counts[layer, expert]}, "
                    f"expected a whole number from 0 to {MAX_COUNT}"
                )
            object.__setattr__(self, "counts", counts.astype(np.int64))
        if not len(ids) and self.counts is None:
            raise TraceError("the trace is empty: no tokens and no counts")

    @property
    def num_tokens(self) -> int:
        return len(self.topk_ids)

    @property
    def num_layers(self) -> int:
        return self.topk_ids.shape[1]

    @property
    def has_sets(self) -> bool:
        """Whether fan-out can be planned and scored; from counts alone, only balance can."""
        return self.num_tokens > 0

    def ids_of_layer(self, layer: int) -> np.ndarray:
        """int32 [T, K]: the sets of one layer, each expert at most once in a row, -1 at the end of a row."""
        return distinct_rows(self.topk_ids[:, layer])

    def set_load(self) -> np.ndarray:
        """int64 [L, E]: sampled tokens that picked each expert."""
        load_LE = np.zeros((self.num_layers, self.num_experts), np.int64)
        for layer in range(self.num_layers):
            ids = self.ids_of_layer(layer)
            load_LE[layer] = np.bincount(ids[ids >= 0], minlength=self.num_experts)
        return load_LE

    def load(self, source: str = "auto") -> np.ndarray:
        """float64 [L, E]: the load to balance, in (token, expert) pairs of the sample.

        `source` is `sets`, `counts` (frequencies over all tokens seen, scaled to the sample), or `auto`: counts if the
        sets are a uniform sample of the same tokens, else the sets, since a sample that favours rare tokens must not
        be mixed with true frequencies unasked.
        """
        if source not in ("auto", "sets", "counts"):
            raise TraceError(f"load source is {source!r}, expected auto, sets or counts")
        if source == "counts" and self.counts is None:
            raise TraceError("the trace holds no counts")
        if not self.has_sets:
            assert self.counts is not None
            return self.counts.astype(np.float64)
        sets_LE = self.set_load()
        if self.counts is None or source == "sets" or (source == "auto" and not self.frequency_true()):
            return sets_LE.astype(np.float64)
        scale_L1 = sets_LE.sum(1, keepdims=True) / np.maximum(self.counts.sum(1, keepdims=True), 1)
        return self.counts * scale_L1

    def frequency_true(self) -> bool:
        """Whether the sets look like a uniform sample of the tokens that were counted (a chi-square per expert)."""
        if self.counts is None or not self.has_sets:
            return False
        sets_LE = self.set_load()
        expected_LE = self.counts * (sets_LE.sum(1, keepdims=True) / np.maximum(self.counts.sum(1, keepdims=True), 1))
        seen = expected_LE > 0
        if (sets_LE[~seen] > 0).any():
            return False
        return bool(np.mean((sets_LE - expected_LE)[seen] ** 2 / expected_LE[seen]) < FREQUENCY_TRUE_DISTANCE)

    def coactivation(self, layer: int) -> np.ndarray:
        """float64 [E, E]: sampled tokens that picked both experts; the diagonal is the load."""
        ids = self.ids_of_layer(layer)
        picked_TE = np.zeros((len(ids), self.num_experts + 1), np.float32)
        np.put_along_axis(picked_TE, ids.astype(np.int64), 1.0, axis=1)  # -1 goes into the column after the experts
        picked_TE = picked_TE[:, : self.num_experts]
        return (picked_TE.T @ picked_TE).astype(np.float64)

    def take(self, index: np.ndarray) -> ActivationTrace:
        """The trace of some of the tokens, without counts, which are of all tokens."""
        domain = None if self.domain is None else self.domain[index]
        return replace(self, topk_ids=self.topk_ids[index], domain=domain, counts=None)

    def of_domain(self, name: str) -> ActivationTrace:
        """The tokens of one domain."""
        if self.domain is None or name not in self.domains:
            raise TraceError(f"no domain {name!r}; the trace has {list(self.domains)}")
        return self.take(np.flatnonzero(self.domain == self.domains.index(name)))

    def split(self, seed: int, fraction: float = 0.5) -> tuple[ActivationTrace, ActivationTrace]:
        """Two traces of different tokens, the first with `fraction` of them."""
        order = np.random.default_rng(seed).permutation(self.num_tokens)
        cut = round(self.num_tokens * fraction)
        return self.take(np.sort(order[:cut])), self.take(np.sort(order[cut:]))

    def save(self, file: str | Path | IO[bytes]) -> None:
        """Write as .npz."""
        arrays: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "topk_ids": self.topk_ids,
            "num_experts": self.num_experts,
            "layers": np.array(self.layers, np.int32),
        }
        if self.domain is not None:
            arrays |= {"domain": self.domain, "domains": np.array(self.domains)}
        if self.counts is not None:
            arrays["counts"] = self.counts
        np.savez_compressed(file, **arrays)

    def to_bytes(self) -> bytes:
        """What `save` writes."""
        buffer = io.BytesIO()
        self.save(buffer)
        return buffer.getvalue()

    @classmethod
    def load_npz(cls, file: str | Path | IO[bytes]) -> ActivationTrace:
        """Read what `save` wrote. Raises TraceError for anything else."""
        with np.load(file, allow_pickle=False) as data:
            if "schema_version" not in data:
                raise TraceError(f"no schema_version; the file has {sorted(data)}")
            version = whole_number("schema_version", data["schema_version"])
            if version != SCHEMA_VERSION:
                raise TraceError(f"schema version {version}, this program reads {SCHEMA_VERSION}")
            return cls(
                data["topk_ids"],
                data["num_experts"],
                tuple(data["layers"]),
                data.get("domain"),
                tuple(data["domains"].tolist()) if "domains" in data else (),
                data.get("counts"),
                source=str(file),
            )


def whole_number(name: str, value: Any) -> int:
    """An integer from a Python or numpy integer. Raises TraceError, naming it, for anything else."""
    if np.ndim(value) or not np.issubdtype(np.asarray(value).dtype, np.integer):
        raise TraceError(f"{name} is {value!r}, expected an integer")
    return int(value)


def distinct_rows(ids_TK: np.ndarray) -> np.ndarray:
    """int32 [T, K]: the ids of each row that are not negative, once each, ascending, then -1."""
    ids_TK = np.sort(ids_TK.astype(np.int32), axis=1)
    repeated = np.zeros(ids_TK.shape, bool)
    repeated[:, 1:] = ids_TK[:, 1:] == ids_TK[:, :-1]
    drop = repeated | (ids_TK < 0)
    if not drop.any():
        return ids_TK
    big = np.iinfo(np.int32).max
    ids_TK = np.sort(np.where(drop, big, ids_TK), axis=1)
    return np.where(ids_TK == big, -1, ids_TK).astype(np.int32)


def merge_traces(traces: list[ActivationTrace], max_tokens: int | None = None, seed: int = 0) -> ActivationTrace:
    """Merge the traces of several routers, weighted by how many tokens each router counted, not by its sample's size.

    Counts add up. If every trace has counts, each contributes sampled tokens in proportion to them, so the result is a
    uniform sample again; `max_tokens` bounds it. Domains are matched by name. Raises TraceError if models differ.
    """
    if not traces:
        raise TraceError("no traces to merge")
    first = traces[0]
    for trace in traces[1:]:
        for name in ("num_experts", "layers"):
            if getattr(trace, name) != getattr(first, name):
                raise TraceError(f"traces differ in {name}: {getattr(first, name)} and {getattr(trace, name)}")
        if trace.topk_ids.shape[2] != first.topk_ids.shape[2]:
            raise TraceError(f"traces differ in top-k: {first.topk_ids.shape[2]} and {trace.topk_ids.shape[2]}")
    rng = np.random.default_rng(seed)
    counts = [trace.counts for trace in traces]
    sizes = np.array([trace.num_tokens for trace in traces], float)
    seen = np.array([c.sum() if c is not None else n for c, n in zip(counts, sizes, strict=True)], float)
    if any(c is None for c in counts):
        seen = sizes
    seen = np.where(sizes > 0, seen, 0.0)
    total = 0.0
    if seen.sum():
        total = float(np.min(sizes[seen > 0] / seen[seen > 0]) * seen.sum())
        total = min(total, max_tokens) if max_tokens is not None else total
    parts = []
    for trace, share in zip(traces, seen / max(seen.sum(), 1), strict=True):
        keep = min(trace.num_tokens, round(total * share))
        parts.append(trace.take(np.sort(rng.permutation(trace.num_tokens)[:keep])) if keep else None)
    kept = [part for part in parts if part is not None]
    domains = tuple(dict.fromkeys(name for trace in traces for name in trace.domains))
    domain = None
    if kept and all(part.domain is not None for part in kept):
        domain = np.concatenate(
            [np.array([domains.index(n) for n in part.domains], np.int8)[part.domain] for part in kept]
        )
    ids = np.concatenate([part.topk_ids for part in kept]) if kept else first.topk_ids[:0]
    known = [c for c in counts if c is not None]
    merged = np.sum(known, axis=0) if len(known) == len(traces) else None
    return ActivationTrace(ids, first.num_experts, first.layers, domain, domains if domain is not None else (), merged)
