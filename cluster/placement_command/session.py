"""A connection to a running service: its Ray cluster, its Serve, and the placement controller in it."""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from placement.command.ending import CommandError, Ending
from placement.placement import Placement

if TYPE_CHECKING:
    from cluster.controller.client import ControllerClient
    from cluster.mesh.messages import ControllerStatus, SeatView

REACH_TIMEOUT_S = 10.0
CALL_TIMEOUT_S = 15.0
SHUTDOWN_TIMEOUT_S = 5.0
PLAN_TIMEOUT_S = 120.0  # the rounds of a large placement take seconds to plan

T = TypeVar("T")

# Ray is imported inside functions, so that wrong usage is told at once.


class Session:
    """What the actions need of a running service. Tests hand in a client of their own."""

    def __init__(self, client: ControllerClient) -> None:
        self.client = client

    async def status(self) -> ControllerStatus:
        """The controller's status. CommandError if there is none in time."""
        return await answered(self.client.status(timeout_s=CALL_TIMEOUT_S))

    async def shard(self, name: str) -> SeatView:
        """The shard that a rank, a process id or a replica id names. CommandError lists those there are."""
        seats = (await self.status()).shards
        for what in ("rank", "pid", "shard_id"):
            for seat in seats:
                if str(getattr(seat, what)) == name:
                    return seat
        there = ", ".join(f"{seat.rank} (pid {seat.pid or '-'}, {seat.shard_id})" for seat in seats)
        raise CommandError(f"no shard has the rank, process id or replica id {name!r}; there are {there or 'none'}")


async def answered(call: Awaitable[T]) -> T:
    """What the controller answers; CommandError without an answer."""
    from cluster.controller.client import ControllerLostError

    try:
        return await call
    except ControllerLostError as error:
        raise CommandError(str(error), ending=Ending.UNREACHABLE) from error


def read_placement(path: Path) -> Placement:
    """A placement from a JSON file. CommandError names the file."""
    try:
        return Placement.load(path)
    except OSError as error:
        raise CommandError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise CommandError(str(error)) from None


@contextlib.contextmanager
def connected(address: str, app_name: str) -> Iterator[Session]:
    """A session with the service on the cluster at `address`. CommandError if there is none."""
    _reach(address)
    import ray
    from ray import serve

    logging.disable(logging.INFO)
    _show_token(address)
    try:
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        except Exception as error:
            told = f"no Ray cluster answers at {address}: {error} (--address names one)"
            raise CommandError(told, ending=Ending.UNREACHABLE) from error
        applications = serve.status().applications
        if app_name not in applications:
            there = ", ".join(sorted(applications)) or "none: Serve does not run there"
            told = f"no application is named {app_name!r}; there are {there} (--app names another)"
            raise CommandError(told, ending=Ending.UNREACHABLE)
        # Here, since it connects to Serve.
        from cluster.controller.client import ControllerClient

        yield Session(ControllerClient(app_name))
    finally:
        if ray.is_initialized():
            _disconnect()


def _disconnect() -> None:
    """In a thread of its own: nothing bounds the time that it takes, and the result has been told."""
    import ray

    thread = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
    thread.start()
    thread.join(SHUTDOWN_TIMEOUT_S)


def _show_token(address: str) -> None:
    """Raise CommandError at once if the cluster takes another token, or wants one."""
    from cluster.ray_joints import cluster_at, wants_other_token

    found = cluster_at(address)
    if found is not None and wants_other_token(found, REACH_TIMEOUT_S):
        raise CommandError(
            f"the Ray cluster at {found} wants another token than this process has: set RAY_AUTH_MODE=token and "
            "RAY_AUTH_TOKEN as they were when it was started (`expertmesh serve` makes up one that nobody else has, "
            "unless both are set)"
        )


def _reach(address: str) -> None:
    """Raise CommandError at once if nothing listens at a HOST:PORT, which Ray takes half a minute to notice."""
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), REACH_TIMEOUT_S).close()
    except (OSError, OverflowError) as error:
        told = f"nothing listens at {address}: {error}; name the Ray cluster with --address"
        raise CommandError(told, ending=Ending.UNREACHABLE) from None
