"""Reads traces that others wrote: vLLM's routed_experts, SGLang's expert-distribution dumps, the OLMoE trace.

T tokens, L layers, K experts of one token, E experts, S physical experts.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from placement.traces.torch_file import read_torch_file
from placement.traces.trace import ActivationTrace, TraceError, merge_traces, whole_number

# What the readers of numpy, zipfile and json, and our own, raise for bytes that are not what they claim to be.
UNREADABLE = (
    *(OSError, LookupError, ValueError, TypeError, EOFError, RuntimeError, MemoryError),
    *(zipfile.BadZipFile, zlib.error, tokenize.TokenError),
)
FORMATS = ("auto", "expertmesh", "olmoe", "vllm", "sglang")


def load_trace(path: str | Path, format: str = "auto", num_experts: int | None = None) -> ActivationTrace:
    """Read a trace file of any known format; `auto` tells formats apart by content.

    `vllm`: .npy of `routed_experts` [T, L, K], or .npz with one such array for each request. `sglang`: the .pt file of
    an expert-distribution dump, per token or counts only. Pass `num_experts` if the file does not say. Raises
    TraceError, in one line, if the file has none of these formats.
    """
    path = Path(path)
    if format not in FORMATS:
        raise TraceError(f"trace format is {format!r}, expected one of {', '.join(FORMATS)}")
    try:
        if path.suffix == ".pt" or format == "sglang":
            return from_sglang(read_torch_file(path), num_experts, str(path))
        if path.suffix == ".npy":
            return from_vllm([np.load(path, allow_pickle=False)], num_experts, str(path))
        with np.load(path, allow_pickle=False) as data:
            if format == "expertmesh" or (format == "auto" and "schema_version" in data):
                return ActivationTrace.load_npz(path)
            if format == "olmoe" or (format == "auto" and "topk_ids" in data):
                return _from_olmoe(data, num_experts, str(path))
            names = [name for name in data.files if data[name].ndim == 3]
            if not names:
                raise TraceError(f"no array of [tokens, layers, k]; the file has {sorted(data.files)}")
            return from_vllm([data[name] for name in names], num_experts, str(path))
    except UNREADABLE as error:
        raise unusable(path, error) from None


def unusable(path: Path, error: BaseException) -> TraceError:
    """The error, in one line, for a file that cannot be read as a trace."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
    return TraceError(f"{path}: not a usable trace: {reason.partition(chr(10))[0]}")


def _from_olmoe(data: Any, num_experts: int | None, source: str) -> ActivationTrace:
    """`topk_ids` and, if present, `domain`, `domains`, `expert_load` [D, L, E], `num_experts` and `layers`."""
    ids = data["topk_ids"]
    if ids.ndim != 3:
        raise TraceError(f"topk_ids must be [tokens, layers, k], got {list(ids.shape)}")
    if num_experts is None:
        num_experts = whole_number("num_experts", data["num_experts"]) if "num_experts" in data else int(ids.max()) + 1
    counts = data.get("expert_load")
    if counts is not None and counts.ndim == 3:
        counts = counts.sum(0)
    has_domains = "domain" in data and "domains" in data
    return ActivationTrace(
        ids,
        num_experts,
        tuple(data["layers"]) if "layers" in data else (),
        data["domain"] if has_domains else None,
        tuple(data["domains"].tolist()) if has_domains else (),
        counts,
        source,
    )


def from_vllm(requests: list[np.ndarray], num_experts: int | None = None, source: str = "") -> ActivationTrace:
    """A trace of vLLM's `routed_experts`: one int array [tokens of a request, L, K] for each request.

    Ids are logical. Layers without experts, in which every id of every token is 0, are left out.
    """
    if not requests or any(np.asarray(one).ndim != 3 for one in requests):
        raise TraceError("routed_experts must be one or more arrays [tokens, layers, k]")
    if len({np.asarray(one).shape[1:] for one in requests}) > 1:
        raise TraceError(f"requests differ in layers or k: {sorted({np.asarray(one).shape[1:] for one in requests})}")
    ids = np.concatenate([_ids("routed_experts", one) for one in requests])
    if not ids.size:
        raise TraceError("routed_experts holds no tokens")
    kept = [layer for layer in range(ids.shape[1]) if ids.shape[2] == 1 or (ids[:, layer] != 0).any()]
    if not kept:
        raise TraceError("routed_experts holds no layer with experts: every id is 0")
    return ActivationTrace(ids[:, kept], num_experts or int(ids.max()) + 1, tuple(kept), source=source)


