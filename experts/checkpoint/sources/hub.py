"""A model on the Hugging Face hub: `org/name`, optionally `@` a branch, a tag or a commit.

Files come through huggingface_hub, into its cache (`HF_HOME`), with its locks, resumption and settings (`HF_ENDPOINT`,
`HF_TOKEN`, `HF_HUB_OFFLINE`). It is imported inside functions: it reads its environment then.
"""

from __future__ import annotations

import glob
import logging
import re
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from experts.checkpoint.errors import CheckpointError, UnreachableError
from experts.checkpoint.sources.base import CONFIG_NAME, ModelSource, refuse_gguf
from experts.checkpoint.sources.progress import Progress

logger = logging.getLogger(__name__)

_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_WORKERS = 8


@dataclass(frozen=True)
class HubSource(ModelSource):
    """`revision` None is the repository's default branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"

    @property
    def remote(self) -> bool:
        return True

    @property
    def _is_resolved(self) -> bool:
        return self.revision is not None and _COMMIT.fullmatch(self.revision) is not None

    def resolved(self) -> HubSource:
        if self._is_resolved:
            return self
        from huggingface_hub import resolve_revision

        with self._refusals():
            # Kept in the cache too, which answers while the hub cannot.
            return replace(self, revision=resolve_revision(self.repo, revision=self.revision).resolved)

    def files(self) -> Mapping[str, int]:
        from huggingface_hub import get_cached_repo_tree
        from huggingface_hub.errors import CachedRepoTreeNotFoundError

        try:
            tree = get_cached_repo_tree(self.repo, revision=self._commit())
        except CachedRepoTreeNotFoundError:
            folder = self._download([CONFIG_NAME])  # which also keeps the list of files
            try:
                tree = get_cached_repo_tree(self.repo, revision=self._commit())
            except CachedRepoTreeNotFoundError:  # offline, with a cache that another version filled
                paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
                return {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
        return {file.path: file.size for file in tree}

    def fetch(self, names: Collection[str]) -> Path:
        from huggingface_hub import constants, try_to_load_from_cache

        commit = self._commit()
        folder: Path | None = None
        missing = []
        for name in names:
            found = try_to_load_from_cache(self.repo, name, revision=commit)
            if isinstance(found, str):
                folder = Path(found).parents[name.count("/")]
            else:
                missing.append(name)
        if not missing and folder is not None:
            return folder
        if constants.is_offline_mode():
            raise CheckpointError(
                f"{self}: {missing[0] if missing else CONFIG_NAME} is not in the cache of this node "
                f"({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set"
            )
        sizes = self.files()
        for name in missing:
            if name not in sizes:
                refuse_gguf(self, sizes)
                raise CheckpointError(f"{self}: the model has no file {name}")
        return self._download(missing, Progress(str(self), sum(sizes[name] for name in missing)))

    def _commit(self) -> str:
        if not self._is_resolved:
            raise ValueError(f"{self} is not resolved to a commit yet; call resolved() first")
        assert self.revision is not None
        return self.revision

    def _download(self, names: Collection[str], progress: Progress | None = None) -> Path:
        from huggingface_hub import snapshot_download

        with self._refusals():
            folder = snapshot_download(
                self.repo,
                revision=self._commit(),
                allow_patterns=[glob.escape(name) for name in names],
                max_workers=_MAX_WORKERS,
                tqdm_class=_reporting_to(progress.add if progress else lambda nbytes: None),
            )
        if progress is not None:
            progress.finish()
        return Path(folder)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """Turn huggingface_hub's errors, of many lines, into one line that names the model and the remedy."""
        from huggingface_hub import constants, errors

        endpoint = constants.ENDPOINT
        others: tuple[type[Exception], ...] = (OSError, *_transport_errors())
        kind: type[CheckpointError] = CheckpointError
        try:
            yield
        except errors.GatedRepoError:
            reason = (
                f"the model is gated; accept its terms at {endpoint}/{self.repo} and set HF_TOKEN to a token of an "
                "account that may read it"
            )
        except errors.RepositoryNotFoundError:
            reason = f"no such folder here, and {endpoint} has no such model, or HF_TOKEN may not read it"
        except errors.RevisionNotFoundError:
            reason = f"the model has no branch, tag or commit {self.revision!r}"
        except (errors.RevisionResolutionError, errors.LocalEntryNotFoundError) as error:
            if constants.is_offline_mode():
                reason = f"not in the cache of this node ({constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE is set"
            else:
                cause = error.__cause__ or error
                kind = UnreachableError
                reason = f"{endpoint} does not answer, and the cache of this node lacks it: {_first_line(cause)}"
        except errors.HfHubHTTPError as error:
            kind = UnreachableError
            reason = f"{endpoint} answers with an error: {_first_line(error)}"
        except errors.HFValidationError as error:
            reason = _first_line(error)
        except others as error:
            kind = UnreachableError
            reason = _first_line(error)
        else:
            return
        raise kind(f"{self}: {reason}")


def _transport_errors() -> tuple[type[Exception], ...]:
    """Errors of the HTTP library that huggingface_hub uses: httpx, or httpx2 from version 2.4."""
    return tuple(sys.modules[name].HTTPError for name in ("httpx", "httpx2") if name in sys.modules)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _reporting_to(add: Callable[[int], None]) -> type:
    """A class of progress bars that shows nothing and reports the bytes of a download.

    Hub's snapshots have two bars in bytes, one for bytes that arrive and one for bytes that are written. Each may lag
    or stay at 0, so the further one counts.
    """
    from tqdm.std import tqdm

    class Bar(tqdm):
        bars: ClassVar[list[Bar]] = []
        reported = 0

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs["disable"] = False
            super().__init__(*args, **kwargs)
            if self.unit == "B":
                Bar.bars.append(self)

        def display(self, msg: str | None = None, pos: int | None = None) -> bool:
            """Show nothing."""
            return True

        def update(self, n: float | None = 1) -> bool | None:
            """Count, then report."""
            shown = super().update(n)
            with self.get_lock():
                done = int(max((bar.n for bar in Bar.bars), default=0))
                gained, Bar.reported = max(0, done - Bar.reported), max(done, Bar.reported)
            if gained:
                add(gained)
            return shown

        def close(self) -> None:
            """Nothing was drawn, so nothing is to be cleared."""
            self.disable = True

    return Bar
