"""Which prompts are computed elsewhere, what vLLM's routes see of it, and that no request fails for want of it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from cluster.config.pools.section import PoolsSection
from cluster.http.requests import BodyCheck
from cluster.pools.prompts import OF_VLLM, PromptJob, Prompts
from cluster.pools.remote_prefill import remote_prefill
from experts.kv_transfer.files import KVFolder, Label
from experts.kv_transfer.handover import Handover, asked_name
from tests.support.waiting import run_async

MODEL = "m"
LONG = "word " * 200  # about 250 tokens
SECTION = PoolsSection(remote_prefill_from_tokens=100, prefill_s=5)
LABEL = Label(bytes(32), bytes(32))


class PrefillRouter:
    """Writes a file for each prompt, or does what `script` says, one entry a call."""

    def __init__(self, folder: KVFolder | None, script: list[Any]) -> None:
        self.folder, self.script, self.jobs = folder, script, []

    async def __call__(self, job: PromptJob) -> dict[str, Any] | None:
        self.jobs.append(job)
        what = self.script.pop(0) if self.script else None
        if isinstance(what, Exception):
            raise what
        if what == "silent":
            await asyncio.Event().wait()
        if what == "nothing":
            return None
        name = asked_name(job.body["kv_transfer_params"])
        if self.folder is None:
            return {"do_remote_prefill": True, "remote_block_ids": [1]}
        assert name is not None
        self.folder.write(name, LABEL, [np.zeros(10, np.uint8)])
        return Handover(name, 1, "00").to_params()


class Scene:
    """A decode router's app: `seen` are the bodies that came to vLLM's routes, and the files that were there."""

    def __init__(self, tmp_path: Path, *script: Any, section: PoolsSection = SECTION, files: bool = True) -> None:
        self.folder = KVFolder(tmp_path / "kv", 1 << 20)
        self.prefill = PrefillRouter(self.folder if files else None, list(script))
        self.there = True
        self.prompts = Prompts(section, MODEL, self.prefill, self.folder if files else None, lambda: self.there)
        self.seen: list[dict[str, Any]] = []
        self.files: list[list[str]] = []
        check = {"max_body_bytes": 1 << 20, "max_sequences": 8, "max_model_len": 4096, "estimate": True}
        paths = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/models")
        self.app = Starlette(
            routes=[Route(path, self._answer, methods=["GET", "POST"]) for path in paths],
            middleware=[Middleware(BodyCheck, **check), remote_prefill(self.prompts)],
        )

    async def _answer(self, request: Request) -> Any:
        self.seen.append(await request.json() if request.method == "POST" else {})
        self.files.append(self.left())
        if self.seen[-1].get("stream"):
            return StreamingResponse(iter([b"data: 1\n\n", b"data: [DONE]\n\n"]))
        return JSONResponse({})

    def left(self) -> list[str]:
        return sorted(path.name for path in self.folder.path("0" * 32 + ".kv").parent.iterdir())

    def post(self, path: str = "/v1/completions", **body: Any) -> httpx.Response:
        return self.send(path, json.dumps({"model": MODEL, **body}).encode())

    def send(self, path: str, content: bytes, **headers: str) -> httpx.Response:
        async def ask() -> httpx.Response:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://decode") as client:
                return await client.post(path, content=content, headers={"content-type": "application/json", **headers})

        return run_async(ask())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "prompt"),
    [
        ("/v1/completions", {"prompt": LONG}),
        ("/v1/completions", {"prompt": [LONG]}),
        ("/v1/completions", {"prompt": list(range(100))}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": LONG}], "tools": []}),
    ],
)
def test_a_long_prompt_is_computed_elsewhere(tmp_path: Path, path: str, prompt: dict[str, Any], stream: bool) -> None:
    scene = Scene(tmp_path)
    asked = {"model": MODEL, **prompt, "max_tokens": 50, "stream": stream, "logprobs": 3, "temperature": 0.5, "seed": 7}
    answer = scene.send(path, json.dumps(asked).encode(), traceparent="00-1-2-01", authorization="Bearer secret")
    assert answer.status_code == 200
    (job,), (seen,), (files,) = scene.prefill.jobs, scene.seen, scene.files
    asking = job.body.pop("kv_transfer_params")
    assert job.path == path
    assert job.body == {"model": MODEL, **prompt, "max_tokens": 1, "stream": False, "temperature": 0.5, "seed": 7}
    assert job.headers == {"traceparent": "00-1-2-01"}, "a key stays here"
    handover = Handover.of(seen.pop("kv_transfer_params"))
    assert seen == asked
    assert handover is not None
    assert files == [handover.name] == [asked_name(asking)]
    assert not handover.keep
    assert scene.left() == [], "gone when the request has ended, read or not"
    assert (scene.prompts.handed_over, scene.prompts.given_up) == (1, 0)


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": "short"},
        {"prompt": [LONG, LONG]},
        {"prompt": [[1] * 100, [2] * 100]},
        {"prompt": LONG, "model": "m:adapter"},
        {"prompt": LONG, "echo": True},
        {"prompt": LONG, "prompt_logprobs": 0},
        {"prompt": LONG, "use_beam_search": True, "n": 2},
        {"prompt": LONG, "max_tokens": 0},
        {},
    ],
)
def test_what_gains_nothing_is_left_to_this_router(tmp_path: Path, body: dict[str, Any]) -> None:
    scene = Scene(tmp_path)
    assert scene.post(**body).status_code == 200
    assert scene.prefill.jobs == []
    assert scene.seen == [{"model": MODEL, **body}]
    assert (scene.prompts.handed_over, scene.prompts.given_up) == (0, 0)


def test_other_paths_pass_through(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    body = {"model": MODEL, "input": LONG}
    assert scene.post("/v1/responses", **body).status_code == 200
    assert scene.seen == [body]
    assert scene.prefill.jobs == []


def test_a_file_is_kept_for_several_answers(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    assert scene.post(prompt=LONG, n=3).status_code == 200
    handover = Handover.of(scene.seen[0]["kv_transfer_params"])
    assert handover is not None
    assert handover.keep
    assert "n" not in scene.prefill.jobs[0].body
    assert scene.left() == []


def test_a_failed_prefill_router_costs_a_retry(tmp_path: Path) -> None:
    scene = Scene(tmp_path, RuntimeError("gone"))
    assert scene.post(prompt=LONG).status_code == 200
    assert len(scene.prefill.jobs) == 2
    assert "kv_transfer_params" in scene.seen[0]
    assert (scene.prompts.handed_over, scene.prompts.given_up) == (1, 0)


@pytest.mark.parametrize("script", [[RuntimeError("gone")] * 2, ["nothing"]])
def test_without_a_prompt_from_elsewhere_this_router_computes_it(tmp_path: Path, script: list[Any]) -> None:
    scene = Scene(tmp_path, *script)
    assert scene.post(prompt=LONG, max_tokens=3).status_code == 200
    assert scene.seen == [{"model": MODEL, "prompt": LONG, "max_tokens": 3}]
    assert (scene.prompts.handed_over, scene.prompts.given_up) == (0, 1)
    assert scene.left() == []


def test_nobody_is_asked_while_nobody_is_there(tmp_path: Path) -> None:
    scene = Scene(tmp_path)
    scene.there = False
    assert scene.post(prompt=LONG).status_code == 200
    assert scene.prefill.jobs == []
    assert "kv_transfer_params" not in scene.seen[0]
    scene.there = True
    assert scene.post(prompt=LONG).status_code == 200
    assert "kv_transfer_params" in scene.seen[1]


def test_a_silent_prefill_router_is_waited_for_once(tmp_path: Path) -> None:
    """Until its deadline; who comes next does not wait for the same."""
    section = SECTION.model_copy(update={"prefill_s": 0.05})
    scene = Scene(tmp_path, "silent", section=section)
    assert scene.post(prompt=LONG).status_code == 200
    scene.prompts._section = SECTION.model_copy(update={"prefill_s": 60.0})
    scene.prompts._not_before_s += 60
    assert scene.post(prompt=LONG).status_code == 200
    assert len(scene.prefill.jobs) == 1
    assert ["kv_transfer_params" in seen for seen in scene.seen] == [False, False]
    assert scene.prompts.given_up == 2


@pytest.mark.parametrize(
    "own",
    [
        b'{"prompt": "x", "kv_transfer_params": {"do_remote_prefill": true, "file": "f.kv"}}',
        b'{"prompt": "x", "kv_transfer_param\\u0073": {"file": "f.kv"}}',
        b'{"prompt": "x", "vllm_xargs": {"kv_transfer_params": "f.kv"}}',
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_clients_cannot_name_kv_cache_of_others(tmp_path: Path, path: str, own: bytes) -> None:
    scene = Scene(tmp_path)
    answer = scene.send(path, own)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "kv_transfer_params"
    assert scene.seen == []


def test_a_connector_of_vllm_gets_what_it_asks_for(tmp_path: Path) -> None:
    scene = Scene(tmp_path, files=False)
    assert scene.post(prompt=LONG).status_code == 200
    assert scene.prefill.jobs[0].body["kv_transfer_params"] == OF_VLLM
    assert scene.seen[0]["kv_transfer_params"] == {"do_remote_prefill": True, "remote_block_ids": [1]}
    assert scene.post(prompt=LONG, n=2).status_code == 200
    assert "kv_transfer_params" not in scene.seen[1], "they hand over to one request"
