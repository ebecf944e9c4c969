"""What a config accepts, what it refuses, and how it says so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config.apps import ConsoleAppConfig, ExpertsAppConfig, LLMAppConfig
from cluster.config.live_sections import LiveConfig
from cluster.config.parse import RENAMED, ConfigError, parse
from cluster.config.serve_file import MeshConfig
from experts.protocol.settings import ShardSettings

TINY = Path(__file__).parents[3] / "configs" / "tiny-cpu.yaml"
TLS = {"cert_file": "/a.pem", "key_file": "/a.key", "ca_file": "/ca.pem"}


def tiny() -> dict[str, Any]:
    return yaml.safe_load(TINY.read_text())


def write(tmp_path: Path, data: Any) -> Path:
    path = tmp_path / "mesh.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def put(data: dict[str, Any], place: str, value: Any) -> None:
    """Set applications.0.args.shards.device and the like."""
    *path, last = place.split(".")
    target: Any = data
    for part in path:
        target = target[int(part) if part.isdigit() else part]
    target[last] = value


def test_the_shipped_config_reads_and_paths_become_absolute() -> None:
    mesh = MeshConfig.from_file(TINY)
    assert mesh.experts.model == mesh.llm.model
    assert Path(mesh.experts.model.path).is_absolute()
    assert (mesh.experts_name, mesh.llm_name, mesh.llm_route_prefix) == ("experts", "llm", "/")
    again = MeshConfig.from_serve_config(mesh.serve)
    assert again.experts == mesh.experts, "what is handed to Serve says the same"
    assert mesh.serve["applications"] == tiny()["applications"], "as written, so that serve deploy finds no change"


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        (
            "applications.0.args.shards.num_threads",
            0,
            r"applications\[0\]\.args\.shards\.num_threads: .*greater than or equal to 1, got 0",
        ),
        ("applications.0.args.shards.speed", 3, r"applications\[0\]\.args\.shards\.speed: unknown key$"),
        (
            "applications.0.args.model.dtype",
            "int8",
            r"args\.model\.dtype: .*'float32', 'bfloat16' or 'float16', got 'int8'",
        ),
        (
            "applications.0.args.model.path",
            "no/such/folder",
            r"args\.model\.path: 'no/such/folder' does not exist; looked at .*no/such/folder",
        ),
        ("applications.0.args.model.path", "./no/where", r"args\.model\.path: './no/where' does not exist"),
        (
            "applications.0.args.model.path",
            "ftp://x/y",
            r"model\.path: 'ftp://x/y': expected a folder, ",
        ),
        ("applications.0.args.model.path", "s3://", r"model\.path: 's3://': expected .* s3://bucket/folder"),
        ("applications.0.args.shards.device", "cuda", r"shards: device is cuda, so ray_actor_options.num_gpus"),
        (
            "applications.0.args.shards",
            {"kernel": "vllm_mxfp4", "offload": {"resident_fraction": 0.5}},
            r"args\.shards: kernel is 'vllm_mxfp4', which cannot be offloaded, .*: expected auto",
        ),
        (
            "applications.1.args.routers.engine_kwargs",
            {"worker_extension_cls": "x.Y"},
            r"worker_extension_cls is set by the",
        ),
        ("applications.1.args.routers.engine_kwargs", {"dtype": "half"}, r"engine_kwargs: dtype .* use model.dtype"),
        (
            "applications.1.args.routers.engine_kwargs",
            {"additional_config": {"expertmesh": {}}},
            r"additional_config.expertmesh is set by the project",
        ),
        (
            "applications.1.args.routers.engine_kwargs",
            {"tensor_parallel_size": "2"},
            r"tensor_parallel_size is '2', expected a whole number of 1 or more",
        ),
        (
            "applications.1.args.routers.engine_kwargs",
            {"pipeline_parallel_size": 2},
            r"pipeline_parallel_size is 2, expected 1: run more routers instead",
        ),
        (
            "applications.1.args.routers.count",
            257,
            r"shards\.max_pairs is 256, but up to 257 routers of 1 worker\(s\) have 257 pairs with a shard",
        ),
        (
            "applications.1.args.routers.llm_config",
            {"server_cls": "x"},
            r"llm_config: server_cls has a key of its own",
        ),
        (
            "applications.1.args.routers.deployment_config",
            {"num_replicas": 3},
            r"count and deployment_config.num_replicas",
        ),
        ("applications.1.args.deadlines.dispatch_ms", -1, r"deadlines\.dispatch_ms: .*greater than 0, got -1"),
        ("applications.1.args.http.api_keys", ["  "], r"http\.api_keys: an API key is empty"),
        ("applications.1.args.transport.name", "gloo", r'transport\.name: "gloo" is gone, .* write "tcp", or "auto"'),
        ("applications.1.args.transport.name", "rdma", r"transport\.name: .*'nccl', got 'rdma'"),
        ("applications.1.args.transport.tls", TLS, r"transport\.tls is set and mesh\.tls is not: set both or neither"),
        ("applications.0.args.mesh", {"tls": TLS}, r"mesh\.tls is set and transport\.tls is not: set both or neither"),
        ("applications.1.args.transport", {"name": "nccl", "tls": TLS}, r"name is nccl, which does not encrypt"),
        (
            "applications.1.args.transport.name",
            "nccl",
            r"transport.name is nccl, but shards.device is 'cpu', expected cuda",
        ),
        (
            "applications.1.args.experts_app",
            "other",
            r"experts_app is 'other', but the application is named 'experts'",
        ),
        (
            "applications.1.args.transport.max_rows_per_dispatch",
            9999,
            r"is 9999, more than shards.max_rows_per_dispatch",
        ),
        ("applications.0.args.model.id", "qwen3:30b", r"model\.id: 'qwen3:30b' has a colon; .*, such as 'qwen3-30b'"),
        (
            "applications.1.args.routers.llm_config",
            {"lora_config": {"dynamic_lora_loading_path": "s3://a"}},
            r"llm_config: lora_config has a key of its own in this config",
        ),
        ("applications.1.args.lora_config", {"dynamic_lora_loading_path": "none"}, r"'none' does not exist"),
        ("applications.1.args.lora_config", {"dynamic_lora_loading_path": "a/b"}, r"'a/b' is no folder here"),
        ("applications.1.args.lora_config", {"dynamic_lora_loading_path": "hf://a"}, r"'hf://a': expected a folder"),
        (
            "applications.1.args.lora_config",
            {"dynamic_lora_loading_path": "/", "max_num_adapters_per_replica": 0},
            r"max_num_adapters_per_replica: .*greater than or equal to 1, got 0",
        ),
        (
            "applications.1.args.routers.engine_kwargs.enable_lora",
            True,
            r"enable_lora is true, but there is no lora_config",
        ),
        ("applications.1.import_path", "x:y", r"no application has import_path serve_app:build_llm"),
        ("applications", 3, r"expected a Serve config with a list of applications"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, place: str, value: Any, expected: str) -> None:
    data = tiny()
    put(data, place, value)
    path = write(tmp_path, data)
    with pytest.raises(ConfigError, match=expected) as caught:
        MeshConfig.from_file(path)
    assert str(caught.value).startswith(str(path))


def test_an_application_without_a_name_is_the_one_that_serve_calls_default() -> None:
    data = tiny()
    del data["applications"][2], data["applications"][1]["name"]
    assert MeshConfig.from_serve_config(data).llm_name == "default"
    del data["applications"][0]["name"]
    with pytest.raises(ConfigError, match="experts_app is 'experts', but the application is named 'default'"):
        MeshConfig.from_serve_config(data)
    data["applications"][1]["args"]["experts_app"] = "default"
    with pytest.raises(ConfigError, match="both applications are named 'default'"):
        MeshConfig.from_serve_config(data)


def test_every_mistake_of_an_application_is_listed() -> None:
    data = tiny()["applications"][0]["args"]
    data["shards"] |= {"num_threads": -1, "colour": "red"}
    with pytest.raises(ConfigError) as caught:
        parse(ExpertsAppConfig, data)
    assert {line.split(":")[0] for line in str(caught.value).splitlines()} == {
        "args.shards.num_threads",
        "args.shards.colour",
    }


@pytest.mark.parametrize("old", RENAMED)
def test_a_renamed_key_is_answered_with_the_new_one(old: str) -> None:
    section, key = old.split(".")
    schema = LiveConfig if section in LiveConfig.model_fields else LLMAppConfig
    data = tiny()["applications"][1]["args"] if schema is LLMAppConfig else {}
    data.setdefault(section, {})[key] = 1
    with pytest.raises(ConfigError) as caught:
        parse(schema, data)
    assert str(caught.value) == f"args.{old}: unknown key; use {RENAMED[old]} instead"
    new = RENAMED[old].split(".")
    place: Any = schema
    for part in new if new[0] in schema.model_fields else [section, *new]:  # else relative to the old key's section
        assert part in place.model_fields
        place = place.model_fields[part].annotation


@pytest.mark.parametrize(
    ("place", "value", "expected"),
    [
        ("2.args.experts_app", "other", "the console's experts_app is 'other', but the application is named 'experts'"),
        ("2.args.llm_apps", ["a", "b"], r"llm_apps are \['a', 'b'\], expected 'llm' among them"),
        ("2.args.llm_apps", [], "llm_apps"),
        ("2.name", "llm", "two applications are named 'llm'"),
        ("2.route_prefix", "/", "have the same route prefix '/'"),
        ("1.args.http.api_keys", ["k"], "the OpenAI API has API keys and the console has none"),
        (
            "2.args.http",
            {"admin_keys": ["a", " "]},
            r"applications\[2\]\.args\.http\.admin_keys: an admin key is empty",
        ),
        ("1.args.http.admin_keys_env", "K", r"applications\[1\]\.args\.http\.admin_keys_env: unknown key"),
        (
            "2.args.http",
            {"max_pending_requests": 3},
            r"applications\[2\]\.args\.http\.max_pending_requests: unknown key",
        ),
    ],
)
def test_a_console_that_does_not_fit_is_refused(place: str, value: Any, expected: str) -> None:
    data = tiny()
    at: Any = data["applications"]
    *path, last = place.split(".")
    for part in path:
        at = at[int(part)] if part.isdigit() else at.setdefault(part, {})
    at[last] = value
    with pytest.raises(ConfigError, match=expected):
        MeshConfig.from_serve_config(data)


def test_the_console_may_be_left_out() -> None:
    data = tiny()
    assert MeshConfig.from_serve_config(data).names == ["experts", "llm", "console"]
    del data["applications"][2]
    mesh = MeshConfig.from_serve_config(data)
    assert (mesh.console, mesh.names) == (None, ["experts", "llm"])


def test_models_that_differ_between_the_applications_are_refused(tmp_path: Path) -> None:
    data = tiny()
    data["applications"][1]["args"]["model"] = {**data["applications"][0]["args"]["model"], "dtype": "bfloat16"}
    with pytest.raises(ConfigError, match=r"model.dtype is 'float32' for the shards and 'bfloat16' for the routers"):
        MeshConfig.from_file(write(tmp_path, data))


def test_paths_beside_the_config_come_first(tmp_path: Path) -> None:
    (tmp_path / "examples" / "tiny-moe").mkdir(parents=True)
    mesh = MeshConfig.from_file(write(tmp_path, tiny()))
    assert mesh.experts.model.path == str(tmp_path / "examples" / "tiny-moe")
    handed = MeshConfig.from_serve_config(mesh.serve)
    assert handed.experts == mesh.experts, "what is handed to Serve needs no folder to look in"


@pytest.mark.parametrize(("text", "expected"), [("a: [", "not YAML"), (None, "cannot be read")])
def test_files_that_are_no_config(tmp_path: Path, text: str | None, expected: str) -> None:
    path = tmp_path / "mesh.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=expected):
        MeshConfig.from_file(path)


def test_settings_reach_router_and_shard() -> None:
    mesh = MeshConfig.from_file(TINY)
    shard = mesh.experts.shard_settings("10.0.0.1", 23)
    assert (shard.bind_host, shard.dtype, shard.num_threads) == ("10.0.0.1", "float32", 1)
    assert shard.slots_per_rank == 23
    router = mesh.llm.router_settings()
    assert (router.dispatch_timeout_ms, router.model_path) == (2000.0, shard.model_path)
    kwargs = mesh.llm.engine_kwargs()
    assert kwargs["additional_config"]["expertmesh"] == router.model_dump()
    assert (kwargs["dtype"], kwargs["max_num_seqs"]) == ("float32", 64)


def test_a_layer_for_guesses_reaches_router_and_shard() -> None:
    """By the key that users write, for both; each reads the checkpoint by its own settings."""
    experts, llm = (app["args"] for app in tiny()["applications"][:2])
    guesses = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}
    llm["routers"]["engine_kwargs"] |= guesses
    for args in (experts, llm):
        args["model"] = {**args["model"], "mtp": True}
    assert parse(ExpertsAppConfig, experts).shard_settings("10.0.0.1", 23).mtp
    kwargs = parse(LLMAppConfig, llm).engine_kwargs()
    assert kwargs["additional_config"]["expertmesh"]["mtp"]
    assert guesses.items() <= kwargs.items()


def test_a_shards_wait_for_a_router_is_the_users_to_say() -> None:
    data = tiny()["applications"][0]["args"]
    default = ShardSettings.model_fields["connect_timeout_s"].default
    assert parse(ExpertsAppConfig, data).shard_settings("10.0.0.1", 23).connect_timeout_s == default
    data["shards"]["connect_s"] = 120
    assert parse(ExpertsAppConfig, data).shard_settings("10.0.0.1", 23).connect_timeout_s == 120
    data["shards"]["connect_s"] = 0
    with pytest.raises(ConfigError, match=r"shards\.connect_s: .*greater than 0, got 0"):
        parse(ExpertsAppConfig, data)


def test_other_additional_config_stays() -> None:
    data = tiny()["applications"][1]["args"]
    data["routers"]["engine_kwargs"]["additional_config"] = {"other": 1}
    assert parse(LLMAppConfig, data).engine_kwargs()["additional_config"]["other"] == 1


def test_every_field_says_what_it_is() -> None:
    seen = [ExpertsAppConfig, LLMAppConfig, ConsoleAppConfig, LiveConfig]
    for schema in seen:
        for name, field in schema.model_fields.items():
            assert field.description, f"{schema.__name__}.{name}"
            if isinstance(field.annotation, type) and hasattr(field.annotation, "model_fields"):
                seen.append(field.annotation)
    assert len(seen) >= 14
