"""How the command follows a start: what it waits for, how long each part took, and why it gives up."""

from __future__ import annotations

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cluster.config.deployments import CONTROLLER
from cluster.config.serve_file import MeshConfig

HEALTH_TIMEOUT_S = 3.0  # Serve's proxy holds requests back until there is a router
POLL_PERIOD_S = 0.3
STATUS_TIMEOUT_S = 3.0
ASK_PERIOD_S = 1.0  # the controller
FAILED = ("UNHEALTHY", "DEPLOY_FAILED")


class ServeFailedError(RuntimeError):
    """The applications did not start; the message says which one and why."""


@dataclass
class StartUp:
    """The start of one config's applications. `progress` gets a line whenever something changes."""

    config: MeshConfig
    progress: Callable[[str], None]
    _start_s: float = field(default_factory=time.monotonic)
    _shown: dict[str, str] = field(default_factory=dict)  # state by deployment
    _asked_s: float = -math.inf

    def wait_until_ready(self, url: str, timeout_s: float) -> None:
        """Return once /ready has seen a generated token. Raises ServeFailedError with Serve's or a shard's reason."""
        end_s = time.monotonic() + timeout_s
        reason = "nothing answers yet"
        # What has to be ready, by route prefix: the gateway after all routers, as it asks them.
        waiting = {mesh.llm_route_prefix: mesh.llm_name for mesh in self.config.meshes}
        if self.config.gateway is not None:
            waiting[self.config.gateway_route_prefix] = self.config.gateway_name
        while time.monotonic() < end_s:
            self._show_states()
            self._ask_controllers()
            ready, answer = ask(url + next(iter(waiting)).rstrip("/") + "/ready")
            if not ready:
                reason = reason_of(answer)
                time.sleep(POLL_PERIOD_S)
                continue
            self._show_router(waiting.pop(next(iter(waiting))), answer)
            if not waiting:
                self._show_states()
                return
        raise ServeFailedError(f"no token after {timeout_s} s: {reason}")

    def _show_states(self) -> None:
        for name, state in self._states():
            if self._shown.get(name) != state:
                self._shown[name] = state
                self.progress(f"{name}: {state} ({time.monotonic() - self._start_s:.1f} s)")

    def _ask_controllers(self) -> None:
        """ServeFailedError if shards cannot start; Serve would try again and again before it says so."""
        if time.monotonic() < self._asked_s + ASK_PERIOD_S:
            return
        for name in [mesh.experts_name for mesh in self.config.pools]:
            if "running" in self._shown.get(f"{name}/{CONTROLLER}", ""):
                self._ask_controller(name)
                self._asked_s = time.monotonic()

    def _ask_controller(self, name: str) -> None:
        from ray import serve

        try:
            status = serve.get_app_handle(name).status.remote().result(timeout_s=STATUS_TIMEOUT_S)
        except Exception as error:
            # Serve restarts it, or gives up on it and says so.
            self.progress(f"{name}/{CONTROLLER} does not answer ({type(error).__name__})")
        else:
            if status.refusal and not status.complete:
                raise ServeFailedError(f"{name}: {status.refusal}")

    def _show_router(self, name: str, answer: Any) -> None:
        parts = answer.get("router", {}).get("start_s") if isinstance(answer, dict) else None
        if parts:
            times = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in parts.items())
            self.progress(f"{name}: of a router's start {times}")

    def _states(self) -> Iterator[tuple[str, str]]:
        """(deployment, how many replicas are in which state). ServeFailedError if Serve gave up on one."""
        from ray import serve

        applications = serve.status().applications
        for name in self.config.names:
            application = applications.get(name)
            if application is None:
                continue
            for deployment_name, deployment in application.deployments.items():
                counts = [f"{count} {str(state).lower()}" for state, count in deployment.replica_states.items()]
                yield f"{name}/{deployment_name}", ", ".join(counts) or "waiting"
                if deployment.status in FAILED:
                    raise ServeFailedError(f"{name}/{deployment_name}: {deployment.message or application.message}")
            # An application that failed to build has no deployments.
            if application.status == "DEPLOY_FAILED":
                raise ServeFailedError(f"{name}: {application.message}")


def ask(url: str) -> tuple[bool, Any]:
    """(whether the URL answers with status 200, its JSON or text, or why there is no answer)."""
    try:
        with urllib.request.urlopen(url, timeout=HEALTH_TIMEOUT_S) as response:
            return response.status == 200, _json(response.read())
    except urllib.error.HTTPError as error:
        return False, _json(error.read()) or str(error)
    except (OSError, http.client.HTTPException) as error:
        return False, str(error) or type(error).__name__


def reason_of(answer: Any) -> str:
    """The reason in a health route's answer, or the answer itself."""
    return str(answer["reason"]) if isinstance(answer, dict) and "reason" in answer else str(answer)


def _json(body: bytes) -> Any:
    text = body.decode(errors="replace").strip()
    try:
        return json.loads(text)
    except ValueError:
        return text
