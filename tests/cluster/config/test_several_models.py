"""A file with a gateway: which applications belong together, and what contradicts what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config.gateway.sections import VersionsSection
from cluster.config.parse import ConfigError
from cluster.config.serve_file import MeshConfig

CONFIG = Path(__file__).parents[3] / "configs" / "tiny-two-models.yaml"


def data() -> dict[str, Any]:
    return yaml.safe_load(CONFIG.read_text())


def app(config: dict[str, Any], name: str) -> dict[str, Any]:
    return next(each for each in config["applications"] if each["name"] == name)


def models(config: dict[str, Any]) -> dict[str, Any]:
    return app(config, "gateway")["deployments"][0]["user_config"]["models"]


def test_routers_find_their_experts_and_two_share_them() -> None:
    mesh = MeshConfig.from_file(CONFIG)
    pairs = [(each.llm_name, each.experts_name, each.num_shards) for each in mesh.meshes]
    assert pairs == [("llm", "experts", 2), ("llm-canary", "experts", 2), ("short", "short-experts", 1)]
    assert [each.experts_name for each in mesh.pools] == ["experts", "short-experts"]
    assert mesh.names == ["experts", "short-experts", "llm", "llm-canary", "short", "console", "gateway"]
    assert mesh.api_route_prefix == "/"
    assert list(mesh.models.models["tiny-moe"].versions) == ["stable", "canary"]
    again = MeshConfig.from_serve_config(mesh.serve)
    assert again.meshes[1].llm == mesh.meshes[1].llm, "what is handed to Serve means the same without the folder"


def test_routers_of_another_name_may_share_the_experts() -> None:
    config = data()
    canary = app(config, "llm-canary")["args"]
    canary["model"] = {**canary["model"], "id": "tiny-moe-long"}
    models(config)["tiny-moe-long"] = {"versions": {"only": {"app": "llm-canary"}}}
    del models(config)["tiny-moe"]["versions"]["canary"]
    assert len(MeshConfig.from_serve_config(config, folder=CONFIG.parent).meshes) == 3
    canary["model"]["dtype"] = "bfloat16"
    with pytest.raises(ConfigError, match=r"llm-canary: model\.dtype is 'float32' for the shards"):
        MeshConfig.from_serve_config(config, folder=CONFIG.parent)


def keys(config: dict[str, Any], *names: str, **counting: str) -> None:
    """A list of keys for applications, some of which count with another one's ledger."""
    for name in names:
        app(config, name)["args"]["http"] = {"keys_file": "/keys.yaml"}
    for name, ledger_app in counting.items():
        app(config, name)["args"]["http"] = {"keys_file": "/keys.yaml", "ledger_app": ledger_app}


def test_all_models_count_with_the_gateways_ledger() -> None:
    config = data()
    keys(config, "gateway", **dict.fromkeys(("llm", "llm-canary", "short", "console"), "gateway"))
    mesh = MeshConfig.from_serve_config(config, folder=CONFIG.parent)
    assert [each.llm.http.ledger_app for each in mesh.meshes] == ["gateway"] * 3


def drop(config: dict[str, Any], name: str) -> None:
    config["applications"].remove(app(config, name))


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda c: drop(c, "gateway"), r"a second application has import_path .*; several need a gateway"),
        (lambda c: drop(c, "short-experts"), r"experts_app is 'short-experts', expected an application of shards: exp"),
        (lambda c: app(c, "console")["args"].update(experts_app="x"), r"experts_app is 'x', expected an application"),
        (
            lambda c: app(c, "llm").update(route_prefix="/"),
            r"llm: route_prefix is '/', the gateway's: give the routers",
        ),
        (
            lambda c: app(c, "llm")["args"]["routers"].update(expert_signatures={}),
            r"llm: routers\.expert_signatures is set, but the gateway itself chooses",
        ),
        (lambda c: models(c).clear(), r"the gateway has no models"),
        (lambda c: models(c).update(y={"versions": {"v": {"app": "no"}}}), r"y\.versions\.v\.app is 'no', expected an"),
        (lambda c: models(c).pop("tiny-moe-short"), r"no model of the gateway has a version with app: short"),
        (
            lambda c: models(c).update(wrong=models(c).pop("tiny-moe-short")),
            r"models\.wrong\.versions\.only: short has model\.id 'tiny-moe-short', but clients name 'wrong'",
        ),
        (
            lambda c: app(c, "short")["args"]["routers"]["deployment_config"].update(
                autoscaling_config={"min_replicas": 0, "max_replicas": 2}
            ),
            r"min_replicas of \w+ is 0, but requests of the gateway go straight to routers",
        ),
        (
            lambda c: app(c, "short")["args"].update(http={"api_keys": ["k"]}),
            r"short has API keys and the gateway has none",
        ),
        (
            lambda c: keys(c, "gateway", "short"),
            r"short: http\.ledger_app is None, expected 'gateway': a key has one limit",
        ),
        (
            lambda c: keys(c, "gateway", short="llm"),
            r"short: http\.ledger_app is 'llm', expected 'gateway': a key has one limit for all models",
        ),
        (
            lambda c: (keys(c, short="gateway"), app(c, "gateway")["args"].update(http={"api_keys": ["k"]})),
            r"short has keys with names and the gateway has none, so nothing would count",
        ),
        (
            lambda c: (keys(c, "gateway", "console", llm="gateway"), keys(c, **{"llm-canary": "gateway"})),
            r"llm: http\.ledger_app is 'gateway' for the routers and None for the console: make them equal",
        ),
        (lambda c: models(c)["tiny-moe"].update(split_by="key"), r"split_by is key, but the gateway has no API keys"),
        (lambda c: app(c, "console").update(name="short"), r"two applications are named 'short'"),
        (
            lambda c: app(c, "experts")["args"]["shards"].update(max_pairs=1),
            r"experts: shards\.max_pairs is 1, but the routers of llm, llm-canary have up to 2 pairs",
        ),
        (lambda c: app(c, "gateway")["deployments"][0].update(name="G"), r"one deployment, whose name is Gateway"),
        (lambda c: app(c, "gateway")["args"].update(colour="red"), r"args\.colour: unknown key"),
    ],
)
def test_what_does_not_fit_is_refused(change: Callable[[dict[str, Any]], Any], expected: str) -> None:
    config = data()
    change(config)
    with pytest.raises(ConfigError, match=expected):
        MeshConfig.from_serve_config(config, folder=CONFIG.parent)


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"versions": {}}, "at least 1 item"),
        ({"versions": {"a b": {"app": "x"}}}, "'a b' is no name"),
        ({"versions": {"a": {"app": "x", "weight": 0}}}, "every weight is 0"),
        ({"versions": {"a": {"app": "x"}, "b": {"app": "x"}}}, "two versions have the same app"),
        ({"versions": {"a": {"app": "x"}}, "split_by": "header"}, "set both or neither"),
        ({"versions": {"a": {"app": "x"}}, "split_by": "header", "split_header": "a b"}, "no name of a header"),
        ({"versions": {"a": {"app": "x"}}, "stable": "b"}, "stable is 'b', expected one of a"),
    ],
)
def test_versions_that_make_no_sense_are_refused(section: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        VersionsSection.model_validate(section)
