"""The structs of the headers as ctypes sees them; `library` compares their sizes with the compiler's."""

from __future__ import annotations

import ctypes

import numpy as np

KIND_PYTHON, KIND_SHM, KIND_TCP, KIND_LOOPBACK = range(4)
NOT_YET, LOST = -1, -2
HINT_WORDS = 3  # of a request's header

_i64, _pointer = ctypes.c_int64, ctypes.c_void_p


class NativeLink(ctypes.Structure):
    """The router's end of a pair; see link.h for the meaning of each field."""

    kind: int
    closed: int
    seq: int
    _fields_ = (
        ("kind", _i64),
        ("send", _pointer),
        ("send_capacity", _i64),
        ("recv", _pointer),
        ("recv_capacity", _i64),
        ("closed", _i64),
        ("line", _i64),
        ("spin_ns", _i64),
        ("seq", _i64),
        ("words", _pointer),
        ("bell", _pointer),
        ("descriptor", _i64),
        ("own", _pointer),
    )

    @classmethod
    def of(cls, kind: int, send_buffer: np.ndarray, recv_buffer: np.ndarray) -> NativeLink:
        """A link of these buffers (uint8), which must outlive it; the fields of its kind are the caller's to set."""
        return cls(
            kind, send_buffer.ctypes.data, len(send_buffer), recv_buffer.ctypes.data, len(recv_buffer),
            line=-1, descriptor=-1,
        )  # fmt: skip


class NativeChannel(ctypes.Structure):
    """The shard's end of a pair; see link.h for the meaning of each field."""

    kind: int
    closed: int
    current: int
    deferred: int
    _fields_ = (
        ("kind", _i64),
        ("recv", _pointer),
        ("recv_capacity", _i64),
        ("send", _pointer),
        ("send_capacity", _i64),
        ("closed", _i64),
        ("answered", _i64),
        ("current", _i64),
        ("words", _pointer),
        ("descriptor", _i64),
        ("own", _pointer),
        ("deferred", _i64),
    )

    @classmethod
    def of(cls, kind: int, recv_buffer: np.ndarray, send_buffer: np.ndarray) -> NativeChannel:
        """A channel of these buffers (uint8), which must outlive it; the fields of its kind are the caller's to set."""
        return cls(
            kind, recv_buffer.ctypes.data, len(recv_buffer), send_buffer.ctypes.data, len(send_buffer), descriptor=-1
        )


class NativeRouter(ctypes.Structure):
    """A router in one epoch; see router.h for the meaning of each field."""

    _fields_ = (
        *((name, _i64) for name in ("num_ranks", "top_k", "num_experts", "hidden", "dtype", "num_nodes")),
        *((name, _pointer) for name in ("choose_ranks", "node_of_rank_R", "work_R", "load_LR", "header")),
        *((name, _pointer) for name in ("send_R", "recv_R", "links_R")),
        *((name, _pointer) for name in ("rank_TK", "row_TK", "rows_R", "pairs_R", "nbytes_R")),
        *((name, _pointer) for name in ("counts", "shard_rows_R", "shard_pairs_R", "times", "device")),
        *((name, _i64) for name in ("layer", "seq", "T")),
        *((name, _pointer) for name in ("x", "ids_TK", "weights_TK", "slots_ER")),
        *((name, _i64) for name in ("post", "timeout_ns")),
    )


class NativeDevice(ctypes.Structure):
    """A router's rows on a GPU; see device.h for the meaning of each field."""

    stream: int
    row_at: int
    host_ids: int
    host_weights: int
    plan: int
    _fields_ = (
        *((name, _pointer) for name in ("copy_to_host", "copy_to_device", "synchronize", "launch")),
        *((name, _pointer) for name in ("pack", "combine")),
        *((name, ctypes.c_uint64) for name in ("plan", "send_address_R", "recv_address_R")),
        *((name, _pointer) for name in ("host_ids", "host_weights", "stream")),
        ("row_at", _i64),
    )


NUM_BUCKETS = 16
HISTOGRAM_WORDS = 2 + NUM_BUCKETS


class NativeRouterCounts(ctypes.Structure):
    """What a router counts; see counts.h."""

    _fields_ = (
        *((name, _i64) for name in ("fan_out_sum", "bytes_sent", "bytes_received", "last_success_ns")),
        *((name, _i64 * HISTOGRAM_WORDS) for name in ("plan_pack", "wait", "combine")),
    )


class NativeSlotWords(ctypes.Structure):
    """What a slot table shares with the compute loop; see shard.h."""

    in_request: int
    requests_ended: int
    _fields_ = (("in_request", _i64), ("requests_ended", _i64), ("slot_of_expert_LE", _pointer))


class NativeShardCounts(ctypes.Structure):
    """What a shard counts; see shard.h."""

    _fields_ = tuple((name, _i64) for name in ("requests", "rows", "pairs", "compute_ns", "last_epoch"))


class NativeShard(ctypes.Structure):
    """A shard's compute loop; see shard.h for the meaning of each field."""

    attention: int
    sockets: int | None
    has_deferred: int
    _fields_ = (
        *((name, _i64) for name in ("num_layers", "num_experts", "hidden", "dtype")),
        *((name, _pointer) for name in ("forward", "kernel")),
        *((name, _i64) for name in ("threads", "max_merged_rows")),
        *((name, _pointer) for name in ("slots", "counts", "bell")),
        *((name, _i64) for name in ("spin_ns", "next", "attention", "top_k")),
        ("sockets", _pointer),
        *((name, _i64) for name in ("has_deferred", "max_passed_over", "passed_over")),
        ("hints", _pointer),
    )


class _NativeHint(ctypes.Structure):
    _fields_ = (("layer", _i64), ("words", _i64 * HINT_WORDS))


class NativeHints(ctypes.Structure):
    """What routers said of the next layer, newest last; see shard.h."""

    written: int
    _fields_ = (("written", _i64), ("ring", _NativeHint * 16))

    def note(self, layer: int, words: np.ndarray) -> None:
        """Add what the request for `layer` said (int64 [3]), as compiled code does."""
        entry = self.ring[self.written % len(self.ring)]
        entry.layer, entry.words[:] = layer, words.tolist()
        self.written += 1

    def newest(self, seen: int) -> tuple[int, np.ndarray] | None:
        """The layer of the newest request and its words; None if no more than `seen` were written."""
        written = self.written
        if written == seen:
            return None
        entry = self.ring[(written - 1) % len(self.ring)]
        return entry.layer, np.array(entry.words, np.int64)
