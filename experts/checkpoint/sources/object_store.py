"""A folder in an object store, `s3://bucket/folder` or `gs://bucket/folder`, through fsspec (s3fs, gcsfs).

Files go to a folder of our own, named after the digest of the listing: a source that changes gets a new folder, so old
and new files are never mixed. In it a file is complete or absent: it is downloaded under another name.

    $EXPERTMESH_HOME/models/s3/bucket/folder/<digest>/        the files
                                            /<digest>.json    the listing: bytes and version of each file
                                            /<digest>.locks/  a lock for each file
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experts.checkpoint.errors import CheckpointError, UnreachableError
from experts.checkpoint.sources.base import ModelSource, is_used, refuse_gguf
from experts.checkpoint.sources.progress import Progress, in_words

logger = logging.getLogger(__name__)

HOME_VARIABLE = "EXPERTMESH_HOME"
PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
_DIGEST = re.compile(r"(.+)@([0-9a-f]{16})")
_FILES_AT_ONCE, _PARTS_AT_ONCE = 4, 16
_PART_BYTES = 32 << 20
_ATTEMPTS = 4  # of one part
_FIRST_PAUSE_S = 0.5
_LOCK_LOG_PERIOD_S = 30.0
# What tells one version of an object from another, in the words of s3fs and gcsfs.
_VERSION_KEYS = ("ETag", "etag", "generation", "md5Hash", "LastModified", "mtime")


def home() -> Path:
    """The folder for what expertmesh downloads by itself."""
    return Path(os.environ.get(HOME_VARIABLE) or "~/.cache/expertmesh").expanduser()


@dataclass(frozen=True)
class ObjectStoreSource(ModelSource):
    """`digest` None: not looked at yet. With one, only the files that had this digest will do."""

    scheme: str
    path: str  # bucket/folder
    digest: str | None = None

    @classmethod
    def parse(cls, scheme: str, path: str) -> ObjectStoreSource:
        """From a URL's parts, perhaps with `@digest` at the end."""
        found = _DIGEST.fullmatch(path)
        return cls(scheme, path.strip("/")) if found is None else cls(scheme, found[1].strip("/"), found[2])

    def __str__(self) -> str:
        return self._url if self.digest is None else f"{self._url}@{self.digest}"

    @property
    def _url(self) -> str:
        return f"{self.scheme}://{self.path}"

    @property
    def remote(self) -> bool:
        return True

    @property
    def _base(self) -> Path:
        # The digest names the version. A segment "..", legal in a key, must not lead out of the home.
        parts = [part if part.strip(".") else f"%{part}" for part in self.path.split("/") if part]
        return home().joinpath("models", self.scheme, *parts)

    @property
    def folder(self) -> Path:
        """Where its files are on this node."""
        return self._base / self._known_digest()

    @property
    def _listing_path(self) -> Path:
        return self._base / f"{self._known_digest()}.json"

    def _known_digest(self) -> str:
        if self.digest is None:
            raise ValueError(f"{self} is not resolved to a digest yet; call resolved() first")
        return self.digest

    def resolved(self) -> ObjectStoreSource:
        if self.digest is not None:
            return self
        listing = self._list()
        found = replace(self, digest=_digest_of(listing))
        found._keep(listing)
        return found

    def files(self) -> Mapping[str, int]:
        return {name: int(size) for name, (size, _) in self._listing().items()}

    def fetch(self, names: Collection[str]) -> Path:
        folder = self.folder
        missing = [name for name in names if not (folder / name).exists()]
        if not missing:
            return folder
        listing = self._listing()
        for name in missing:
            if name not in listing:
                refuse_gguf(self, listing)
                raise CheckpointError(f"{self}: has no file {name}")
        total = sum(int(listing[name][0]) for name in missing)
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if total > free:
            raise CheckpointError(
                f"{self}: {in_words(total)} to fetch, {in_words(free)} free in {folder}; set {HOME_VARIABLE} to a "
                "folder with more room"
            )
        progress = Progress(str(self), total)
        # Two pools, as a task that waits for tasks of its own pool would wait for ever.
        with ThreadPoolExecutor(_FILES_AT_ONCE) as files, ThreadPoolExecutor(_PARTS_AT_ONCE) as parts:
            tasks = [files.submit(self._fetch_file, name, listing[name], parts, progress) for name in missing]
            try:
                for task in tasks:
                    task.result()
            except BaseException:
                for pool in (files, parts):
                    pool.shutdown(wait=False, cancel_futures=True)
                raise
        progress.finish()
        return folder

    # One file --------------------------------------------------------------------------------------------------------

    def _fetch_file(self, name: str, expected: list[Any], parts: ThreadPoolExecutor, progress: Progress) -> None:
        target = self.folder / name
        with self._locked(name):
            if target.exists():  # another process was faster
                progress.add(int(expected[0]))
                return
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.part")  # one that a killed process left is overwritten
            try:
                self._check_version(name, expected)
                self._download(name, int(expected[0]), part, parts, progress)
                self._check_version(name, expected)  # or parts of two versions may be in it
                part.replace(target)
            except CheckpointError:
                raise
            except Exception as error:
                raise UnreachableError(f"{self._url}/{name}: cannot be fetched: {_one_line(error)}") from None
            finally:
                part.unlink(missing_ok=True)

    def _check_version(self, name: str, expected: list[Any]) -> None:
        filesystem = self._filesystem()
        filesystem.invalidate_cache()  # it keeps listings
        found = self._entry(filesystem.info(f"{self.path}/{name}"))
        if found != expected:
            raise CheckpointError(
                f"{self._url}/{name} has changed since the service was built: it is {found}, expected {expected} "
                "(bytes, version); deploy again"
            )

    def _download(self, name: str, size: int, part: Path, parts: ThreadPoolExecutor, progress: Progress) -> None:
        filesystem = self._filesystem()
        key = f"{self.path}/{name}"

        with part.open("wb") as file:
            file.truncate(size)

            def fetch(start: int) -> None:
                end = min(start + _PART_BYTES, size)
                data = _with_retries(lambda: _exactly(filesystem.cat_file(key, start=start, end=end), end - start))
                os.pwrite(file.fileno(), data, start)
                progress.add(len(data))

            tasks = [parts.submit(fetch, start) for start in range(0, size, _PART_BYTES)]
            try:
                for task in tasks:
                    task.result()
            finally:
                for task in tasks:
                    task.cancel()
                wait(tasks)  # before the file is closed
            os.fsync(file.fileno())

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Only one process of this node fetches this file. The lock of a process that dies is free at once."""
        import filelock

        folder = self._base / f"{self._known_digest()}.locks"
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / f"{name.replace('/', '%')}.lock")
        while not lock.is_locked:
            try:
                lock.acquire(timeout=_LOCK_LOG_PERIOD_S)
            except filelock.Timeout:
                logger.info("%s: another process of this node fetches %s", self, name)
        try:
            yield
        finally:
            lock.release()

    # The listing -----------------------------------------------------------------------------------------------------

    def _listing(self) -> dict[str, list[Any]]:
        """Bytes and version of each file, from this node's copy or else from the store."""
        try:
            return dict(json.loads(self._listing_path.read_text()))
        except FileNotFoundError:
            listing = self._list()
        except ValueError:
            logger.warning("%s is damaged; asking the store again", self._listing_path)
            listing = self._list()
        if _digest_of(listing) != self.digest:
            raise CheckpointError(
                f"{self._url} has changed since the service was built: its digest is {_digest_of(listing)}, expected "
                f"{self.digest}; deploy again"
            )
        self._keep(listing)
        return listing

    def _keep(self, listing: dict[str, list[Any]]) -> None:
        self._base.mkdir(parents=True, exist_ok=True)
        temporary = self._listing_path.with_suffix(f".{os.getpid()}.part")
        temporary.write_text(json.dumps(listing, indent=1, sort_keys=True))
        temporary.replace(self._listing_path)

    def _list(self) -> dict[str, list[Any]]:
        try:
            filesystem = self._filesystem()
            filesystem.invalidate_cache()
            found = filesystem.find(self.path, detail=True)
        except FileNotFoundError:
            found = {}
        except CheckpointError:
            raise
        except Exception as error:  # each store has errors of its own
            raise UnreachableError(f"{self._url}: cannot be listed: {_one_line(error)}") from None
        prefix = self.path + "/"
        files = {key.removeprefix(prefix): self._entry(info) for key, info in found.items() if key.startswith(prefix)}
        # A README that changes must not make each node fetch the weights again.
        files = {name: entry for name, entry in files.items() if _is_inside(name) and is_used(name)}
        if not files:
            raise CheckpointError(f"{self._url}: there is no such folder, or nothing in it")
        return files

    @staticmethod
    def _entry(info: Mapping[str, Any]) -> list[Any]:
        version = next((str(info[key]) for key in _VERSION_KEYS if info.get(key) is not None), "")
        return [int(info["size"]), version.strip('"')]

    def _filesystem(self) -> Any:
        import fsspec

        try:
            return fsspec.filesystem(self.scheme)
        except ImportError:
            package = PACKAGES[self.scheme]
            raise CheckpointError(f"{self._url}: needs the package {package}: pip install {package}") from None


