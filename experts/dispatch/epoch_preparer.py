"""Prepares epochs in a thread of its own, beside the engine's steps: reads them, connects to new shards, builds tables.

R ranks.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from experts.dispatch.connector import Connector
from experts.dispatch.dispatcher import Dispatcher
from experts.dispatch.epoch import PreparedEpoch, prepare_epoch
from experts.protocol.membership import AppliedMembership, Membership, Preparation, ShardEndpoint, host_id
from experts.protocol.membership_bytes import UnknownEpochError, epochs_in
from experts.transports.base import RouterLink

# While an epoch is prepared, a step that wants the interpreter's lock gets it after this long instead of 5 ms.
SWITCH_INTERVAL_S = 0.0002


@dataclass
class _Job:
    """One epoch on its way."""

    epoch: int
    future: concurrent.futures.Future[PreparedEpoch] = field(init=False)
    superseded: threading.Event = field(default_factory=threading.Event)
    connecting: list[int] = field(default_factory=list)
    refused: list[int] = field(default_factory=list)


class EpochPreparer:
    """The newest epoch that a router was told of, and the links made for it. One thread calls its methods."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        connector: Connector,
        prefer_local: bool,
        check_first: Callable[[Membership], None] = lambda membership: None,
    ) -> None:
        """`check_first` raises ValueError if the router cannot serve with the first membership."""
        self._dispatcher = dispatcher
        self._connector = connector
        self._prefer_local = prefer_local
        self._check_first = check_first
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="epochs")
        self._newest: _Job | None = None
        self._made: dict[str, RouterLink] = {}  # by incarnation: links that no epoch has taken over yet

    def start(self, told: Membership | bytes, connect_s: float | None) -> Preparation:
        """Begin to prepare an epoch in place of any other; new shards may take `connect_s` (None: until they time out).

        ValueError for bytes that are no membership, and for an epoch older than the one in use.
        """
        epoch = told.epoch if isinstance(told, Membership) else epochs_in(told)[0]
        current = self._dispatcher.membership
        if current is not None and epoch < current.epoch:
            raise ValueError(f"epoch {epoch} is older than the current epoch {current.epoch}")
        if self._newest is not None:
            self._newest.superseded.set()
        job = self._newest = _Job(epoch)
        job.future = self._pool.submit(self._prepare, job, told, current, connect_s)
        return self.state()

    def state(self) -> Preparation:
        """How far the newest epoch is."""
        job = self._newest
        if job is None:
            return Preparation(-1, False, [], False, "no epoch was told yet")
        if not job.future.done():
            return Preparation(job.epoch, False, list(job.connecting), False, "")
        error = job.future.exception()
        if error is None:
            return Preparation(job.epoch, True, [], False, "")
        return Preparation(job.epoch, False, [], isinstance(error, UnknownEpochError), str(error) or repr(error))

    def wait(self) -> None:
        """Until the newest epoch is ready, or raise why it will not be."""
        assert self._newest is not None, "an epoch was started"
        self._newest.future.result()

    def finish(self, epoch: int) -> AppliedMembership:
        """Have the dispatcher take over a prepared epoch; called between two steps. ValueError if it is not ready."""
        job = self._newest
        if job is None or job.epoch != epoch or not job.future.done() or job.future.exception() is not None:
            raise ValueError(f"epoch {epoch} is not ready to be applied; the newest: {self.state()}")
        prepared = job.future.result()
        self._newest = None
        unwanted = self._dispatcher.take_over(prepared)
        if self._made:
            used = {id(link) for link in prepared.links.values()}
            unwanted += [link for link in self._made.values() if id(link) not in used]
            self._made = {}
        if unwanted:
            self._pool.submit(_close, unwanted)
        return AppliedMembership(epoch, sorted(prepared.links), dict(prepared.lost), job.refused)

    def settle(self) -> None:
        """Wait until what `finish` left to close is closed."""
        self._pool.submit(lambda: None).result()

    def close(self) -> None:
        """Give up what is being prepared and close the links that no epoch has."""
        if self._newest is not None:
            self._newest.superseded.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._connector.close()
        for link in self._made.values():
            link.close()
        self._made = {}

    def _prepare(
        self, job: _Job, told: Membership | bytes, current: Membership | None, connect_s: float | None
    ) -> PreparedEpoch:
        dispatcher = self._dispatcher
        with _quick_switches():
            membership = told if isinstance(told, Membership) else Membership.from_bytes(told, current)
            dispatcher.shape.check_placement(membership.placement)
            if current is None:
                self._check_first(membership)
        links: dict[int, RouterLink] = {}
        lost: dict[int, str] = {}
        fresh: list[ShardEndpoint] = []
        kept = set()
        for rank, endpoint in enumerate(membership.endpoints):
            if endpoint is None:
                lost[rank] = "no shard has this rank yet"
                continue
            link = dispatcher.links.get(rank)
            if link is not None and _incarnation(current, rank) == endpoint.incarnation:
                links[rank] = link
                kept.add(rank)
            elif endpoint.incarnation in self._made:
                links[rank] = self._made[endpoint.incarnation]
            else:
                fresh.append(endpoint)
        made, missed, job.refused = self._connector.take(fresh, connect_s, job.superseded, job.connecting)
        self._made |= {endpoint.incarnation: made[endpoint.rank] for endpoint in fresh if endpoint.rank in made}
        links |= made
        lost |= missed
        local_R = None
        if self._prefer_local:
            local_R = np.array([e is not None and e.host_id == host_id() for e in membership.endpoints])
        with _quick_switches():
            return prepare_epoch(
                dispatcher.shape, dispatcher.max_rows, membership, links, lost, local_R, frozenset(kept)
            )


def _incarnation(membership: Membership | None, rank: int) -> str | None:
    if membership is None or rank >= len(membership.endpoints):
        return None
    endpoint = membership.endpoints[rank]
    return None if endpoint is None else endpoint.incarnation


def _close(links: Iterable[RouterLink]) -> None:
    for link in links:
        link.close()


@contextlib.contextmanager
def _quick_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
