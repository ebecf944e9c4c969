"""One expert shard: loads the experts of its rank, listens for routers, computes what they send. Needs no Ray, no vllm.

`python -m experts.shard.server --settings JSON --placement FILE --rank R` runs one shard. When it is ready, it prints
its endpoint as one line of JSON.
"""

from __future__ import annotations

import argparse
import base64
import json
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from experts.checkpoint import ExpertCheckpoint
from experts.checkpoint.fingerprint import Fingerprint
from experts.protocol.log_lines import log_to_stderr
from experts.protocol.membership import ShardEndpoint, host_id
from experts.protocol.orders import CopyOrder, CopyResult
from experts.protocol.secret import MeshSecret
from experts.protocol.settings import ShardSettings
from experts.protocol.status import ShardStatus
from experts.protocol.wire import reply_capacity, request_capacity
from experts.shard.hand_out import HandOut
from experts.shard.kernels import fill_hot_first, kernel_for, offload_status, start_prefetch
from experts.shard.loop import ShardLoop
from experts.shard.mover import Mover
from experts.shard.slots import SlotTable, experts_of
from experts.transports.base import ShardChannel
from experts.transports.connect import open_shard_channel
from experts.transports.control import Hello, LifeLine
from experts.transports.control_port.listener import ControlListener
from experts.transports.control_port.visitor import OtherIncarnationError, PortLimits
from experts.transports.devices import identity_of, use_device
from experts.transports.memory_limit import PairRoom
from experts.transports.shm import ShmDoorbell
from experts.transports.tls.identity import TlsIdentity
from experts.transports.weights import reader
from experts.transports.weights.frames import WeightsHello
from placement.placement import Placement, check_same_model

logger = logging.getLogger(__name__)

_LOADING_THREADS = 8  # more than cores: they wait for the disk in turn; see benchmarks.data_plane.expert_loading
_HELLO_BYTES = 1 << 16  # of a hello, without the hashes of tensors
_NAMED = 3  # tensors that a refusal names


