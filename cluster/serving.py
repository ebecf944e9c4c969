"""`expertmesh serve CONFIG`: serve on this machine, report progress, and clean up on Ctrl-C."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import logging
import os
import secrets
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.config.parse import ConfigError
from cluster.config.serve_file import MeshConfig
from cluster.haproxy_guard import HAProxyGuard
from cluster.log_format import LogFormat, json_line, print_json_lines, say, with_json_logs
from cluster.serve_environment import (
    HAPROXY_SWITCH,
    MISSING_HAPROXY,
    environment_of_a_local_cluster,
    has_haproxy,
    metrics_port,
)
from cluster.start_up import ServeFailedError, StartUp
from placement.command.ending import CommandError, Ending, tell

START_S = time.monotonic()
STATUS_TIMEOUT_S = 10.0
WATCH_PERIOD_S = 2.0

# Read by Ray when it is imported.
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's workers run at a low priority by default; here they are the service itself.
    "RAY_worker_niceness": "0",
}


class NoClusterError(ServeFailedError):
    """Nothing answers where a Ray cluster was named."""


@dataclass(frozen=True)
class Options:
    """The command line."""

    config: str
    port: int | None = None
    address: str | None = None
    timeout_s: float = 900.0
    verbose: bool = False
    as_json: bool = False
    log_format: LogFormat = "text"

    @property
    def json_lines(self) -> bool:
        """Whether logs, and what is shown, are lines of JSON."""
        return self.log_format == "json"

    def progress(self, message: str) -> None:
        """Print a line with the seconds since the command started."""
        after_s = round(time.monotonic() - START_S, 1)
        line = (
            json_line(message, role="command", after_s=after_s) if self.json_lines else f"[{after_s:5.1f} s] {message}"
        )
        say(line, sys.stderr if self.as_json else sys.stdout)


def serve(options: Options) -> None:
    """Serve until Ctrl-C. Raises CommandError with the reasons if the config is wrong or the start fails."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        config = MeshConfig.from_file(options.config)
        if options.json_lines:
            config = config.model_copy(update={"serve": with_json_logs(config.serve)})
        with serving(config, options) as url:
            StartUp(config, options.progress).wait_until_ready(url, options.timeout_s)
            _tell_ready(config, url, options)
            _watch(config, options)
    except ConfigError as error:
        raise CommandError(*str(error).splitlines()) from None
    except NoClusterError as error:
        raise CommandError(str(error), ending=Ending.UNREACHABLE) from None
    except ServeFailedError as error:
        raise CommandError(str(error)) from None
    except KeyboardInterrupt:
        options.progress("stopped")


# Start and stop -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def serving(config: MeshConfig, options: Options) -> Iterator[str]:
    """Start Ray unless a cluster is named, deploy both applications, and yield their URL; undo all of it on exit.

    Raises ServeFailedError if Ray or Serve refuse, ConfigError if the placement does not fit the model.
    """
    with contextlib.ExitStack() as stack:
        if options.address is None:
            # Short: it holds Unix sockets, whose paths may have 107 characters.
            folder = Path(tempfile.mkdtemp(prefix="expertmesh-"))
            stack.callback(HAProxyGuard(folder).close)
            _set_environment(folder, options)
        with _applications(config, options) as url:
            yield url


def _set_environment(folder: Path, options: Options) -> None:
    """The environment of the cluster to start here; what the user has set stays."""
    os.environ.update({name: value for name, value in RAY_ENVIRONMENT.items() if name not in os.environ})
    os.environ.update(environment_of_a_local_cluster(folder, os.environ))
    if os.environ[HAPROXY_SWITCH] != "1" and not has_haproxy():
        options.progress(MISSING_HAPROXY)
    if "RAY_AUTH_MODE" not in os.environ:
        # Ray asks for a token by default. One that lives as long as this cluster leaves no file in the home folder.
        os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(16))


