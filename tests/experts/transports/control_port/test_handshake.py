"""The handshake without sockets: who is let in, who is not, and that no byte of it can be changed or used twice."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experts.protocol.secret import MIN_CHARACTERS, SECRET_ENV, MeshSecret, MeshSecretError
from experts.transports.control_port import handshake
from experts.transports.control_port.handshake import (
    READER,
    ROUTER,
    AskingHandshake,
    Handshake,
    HandshakeError,
    OtherSecretError,
    OtherVersionError,
    ServingHandshake,
)

TEXT = "a secret that nobody else knows, of the right length"
SECRET, OTHER = MeshSecret(TEXT), MeshSecret(TEXT + "!")
HELLO = {"router_id": "r", "incarnation": "1"}


@dataclass
class Talk:
    """Both sides, and every byte in the order sent: (whether the asking side sent it, bytes)."""

    asks: AskingHandshake
    serves: ServingHandshake
    sent: list[tuple[bool, bytes]] = field(default_factory=list)

    @classmethod
    def of(cls, asking: MeshSecret = SECRET, serving: MeshSecret = SECRET, role: int = ROUTER) -> Talk:
        return cls(AskingHandshake(asking, role), ServingHandshake(serving, 1 << 20))

    def tell(self, to: Handshake, data: bytes, flip: int = -1) -> bytes:
        """Have `data` arrive, one bit of it changed if `flip` says so; returns what comes back."""
        changed = bytearray(data)
        if flip >= 0:
            changed[flip // 8] ^= 1 << flip % 8
        self.sent.append((to is self.serves, bytes(changed)))
        answer = b""
        at = 0
        while at < len(changed):
            size = to.wanted
            answer += to.feed(bytes(changed[at : at + size]))
            at += size
        return answer

    def prove(self) -> None:
        """Up to where each knows the other."""
        proof = self.tell(self.asks, self.tell(self.serves, self.asks.greeting))
        self.tell(self.asks, self.tell(self.serves, proof))

    def run(self) -> None:
        """All of it."""
        self.prove()
        self.tell(self.serves, self.asks.seal(HELLO))
        self.tell(self.asks, self.serves.seal({"ok": True}))


def test_two_members_hear_each_other() -> None:
    talk = Talk.of(role=READER)
    talk.run()
    assert (talk.serves.message, talk.asks.message) == (HELLO, {"ok": True})
    assert (talk.serves.peer_role, talk.serves.wanted, talk.asks.wanted) == (READER, 0, 0)


def test_nothing_of_the_hello_is_told_before_both_are_known() -> None:
    talk = Talk.of(serving=OTHER)
    with pytest.raises(OtherSecretError, match=r"does not know the mesh's secret$") as caught:
        talk.prove()
    assert not talk.serves.proven
    assert not talk.asks.proven
    with pytest.raises(OtherSecretError, match="does not know this side's secret of the mesh"):
        talk.asks.feed(caught.value.parting)


def test_a_listener_that_knows_nothing_is_found_out() -> None:
    """It says welcome to everybody."""
    talk = Talk.of()
    proof = talk.tell(talk.asks, talk.tell(talk.serves, talk.asks.greeting))
    assert len(proof) == 32
    with pytest.raises(HandshakeError, match="it is another process than the shard"):
        talk.asks.feed(b"\1" + bytes(32))


def test_a_proof_sent_back_is_none() -> None:
    """Neither by a listener to who asks, nor over another connection."""
    talk = Talk.of()
    proof = talk.tell(talk.asks, talk.tell(talk.serves, talk.asks.greeting))
    with pytest.raises(HandshakeError):
        talk.asks.feed(b"\1" + proof)
    again = ServingHandshake(SECRET, 1 << 20)
    again.feed(talk.asks.greeting)
    with pytest.raises(OtherSecretError):
        again.feed(proof)


def test_a_recorded_talk_opens_nothing() -> None:
    talk = Talk.of()
    talk.run()
    recorded = b"".join(data for to_serving, data in talk.sent if to_serving)
    later = ServingHandshake(SECRET, 1 << 20)
    later.feed(recorded[: later.wanted])
    with pytest.raises(OtherSecretError):
        later.feed(recorded[44 : 44 + later.wanted])


@given(message=st.integers(0, 5), bit=st.integers(0))
def test_no_bit_can_be_changed_on_the_way(message: int, bit: int) -> None:
    talk = Talk.of()

    def arrive(number: int, to: Handshake, data: bytes) -> bytes:
        return talk.tell(to, data, bit % (8 * len(data)) if number == message else -1)

    def run() -> None:
        proof = arrive(1, talk.asks, arrive(0, talk.serves, talk.asks.greeting))
        arrive(3, talk.asks, arrive(2, talk.serves, proof))
        arrive(4, talk.serves, talk.asks.seal(HELLO))
        arrive(5, talk.asks, talk.serves.seal({"ok": True}))

    with pytest.raises(HandshakeError):
        run()


def test_another_version_is_named_on_both_sides(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk.of()
    monkeypatch.setattr(handshake, "PROTOCOL_VERSION", 9)
    with pytest.raises(
        OtherVersionError, match="speaks protocol version 4, this side 9; run the same release"
    ) as caught:
        talk.serves.feed(talk.asks.greeting)
    monkeypatch.undo()
    newer = bytearray(caught.value.parting)
    newer[8:10] = (9).to_bytes(2)
    with pytest.raises(OtherVersionError, match="speaks protocol version 9, this side 4"):
        talk.asks.feed(bytes(newer))


def test_a_member_cannot_send_more_than_a_hello() -> None:
    talk = Talk.of()
    talk.serves = ServingHandshake(SECRET, 100)
    talk.prove()
    with pytest.raises(HandshakeError, match="announces a message of 133 bytes, expected at most 100"):
        talk.tell(talk.serves, talk.asks.seal({"name": "x" * 121}))


@pytest.mark.parametrize(
    ("message", "reason"),
    [("[" * 100_000, "more than 1024 brackets"), ("[1]", "a JSON list, expected an object"), ("{", "is no JSON")],
)
def test_what_is_no_object_is_refused_before_it_is_parsed_too_deep(
    message: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    talk = Talk.of()
    talk.prove()
    monkeypatch.setattr(handshake.json, "dumps", lambda _: message)
    with pytest.raises(HandshakeError, match=reason):
        talk.tell(talk.serves, talk.asks.seal({}))


def test_a_secret_shows_itself_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Talk.of()
    talk.run()
    for shown in (repr(SECRET), str(SECRET), f"{SECRET}", repr([SECRET]), repr(talk.asks), repr(talk)):
        assert TEXT not in shown
    assert TEXT.encode() not in b"".join(data for _, data in talk.sent)
    assert pickle.loads(pickle.dumps(SECRET)) == SECRET != OTHER
    assert MeshSecret.generate() != MeshSecret.generate()
    short = "x" * (MIN_CHARACTERS - 1)
    with pytest.raises(MeshSecretError, match="has 31 characters, expected at least 32; make one with") as caught:
        MeshSecret(short)
    assert short not in str(caught.value)
    monkeypatch.setenv(SECRET_ENV, f" {TEXT}\n")
    assert MeshSecret.from_environment() == SECRET
    monkeypatch.setenv("SHORT", short)
    with pytest.raises(MeshSecretError, match="environment variable SHORT: the mesh's secret has 31 characters"):
        MeshSecret.from_environment("SHORT")
    monkeypatch.delenv(SECRET_ENV)
    with pytest.raises(MeshSecretError, match=f"environment variable {SECRET_ENV} holds no secret of the mesh; make"):
        MeshSecret.from_environment()


def test_signatures_tell_where_one_part_ends() -> None:
    assert SECRET.sign(b"p", b"ab", b"c") != SECRET.sign(b"p", b"a", b"bc") != SECRET.sign(b"q", b"a", b"bc")
