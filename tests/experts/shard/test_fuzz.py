"""Anything at all sent to a live shard, by strangers and by members, with a well-behaved router beside them.

EXPERTMESH_FUZZ_EXAMPLES says how many things are sent; `make fuzz` sends 100,000.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experts.protocol.errors import ShardLostError
from experts.protocol.membership import ShardEndpoint
from experts.protocol.secret import MeshSecret
from experts.protocol.wire import H_STATUS, HEADER_WORDS, STATUS_NO_SLOT, STATUS_OK, STATUS_REJECTED, header_of
from experts.transports import atomics
from experts.transports.connect import connect
from experts.transports.control import Hello, open_control
from experts.transports.control_port.handshake import READER, ROUTER, AskingHandshake
from experts.transports.shm import ShmRouterLink
from experts.transports.weights.frames import ASK, WeightsHello
from placement.placement import Placement
from tests.support.echo_shard import deadline_in
from tests.support.packed_request import HIDDEN, pack
from tests.support.small_mesh import (
    Mesh,
    assert_matches,
    identity_of,
    mesh_of,
    oracle,
    random_batch,
    run,
    write_checkpoint,
)
from tests.support.strangers import LONG_S, OTHER_SECRET, all_from, stranger_at
from tests.support.waiting import await_true, join

EXAMPLES = int(os.environ.get("EXPERTMESH_FUZZ_EXAMPLES", "400"))
NUM_LAYERS, NUM_EXPERTS, TOP_K = 2, 6, 3
GROWTH_BYTES = 64 << 20
MORE_THREADS = 4  # that open pairs; they stay

EDGES = st.sampled_from([-(1 << 63), -1, 0, 1, 2, 6, 100, 101, 1 << 20, (1 << 20) + 1, 1 << 31, 1 << 32, (1 << 63) - 1])
JSON = st.recursive(
    st.none() | st.booleans() | EDGES | st.floats(allow_nan=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
NAMES = (*Hello.__dataclass_fields__, "surprise")
TRANSPORTS = st.sampled_from(["shm", "tcp", "gloo_split", "nccl", "auto", "pigeon", ""])
CHANGES = st.dictionaries(st.sampled_from(NAMES), JSON | EDGES, max_size=3) | st.fixed_dictionaries(
    {"transport": TRANSPORTS}, optional={"details": JSON, "max_rows": EDGES, "top_k": EDGES}
)


@dataclass
class Attack:
    """A shard, what is known of it, and a pair with it that is opened anew when it is lost."""

    mesh: Mesh
    done: Counter[str] = field(default_factory=Counter)
    link: ShmRouterLink | None = None
    layout: str = ""

    def __post_init__(self) -> None:
        """The refusal of a wrong layout names the right one."""
        self.layout = self.hello_of_a_reader({}, []).split("'")[1]

    @property
    def endpoint(self) -> ShardEndpoint:
        return self.mesh.shards[0].endpoint

    def hello(self) -> Hello:
        identity = identity_of(self.mesh.model)
        return Hello("fuzz", "shm", self.endpoint.incarnation, "float32", HIDDEN, TOP_K, NUM_LAYERS, 100, **identity)

    def pair(self) -> ShmRouterLink:
        if self.link is None:
            link = connect(self.endpoint, self.hello(), "cpu", 20.0, deadline_in(LONG_S))
            assert isinstance(link, ShmRouterLink)
            self.link = link
        return self.link

    # What is sent -----------------------------------------------------------------------------------------------------

    def bytes_of_a_stranger(self, data: bytes, knows_magic: bool, waits: bool) -> None:
        """Nothing that makes sense after at most a greeting, and perhaps no patience to hear the answer."""
        with stranger_at(self.endpoint) as connection:
            greeting = AskingHandshake(OTHER_SECRET, ROUTER).greeting
            with contextlib.suppress(ConnectionError):  # it may have been turned away by then
                connection.sendall(greeting + data if knows_magic else data)
                if waits and len(data) >= len(greeting):
                    said = all_from(connection)
                    assert len(said) in (0, 44, 44 + 33), "a stranger learns nothing else"

    def changed_proof(self, at: int, value: int, role: int) -> None:
        """A member's own greeting and proof with one byte changed."""
        with stranger_at(self.endpoint) as connection:
            handshake = AskingHandshake(MeshSecret.from_environment(), role)
            whole = bytearray(handshake.greeting + bytes(32))
            was, whole[at % 44] = whole[at % 44], value
            with contextlib.suppress(ConnectionError):
                connection.sendall(whole[:44])
                answer = connection.recv(44)
                if len(answer) == 44:
                    with contextlib.suppress(ConnectionError):
                        proof = handshake.feed(answer)
                        connection.sendall(proof)
                        welcome = all_from(connection) if was != value else connection.recv(33)
                        assert welcome[:1] in ((b"", b"\0") if was != value else (b"\1",))

    def frame_of_a_member(self, change: Callable[[bytes], bytes], role: int, waits: bool) -> None:
        """A frame whose bytes were changed after it was signed."""
        with self._member(role) as control:
            sealed = control.handshake.seal(asdict(self.hello()))
            with contextlib.suppress(ConnectionError):
                control.socket.sendall(change(sealed))
                if waits and change(sealed)[:4] == sealed[:4] and len(change(sealed)) >= len(sealed):
                    all_from(control.socket)

    def hello_of_a_member(self, changes: dict[str, Any], without: list[str]) -> None:
        """Properly signed, and no router's. A sound one gets its pair, which ends with the connection."""
        message = {name: value for name, value in {**asdict(self.hello()), **changes}.items() if name not in without}
        self._say(message, ROUTER)

    def hello_of_a_reader(self, changes: dict[str, Any], asks: list[tuple[int, int]]) -> str:
        """For weights; and it asks for whatever if it is let in."""
        identity = identity_of(self.mesh.model)
        hello = asdict(WeightsHello(self.endpoint.incarnation, self.layout, **identity)) | changes
        return self._say(hello, READER, b"".join(ASK.pack(*ask) for ask in asks))

    def any_message(self, message: dict[str, Any], role: int) -> None:
        """Signed, and not like anything."""
        self._say(message, role)

    def request(self, words: dict[int, int], offsets: list[int], body: bytes, nbytes: int, late: bool) -> None:
        """A request with some of its header and of its sections overwritten, perhaps after it was posted."""
        link = self.pair()
        length = pack(link.send_buffer, 7, [0, 2], layer=1)
        post = length if nbytes < 0 else nbytes

        def spoil() -> None:
            header_of(link.send_buffer)[list(words)] = list(words.values())
            link.send_buffer[128 : 128 + 4 * len(offsets)].view(np.int32)[:] = offsets
            link.send_buffer[192 : 192 + len(body)] = np.frombuffer(body, np.uint8)

        if not late:
            spoil()
        if post <= len(link.send_buffer):
            link.post(post)
        else:  # what no link of ours would do
            link.post(length)
            link.wait(deadline_in(LONG_S))
            link.native.seq += 1
            region = link.region.bytes.view(np.uint32)
            region[4 * 16], region[0] = post, link.native.seq
            atomics.ring(link._bell.address, link._bell.address + 64)
        if late:
            spoil()
        try:
            link.wait(deadline_in(LONG_S))
        except ShardLostError:
            assert post > len(link.send_buffer) or late or words or offsets or body
            link.close()
            self.link = None
            return
        status = int(header_of(link.recv_buffer)[H_STATUS])
        assert status in (STATUS_OK, STATUS_REJECTED, STATUS_NO_SLOT)
        if not (words or offsets or body) and post == length:
            assert status == STATUS_OK

    # ------------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _member(self, role: int) -> Iterator[Any]:
        control = open_control(self.endpoint, None, deadline_in(LONG_S), role)
        control.socket.settimeout(LONG_S)
        try:
            yield control
        finally:
            control.socket.close()

    def _say(self, message: dict[str, Any], role: int, more: bytes = b"") -> str:
        """The reason of a refusal, empty if there is none."""
        with self._member(role) as control, contextlib.suppress(ConnectionError):
            control.socket.sendall(control.handshake.seal(message))
            heard = control.handshake
            while heard.message is None:
                data = b""
                while len(data) < heard.wanted:
                    part = control.socket.recv(heard.wanted - len(data))
                    if not part:
                        return ""
                    data += part
                heard.feed(data)
            if heard.message["ok"]:
                control.socket.sendall(more)
                return ""
            assert heard.message["error"]
            return str(heard.message["error"])
        return ""


