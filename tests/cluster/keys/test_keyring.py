"""What a list of keys may say, and that no message about it shows a key."""

from __future__ import annotations

import pytest

from cluster.keys.command import line_of
from cluster.keys.keyring import Key, Keyring, KeysError, Limits, digest_of, parse_keys

ALICE = line_of("sk-alice", name="alice", requests_per_minute=5, models=["m"])
BOB = line_of("sk-bob", name="bob", role="admin")


def test_each_key_is_its_holders_with_role_limits_and_models() -> None:
    ring = parse_keys(f"# ours\n{ALICE}\n{BOB}\n", "here")
    assert ring.find("sk-alice") == Key("alice", "client", Limits(requests_per_minute=5), frozenset({"m"}))
    assert ring.find("sk-bob") == Key("bob", "admin")
    assert ring.find("sk-bob ") is None
    assert ring.has_role("admin")
    assert parse_keys(f"keys:\n{ALICE}\n", "here").find("sk-alice") is not None


def test_a_holder_may_have_an_old_and_a_new_key() -> None:
    again = ALICE.replace(digest_of("sk-alice").hex(), digest_of("sk-alice-2").hex())
    ring = parse_keys(f"{ALICE}\n{again}\n", "here")
    assert ring.find("sk-alice") == ring.find("sk-alice-2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"^here holds no key"),
        ("[]", r"^here holds no key"),
        ("- {name: sk-secret, [", r"^here is no YAML at line 1, column \d+$"),
        ("sk-secret", r"^here: Input should be a valid list"),
        (f"{ALICE}\n- {{name: x, sha256: sk-secret}}", r"^here\[1\]\.sha256: expected 64 hexadecimal digits"),
        (ALICE.replace("alice", "a b"), r"^here\[0\]\.name: 'a b' is no name"),
        (ALICE.replace("client", "king"), r"^here\[0\]\.role: Input should be 'client' or 'admin'"),
        (
            ALICE.replace("per_minute: 5", "per_minute: 0"),
            r"requests_per_minute: Input should be greater than or equal",
        ),
        (ALICE.replace("models", "model"), r"^here\[0\]\.model: unknown key"),
        (f"{ALICE}\n{BOB.replace('bob', 'alice')}", r"two keys are named alice and differ"),
        (f"{ALICE}\n{ALICE.replace('alice', 'carol', 1)}", r"carol and alice have the same key"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused_without_showing_it(text: str, message: str) -> None:
    with pytest.raises(KeysError, match=message) as caught:
        parse_keys(text, "here")
    assert "secret" not in str(caught.value)


def test_unnamed_keys_never_replace_named_ones() -> None:
    ring = parse_keys(ALICE, "here").with_unnamed("unnamed", "client", map(digest_of, ["sk-alice", "sk-old"]))
    assert ring.find("sk-alice") is not None
    assert ring.find("sk-alice").name == "alice"  # type: ignore[union-attr]
    assert ring.find("sk-old") == Key("unnamed")
    assert not Keyring()
