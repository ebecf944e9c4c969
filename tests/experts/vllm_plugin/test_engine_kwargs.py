"""What an engine is started with: the user's arguments, plus what the project has to own."""

from __future__ import annotations

from typing import Any

import pytest

from experts.protocol.settings import RouterSettings
from experts.vllm_plugin.engine_kwargs import WORKER_EXTENSION, router_engine_kwargs

SETTINGS = RouterSettings(model_path="/models/moe", router_id="r1")


def test_the_users_arguments_come_through() -> None:
    user = {"model": "/models/moe", "max_model_len": 4096, "additional_config": {"theirs": {"a": 1}}}
    kwargs = router_engine_kwargs(SETTINGS, user)
    assert kwargs["model"] == "/models/moe"
    assert kwargs["max_model_len"] == 4096
    assert kwargs["worker_extension_cls"] == WORKER_EXTENSION == "experts.vllm_plugin.worker.ExpertMeshWorker"
    assert kwargs["load_format"] == "expertmesh"
    assert kwargs["additional_config"]["theirs"] == {"a": 1}
    assert RouterSettings.model_validate(kwargs["additional_config"]["expertmesh"]) == SETTINGS
    assert "compilation_config" not in kwargs
    assert user == {"model": "/models/moe", "max_model_len": 4096, "additional_config": {"theirs": {"a": 1}}}


@pytest.mark.parametrize("missing", [{}, {"additional_config": None}])
def test_additional_config_may_be_missing(missing: dict[str, Any]) -> None:
    assert set(router_engine_kwargs(SETTINGS, missing)["additional_config"]) == {"expertmesh"}


@pytest.mark.parametrize(
    ("user", "text"),
    [
        ({"worker_extension_cls": "my.Worker"}, r"engine_kwargs.worker_extension_cls is set by .*'my.Worker'"),
        ({"load_format": "dummy"}, r"engine_kwargs.load_format is set by .*'dummy'"),
        ({"additional_config": {"expertmesh": {}}}, r"engine_kwargs.additional_config.expertmesh is set by"),
    ],
)
def test_what_the_project_owns_is_refused_by_name(user: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        router_engine_kwargs(SETTINGS, user)


def test_on_gpus_graphs_are_made_in_pieces() -> None:
    """A full graph would replay a dispatch without the shards."""
    assert router_engine_kwargs(SETTINGS, {}, "cuda")["compilation_config"] == {"cudagraph_mode": "PIECEWISE"}
    user = {"compilation_config": {"cudagraph_mode": "NONE", "level": 0}}
    assert router_engine_kwargs(SETTINGS, user, "cuda")["compilation_config"] == {"cudagraph_mode": "NONE", "level": 0}
    assert "compilation_config" not in router_engine_kwargs(SETTINGS, {"enforce_eager": True}, "cuda")