def from_sglang(dump: Any, num_experts: int | None = None, source: str = "") -> ActivationTrace:
    """A trace of what SGLang's expert-distribution recorder dumps.

    Mode `stat`: `logical_count` [steps, L, E] or [L, E], counts alone. Mode `per_token`: `records`, each with
    `topk_ids_of_layer` [L, T, K] of physical ids, which `last_physical_to_logical_map` [L, S] translates. Mode
    `per_pass`: records with `global_physical_count` [L, S], counts alone. Padding (-1) is left out.
    """
    if not isinstance(dump, dict):
        raise TraceError(f"an expert-distribution dump is a dictionary, got {type(dump).__name__}")
    if "logical_count" in dump:
        counts = np.asarray(dump["logical_count"])
        counts = counts.sum(0) if counts.ndim == 3 else counts
        if counts.ndim != 2 or counts.dtype.kind not in "iuf":
            raise TraceError(f"logical_count must be numbers [layers, experts], got {counts.dtype} {counts.shape}")
        return _counts_only(np.rint(counts), source)
    if "records" not in dump or "last_physical_to_logical_map" not in dump:
        raise TraceError(f"expected logical_count, or records with a map; the dump has {sorted(map(str, dump))}")
    map_LS = _ids("last_physical_to_logical_map", dump["last_physical_to_logical_map"])
    if map_LS.ndim != 2:
        raise TraceError(f"last_physical_to_logical_map must be [layers, slots], got {list(map_LS.shape)}")
    num_layers, num_slots = map_LS.shape
    num_experts = num_experts or int(map_LS.max()) + 1
    if map_LS.min(initial=0) < 0:
        raise TraceError(f"last_physical_to_logical_map holds {map_LS.min()}, expected an expert in each slot")
    sets = [_ids("topk_ids_of_layer", r["topk_ids_of_layer"]) for r in dump["records"] if "topk_ids_of_layer" in r]
    if sets:
        ids_LTK = np.concatenate(sets, axis=1)
        if ids_LTK.min(initial=-1) < -1:
            raise TraceError(f"topk_ids_of_layer holds {ids_LTK.min()}, expected -1 (padding) to {num_slots - 1}")
        if len(ids_LTK) != num_layers or ids_LTK.max(initial=-1) >= num_slots:
            raise TraceError(
                f"records of {len(ids_LTK)} layers do not fit a map of {num_layers} layers, {num_slots} slots"
            )
        logical_LTK = np.stack(
            [np.where(i >= 0, m[np.maximum(i, 0)], -1) for i, m in zip(ids_LTK, map_LS, strict=True)]
        )
        ids_TLK = logical_LTK.transpose(1, 0, 2)
        ids_TLK = ids_TLK[(ids_TLK >= 0).any((1, 2))]
        return ActivationTrace(ids_TLK, num_experts, source=source)
    passes = [np.asarray(r["global_physical_count"]) for r in dump["records"] if "global_physical_count" in r]
    if not passes:
        raise TraceError("the records hold neither topk_ids_of_layer nor global_physical_count")
    for one in passes:
        if one.shape != map_LS.shape or one.dtype.kind not in "iuf":
            raise TraceError(
                f"global_physical_count must be numbers {list(map_LS.shape)}, got {one.dtype} {list(one.shape)}"
            )
    physical_LS = np.rint(np.sum(passes, axis=0))
    counts_LE = np.zeros((num_layers, num_experts), physical_LS.dtype)
    for layer in range(num_layers):
        np.add.at(counts_LE[layer], map_LS[layer], physical_LS[layer])
    return _counts_only(counts_LE, source)


def _ids(name: str, values: Any) -> np.ndarray:
    """int64 of integers, or of an empty list, which has no type. Raises TraceError for anything else."""
    given = np.asarray(values)
    if given.size and not np.issubdtype(given.dtype, np.integer):
        raise TraceError(f"{name} must be integers, got {given.dtype} {list(given.shape)}")
    return given.astype(np.int64)


def _counts_only(counts_LE: np.ndarray, source: str) -> ActivationTrace:
    num_layers, num_experts = counts_LE.shape
    return ActivationTrace(np.zeros((0, num_layers, 1), np.int16), num_experts, counts=counts_LE, source=source)


TRACE_SUFFIXES = (".pt", ".npz", ".npy", ".json", ".jsonl")


