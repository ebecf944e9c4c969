"""`make monitoring`: Prometheus, and Grafana where it is installed, for a service here; Ctrl-C stops both."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).resolve().parents[2] / "configs/monitoring"
START_TIMEOUT_S = 60.0  # Grafana migrates its database at the first start
STOP_TIMEOUT_S = 15.0
POLL_S = 0.2
HOMES = ("/usr/share/grafana", "/usr/local/share/grafana", "/opt/homebrew/share/grafana")  # of Grafana's packages

NO_PROMETHEUS = (
    "Prometheus is not on the PATH: apt-get install prometheus (Debian, Ubuntu), brew install prometheus, or unpack "
    "https://prometheus.io/download/ and add its folder to PATH"
)
NO_GRAFANA = (
    "Grafana is not on the PATH, so there are no dashboards (https://grafana.com/docs/grafana/latest/setup-grafana/"
    "installation/); Prometheus shows alerts and graphs without it"
)


class CannotStartError(RuntimeError):
    """What is missing or in the way, and the remedy."""


def main(argv: list[str] | None = None) -> None:
    """Run both until Ctrl-C, SIGTERM, or the end of one of them. Exits with status 1 and the reason if that fails."""
    options = _options(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="expertmesh-monitoring-")))
            running = {"Prometheus": stack.enter_context(_prometheus(options, folder))}
            grafana = grafana_command()
            if grafana is None:
                print(NO_GRAFANA)
            else:
                running["Grafana"] = stack.enter_context(_grafana(grafana, options, folder))
            print("Ctrl-C stops it.", flush=True)
            while all(process.poll() is None for process in running.values()):
                time.sleep(POLL_S)
            [ended] = [name for name, process in running.items() if process.poll() is not None][:1]
            raise CannotStartError(f"{ended} ended: {_last_lines(folder / f'{ended}.log')}")
    except CannotStartError as error:
        print(f"monitoring: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped")


def _options(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m cluster.observability.monitoring", description=__doc__)
    port = int(os.environ.get("EXPERTMESH_METRICS_PORT", "8080"))
    parser.add_argument(
        "--metrics-port", type=int, default=port, help="of Ray's metrics agent here (EXPERTMESH_METRICS_PORT, 8080)"
    )
    parser.add_argument(
        "--targets", type=Path, help="instead, a file in which Ray lists its nodes' agents (docs/monitoring.md)"
    )
    parser.add_argument("--rules", type=Path, default=CONFIGS / "rules.yaml", help="alerts")
    parser.add_argument("--interval-s", type=int, help="between scrapes, and between looks at the alerts (15)")
    parser.add_argument("--prometheus-port", type=int, default=9090, help="port of its page (%(default)s)")
    parser.add_argument("--grafana-port", type=int, default=3000, help="port of its page (%(default)s)")
    return parser.parse_args(argv)


def prometheus_config(options: argparse.Namespace) -> dict[str, Any]:
    """configs/monitoring/prometheus.yaml with the command line's changes."""
    config: dict[str, Any] = yaml.safe_load((CONFIGS / "prometheus.yaml").read_text())
    config["rule_files"] = [str(options.rules.resolve())]
    [job] = config["scrape_configs"]
    job["static_configs"] = [{"targets": [f"127.0.0.1:{options.metrics_port}"]}]
    if options.targets is not None:
        del job["static_configs"]
        job["file_sd_configs"] = [{"files": [str(options.targets.resolve())], "refresh_interval": "15s"}]
    if options.interval_s is not None:
        both = f"{options.interval_s}s"
        config["global"] = {"scrape_interval": both, "scrape_timeout": both, "evaluation_interval": both}
    return config


def grafana_command() -> list[str] | None:
    """How to start Grafana here; None without it."""
    for name, more in (("grafana", ["server"]), ("grafana-server", [])):
        program = shutil.which(name)
        if program is not None:
            beside = Path(program).resolve().parents[1]
            homes = [home for home in (beside, *map(Path, HOMES)) if (home / "public").is_dir()]
            return [program, *more, *(["--homepath", str(homes[0])] if homes else [])]
    return None


def grafana_environment(options: argparse.Namespace, folder: Path) -> dict[str, str]:
    """Everything in `folder`, nothing sent home, pages without a log-in, dashboards and datasource provisioned."""
    return {
        "GF_SERVER_HTTP_ADDR": "127.0.0.1",
        "GF_SERVER_HTTP_PORT": str(options.grafana_port),
        "GF_PATHS_DATA": str(folder / "grafana"),
        "GF_PATHS_LOGS": str(folder / "grafana"),
        "GF_PATHS_PLUGINS": str(folder / "grafana/plugins"),
        "GF_PATHS_PROVISIONING": str(CONFIGS / "grafana/provisioning"),
        "GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH": str(CONFIGS / "grafana/dashboards/service.json"),
        "GF_AUTH_ANONYMOUS_ENABLED": "true",
        "GF_AUTH_ANONYMOUS_ORG_ROLE": "Viewer",
        "GF_ANALYTICS_REPORTING_ENABLED": "false",
        "GF_ANALYTICS_CHECK_FOR_UPDATES": "false",
        "GF_ANALYTICS_CHECK_FOR_PLUGIN_UPDATES": "false",
        "PROMETHEUS_PORT": str(options.prometheus_port),
        "EXPERTMESH_DASHBOARDS": str(CONFIGS / "grafana/dashboards"),
    }


@contextlib.contextmanager
def _prometheus(options: argparse.Namespace, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    program = shutil.which("prometheus")
    if program is None:
        raise CannotStartError(NO_PROMETHEUS)
    config = folder / "prometheus.yaml"
    config.write_text(yaml.safe_dump(prometheus_config(options), sort_keys=False))
    command = [
        *(program, f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"),
        *(f"--web.listen-address=127.0.0.1:{options.prometheus_port}", "--storage.tsdb.retention.time=2d"),
    ]
    with _running("Prometheus", command, {}, options.prometheus_port, "/-/ready", folder) as process:
        url = f"http://127.0.0.1:{options.prometheus_port}"
        print(f"Prometheus: {url}/alerts   {url}/targets", flush=True)
        yield process


@contextlib.contextmanager
def _grafana(command: list[str], options: argparse.Namespace, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    environment = grafana_environment(options, folder)
    with _running("Grafana", command, environment, options.grafana_port, "/api/health", folder) as process:
        print(f"Grafana: http://127.0.0.1:{options.grafana_port}/dashboards/f/expertmesh", flush=True)
        yield process


@contextlib.contextmanager
def _running(
    name: str, command: list[str], environment: Mapping[str, str], port: int, ready: str, folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A program, once it answers with 200 at the path `ready`; ended on the way out."""
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            option = f"--{name.lower()}-port"
            raise CannotStartError(f"something listens on port {port} already; choose another for {name} with {option}")
    with open(folder / f"{name}.log", "wb") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C reaches this process alone, which ends the others
            preexec_fn=_end_with_parent,
        )
    try:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not _answers(f"http://127.0.0.1:{port}{ready}"):
            if process.poll() is not None:
                raise CannotStartError(f"{name} does not start: {_last_lines(folder / f'{name}.log')}")
            if time.monotonic() > deadline_s:
                raise CannotStartError(f"{name} does not answer on port {port} within {START_TIMEOUT_S:g} s")
            time.sleep(POLL_S)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(STOP_TIMEOUT_S)


def _end_with_parent() -> None:
    """In the child: have Linux end it when its parent is gone, however that ended."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.HTTPError):
        return False


def _last_lines(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-5:])


if __name__ == "__main__":
    main()
