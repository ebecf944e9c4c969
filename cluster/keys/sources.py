"""Where keys come from, and that a changed file takes effect without a restart."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from cluster.config.http_sections import ConsoleHttpSection, KeysSection
from cluster.keys.keyring import MAX_FILE_BYTES, Keyring, KeysError, digest_of, parse_keys

LOOK_EVERY_S = 1.0
UNNAMED, UNNAMED_ADMIN = "unnamed", "unnamed-admin"  # holders of http.api_keys and http.admin_keys

logger = logging.getLogger("ray.serve")
Stamp = tuple[int, int, int]


@dataclass
class KeySource:
    """The keys in use. Raises KeysError at the start; a file that breaks later leaves the last good keys in use."""

    base: Keyring  # those that stay
    file: Path | None = None
    clock: Callable[[], float] = time.monotonic
    problem: str = ""  # why the file at present is not what is in use
    _ring: Keyring = field(default_factory=Keyring, init=False)
    _stamp: Stamp | None = field(default=None, init=False)
    _looked_s: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        self._ring = self.base
        if self.file is not None:
            self._stamp = _stamp(self.file)
            self._ring = self._read(self.file)
            self._looked_s = self.clock()

    def ring(self) -> Keyring:
        """The keys in use. Looks at the file once a second: nothing has to run for it."""
        if self.file is not None and self.clock() - self._looked_s >= LOOK_EVERY_S:
            self._looked_s = self.clock()
            self._look(self.file)
        return self._ring

    def _look(self, file: Path) -> None:
        try:
            stamp = _stamp(file)
            if stamp == self._stamp:
                return
            ring = self._read(file)
        except KeysError as error:
            if str(error) != self.problem:
                logger.error("%s; the %d keys that were read last stay in use", error, len(self._ring.keys))
            self.problem = str(error)
            return
        self._ring, self._stamp, self.problem = ring, stamp, ""
        logger.info("%d keys are in use, read from %s", len(ring.keys), file)

    def _read(self, file: Path) -> Keyring:
        try:
            with file.open("rb") as opened:
                raw = opened.read(MAX_FILE_BYTES + 1)
            text = raw.decode()
        except (OSError, UnicodeDecodeError) as error:
            raise KeysError(f"http.keys_file {file} cannot be read: {error}") from error
        if len(raw) > MAX_FILE_BYTES:
            raise KeysError(f"http.keys_file {file} has more than {MAX_FILE_BYTES} bytes")
        return Keyring({**self.base.keys, **parse_keys(text, f"http.keys_file {file}").keys})


def source_of(http: KeysSection, more_digests: Collection[bytes] = ()) -> KeySource:
    """The keys that a section names, and further ones by their digests. Raises KeysError, or ValueError of `keys()`."""
    ring = Keyring()
    if http.keys_env is not None:
        text = os.environ.get(http.keys_env, "")
        if not text.strip():
            raise KeysError(f"http.keys_env names {http.keys_env}, which holds no key where the application is built")
        ring = parse_keys(text, f"http.keys_env {http.keys_env}")
    admins = http.admins() if isinstance(http, ConsoleHttpSection) else frozenset()
    ring = ring.with_unnamed(UNNAMED_ADMIN, "admin", map(digest_of, admins))
    ring = ring.with_unnamed(UNNAMED, "client", [*map(digest_of, http.keys()), *more_digests])
    return KeySource(ring, None if http.keys_file is None else Path(http.keys_file))


def _stamp(file: Path) -> Stamp:
    """Changes with the file, and with what a symbolic link in its path leads to, as a mounted Secret's does."""
    try:
        status = file.stat()
    except OSError as error:
        raise KeysError(f"http.keys_file {file} cannot be read: {error}") from error
    return status.st_mtime_ns, status.st_ino, status.st_size
