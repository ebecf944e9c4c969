"""API keys and admin keys: where they come from, and what is refused."""

from __future__ import annotations

import pytest

from cluster.config.http_sections import ConsoleHttpSection, HttpSection
from cluster.config.parse import ConfigError
from cluster.config.serve_file import MeshConfig
from tests.support.serve.shipped_configs import serve_config


def test_api_keys_from_config_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_TEST_KEYS", "b, c,")
    assert HttpSection(api_keys=["a"], api_keys_env="MESH_TEST_KEYS").keys() == {"a", "b", "c"}
    assert HttpSection().keys() == frozenset()


def test_admin_keys_from_config_and_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_TEST_KEYS", "b, c,")
    section = ConsoleHttpSection(admin_keys=["a"], admin_keys_env="MESH_TEST_KEYS", api_keys=["reader"])
    assert (section.admins(), section.keys()) == ({"a", "b", "c"}, {"reader"})
    assert ConsoleHttpSection().admins() == frozenset()


@pytest.mark.parametrize("held", ["", " , "])
def test_a_variable_without_a_key_is_refused(monkeypatch: pytest.MonkeyPatch, held: str) -> None:
    monkeypatch.setenv("MESH_TEST_KEYS", held)
    with pytest.raises(ValueError, match=r"^http\.api_keys_env names MESH_TEST_KEYS, which holds no key"):
        HttpSection(api_keys_env="MESH_TEST_KEYS").keys()
    with pytest.raises(ValueError, match=r"^http\.admin_keys_env names MESH_TEST_KEYS, which holds no key"):
        ConsoleHttpSection(admin_keys_env="MESH_TEST_KEYS").admins()


def test_an_api_key_is_no_admin_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MESH_TEST_KEYS", "b, c")
    monkeypatch.setenv("MESH_TEST_ADMINS", "c, d")
    section = ConsoleHttpSection(api_keys_env="MESH_TEST_KEYS", admin_keys_env="MESH_TEST_ADMINS")
    with pytest.raises(ValueError, match="1 of the admin keys is among the API keys"):
        section.admins()


def test_which_sections_ask_for_keys() -> None:
    assert not HttpSection().asks_for_keys
    assert not ConsoleHttpSection().asks_for_keys
    for field, value in (("keys_file", "/k"), ("keys_env", "K"), ("api_keys", ["k"]), ("api_keys_env", "K")):
        named = field in ("keys_file", "keys_env")
        section = HttpSection(**{field: value})
        assert (section.asks_for_keys, section.names_keys) == (True, named)
        assert ConsoleHttpSection(**{field: value}).asks_for_keys
    for field, value in (("admin_keys", ["k"]), ("admin_keys_env", "K")):
        section = ConsoleHttpSection(**{field: value})
        assert (section.asks_for_keys, section.names_keys) == (True, False)


def test_a_file_of_keys_is_named_by_its_absolute_path() -> None:
    with pytest.raises(ValueError, match=r"'keys.yaml' is no absolute path"):
        HttpSection(keys_file="keys.yaml")


@pytest.mark.parametrize("name", ["api_keys", "admin_keys"])
def test_an_empty_key_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="key is empty"):
        ConsoleHttpSection(**{name: ["a", " "]})


def test_what_is_counted_elsewhere_has_names() -> None:
    assert HttpSection(keys_env="K", ledger_app="gateway").ledger_app == "gateway"
    with pytest.raises(ValueError, match="ledger_app is 'gateway', but nothing is counted without names of keys"):
        HttpSection(api_keys=["k"], ledger_app="gateway")


def test_a_ledger_elsewhere_is_refused_without_a_gateway() -> None:
    config = serve_config("tiny-cpu.yaml")
    config["applications"][1]["args"]["http"] |= {"keys_file": "/keys.yaml", "ledger_app": "gateway"}
    config["applications"][2]["args"]["http"] = {"keys_file": "/keys.yaml", "ledger_app": "gateway"}
    with pytest.raises(ConfigError, match=r"http\.ledger_app is 'gateway', but the file has no gateway: remove it"):
        MeshConfig.from_serve_config(config)
