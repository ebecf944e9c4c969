"""What the builders refuse before Serve touches a replica: one line each, which names the key."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import parse as parse_module
from cluster.config.apps import ConsoleAppConfig, ExpertsAppConfig, LLMAppConfig
from cluster.config.parse import ConfigError, parse
from cluster.config.serve_file import MeshConfig
from cluster.refusals.applications import (
    LLM_CONFIG_KEYS,
    experts_problems,
    llm_problems,
    refuse_console,
    refuse_experts,
    refuse_llm,
)
from tests.support.serve.shipped_configs import SHAPES, serve_config

REPOSITORY = Path(__file__).parents[3]
TINY = REPOSITORY / "configs" / "tiny-cpu.yaml"


def llm(**routers: Any) -> dict[str, Any]:
    """Arguments of the shipped application `llm`, with changed routers."""
    args: dict[str, Any] = yaml.safe_load(TINY.read_text())["applications"][1]["args"]
    args["routers"] |= routers
    return args


def experts(**shards: Any) -> dict[str, Any]:
    args: dict[str, Any] = yaml.safe_load(TINY.read_text())["applications"][0]["args"]
    args["shards"] |= shards
    return args


def lines(args: dict[str, Any]) -> list[str]:
    schema, refuse = (ExpertsAppConfig, refuse_experts) if "shards" in args else (LLMAppConfig, refuse_llm)
    try:
        refuse(parse(schema, args))  # type: ignore[operator, arg-type]
    except ConfigError as error:
        return str(error).splitlines()
    return []


def test_the_meshs_secret_has_to_be_where_the_controller_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OURS", raising=False)
    args = experts() | {"mesh": {"secret_env": "OURS"}}
    [line] = lines(args)
    assert line.startswith("args.mesh.secret_env: the environment variable OURS holds no secret of the mesh; make one")
    refuse_experts(parse(ExpertsAppConfig, args), keys=False)
    of_its_own = {"num_cpus": 0, "runtime_env": {"env_vars": {"OURS": "x" * 32}}}
    assert lines(args | {"controller": {"ray_actor_options": of_its_own}}) == []
    assert lines(args | {"controller": {"ray_actor_options": {"resources": {"safe": 1}}}}) == [], "on another node"
    monkeypatch.setenv("OURS", "short")
    assert "5 characters, expected at least 32" in lines(args)[0]


ONE_MODEL = [f"tiny-{name}.yaml" for name in ("cpu", "cpu-planned", "autopilot", "tp", "pools", "offload")]


@pytest.mark.parametrize("name", [*ONE_MODEL, *SHAPES])
def test_what_ships_is_not_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parse_module, "find_path", lambda value, where, folder: Path(value))
    monkeypatch.setenv("EXPERTMESH_MESH_SECRET", "0" * 64)  # a pod has it from a Secret
    mesh = MeshConfig.from_serve_config(serve_config(name))
    refuse_experts(mesh.experts)
    refuse_llm(mesh.llm, keys=not mesh.llm.http.names_keys)


@pytest.mark.parametrize(
    ("routers", "expected"),
    [
        (
            {"engine_kwargs": {"max_num_sequences": 1}},
            "engine_kwargs.max_num_sequences is no engine option of",
        ),
        ({"engine_kwargs": {"max_num_seqs": "x"}}, "engine_kwargs.max_num_seqs is 'x': expected a valid integer"),
        (
            {"engine_kwargs": {"tensor_parallel_size": 3}},
            "engine_kwargs.tensor_parallel_size is 3, but the model's 4 heads (num_attention_heads in its config.json)",
        ),
        ({"engine_kwargs": {"max_model_len": 4096}}, "engine_kwargs.max_model_len is 4096, more than the model's 2048"),
        (
            {"deployment_config": {"gracefull_shutdown_timeout_s": 5}},
            "deployment_config.gracefull_shutdown_timeout_s is no option of a Serve deployment; did you mean",
        ),
        (
            {"deployment_config": {"max_surge_percent": 200}},
            "deployment_config.max_surge_percent is 200: expected",
        ),
        (
            {"deployment_config": {"health_check_period_s": "x"}},
            "deployment_config.health_check_period_s is 'x'",
        ),
        (
            {"deployment_config": {"name": "r"}},
            "deployment_config.name cannot be set: the project",
        ),
        (
            {"deployment_config": {"placement_group_bundles": [{"CPU": 1}]}},
            "deployment_config.placement_group_bundles is computed by the project; use routers.placement_group_config",
        ),
        (
            {"deployment_config": {"max_replicas_per_node": 1}},
            "deployment_config.max_replicas_per_node does not go with a placement group",
        ),
        (
            {"count": None, "deployment_config": {"autoscaling_config": {"max_replica": 2}}},
            "deployment_config.autoscaling_config.max_replica is unknown to Serve; did you mean max_replicas?",
        ),
        (
            {"deployment_config": {"ray_actor_options": {"num_cpu": 1}}},
            "deployment_config.ray_actor_options.num_cpu is unknown to Serve; did you mean num_cpus?",
        ),
        (
            {"deployment_config": {"ray_actor_options": {"num_cpus": -1}}},
            "deployment_config.ray_actor_options.num_cpus is -1: expected greater than or equal to 0",
        ),
        (
            {"placement_group_config": {"bundle": [{"CPU": 1}], "bundles": [{"CPU": 1}]}},
            "placement_group_config.bundle is no option of a placement group; did you mean bundles?",
        ),
        ({"placement_group_config": {"strategy": "PACK"}}, "placement_group_config has no bundles, expected either"),
        (
            {"placement_group_config": {"bundles": []}},
            "placement_group_config.bundles is [], expected a list",
        ),
        (
            {"placement_group_config": {"bundles": [{"CPU": 1}], "strategy": "TIGHT"}},
            "placement_group_config.strategy is 'TIGHT', expected one of PACK, SPREAD",
        ),
        (
            {"placement_group_config": {"bundles": [{"num_cpus": 1}]}},
            "placement_group_config.bundles[0].num_cpus is not read there; use CPU instead",
        ),
        (
            {"placement_group_config": {"bundle_per_worker": {"CPU": "two"}}},
            "placement_group_config.bundle_per_worker.CPU is 'two', expected an amount of 0 or more",
        ),
        (
            {"placement_group_config": {"bundles": [{"GPU": 1}]}},
            "placement_group_config asks for GPUs, but routers.accelerator is cpu",
        ),
        ({"accelerator": "gpu"}, "placement_group_config asks for no GPU, but routers.accelerator is gpu"),
        ({"accelerator_type": "L4"}, "accelerator_type is 'L4', but routers.accelerator is cpu"),
        (
            {"accelerator": "gpu", "accelerator_type": "H1000", "placement_group_config": None},
            "accelerator_type is 'H1000', which Ray does not know; did you mean H100?",
        ),
        (
            {"llm_config": {"experimental_config": {}}},
            "llm_config.experimental_config is unknown to Ray Serve LLM; did you mean experimental_configs?",
        ),
    ],
)
def test_routers_that_would_not_come_up_are_refused(routers: dict[str, Any], expected: str) -> None:
    [line] = lines(llm(**routers))
    assert line.startswith(f"args.routers.{expected}")


@pytest.mark.parametrize(
    ("shards", "expected"),
    [
        ({"deployment_config": {"max_ongoing": 1}}, "deployment_config.max_ongoing is no option of a Serve deployment"),
        ({"ray_actor_options": {"num_gpus": 1}}, "ray_actor_options.num_gpus is 1, but shards.device is cpu"),
        (
            {"device": "cuda", "ray_actor_options": {"num_gpus": 1.5}},
            "ray_actor_options.num_gpus is 1.5, expected a fraction of one GPU or a whole number",
        ),
        (
            {"ray_actor_options": {"resources": {"CPU": 1}}},
            "ray_actor_options.resources.CPU is not read there; use num_cpus instead",
        ),
        (
            {"ray_actor_options": {"resources": {"fast_disk": -1}}},
            "ray_actor_options.resources.fast_disk is -1, expected an amount of 0 or more",
        ),
        (
            {"ray_actor_options": {"runtime_env": {"env_var": {"A": "1"}}}},
            "ray_actor_options.runtime_env.env_var is no field of a runtime_env; did you mean env_vars?",
        ),
        (
            {"ray_actor_options": {"runtime_env": {"env_vars": {"A": 1}}}},
            "ray_actor_options.runtime_env.env_vars.A is 1, expected a string: put it in quotes",
        ),
    ],
)
def test_shards_that_would_not_come_up_are_refused(shards: dict[str, Any], expected: str) -> None:
    [line] = lines(experts(**shards))
    assert line.startswith(f"args.shards.{expected}")


def test_a_controller_that_would_not_come_up_is_refused() -> None:
    args = experts()
    args["controller"] = {"ray_actor_options": {"num_cpu": 1}}
    [line] = lines(args)
    assert line == "args.controller.ray_actor_options.num_cpu is unknown to Serve; did you mean num_cpus?"


def test_every_mistake_has_a_line_of_its_own() -> None:
    args = llm(engine_kwargs={"max_num_seq": 1, "max_model_len": 9999}, llm_config={"x": 1})
    args["http"]["api_keys_env"] = "NO_SUCH_VARIABLE_IS_SET"
    assert [line.split(" ")[0] for line in lines(args)] == [
        "args.routers.engine_kwargs.max_num_seq",
        "args.routers.llm_config.x",
        "args.http.api_keys_env",
        "args.routers.engine_kwargs.max_model_len",
    ]


def test_a_dispatch_that_outlasts_a_step_of_several_workers_is_refused() -> None:
    args = llm(engine_kwargs={"tensor_parallel_size": 2}) | {"deadlines": {"dispatch_ms": 300_000}}
    [line] = lines(args)
    assert line.startswith("args.deadlines.dispatch_ms is 300000, but vLLM gives up an engine of several workers")
    assert lines(llm(engine_kwargs={}) | {"deadlines": {"dispatch_ms": 300_000}}) == []


def test_a_long_context_that_the_user_answers_for_is_taken() -> None:
    env = {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
    assert lines(llm(engine_kwargs={"max_model_len": 4096}, env_vars=env)) == []


def test_missing_files_of_the_model_are_refused_in_both_applications(tmp_path: Path) -> None:
    shutil.copy(REPOSITORY / "examples/tiny-moe/config.json", tmp_path)
    for args in (llm(), experts()):
        args["model"]["path"] = str(tmp_path)
        found = lines(args)
        assert found[0].startswith(f"args.model.path: {tmp_path} holds no *.safetensors file")
        assert any("holds no tokenizer" in line for line in found) == ("routers" in args)
    (tmp_path / "config.json").unlink()
    assert lines(args) == [
        f"args.model.path: {tmp_path}/config.json: the file is missing; expected a downloaded Hugging Face checkpoint"
    ]


def test_another_tokenizer_makes_up_for_a_missing_one(tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        shutil.copy(REPOSITORY / "examples/tiny-moe" / name, tmp_path)
    args = llm(engine_kwargs={"tokenizer": "examples/tiny-moe"})
    args["model"]["path"] = str(tmp_path)
    assert lines(args) == []


def test_of_a_checkpoint_that_is_elsewhere_config_json_alone_is_judged(tmp_path: Path) -> None:
    config = parse(LLMAppConfig, llm(engine_kwargs={"max_model_len": 2049}))
    assert list(llm_problems(config, None, complete=True)) == []
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 2048}))
    [line] = llm_problems(config, tmp_path, complete=False)
    assert line.startswith("routers.engine_kwargs.max_model_len is 2049, more than the model's 2048")
    assert list(experts_problems(parse(ExpertsAppConfig, experts()), tmp_path, complete=False)) == []


def test_api_keys_of_a_cluster_elsewhere_are_not_looked_for() -> None:
    args = llm()
    args["http"]["api_keys_env"] = "NO_SUCH_VARIABLE_IS_SET"
    refuse_llm(parse(LLMAppConfig, args), keys=False)
    assert lines(args) == [
        "args.http.api_keys_env names NO_SUCH_VARIABLE_IS_SET, which holds no key where the application is built"
    ]


def test_a_console_that_would_not_come_up_is_refused() -> None:
    http = {"api_keys_env": "NO_SUCH_VARIABLE_IS_SET", "admin_keys_env": "NOR_IS_THIS"}
    config = parse(ConsoleAppConfig, {"http": http, "deployment_config": {"num_cpus": 1}})
    with pytest.raises(ConfigError) as caught:
        refuse_console(config)
    assert [line.split(" ")[0] for line in str(caught.value).splitlines()] == [
        "args.deployment_config.num_cpus",
        "args.http.api_keys_env",
        "args.http.admin_keys_env",
    ]
    with pytest.raises(ConfigError, match=r"^args\.http: 1 of the admin keys is among the API keys"):
        refuse_console(parse(ConsoleAppConfig, {"http": {"api_keys": ["a"], "admin_keys": ["a", "b"]}}))
    refuse_console(parse(ConsoleAppConfig, {"deployment_config": {"num_replicas": 2}}))


def test_upgrades_without_a_surge_are_warned_of(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr(logging.getLogger("ray.serve"), "propagate", True)
    refuse_llm(parse(LLMAppConfig, llm()))
    assert caplog.messages == []
    refuse_llm(parse(LLMAppConfig, llm(deployment_config={"max_surge_percent": 0})))
    [message] = set(caplog.messages)
    assert message.startswith("args.routers.deployment_config.max_surge_percent is 0: an upgrade stops each router")


def test_keys_of_llm_config_are_those_of_ray_serve_llm() -> None:
    """A joint: a new version of Ray may bring a field."""
    pytest.importorskip("ray.serve.llm", reason="ray.serve.llm needs vllm")
    from ray.serve.llm import LLMConfig

    own = set(LLMConfig.model_fields) - set(LLM_CONFIG_KEYS)
    schema = LLMAppConfig.model_fields["routers"].annotation
    for key in own:
        with pytest.raises(ValueError, match="has a key of its own"):
            schema(llm_config={key: None})  # type: ignore[misc]


def test_builders_refuse_without_importing_vllm_or_torch() -> None:
    """As Serve's build task does. Only a planner for the shards' placement needs torch, after the refusals."""
    code = f"""