def cut(data: bytes, at: int) -> bytes:
    return data[: at % (len(data) + 1)]


def flipped(data: bytes, at: int) -> bytes:
    whole = bytearray(data)
    whole[at % len(data)] ^= 0xFF
    return bytes(whole)


ROLES = st.sampled_from([ROUTER, READER])
WORDS = st.dictionaries(st.integers(0, HEADER_WORDS - 1), EDGES, max_size=3)
INT32 = st.integers(-(1 << 31), (1 << 31) - 1)
EXAMPLE = st.one_of(
    st.tuples(st.just("bytes_of_a_stranger"), st.binary(max_size=200), st.booleans(), st.booleans()),
    st.tuples(st.just("changed_proof"), st.integers(0, 43), st.integers(0, 255), ROLES),
    st.tuples(
        st.just("frame_of_a_member"),
        st.builds(lambda how, at: lambda data: how(data, at), st.sampled_from([cut, flipped]), st.integers(0, 1 << 12)),
        ROLES,
        st.booleans(),
    ),
    st.tuples(st.just("hello_of_a_member"), CHANGES, st.lists(st.sampled_from(NAMES), max_size=1)),
    st.tuples(
        st.just("hello_of_a_reader"),
        st.dictionaries(st.sampled_from((*WeightsHello.__dataclass_fields__, "surprise")), JSON, max_size=2),
        st.lists(st.tuples(INT32, INT32), max_size=4),
    ),
    st.tuples(st.just("any_message"), st.dictionaries(st.text(max_size=9), JSON, max_size=4), ROLES),
    *[
        st.tuples(
            st.just("request"),
            WORDS,
            st.lists(INT32, max_size=4),
            st.binary(max_size=64),
            st.just(-1) | st.integers(0, 2000) | st.sampled_from([1 << 16, 1 << 31, (1 << 32) - 1]),
            st.booleans(),
        )
    ]
    * 3,
)