def import_trace(path: str | Path, kind: str = "auto", num_experts: int | None = None) -> ActivationTrace:
    """Read a routing trace of this or another program; `kind` is one of `FORMATS`.

    - `vllm`: `routed_experts` [T, L, K] as .npy, as .npz with one array for each request, or the API's responses as
      .json or .jsonl, where it is an .npy in base64. The API gives no number of experts: pass `num_experts`.
    - `sglang`: the recorder's dumps as .pt, read without torch, or the same dictionary as .json; per token, per pass or
      counts. Their ids are physical and are translated by the dump's map.
    - `olmoe`: .npz with `topk_ids`, `domain`, `domains`, `expert_load`, `num_experts`, `layers`.
    - `expertmesh`: this project's .npz.
    - `auto`: decided by content.

    A folder stands for all such files in it, merged, since SGLang writes one for each rank. Layers in which no token
    picked an expert (dense ones) are left out of others' traces; the trace's `layers` names those kept. This project's
    have the layers of the mesh, all of which a placement needs, that for guesses too if no router guessed. Raises
    TraceError, in one line, if nothing can be read or a file contradicts `num_experts`.
    """
    path = Path(path)
    files = [path]
    if kind not in FORMATS:
        raise TraceError(f"trace format is {kind!r}, expected one of {', '.join(FORMATS)}")
    if path.is_dir():
        files = sorted(each for each in path.iterdir() if each.suffix in TRACE_SUFFIXES)
        if not files:
            raise TraceError(f"{path}: no traces in the folder; they end in {', '.join(TRACE_SUFFIXES)}")
        trace = merge_traces([_read(each, kind, num_experts) for each in files])
    else:
        trace = _read(path, kind, num_experts)
    if num_experts is not None and trace.num_experts != num_experts:
        raise TraceError(f"{path}: the trace has {trace.num_experts} experts, but num_experts is {num_experts}")
    return trace if all(map(_is_own, files)) else without_idle_layers(trace)


def _is_own(path: Path) -> bool:
    """Whether a file that was read is this project's."""
    if path.suffix != ".npz":
        return False
    with np.load(path, allow_pickle=False) as data:
        return "schema_version" in data


def without_idle_layers(trace: ActivationTrace) -> ActivationTrace:
    """The trace without layers in which no expert was picked, such as dense layers in other engines' records."""
    picked_L = (trace.topk_ids >= 0).any((0, 2))
    if trace.counts is not None:
        picked_L |= trace.counts.any(1)
    if picked_L.all():
        return trace
    if not picked_L.any():
        raise TraceError("the trace is empty: no expert was picked in any layer")
    return ActivationTrace(
        trace.topk_ids[:, picked_L],
        trace.num_experts,
        tuple(np.array(trace.layers)[picked_L].tolist()),
        trace.domain,
        trace.domains,
        None if trace.counts is None else trace.counts[picked_L],
        trace.source,
    )


def _read(path: Path, kind: str, num_experts: int | None) -> ActivationTrace:
    if path.suffix not in (".json", ".jsonl"):
        return load_trace(path, kind, num_experts)
    try:
        text = path.read_text()
        data = [json.loads(line) for line in text.splitlines() if line.strip()] if path.suffix == ".jsonl" else (
            json.loads(text)
        )  # fmt: skip
        if isinstance(data, dict) and (kind == "sglang" or "logical_count" in data or "records" in data):
            return from_sglang(data, num_experts, str(path))
        found = list(_routed_experts(data))
        if not found:
            raise TraceError("it holds neither `routed_experts` nor an expert-distribution dump")
        return from_vllm(found, num_experts, str(path))
    except FileNotFoundError as error:
        raise TraceError(f"{path}: {error.strerror}") from None
    except UNREADABLE as error:
        raise unusable(path, error) from None


def _routed_experts(data: Any) -> Iterator[np.ndarray]:
    """Every `routed_experts` in nested JSON, at any depth; null ones are skipped."""
    if isinstance(data, list):
        for each in data:
            yield from _routed_experts(each)
    elif isinstance(data, dict):
        for key, value in data.items():
            if key != "routed_experts":
                yield from _routed_experts(value)
            elif isinstance(value, str):
                try:
                    yield np.load(io.BytesIO(base64.b64decode(value, validate=True)), allow_pickle=False)
                except (binascii.Error, ValueError, EOFError) as error:
                    raise TraceError(f"routed_experts is not an .npy in base64: {error}") from None
            elif value is not None:
                yield np.array(value)
