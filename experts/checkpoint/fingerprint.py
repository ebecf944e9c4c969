"""Hashes of a checkpoint's tensors, by which two processes find out whether their folders hold the same weights.

A tensor's hash covers its name, dtype and shape, and its bytes: all of them up to `WHOLE_BYTES`, of a larger one three
windows (the first bytes, the last, and some between at a place that its name decides). So it tells checkpoints apart
that were trained, quantized, written or cut differently. It does not prove that two large tensors are equal: a change
of single bytes between the windows stays unseen, and so does one in 4 billion of the others.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.header import TensorEntry, open_weights
from experts.checkpoint.safetensors_file import TensorStore

WHOLE_BYTES = 128 << 10
WINDOW_BYTES = 1 << 10
_THREADS = 8  # reads of a few bytes wait for the disk, not for a core
_AT_ONCE = 512


@dataclass(frozen=True)
class Fingerprint:
    """The hash of every tensor of a folder; of one whose file is not here, that of its name."""

    name_of: dict[int, str]
    """By hash, the tensors whose files are here."""
    absent: frozenset[int]

    def to_bytes(self) -> bytes:
        """All hashes, ascending, as little-endian uint32."""
        return np.array(sorted({*self.name_of, *self.absent}), "<u4").tobytes()

    def differing(self, theirs: bytes) -> list[str]:
        """The tensors here that the other side has with other bytes, or not at all; those that it left out are not
        among them. ValueError for what is no fingerprint."""
        if len(theirs) % 4:
            raise ValueError(f"a fingerprint of {len(theirs)} bytes, expected a multiple of 4")
        known = set(np.frombuffer(theirs, "<u4").tolist())
        return sorted(
            name for found, name in self.name_of.items() if found not in known and _absent_hash(name) not in known
        )


def fingerprint_of(store: TensorStore) -> Fingerprint:
    """Hash all tensors of a folder. CheckpointError names a file that cannot be read."""
    absent: set[int] = set()
    parts: list[tuple[Path, list[tuple[str, TensorEntry]]]] = []
    for path, names in store.index.by_file().items():
        if store.is_here(names[0]):
            # In the order of the file, which disks and their caches like best.
            entries = sorted(((name, store.entry(name)) for name in names), key=lambda pair: pair[1].start)
            parts += [(path, entries[start : start + _AT_ONCE]) for start in range(0, len(entries), _AT_ONCE)]
        else:
            absent |= {_absent_hash(name) for name in names}
    name_of: dict[int, str] = {}
    with concurrent.futures.ThreadPoolExecutor(_THREADS, thread_name_prefix="fingerprint") as pool:
        for part in pool.map(_hash_part, parts):
            name_of |= part
    return Fingerprint(name_of, frozenset(absent))


def _hash_part(part: tuple[Path, list[tuple[str, TensorEntry]]]) -> dict[int, str]:
    path, tensors = part
    found = {}
    with open_weights(path) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # nothing beside the windows is wanted
        for name, entry in tensors:
            head = f"{name}\0{entry.dtype_name}\0{entry.shape}\0".encode()
            state = hashlib.blake2b(head, digest_size=4)
            for start, nbytes in _windows(name, entry.nbytes):
                data = os.pread(file.fileno(), nbytes, entry.start + start)
                if len(data) != nbytes:
                    raise CheckpointError(f"{path}: {name} ends early; was the file cut while it was read?")
                state.update(data)
            found[int.from_bytes(state.digest(), "little")] = name
    return found


def _windows(name: str, nbytes: int) -> Iterator[tuple[int, int]]:
    """(start, length) of the bytes of a tensor that are hashed."""
    if nbytes <= WHOLE_BYTES:
        yield 0, nbytes
        return
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
    yield 0, WINDOW_BYTES
    yield WINDOW_BYTES + seed % (nbytes - 3 * WINDOW_BYTES), WINDOW_BYTES
    yield nbytes - WINDOW_BYTES, WINDOW_BYTES


def _absent_hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(f"absent\0{name}".encode(), digest_size=4).digest(), "little")