def subfolders(url: str) -> list[str]:
    """Names of the folders in a folder of an object store, such as s3://bucket/adapters.

    UnreachableError where the store does not answer; CheckpointError where its package is missing.
    """
    scheme, _, path = url.partition("://")
    source = ObjectStoreSource.parse(scheme, path)
    filesystem = source._filesystem()
    try:
        filesystem.invalidate_cache()
        found = filesystem.ls(source.path, detail=True)
    except FileNotFoundError:
        return []
    except Exception as error:  # each store has errors of its own
        raise UnreachableError(f"{url}: cannot be listed: {_one_line(error)}") from None
    return sorted(info["name"].rstrip("/").rpartition("/")[2] for info in found if info["type"] == "directory")


def _digest_of(listing: dict[str, list[Any]]) -> str:
    return hashlib.sha256(json.dumps(listing, sort_keys=True).encode()).hexdigest()[:16]


def _is_inside(name: str) -> bool:
    return bool(name) and not name.endswith("/") and all(part not in ("", ".", "..") for part in name.split("/"))


def _exactly(data: bytes, nbytes: int) -> bytes:
    if len(data) != nbytes:
        raise OSError(f"the store sent {len(data)} bytes, expected {nbytes}")
    return data


def _with_retries(call: Any) -> Any:
    for attempt in range(_ATTEMPTS):
        try:
            return call()
        except (FileNotFoundError, PermissionError):
            raise
        except Exception as error:
            if attempt + 1 == _ATTEMPTS:
                raise
            pause_s = _FIRST_PAUSE_S * 2**attempt
            logger.warning("%s; trying again in %.1f s", _one_line(error), pause_s)
            time.sleep(pause_s)
    return None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
