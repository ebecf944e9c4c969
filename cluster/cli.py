"""`python -m serve_app CONFIG`: serve on this machine, report progress, and clean up on Ctrl-C."""

from __future__ import annotations

import argparse
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
from pathlib import Path
from typing import Any

from cluster.config.parse import ConfigError
from cluster.config.serve_file import MeshConfig
from cluster.haproxy_guard import HAProxyGuard
from cluster.serve_environment import (
    HAPROXY_SWITCH,
    MISSING_HAPROXY,
    environment_of_a_local_cluster,
    has_haproxy,
    metrics_port,
)
from cluster.start_up import ServeFailedError, StartUp
from experts.protocol.settings import StrictModel

START_S = time.monotonic()
STATUS_TIMEOUT_S = 10.0
WATCH_PERIOD_S = 2.0

# Read by Ray when it is imported.
RAY_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray's workers run at a low priority by default; here they are the service itself.
    "RAY_worker_niceness": "0",
}


class Options(StrictModel):
    """The command line."""

    config: str
    port: int | None
    address: str | None
    timeout_s: float
    verbose: bool


def main(argv: list[str] | None = None) -> None:
    """Run the command. Exits with status 1 and the reason if the config is wrong or the start fails."""
    options = _options(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        config = MeshConfig.from_file(options.config)
        with serving(config, options) as url:
            StartUp(config, _progress).wait_until_ready(url, options.timeout_s)
            _welcome(config, url)
            _watch(config)
    except (ConfigError, ServeFailedError) as error:
        print(f"serve_app: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        _progress("stopped")


def _options(argv: list[str] | None) -> Options:
    parser = argparse.ArgumentParser(prog="python -m serve_app", description=__doc__)
    parser.add_argument("config", help="Serve config with the two applications, such as configs/tiny-cpu.yaml")
    port = os.environ.get("EXPERTMESH_HTTP_PORT")
    parser.add_argument("--port", type=int, default=port, help="HTTP port (EXPERTMESH_HTTP_PORT, or the config's)")
    parser.add_argument(
        "--address", default=os.environ.get("RAY_ADDRESS"), help="Ray cluster to use (RAY_ADDRESS, or a new one here)"
    )
    parser.add_argument(
        "--timeout-s", type=float, default=900.0, help="give up if no token is generated within this time (%(default)s)"
    )
    parser.add_argument("--verbose", action="store_true", help="show the logs of all processes")
    return Options(**vars(parser.parse_args(argv)))


def _progress(message: str) -> None:
    """Print a line with the seconds since the command started."""
    print(f"[{time.monotonic() - START_S:5.1f} s] {message}", flush=True)


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
            _set_environment(folder)
        with _applications(config, options) as url:
            yield url


def _set_environment(folder: Path) -> None:
    """The environment of the cluster to start here; what the user has set stays."""
    os.environ.update({name: value for name, value in RAY_ENVIRONMENT.items() if name not in os.environ})
    os.environ.update(environment_of_a_local_cluster(folder, os.environ))
    if os.environ[HAPROXY_SWITCH] != "1" and not has_haproxy():
        _progress(MISSING_HAPROXY)
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
        _progress("starting Serve")
        _start_serve(config.serve.get("proxy_location", "HeadOnly"), http_options)
        _progress(f"deploying {', '.join(config.names)} ({config.num_shards} shards)")
        _deploy(config, http_options)
        yield f"http://{_reachable(http_options.get('host', '127.0.0.1'))}:{http_options.get('port', 8000)}"
    finally:
        if ray.is_initialized():
            _progress("shutting down")
            _undeploy(config)
            ray.shutdown()


def _refuse(config: MeshConfig, options: Options) -> None:
    """Raise ConfigError for what the builders would refuse, before anything is started."""
    from cluster.refusals.applications import refuse_console, refuse_experts, refuse_llm

    keys = options.address is None  # a cluster elsewhere may have variables that are not set here
    refuse_experts(config.experts, f"{options.config}: {config.experts_name}", keys=keys)
    refuse_llm(config.llm, f"{options.config}: {config.llm_name}", keys=keys)
    if config.console is not None:
        refuse_console(config.console, f"{options.config}: {config.console_name}", keys=keys)


def _connect_to_ray(options: Options) -> None:
    """Connect to the named cluster, or start one here."""
    import ray

    logs = {"log_to_driver": options.verbose, "logging_level": "INFO" if options.verbose else "WARNING"}
    if options.address is not None:
        _progress(f"connecting to Ray at {options.address}")
        try:
            ray.init(address=options.address, **logs)
        except Exception as error:
            raise ServeFailedError(f"no Ray cluster answers at {options.address}: {_one_line(error)}") from error
        return
    port = metrics_port(os.environ)
    local = {"num_cpus": max(os.cpu_count() or 1, 4), "include_dashboard": False, "_metrics_export_port": port}
    for attempt in (1, 2):
        _progress("starting Ray")
        try:
            ray.init(address="local", **local, **logs)
            _progress(f"metrics for Prometheus: http://127.0.0.1:{port}/metrics (`make monitoring` shows them)")
            return
        except Exception as error:
            # Ray gives its first process 30 s, which a busy machine may exceed once.
            ray.shutdown()
            if attempt == 2:
                raise ServeFailedError(f"Ray does not start: {error}") from error
            _progress(f"Ray did not start, trying again: {error}")


def _start_serve(proxy_location: str, http_options: dict[str, Any]) -> None:
    from ray import serve

    try:
        serve.start(proxy_location=proxy_location, http_options=http_options)
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

    spec = read_spec(config.experts)
    shards = ShardsAtHand(config.num_shards, 1, config.experts.shards.slots_per_rank)
    check_plan(config.live.placement, ModelFacts(spec.num_layers, spec.num_experts), shards)


def _undeploy(config: MeshConfig) -> None:
    from cluster.ray_joints import delete_applications

    try:
        delete_applications(config.names)
    except Exception as error:
        # The user must see the error that led here.
        _progress(f"not everything was deleted: {_one_line(error)}")


def _reachable(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "::", "") else host


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


# While it runs --------------------------------------------------------------------------------------------------------


def _welcome(config: MeshConfig, url: str) -> None:
    base = url + config.llm_route_prefix.rstrip("/")
    key = '-H "Authorization: Bearer $API_KEY" ' if config.llm.http.asks_for_keys else ""
    body = {
        "model": config.llm.model.id,
        "messages": [{"role": "user", "content": "def read_lines(path):"}],
        "max_tokens": 64,
    }
    _progress("ready: the first token was generated")
    print(f"\n  {base}/v1   (OpenAI API, model {config.llm.model.id!r})")
    print(f"  {base}/health   {_console_links(config, url)}\n")
    print(
        f"  curl {base}/v1/chat/completions {key}-H 'Content-Type: application/json' \\\n    -d '{json.dumps(body)}'\n"
    )
    print("Ctrl-C stops it.", flush=True)


def _console_links(config: MeshConfig, url: str) -> str:
    if config.console is None:
        return ""
    base = url + config.console_route_prefix.rstrip("/")
    return f"{base}/status"


def _watch(config: MeshConfig) -> None:
    """Print a line whenever the set of shards changes, until Ctrl-C."""
    from ray import serve

    controller = serve.get_app_handle(config.experts_name)
    shown = ""
    while True:
        try:
            status = controller.status.remote().result(timeout_s=STATUS_TIMEOUT_S)
        except Exception as error:
            line = f"the placement controller does not answer ({type(error).__name__}); serving continues"
        else:
            shards = ", ".join(f"{shard.rank} (pid {shard.pid})" for shard in status.shards if shard.serving)
            line = f"epoch {status.epoch}: shards {shards}"
            if status.missing_ranks:
                line += f"; missing ranks {', '.join(map(str, status.missing_ranks))}"
        if line != shown:
            shown = line
            _progress(line)
        time.sleep(WATCH_PERIOD_S)
