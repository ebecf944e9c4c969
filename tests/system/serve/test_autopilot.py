"""Prompts of one domain come, and the placement follows by itself: seen in the status, and no request notices."""

from __future__ import annotations

import json
from typing import Any

from benchmarks.serving.endless_streams import Streams
from placement.traces.profile import read_prompts
from tests.support.serve.deploying import deploy, still
from tests.support.serve.service import API_KEY, REPOSITORY, Service
from tests.support.waiting import wait_for

AUTOPILOT = {"mode": "auto", "window_s": 3, "cool_down_s": 2, "horizon_s": 3600, "min_drift": 0.005, "min_gain": 0.002}


def test_the_placement_follows_the_prompts(service: Service) -> None:
    wait_for(lambda: still(service, 3), 120, "the service to be still")
    expected = service.greedy(48)
    prompts = read_prompts(REPOSITORY / "examples" / "tiny-moe" / "prompts.jsonl")
    of_code = [prompt.text for prompt in prompts if prompt.domain == "code"][:6]
    running = Streams(service.url, "tiny-moe", of_code, max_tokens=64, api_key=API_KEY)
    before = service.config["applications"][0]["deployments"]
    settings: dict[str, Any] = {"placement": {"policy": "linear"}, "autopilot": AUTOPILOT}

    def plans() -> list[dict[str, Any]]:
        code, body = service.get("/expertmesh/history")
        assert code == 200
        return [each for each in json.loads(body)["autopilot"] if each["measured_gain"] is not None]

    def state() -> str:
        return service.status()["controller"]["autopilot"]["state"]

    kept = json.loads(json.dumps(before))
    try:
        with running.running():
            wait_for(running.warm, 60, "the first text of every stream")
            deploy(service, lambda by_name: by_name["PlacementController"]["user_config"].update(settings))
            # Only the first run of these sources compiles the planner.
            wait_for(lambda: state() not in ("off", "preparing"), 400, "the planner's machine code")
            [plan, *_] = wait_for(plans, 240, "a plan to be carried out and measured")
            status = service.status()["controller"]
    finally:
        service.config["applications"][0]["deployments"] = kept
        deploy(service, lambda by_name: None)
    everything = running.window(0, float("inf"))
    assert everything.failed == []
    assert everything.changed == 0
    assert plan["copies"] > 0
    assert plan["outcome"] in ("helped", "no difference")
    assert plan["measured_gain"] > 0
    assert status["autopilot"]["mode"] == "auto"
    assert status["autopilot"]["window"]["tokens"]["decode"] > 0
    assert status["autopilot"]["counters"]["moves"] >= 1
    wait_for(lambda: still(service, 3), 120, "the service to be as it was")
    assert service.greedy(48) == expected
