"""Which paths of vLLM's app clients may use, and what the front door takes for granted of its routes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI

pytest.importorskip("vllm", reason="vLLM's HTTP side")

from cluster.http.paths.absent import why_absent
from cluster.http.paths.served import is_served, path_of, take_off, working_paths
from cluster.reference.http_page import BOTH, POOLING, VLLM

ALSO = {"/health", "/redoc", "/docs/oauth2-redirect"}  # ours, or FastAPI's


def app_of(tasks: tuple[str, ...], model_config: Any = None) -> FastAPI:
    """vLLM's app with every route it can have for tasks, development's included."""
    from vllm import envs
    from vllm.entrypoints.launchers.app import build_app
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    args = make_arg_parser(FlexibleArgumentParser()).parse_args(["--model", "m"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(envs, "VLLM_SERVER_DEV_MODE", True)
        patch.setattr(envs, "VLLM_ALLOW_RUNTIME_LORA_UPDATING", True)
        return build_app(args, tasks, model_config)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def generating() -> FastAPI:
    return app_of(("generate",))


@pytest.fixture(scope="module")
def pooling() -> FastAPI:
    """With what any model has that pools."""
    model_config: Any = SimpleNamespace(get_pooling_task=lambda tasks: "embed")
    return app_of(("embed", "classify", "token_embed"), model_config)


def paths_of(app: FastAPI) -> set[str]:
    return {path_of(route) for route in app.router.routes}


def test_clients_reach_what_they_need_and_nothing_that_controls_the_engine(generating: FastAPI) -> None:
    """Each path that is new in a version of vLLM has to be put on one side here."""
    paths = paths_of(generating)
    served = {path for path in paths if is_served(path)}
    assert served == {
        *("/v1/models", "/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch"),
        *("/v1/responses", "/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel"),
        *("/v1/messages", "/v1/messages/count_tokens", "/v1/systemone", "/generative_scoring"),
        *("/tokenize", "/detokenize", "/load", "/version", "/metrics", "/docs", "/openapi.json"),
    }
    assert {path for _, path in VLLM} == served, "cluster/reference/http_page.py has words for each"
    dangerous = {"/collective_rpc", "/sleep", "/pause", "/server_info", "/scale_elastic_ep", "/reset_prefix_cache"}
    assert dangerous <= paths - served, "what VLLM_SERVER_DEV_MODE brings is on the other side"


def test_of_an_engine_that_pools_they_reach_what_it_pools(pooling: FastAPI) -> None:
    served = {path for path in paths_of(pooling) if is_served(path, generates=False)}
    assert served == {path for _, path in POOLING} | set(BOTH)


@pytest.mark.parametrize("generates", [True, False])
def test_every_path_that_is_taken_off_says_why(generating: FastAPI, pooling: FastAPI, generates: bool) -> None:
    """And so do those of the other kind of engine."""
    app, other = (generating, pooling) if generates else (pooling, generating)
    served = {path for path in paths_of(app) if is_served(path, generates)}
    there = served - set(BOTH)
    gone = (paths_of(app) | paths_of(other)) - served - ALSO
    assert len(gone) > 20
    assert {path for path in gone if why_absent(path, there) is None} == set()
    assert why_absent("/v1/nothing", there) is None


def test_a_path_of_the_other_kind_names_what_to_do_instead() -> None:
    told = why_absent("/v1/embeddings", {"/v1/completions"})
    assert told is not None
    assert told.endswith("are for routers with the option runner: pooling")
    told = "its engine generates no text, and pools in one way only; it has /classify, /pooling"
    for path in ("/v1/chat/completions", "/v1/responses/x", "/v1/embeddings"):
        assert why_absent(path, {"/pooling", "/classify"}) == told


def test_what_makes_the_engine_work_is_limited(generating: FastAPI, pooling: FastAPI) -> None:
    for app, generates in ((generating, True), (pooling, False)):
        left = FastAPI()
        left.router.routes[:] = app.router.routes
        take_off(left, generates)
        expected = {
            *("/v1/completions", "/v1/chat/completions", "/v1/chat/completions/batch", "/v1/responses"),
            *("/v1/messages", "/v1/systemone", "/generative_scoring"),
        }
        assert working_paths(left) == (expected if generates else {path for _, path in POOLING})


@pytest.mark.parametrize("generates", [True, False])
def test_an_app_of_the_other_kind_is_refused(generating: FastAPI, pooling: FastAPI, generates: bool) -> None:
    left = FastAPI()
    left.router.routes[:] = (pooling if generates else generating).router.routes
    with pytest.raises(RuntimeError, match="has no route /v1/completions" if generates else "has no route /pooling"):
        take_off(left, generates)