@dataclass
class GoodRouter:
    """Dispatches without pause and compares what comes back; in a thread of its own."""

    mesh: Mesh
    answers: int = 0
    failure: str = ""

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            router, batch = self.mesh.router(router_id="good", fallback_max_ms_per_step=0), random_batch(5)
            expected_TD = [oracle(self.mesh.checkpoint, layer, batch) for layer in range(NUM_LAYERS)]
            while not self._stop.wait(0.01):
                for layer in range(NUM_LAYERS):
                    assert_matches(run(router, layer, batch), expected_TD[layer])
                    self.answers += 1
            assert router.status().lost == {}
            assert router.status().fallback_pairs == 0
        except BaseException as error:
            self.failure = repr(error)

    def end(self) -> None:
        self._stop.set()
        join(self._thread, "the good router's last answer")


def rss_bytes(pid: int) -> int:
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024 + int(fields["RssShmem"].split()[0]) * 1024


def count_of(pid: int, what: str) -> int:
    return len(list(Path(f"/proc/{pid}/{what}").iterdir()))


@pytest.mark.timeout(300 + EXAMPLES * 0.1)
def test_whatever_is_sent_the_shard_serves_on_and_does_not_grow(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path)
    with mesh_of(model, Placement.linear(NUM_LAYERS, NUM_EXPERTS, 1)) as mesh:
        attack, good = Attack(mesh), GoodRouter(mesh)
        await_true(lambda: good.answers or good.failure, "the good router's first answer")
        pid = attack.endpoint.pid
        over_tcp = mesh.router(transport="tcp", router_id="first")  # the first socket brings an epoll set that stays
        over_tcp.close()
        await_true(lambda: mesh.shards[0].status().routers == ["good"], "the end of the pair over TCP")
        before_bytes, threads, descriptors = rss_bytes(pid), count_of(pid, "task"), count_of(pid, "fd")

        @settings(
            max_examples=EXAMPLES,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        )
        @given(EXAMPLE)
        def send(example: tuple[Any, ...]) -> None:
            kind, *arguments = example
            getattr(attack, kind)(*arguments)
            attack.done[kind] += 1
            if attack.done.total() % 10_000 == 0:
                print(f"{attack.done.total()} sent", flush=True)
            assert not good.failure

        send()
        good.end()
        assert good.failure == ""
        assert good.answers > NUM_LAYERS
        assert set(attack.done) == {kind for kind in dir(Attack) if kind in attack.done}
        status = mesh.shards[0].status()
        assert status.alive
        assert status.fault is None
        await_true(lambda: count_of(pid, "task") <= threads + MORE_THREADS, "the end of what the attack started")
        # The pair of the attack has two at the shard: the connection, and none for its memory.
        await_true(lambda: count_of(pid, "fd") <= descriptors + 2, "the descriptors' return")
        grown = rss_bytes(pid) - before_bytes
        print(
            f"sent {json.dumps(attack.done)} beside {good.answers} right answers; the shard grew by "
            f"{grown / 2**20:.1f} MiB and {count_of(pid, 'task') - threads} threads"
        )
        assert grown <= GROWTH_BYTES
