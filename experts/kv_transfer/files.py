"""KV cache of one prompt in one file of a folder that both routers see, such as one of a tmpfs.

A file appears whole, by a rename, or not at all. Whoever reads it checks who wrote it (model, dtype, layout), for which
tokens, and every byte; what is not as it should be is no file. Nothing is mapped: a file that somebody cuts off while
it is read is an error, and no SIGBUS.
"""

from __future__ import annotations

import logging
import os
import re
import stat
import struct
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

logger = logging.getLogger(__name__)

MAGIC = b"EMKV0001"
_HEAD = struct.Struct("<8s32s32sQI")  # magic, layout, tokens, bytes that follow, their CRC-32
_NAME = re.compile(r"[0-9a-f]{32}\.kv")
_OURS = re.compile(r"[0-9a-f]{32}\.kv(\.[0-9]+)?")  # with the writer's process id while it is written


class BadKVFileError(Exception):
    """There is no file of this name, or it is not what was asked for; the message says what is wrong."""


@dataclass(frozen=True)
class Label:
    """What a file has to be of, for its blocks to be the reader's own. Both are SHA-256."""

    layout: bytes  # of the model's tensors, and of the layers, shapes and dtypes of the cache
    tokens: bytes  # of the prompt, and of whatever else its KV cache depends on


class KVFolder:
    """The files of one folder, which this user alone may read."""

    def __init__(self, folder: str | os.PathLike[str], max_bytes: int) -> None:
        """Make the folder if need be. OSError; PermissionError if it belongs to somebody else, or others may write."""
        self._folder = Path(folder)
        self._max_bytes = max_bytes
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self._folder.stat()
        if found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise PermissionError(
                f"{self._folder} belongs to user {found.st_uid} with mode {stat.S_IMODE(found.st_mode):o}, expected "
                f"user {os.getuid()} and mode 700: others could read prompts there, or put in their own"
            )

    def path(self, name: str) -> Path:
        """Where the file of a name is. BadKVFileError for what is no name of ours, such as a path."""
        if not _NAME.fullmatch(name):
            raise BadKVFileError(f"{name!r} is no name of a KV file")
        return self._folder / name

    def write(self, name: str, label: Label, parts: Iterable[npt.NDArray[np.uint8]]) -> int:
        """Write the parts, one after another, and have the file appear; returns its bytes.

        OSError without a file if the folder is full, BadKVFileError if it would be over its limit.
        """
        path = self.path(name)
        partial = path.with_name(f"{name}.{os.getpid()}")
        used, size, crc = self.used_bytes(), 0, 0
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            with open(descriptor, "wb", buffering=0) as file:
                file.write(bytes(_HEAD.size))
                for part in parts:
                    if used + size + part.nbytes > self._max_bytes:
                        raise BadKVFileError(
                            f"{self._folder} has {used} bytes and may have {self._max_bytes}: this prompt is left out"
                        )
                    left = part.data
                    crc = zlib.crc32(left, crc)
                    size += part.nbytes
                    while left:
                        left = left[file.write(left) :]
                file.seek(0)
                file.write(_HEAD.pack(MAGIC, label.layout, label.tokens, size, crc))
            partial.rename(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
        return size

    def read(self, name: str, label: Label, size: int) -> npt.NDArray[np.uint8]:
        """The `size` bytes of a file, checked. BadKVFileError says why they cannot be had."""
        try:
            with self.path(name).open("rb", buffering=0) as file:
                head = file.read(_HEAD.size)
                if len(head) < _HEAD.size:
                    raise BadKVFileError(f"{name} has {len(head)} bytes, expected a header of {_HEAD.size}")
                magic, layout, tokens, length, crc = _HEAD.unpack(head)
                if magic != MAGIC:
                    raise BadKVFileError(f"{name} begins with {magic!r}, expected {MAGIC!r}")
                if layout != label.layout:
                    raise BadKVFileError(f"{name} is of other weights, or of a cache with another layout")
                if tokens != label.tokens:
                    raise BadKVFileError(f"{name} is of another prompt")
                if length != size:
                    raise BadKVFileError(f"{name} has {length} bytes of blocks, expected {size}")
                data = np.empty(size, np.uint8)
                left = data.data
                while left and (count := file.readinto(left)):  # type: ignore[attr-defined]
                    left = left[count:]
                if left:
                    raise BadKVFileError(f"{name} ends {len(left)} bytes too early")
        except OSError as error:
            raise BadKVFileError(f"{name} cannot be read: {error.strerror}") from error
        if zlib.crc32(data.data) != crc:
            raise BadKVFileError(f"{name} is damaged: its bytes have another CRC-32 than when it was written")
        return data

    def remove(self, name: str) -> None:
        """Remove a file, if it is still there."""
        try:
            self.path(name).unlink(missing_ok=True)
        except (BadKVFileError, OSError) as error:
            logger.warning("a KV file stays until it is old: %s", error)

    def used_bytes(self) -> int:
        """Bytes of all files, those that are being written included."""
        return sum(found.st_size for _, found in self._files())

    def sweep(self, max_age_s: float) -> int:
        """Remove files last written more than `max_age_s` ago, for which nobody waits. Returns their number."""
        removed = 0
        for path, found in self._files():
            if time.time() - found.st_mtime > max_age_s:
                path.unlink(missing_ok=True)
                removed += 1
        return removed

    def _files(self) -> Iterator[tuple[Path, os.stat_result]]:
        try:
            with os.scandir(self._folder) as entries:
                found = [Path(entry.path) for entry in entries if _OURS.fullmatch(entry.name)]
        except FileNotFoundError:
            return
        for path in found:
            try:
                yield path, path.stat()
            except FileNotFoundError:
                continue
