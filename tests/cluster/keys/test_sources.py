"""A file of keys that changes while requests come: rotated, broken, mended, mounted as Kubernetes mounts a Secret."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from cluster.config.http_sections import ConsoleHttpSection, HttpSection
from cluster.keys.command import line_of
from cluster.keys.keyring import KeysError, digest_of
from cluster.keys.sources import LOOK_EVERY_S, KeySource, source_of

OLD, NEW = line_of("sk-old", name="team"), line_of("sk-new", name="team")


class Clock:
    def __init__(self) -> None:
        self.now_s = 1e9  # long after the start

    def __call__(self) -> float:
        self.now_s += LOOK_EVERY_S
        return self.now_s


def watched(file: Path, **more: object) -> KeySource:
    source = source_of(HttpSection(keys_file=str(file), **more))  # type: ignore[arg-type]
    source.clock = Clock()
    return source


def replace(file: Path, text: str) -> None:
    """As editors and `kubectl` do: another file takes the name."""
    other = file.with_suffix(".new")
    other.write_text(text)
    os.replace(other, file)


def test_a_key_is_rotated_without_a_restart(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    file.write_text(OLD)
    source = watched(file)
    assert source.ring().find("sk-new") is None
    replace(file, f"{OLD}\n{NEW}")
    assert source.ring().find("sk-old") == source.ring().find("sk-new")
    replace(file, NEW)
    assert source.ring().find("sk-old") is None
    assert source.ring().find("sk-new") is not None


@pytest.mark.parametrize("broken", ["", "- {name: team", None])
def test_a_file_that_breaks_leaves_the_last_good_keys_in_use_and_says_so(
    tmp_path: Path, broken: str | None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    file = tmp_path / "keys.yaml"
    file.write_text(OLD)
    source = watched(file)
    if broken is None:
        file.unlink()
    else:
        replace(file, broken)
    for _ in range(3):
        assert source.ring().find("sk-old") is not None
    assert str(file) in source.problem
    assert {record.levelname for record in caplog.records} == {"ERROR"}
    assert len({record.created for record in caplog.records}) == 1, "once, and not at each look"
    assert "stay in use" in caplog.text
    replace(file, NEW)
    assert source.ring().find("sk-old") is None
    assert source.problem == ""


def test_a_mounted_secret_changes_under_a_symbolic_link(tmp_path: Path) -> None:
    for name, text in (("v1", OLD), ("v2", NEW)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "keys.yaml").write_text(text)
    (tmp_path / "..data").symlink_to("v1")
    (tmp_path / "keys.yaml").symlink_to("..data/keys.yaml")
    source = watched(tmp_path / "keys.yaml")
    assert source.ring().find("sk-old") is not None
    (tmp_path / "..data_tmp").symlink_to("v2")
    os.replace(tmp_path / "..data_tmp", tmp_path / "..data")
    assert source.ring().find("sk-old") is None
    assert source.ring().find("sk-new") is not None


def test_nothing_is_open_because_a_file_is_missing_at_the_start(tmp_path: Path) -> None:
    with pytest.raises(KeysError, match=r"^http\.keys_file .*keys\.yaml cannot be read"):
        source_of(HttpSection(keys_file=str(tmp_path / "keys.yaml")))
    (tmp_path / "keys.yaml").write_text("# none yet")
    with pytest.raises(KeysError, match=r"holds no key: add a line that `expertmesh keys new` prints"):
        source_of(HttpSection(keys_file=str(tmp_path / "keys.yaml")))


def test_all_sources_add_up_and_each_has_its_role(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys.yaml").write_text(OLD)
    monkeypatch.setenv("MESH_TEST_LIST", line_of("sk-env", name="ci", concurrency=2))
    monkeypatch.setenv("MESH_TEST_KEYS", "sk-plain,sk-plain-2")
    http = ConsoleHttpSection(
        keys_file=str(tmp_path / "keys.yaml"),
        keys_env="MESH_TEST_LIST",
        api_keys_env="MESH_TEST_KEYS",
        admin_keys=["sk-admin"],
    )
    ring = source_of(http, [digest_of("vllms-own")]).ring()
    found = {
        secret: ring.find(secret) for secret in ("sk-old", "sk-env", "sk-plain", "sk-plain-2", "sk-admin", "vllms-own")
    }
    assert {secret: key and (key.name, key.role) for secret, key in found.items()} == {
        "sk-old": ("team", "client"),
        "sk-env": ("ci", "client"),
        "sk-plain": ("unnamed", "client"),
        "sk-plain-2": ("unnamed", "client"),
        "sk-admin": ("unnamed-admin", "admin"),
        "vllms-own": ("unnamed", "client"),
    }
    monkeypatch.delenv("MESH_TEST_LIST")
    with pytest.raises(KeysError, match=r"^http\.keys_env names MESH_TEST_LIST, which holds no key"):
        source_of(http)
    assert not source_of(HttpSection()).ring()
