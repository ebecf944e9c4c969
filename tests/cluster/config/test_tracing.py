"""The section `routers.tracing`: what it sets, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cluster.config.parse import ConfigError
from cluster.config.serve_file import MeshConfig
from cluster.router.options import runtime_env_of
from tests.support.serve.shipped_configs import serve_config

CONFIGS = Path(__file__).parents[3] / "configs"


def trace(data: dict[str, Any], section: dict[str, Any]) -> None:
    data["applications"][1]["args"]["routers"]["tracing"] = section


def test_tracing_reaches_the_engine_and_its_environment() -> None:
    data = serve_config("tiny-cpu.yaml")
    section = {"otlp_endpoint": "http://collector:4318/v1/traces", "sample_ratio": 0.5, "layers_per_step": 2}
    assert "otlp_traces_endpoint" not in MeshConfig.from_serve_config(data, folder=CONFIGS).llm.engine_kwargs()
    trace(data, section)
    config = MeshConfig.from_serve_config(data, folder=CONFIGS).llm
    options = config.engine_kwargs()
    assert options["otlp_traces_endpoint"] == section["otlp_endpoint"]
    told = options["additional_config"]["expertmesh"]["tracing"]
    assert told == {"step_interval": 16, "layers_per_step": 2}
    env_vars = runtime_env_of(config.routers)["env_vars"]
    assert {name: value for name, value in env_vars.items() if name.startswith("OTEL_")} == {
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": section["otlp_endpoint"],
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
        "OTEL_TRACES_SAMPLER": "parentbased_traceidratio",
        "OTEL_TRACES_SAMPLER_ARG": "0.5",
        "OTEL_SERVICE_NAME": "expertmesh",
    }


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"otlp_endpoint": "collector:4318"}, "is no http:// or https:// URL"),
        ({"otlp_endpoint": "http://c:4318"}, "has no path; a collector takes spans at http://c:4318/v1/traces"),
        ({"sample_ratio": 2}, "less than or equal to 1"),
        ({"step_interval": 0}, "greater than or equal to 1"),
    ],
)
def test_tracing_that_cannot_be(change: dict[str, Any], told: str) -> None:
    data = serve_config("tiny-cpu.yaml")
    trace(data, {"otlp_endpoint": "http://c:4318/v1/traces", **change})
    with pytest.raises(ConfigError, match=told):
        MeshConfig.from_serve_config(data, folder=CONFIGS)


@pytest.mark.parametrize("option", [{"otlp_traces_endpoint": "http://c"}, {"disable_log_stats": True}])
def test_tracing_and_engine_options_that_contradict_it(option: dict[str, Any]) -> None:
    data = serve_config("tiny-cpu.yaml")
    trace(data, {"otlp_endpoint": "http://c:4318/v1/traces"})
    data["applications"][1]["args"]["routers"]["engine_kwargs"] = option
    with pytest.raises(ConfigError, match=f"engine_kwargs.{next(iter(option))} and tracing are both set"):
        MeshConfig.from_serve_config(data, folder=CONFIGS)