@contextlib.contextmanager
def _applications(config: MeshConfig, options: Options) -> Iterator[str]:
    if not options.verbose:
        logging.disable(logging.INFO)
    import ray

    _refuse(config, options)
    http_options = dict(config.serve.get("http_options") or {})
    if options.port is not None:
        http_options["port"] = options.port
    try:
        _connect_to_ray(options)
        # Ray installs a handler of its own, which aborts the process three seconds later.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        options.progress("starting Serve")
        if options.json_lines and options.verbose:
            print_json_lines()
        _start_serve(config.serve, http_options)
        num_shards = sum(mesh.num_shards for mesh in config.pools)
        options.progress(f"deploying {', '.join(config.names)} ({num_shards} shards)")
        _deploy(config, http_options)
        yield f"http://{_reachable(http_options.get('host', '127.0.0.1'))}:{http_options.get('port', 8000)}"
    finally:
        if ray.is_initialized():
            options.progress("shutting down")
            _undeploy(config, options)
            ray.shutdown()


def _refuse(config: MeshConfig, options: Options) -> None:
    """Raise ConfigError for what the builders would refuse, before anything is started."""
    from cluster.refusals.applications import refuse_console, refuse_experts, refuse_gateway, refuse_llm

    keys = options.address is None  # a cluster elsewhere may have variables that are not set here
    for mesh in config.pools:
        refuse_experts(mesh.experts, f"{options.config}: {mesh.experts_name}", keys=keys)
        if mesh.console is not None:
            refuse_console(mesh.console, f"{options.config}: {mesh.console_name}", keys=keys)
    for mesh in config.meshes:
        refuse_llm(mesh.llm, f"{options.config}: {mesh.llm_name}", keys=keys)
    if config.gateway is not None:
        refuse_gateway(config.gateway, f"{options.config}: {config.gateway_name}", keys=keys)


def _connect_to_ray(options: Options) -> None:
    """Connect to the named cluster, or start one here."""
    import ray

    level = "INFO" if options.verbose and not options.json_lines else "WARNING"
    logs = {"log_to_driver": options.verbose, "logging_level": level}
    if options.address is not None:
        options.progress(f"connecting to Ray at {options.address}")
        try:
            ray.init(address=options.address, **logs)
        except Exception as error:
            raise NoClusterError(f"no Ray cluster answers at {options.address}: {_one_line(error)}") from error
        return
    port = metrics_port(os.environ)
    local = {"num_cpus": max(os.cpu_count() or 1, 4), "include_dashboard": False, "_metrics_export_port": port}
    for attempt in (1, 2):
        options.progress("starting Ray")
        try:
            ray.init(address="local", **local, **logs)
            options.progress(f"metrics for Prometheus: http://127.0.0.1:{port}/metrics (`make monitoring` shows them)")
            return
        except Exception as error:
            # Ray gives its first process 30 s, which a busy machine may exceed once.
            ray.shutdown()
            if attempt == 2:
                raise ServeFailedError(f"Ray does not start: {error}") from error
            options.progress(f"Ray did not start, trying again: {error}")


def _start_serve(config: dict[str, Any], http_options: dict[str, Any]) -> None:
    from ray import serve

    try:
        proxy_location, logging_config = config.get("proxy_location", "HeadOnly"), config.get("logging_config")
        serve.start(proxy_location=proxy_location, http_options=http_options, logging_config=logging_config)
    except Exception as error:  # a port in use, an unknown option, a cluster that is too slow
        raise ServeFailedError(f"Serve does not start with {http_options}: {_one_line(error)}") from error


def _deploy(config: MeshConfig, http_options: dict[str, Any]) -> None:
    """Deploy both applications, and check here what Serve's build tasks check, to report it without their frames."""
    from cluster.ray_joints import deploy_config

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        checked = pool.submit(_check_plan, config)
        try:
            deploy_config({**config.serve, "http_options": http_options})
        except Exception as error:
            raise ServeFailedError(f"Serve does not accept the config: {_one_line(error)}") from error
        checked.result()