class ShardServer:
    """A shard's life: start, copy and release experts while it serves, stop."""

    def __init__(self, settings: ShardSettings, secret: MeshSecret | None = None) -> None:
        """`secret` None: the environment has it; MeshSecretError from `start` if not."""
        self.settings = settings
        self._given_secret = secret
        self._tls: TlsIdentity | None = None
        self.dtype: torch.dtype = getattr(torch, settings.dtype)
        self.endpoint: ShardEndpoint | None = None
        self.epoch = -1
        self._loop: ShardLoop | None = None
        self._listener: ControlListener | None = None
        self._bell: ShmDoorbell | None = None
        self._fingerprint: Fingerprint | None = None
        self._room: PairRoom | None = None
        self._mover: Mover | None = None
        self._hand_out: HandOut | None = None

    def start(self, placement: Placement, rank: int, epoch: int, num_slots: int | None = None) -> ShardEndpoint:
        """`load`, then `listen`."""
        self.load(placement, rank, num_slots)
        return self.listen(rank, epoch)

    def load(
        self, placement: Placement, rank: int, num_slots: int | None = None, load_LE: np.ndarray | None = None
    ) -> None:
        """Load the experts of `rank`, which may be none.

        `num_slots`: slots of each layer, by default the settings' slots_per_rank, else the placement's. `load_LE`
        (float [L, E]): the tokens of each expert, as far as known; a shard that offloads has the hot ones in memory
        first. Raises ValueError or CheckpointError if this shard cannot serve the placement.
        """
        if self._loop is not None:
            raise RuntimeError("this shard was started before")
        if not 0 <= rank < placement.num_ranks:
            raise ValueError(f"rank is {rank}, expected one of the placement's ranks, 0 to {placement.num_ranks - 1}")
        settings = self.settings
        self._secret()  # rather before loading than after
        self._tls = None if settings.tls is None else TlsIdentity(settings.tls)
        torch.set_num_threads(settings.num_threads)
        use_device(settings.device)
        checkpoint = ExpertCheckpoint.open(settings.model_path, settings.mtp)
        check_same_model("the placement", placement, "the checkpoint", checkpoint.spec)
        checkpoint.fetch_experts(experts_of(placement, rank))
        checkpoint.check(only_here=True)
        fingerprint = checkpoint.start_fingerprint()
        spec = checkpoint.spec
        num_slots = num_slots or settings.slots_per_rank or placement.slots_per_rank
        needed = max(Counter(layer for layer, _ in experts_of(placement, rank)).values(), default=0)
        if num_slots < needed:
            raise ValueError(f"slots_per_rank is {num_slots}, the placement needs at least {needed}")
        kernel = kernel_for(checkpoint, settings, num_slots)
        slots = SlotTable(checkpoint, kernel, num_slots, self.dtype)
        start_s = time.monotonic()
        count = slots.load(placement, rank, _LOADING_THREADS)
        start_prefetch(kernel, slots, settings.offload)
        logger.info(
            "rank %d: %d experts ready in %.1f s, kernel %s", rank, count, time.monotonic() - start_s, kernel.name
        )
        self._bell = ShmDoorbell(settings.spin_us)
        self._loop = ShardLoop(
            slots, kernel, self._bell, self.dtype, settings.num_threads, top_k=spec.top_k, device=settings.device
        )
        self._loop.warm_up(settings.max_rows_per_dispatch)
        fill_hot_first(kernel, slots, placement, load_LE)
        self._fingerprint = fingerprint.result()
        self._room = PairRoom()
        rows, row_bytes = settings.max_rows_per_dispatch, spec.hidden_size * self.dtype.itemsize
        self._room.check(1, request_capacity(rows, spec.top_k, row_bytes) + reply_capacity(rows, row_bytes))
        self._incarnation = uuid.uuid4().hex
        weights = base64.b64encode(self._fingerprint.to_bytes()).decode()
        self._hello_bytes = len(weights) + _HELLO_BYTES
        self._hand_out = HandOut(slots, self._fingerprint, self._incarnation)
        reads = WeightsHello("", kernel.layout, checkpoint.facts, weights)
        self._mover = Mover(slots, reads, secret=self._secret, tls=self._tls)
        reader.warm_up()

    def listen(self, rank: int, epoch: int) -> ShardEndpoint:
        """Start to serve what was loaded; returns the endpoint. All threads that serve are started here."""
        if self._loop is None or self._hand_out is None:
            raise RuntimeError("this shard has nothing to serve yet; call load() first")
        settings = self.settings
        self._loop.start()
        self.epoch = epoch
        self._listener = ControlListener(
            settings.bind_host,
            self._open_channel,
            self._loop.add,
            self._forget,
            settings.connect_timeout_s,
            self._hand_out.open,
            secret=self._secret,
            tls=self._tls,
            limits=PortLimits(
                settings.max_handshakes, settings.max_pairs, settings.max_pairs_per_router, self._hello_bytes
            ),
        )
        where = (settings.bind_host, self._listener.port, host_id(), os.getpid(), identity_of(settings.device))
        self.endpoint = ShardEndpoint(rank, self._incarnation, *where)
        logger.info("rank %d: listening on %s:%d", rank, settings.bind_host, self._listener.port)
        return self.endpoint

    def copy(
        self,
        orders: Sequence[CopyOrder],
        on_done: Callable[[CopyResult], None],
        *,
        max_bytes_per_s: float | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """Copy experts into free slots while serving; returns when `on_done` has had one result for each order.

        Takes orders as they come, those of different sources side by side. Where a source fails or is silent, its next
        one follows, at last the checkpoint. What comes is checked before requests can reach it. `on_done` is called by
        other threads, one call at a time. `cancelled` is asked often; then what is left fails with error "cancelled".
        RuntimeError if another call still runs.
        """
        self._running()
        assert self._mover is not None
        self._mover.copy(orders, on_done, max_bytes_per_s, cancelled)

    def release(self, pairs: Iterable[tuple[int, int]]) -> int:
        """Give up (layer, expert) pairs; returns how many it held. Does not wait.

        Requests for them are answered with STATUS_NO_SLOT at once; their slots are free when the current request ends.
        """
        loop, _ = self._running()
        return loop.slots.release(pairs)

    def held_Ls(self) -> np.ndarray:
        """int32 [L, s]: the expert in each slot that requests can reach, else -1."""
        loop, _ = self._running()
        return loop.slots.held_Ls()

    @property
    def expert_bytes(self) -> int:
        """Bytes of one expert in the kernel's format. RuntimeError before it was started."""
        return self._running()[0].kernel.shape.expert_bytes

    def status(self) -> ShardStatus:
        """What it holds and has done, for health checks and metrics. RuntimeError before it was started."""
        loop, endpoint = self._running()
        assert self._mover is not None
        assert self._hand_out is not None
        counters, moved = loop.counters, self._mover.counters
        return ShardStatus(
            rank=endpoint.rank,
            epoch=self.epoch,
            pid=endpoint.pid,
            incarnation=endpoint.incarnation,
            endpoint=endpoint,
            alive=loop.alive,
            fault=loop.fault,
            routers=loop.router_ids,
            kernel=loop.kernel.name,
            loaded_experts=loop.slots.num_loaded,
            loaded_bytes=loop.slots.loaded_bytes,
            weights_digest=loop.slots.digest(),
            requests=counters.requests,
            rows=counters.rows,
            pairs=counters.pairs,
            errors=counters.errors,
            compute_ns=counters.compute_ns,
            last_error=counters.last_error,
            last_epoch=counters.last_epoch,
            num_slots=loop.slots.num_slots,
            free_slots=loop.slots.num_free,
            copies=dict(moved.copies),
            copied_bytes=dict(moved.copied_bytes),
            copies_failed=moved.failed,
            copies_in_flight=moved.in_flight,
            copy_seconds=moved.seconds,
            handed_out=self._hand_out.experts,
            handed_out_bytes=self._hand_out.bytes,
            offload=offload_status(loop.kernel),
        )

    def use_secret(self, secret: MeshSecret) -> None:
        """Let in, and connect as, who knows another secret from now on. Pairs that are open stay so."""
        self._given_secret = secret

    def _secret(self) -> MeshSecret:
        return self._given_secret or MeshSecret.from_environment()

    def stop(self) -> None:
        """Disconnect the routers and end the loop. Idempotent."""
        if self._listener is not None:
            self._listener.stop()
        if self._mover is not None:
            self._mover.close()
        if self._loop is not None:
            self._loop.stop()
            self._loop.kernel.close()
        if self._bell is not None:
            self._bell.close()
        self._listener = None

    def _running(self) -> tuple[ShardLoop, ShardEndpoint]:
        if self._loop is None or self.endpoint is None:
            raise RuntimeError("this shard is not started yet; call start() first")
        return self._loop, self.endpoint

    def _open_channel(self, hello: Hello, line: LifeLine) -> tuple[ShardChannel, dict[str, Any]]:
        """Open a router's channel. ValueError if the router would send what this shard cannot compute."""
        loop, _ = self._running()
        spec = loop.slots.checkpoint.spec
        if hello.incarnation != self._incarnation:
            raise OtherIncarnationError(
                f"this is another incarnation of the shard, the router wants {hello.incarnation}"
            )
        for name, theirs, ours in (
            ("dtype", hello.dtype, self.settings.dtype),
            ("hidden size", hello.hidden_size, spec.hidden_size),
            ("number of MoE layers", hello.num_layers, spec.num_layers),
            *((name, hello.facts.get(name), ours) for name, ours in loop.slots.checkpoint.facts.items()),
            ("top-k", hello.top_k, spec.top_k),
        ):
            if theirs != ours:
                raise ValueError(f"router {hello.router_id} has {name} {theirs}, this shard has {ours}")
        self._check_weights(hello)
        if hello.max_rows > self.settings.max_rows_per_dispatch:
            raise ValueError(
                f"router {hello.router_id} sends up to {hello.max_rows} rows in a message, this shard takes up to "
                f"{self.settings.max_rows_per_dispatch} (max_rows_per_dispatch)"
            )
        assert self._bell is not None
        assert self._room is not None
        nbytes = hello.request_capacity + hello.reply_capacity
        self._room.take(nbytes)
        try:
            deadline_s = time.monotonic() + self.settings.connect_timeout_s
            channel, answer = open_shard_channel(hello, line, self._bell, self.settings.device, deadline_s)
            return channel, answer if loop.kernel.hints is None else {**answer, "wants_hints": True}
        except BaseException:
            self._room.give_back(nbytes)
            raise

    def _forget(self, channel: ShardChannel) -> None:
        """A router has left."""
        loop, _ = self._running()
        loop.remove(channel)
        assert self._room is not None
        self._room.give_back(len(channel.recv_buffer) + len(channel.send_buffer))

    def _check_weights(self, hello: Hello) -> None:
        """ValueError names the tensors that the router has with other bytes: it would mix two models."""
        assert self._fingerprint is not None
        differing = self._fingerprint.differing(base64.b64decode(hello.weights, validate=True))
        if differing:
            named = ", ".join(differing[:_NAMED]) + (f" and {n} more" if (n := len(differing) - _NAMED) > 0 else "")
            raise ValueError(
                f"router {hello.router_id} has other weights than this shard, which reads {self.settings.model_path}: "
                f"{named}; give both the same checkpoint"
            )


def main() -> None:
    """Run one shard until SIGTERM, SIGINT or, with --until-stdin-closes, the end of standard input."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", required=True, help="ShardSettings as JSON")
    parser.add_argument("--placement", required=True, help="placement file (JSON)")
    parser.add_argument("--rank", required=True, type=int)
    parser.add_argument("--epoch", default=0, type=int)
    parser.add_argument("--until-stdin-closes", action="store_true", help="end with the process that started this one")
    parser.add_argument("--log-format", choices=["text", "json"], default="text")
    args = parser.parse_args()
    log_to_stderr(args.log_format, role="shard", rank=args.rank, epoch=args.epoch)
    server = ShardServer(ShardSettings.model_validate_json(args.settings))
    endpoint = server.start(Placement.load(args.placement), args.rank, args.epoch)
    print(json.dumps(asdict(endpoint)), flush=True)
    done = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: done.set())
    if args.until_stdin_closes:

        def follow_stdin() -> None:
            sys.stdin.read()
            done.set()

        threading.Thread(target=follow_stdin, daemon=True).start()
    done.wait()
    server.stop()


if __name__ == "__main__":
    main()