import sys, yaml
import serve_app
from cluster.config.parse import ConfigError
experts, llm = (application["args"] for application in yaml.safe_load(open({str(TINY)!r}))["applications"][:2])
llm["routers"]["engine_kwargs"]["max_num_sequences"] = 3
experts["shards"]["ray_actor_options"]["num_cpu"] = 3
for build, args in ((serve_app.build_llm, llm), (serve_app.build_experts, experts)):
    try:
        build(args)
    except ConfigError as error:
        print(error)
print([name for name in ("vllm", "torch", "transformers") if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines() == [
        "args.routers.engine_kwargs.max_num_sequences is no engine option of the installed vllm; did you mean "
        "max_num_seqs?",
        "args.shards.ray_actor_options.num_cpu is unknown to Serve; did you mean num_cpus?",
        "[]",
    ]


def test_serves_build_task_reports_the_lines_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """A joint: this task returns a message for an exception of Serve's own, and raises any other one."""
    from ray.serve._private import application_state
    from ray.serve.schema import LoggingConfig

    monkeypatch.setattr(application_state, "configure_component_logger", lambda **_: None)
    build = application_state.build_serve_application._function
    args = llm(engine_kwargs={"max_num_sequences": 1})
    _, _, message = build("serve_app:build_llm", "v", "llm", args, LoggingConfig(), None, {}, {}, {})
    assert message == (
        "args.routers.engine_kwargs.max_num_sequences is no engine option of the installed vllm; did you mean "
        "max_num_seqs?"
    )