def _check_plan(config: MeshConfig) -> None:
    from cluster.mesh.planning import ModelFacts, ShardsAtHand, check_plan, read_spec

    for mesh in config.pools:
        spec = read_spec(mesh.experts)
        shards = ShardsAtHand(mesh.num_shards, 1, mesh.experts.shards.slots_per_rank)
        check_plan(mesh.live.placement, ModelFacts(spec.num_layers, spec.num_experts), shards)


def _undeploy(config: MeshConfig, options: Options) -> None:
    from cluster.ray_joints import delete_applications

    try:
        delete_applications(config.names)
    except Exception as error:
        # The user must see the error that led here.
        options.progress(f"not everything was deleted: {_one_line(error)}")


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# While it runs --------------------------------------------------------------------------------------------------------


def _tell_ready(config: MeshConfig, url: str, options: Options) -> None:
    ready, addresses = "ready: the first token was generated", _addresses(config, url)
    if options.json_lines and not options.as_json:
        options.progress(f"{ready}; {addresses['openai']} has the OpenAI API. Ctrl-C stops it.")
        return
    options.progress(ready)
    tell(options.as_json, addresses, _welcome(config, url))


def _addresses(config: MeshConfig, url: str) -> dict[str, Any]:
    """Where the service is, for programs."""
    base = url + config.api_route_prefix.rstrip("/")
    console = None if config.console is None else url + config.console_route_prefix.rstrip("/")
    told = {"url": base, "openai": f"{base}/v1", "model": config.llm.model.id, "console": console, "pid": os.getpid()}
    return told if config.gateway is None else {**told, "models": list(config.models.models)}


def _welcome(config: MeshConfig, url: str) -> Iterator[str]:
    """The same for people, with a first request."""
    base = url + config.api_route_prefix.rstrip("/")
    key = '-H "Authorization: Bearer $API_KEY" ' if config.llm.http.asks_for_keys else ""
    body = {
        "model": config.llm.model.id,
        "messages": [{"role": "user", "content": "def read_lines(path):"}],
        "max_tokens": 64,
    }
    models = ", ".join(map(repr, config.models.models)) or repr(config.llm.model.id)
    yield f"\n  {base}/v1   (OpenAI API, model {models})"
    yield f"  {base}/health   {_console_links(config, url)}\n"
    yield f"  curl {base}/v1/chat/completions {key}-H 'Content-Type: application/json' \\"
    yield f"    -d '{json.dumps(body)}'\n"
    yield "Ctrl-C stops it."


def _console_links(config: MeshConfig, url: str) -> str:
    if config.console is None:
        return ""
    base = url + config.console_route_prefix.rstrip("/")
    return f"{base}/ (live page)   {base}/status"


def _watch(config: MeshConfig, options: Options) -> None:
    """Print a line whenever the set of shards changes, until Ctrl-C."""
    from ray import serve

    names = [mesh.experts_name for mesh in config.pools]
    controllers = {name: serve.get_app_handle(name) for name in names}
    shown = dict.fromkeys(names, "")
    while True:
        for name, controller in controllers.items():
            line = _shards_line(controller)
            if line != shown[name]:
                shown[name] = line
                options.progress(line if len(names) == 1 else f"{name}: {line}")
        time.sleep(WATCH_PERIOD_S)


def _shards_line(controller: Any) -> str:
    """Epoch and shards, or that their controller is silent."""
    try:
        status = controller.status.remote().result(timeout_s=STATUS_TIMEOUT_S)
    except Exception as error:
        return f"the placement controller does not answer ({type(error).__name__}); serving continues"
    shards = ", ".join(f"{shard.rank} (pid {shard.pid})" for shard in status.shards if shard.serving)
    line = f"epoch {status.epoch}: shards {shards}"
    if status.missing_ranks:
        line += f"; missing ranks {', '.join(map(str, status.missing_ranks))}"
    return line
