"""One service that traces and logs JSON: a request's spans at a collector, and every line of every process."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.otlp_receiver import Collector, ReceivedSpan, collector
from tests.support.serve.service import API_KEY, Service, running_service
from tests.support.waiting import wait_for

TRACE, CLIENT_SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
NUM_TOKENS, STEP_INTERVAL, LAYERS = 12, 4, 2


@pytest.fixture(scope="module")
def spans() -> Iterator[Collector]:
    with collector() as running:
        yield running


@pytest.fixture(scope="module")
def traced(spans: Collector) -> Iterator[Service]:
    def change(config: dict[str, Any]) -> None:
        routers = config["applications"][1]["args"]["routers"]
        routers["tracing"] = {
            "otlp_endpoint": spans.endpoint,
            "sample_ratio": 0.0,
            "step_interval": STEP_INTERVAL,
            "layers_per_step": LAYERS,
        }
        routers["env_vars"] |= {"OTEL_BSP_SCHEDULE_DELAY": "200", "OTEL_EXPORTER_OTLP_HEADERS": "x-key=secret"}

    with running_service(change, "--log-format", "json", "--verbose") as running:
        yield running


def complete(service: Service, **headers: str) -> dict[str, str]:
    """Headers of the answer to a completion."""
    body = {"model": "tiny-moe", "prompt": "import os", "max_tokens": NUM_TOKENS, "temperature": 0, "ignore_eos": True}
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {API_KEY}", **headers}
    request = urllib.request.Request(service.url + "/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=120) as response:
        assert json.load(response)["usage"]["completion_tokens"] == NUM_TOKENS
        return dict(response.headers)


def test_a_request_is_one_trace_from_http_to_the_shards(traced: Service, spans: Collector) -> None:
    told = complete(traced, traceparent=f"00-{TRACE}-{CLIENT_SPAN}-01", **{"X-Request-Id": "my-request"})

    def whole() -> list[ReceivedSpan]:
        found = spans.of_trace(TRACE)
        return found if {"POST /v1/completions", "llm_request", "step"} <= {span.name for span in found} else []

    found = wait_for(whole, 30, "the spans of the request")
    by_id = {span.span_id: span for span in found}
    assert len(by_id) == len(found)
    [http] = [span for span in found if span.name == "POST /v1/completions"]
    assert http.parent_id == CLIENT_SPAN
    assert told["traceresponse"] == f"00-{TRACE}-{http.span_id}-01"
    assert http.attributes["http.response.status_code"] == 200
    assert http.attributes["expertmesh.request_id"] == "my-request"
    [request] = [span for span in found if span.name == "llm_request"]
    assert (request.parent_id, request.attributes["gen_ai.usage.completion_tokens"]) == (http.span_id, NUM_TOKENS)
    steps = [span for span in found if span.name == "step"]
    assert len(steps) == NUM_TOKENS // STEP_INTERVAL
    assert {span.parent_id for span in steps} == {http.span_id}
    assert all("my-request" in span.attributes["gen_ai.request.id"] for span in steps)
    layers = [span for span in found if span.name.startswith("moe layer")]
    assert [sum(layer.parent_id == step.span_id for layer in layers) for step in steps] == [LAYERS] * len(steps)
    shards = [span for span in found if span.name.startswith("shard")]
    for layer in layers:
        asked = [shard for shard in shards if shard.parent_id == layer.span_id]
        ranks = [shard.attributes["expertmesh.rank"] for shard in asked]
        assert ranks
        assert len(ranks) == len(set(ranks)), "one span a shard"
        assert all(shard.attributes["expertmesh.compute_us"] > 0 for shard in asked)
    assert len(shards) + len(layers) + len(steps) + 2 == len(found)
    for span in found:
        parent = by_id.get(span.parent_id)
        assert span.start_ns <= span.end_ns
        if parent is not None:
            assert parent.start_ns <= span.start_ns, (parent, span)
            assert span.end_ns <= parent.end_ns, (parent, span)
    assert {span.resource["service.name"] for span in found} == {"expertmesh"}
    assert all(headers.get("x-key") == "secret" for headers in spans.headers)


def test_what_is_not_sampled_sends_nothing(traced: Service, spans: Collector) -> None:
    told = complete(traced)
    trace_id = told["traceresponse"].split("-")[1]
    complete(traced, traceparent=f"00-{'1' * 32}-{CLIENT_SPAN}-01")
    wait_for(lambda: spans.of_trace("1" * 32), 30, "the spans of a later request")
    assert spans.of_trace(trace_id) == []


def test_every_line_is_an_object_and_says_whose_it_is(traced: Service) -> None:
    """In Serve's log files, and in what the command prints with --verbose. A killed shard's lines are among them."""
    victim = traced.shards()[1]
    os.kill(victim["pid"], signal.SIGKILL)
    complete(traced)  # who asks it learns that it is gone
    wait_for(lambda: traced.shards().get(1, victim)["pid"] != victim["pid"], 120, "the shard's successor")
    complete(traced)
    files = sorted((traced.folder / "ray" / "session_latest" / "logs" / "serve").glob("*.log"))
    lines = [line for file in files for line in objects_in(file)]
    printed = objects_in(traced.log)
    for line in (*lines, *printed):
        assert {"asctime", "levelname", "message"} <= set(line), line
    assert {"controller", "shard", "router", "console"} <= {line.get("role") for line in lines}
    assert {"command", "shard", "router", "engine"} <= {line.get("role") for line in printed}
    of_victim = [line for line in lines if line.get("process") == victim["pid"] and line.get("role") == "shard"]
    begun = next(index for index, line in enumerate(of_victim) if "starting with" in line["message"])
    assert all((line["rank"], type(line["epoch"])) == (1, int) for line in of_victim[begun:])
    assert any(line["message"].startswith("router ") for line in of_victim[begun:]), "lines of `experts` are there"
    engines = [line for line in printed if line.get("role") == "engine"]
    assert any("going on without shard 1" in line["message"] and line["epoch"] > 0 for line in engines)


def test_ctrl_c_deletes_what_serves_and_no_shard_waits_for_the_controller(traced: Service) -> None:
    """Last, as nothing serves any more. Serve stops the controller too, and shards may ask it for leave too late."""
    pids = [shard["pid"] for shard in traced.shards().values()]
    assert traced.command is not None
    traced.command.send_signal(signal.SIGINT)
    assert traced.command.wait(120) == 0, traced.log.read_text()
    told = [line["message"] for line in objects_in(traced.log)]
    assert told[-1] == "stopped"
    assert not any("did not answer leave" in message for message in told)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def objects_in(file: Path) -> list[dict[str, Any]]:
    """The file's lines, all of which are JSON objects; one that is being written is left out."""
    text = file.read_text()
    found = []
    for line in text[: text.rfind("\n") + 1].splitlines():
        try:
            told = json.loads(line)
        except ValueError:
            told = None
        assert isinstance(told, dict), f"{file.name}: {line}"
        found.append(told)
    return found
