"""Several hosts on one machine: network namespaces, each with one interface on a common switch.

    host 0 (10.213.0.1) --+
    host 1 (10.213.0.2) --+-- bridge in a namespace of its own
    host 2 (10.213.0.3) --+

Each host has a folder of its own at the path `Host.folder`, the same path on all hosts: Ray's sockets and logs go
there. The machine's own network is not touched. The hosts' processes are killed before the hosts are removed. If this
process is killed, a shell removes them; if that is killed too, the next run does.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.processes import AtExit

_PREFIX = "expertmesh"
_CLONE_NEWNET = 0x40000000
_LIMIT_S = 30.0
# Arguments: the hosts' folder, and all namespaces.
_REMOVE_HOSTS = """
folder="$1"
shift
for name; do
    while pids=$(ip netns pids "$name") && [ -n "$pids" ]; do kill -KILL $pids; sleep 0.1; done
    ip netns del "$name"
done
rm -rf "$folder"
"""


class NamespacesRefusedError(RuntimeError):
    """This user may not create network namespaces here; the message is the system's answer."""


def _ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    if done.returncode != 0:
        raise NamespacesRefusedError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


@dataclass(frozen=True)
class Host:
    """One namespace."""

    name: str
    address: str
    switch: str
    port: str
    folder: str
    disk: str
    """The folder behind `folder` on this host, as the rest of the machine sees it."""

    def command(self, *words: str) -> list[str]:
        """The command line that runs `words` on this host."""
        # `ip netns exec` gives the process its own view of mounts; the binding ends with that view.
        bind = 'mount --bind "$0" "$1" && shift && exec "$@"'
        return ["ip", "netns", "exec", self.name, "sh", "-c", bind, self.disk, self.folder, *words]

    def popen(self, *words: str, **options: Any) -> subprocess.Popen[str]:
        """Start a process on this host. It is killed with the hosts, if it runs that long."""
        return subprocess.Popen(self.command(*words), text=True, **options)

    def cut(self) -> None:
        """Pull the plug: no packet gets in or out, and no connection is closed."""
        _ip("-n", self.switch, "link", "set", self.port, "down")

    def join(self) -> None:
        """Undo `cut`."""
        _ip("-n", self.switch, "link", "set", self.port, "up")

    def limit(self, mbit_per_s: float | None, burst_bytes: int = 1 << 15) -> None:
        """Limit what this host sends to `mbit_per_s` (a token bucket of `burst_bytes`); None removes the limit."""
        with contextlib.suppress(NamespacesRefusedError):  # there may be no limit to remove
            _ip("netns", "exec", self.name, "tc", "qdisc", "del", "dev", "eth0", "root")
        if mbit_per_s is not None:
            bucket = ["rate", f"{mbit_per_s}mbit", "burst", str(burst_bytes), "latency", "500ms"]
            _ip("netns", "exec", self.name, "tc", "qdisc", "add", "dev", "eth0", "root", "tbf", *bucket)

    def link_bytes(self) -> tuple[int, int]:
        """(bytes sent, bytes received) by this host's interface so far, including Ethernet headers."""
        [interface] = json.loads(_ip("-n", self.name, "-s", "-j", "link", "show", "dev", "eth0"))
        counters = interface["stats64"]
        return int(counters["tx"]["bytes"]), int(counters["rx"]["bytes"])

    def pids(self) -> list[int]:
        """Ids of the processes on this host."""
        return [int(pid) for pid in _ip("netns", "pids", self.name).split()]

    def kill_all(self) -> None:
        """Kill every process on this host and wait until they are gone. Raises TimeoutError."""
        limit_s = time.monotonic() + _LIMIT_S
        while pids := self.pids():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if time.monotonic() > limit_s:
                raise TimeoutError(f"processes {pids} on host {self.name} survive SIGKILL")
            time.sleep(0.01)


def enter(name: str) -> None:
    """Move the calling thread, and processes it starts, into the namespace `name`."""
    descriptor = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(descriptor, _CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), f"setns to {name}")
    finally:
        os.close(descriptor)


def _remove_leftovers() -> None:
    for line in _ip("netns", "list").splitlines():
        name = line.split()[0]
        parts = name.split("-")
        if parts[0] == _PREFIX and len(parts) == 3 and not os.path.exists(f"/proc/{parts[1]}"):
            Host(name, "", "", "", "", "").kill_all()
            _ip("netns", "del", name)


@contextlib.contextmanager
def hosts_on_a_switch(count: int) -> Iterator[list[Host]]:
    """`count` hosts that reach each other. Raises NamespacesRefusedError where the user may not create them."""
    if shutil.which("ip") is None:
        raise NamespacesRefusedError("there is no `ip` command (iproute2)")
    _remove_leftovers()
    switch, *names = (f"{_PREFIX}-{os.getpid()}-{word}" for word in ("switch", *range(count)))
    made: list[Host] = []
    base = tempfile.mkdtemp(prefix="mesh")  # short, because it will hold Unix sockets
    at_exit = AtExit(_REMOVE_HOSTS, base, *names, switch)
    folder = os.path.join(base, "own")
    os.mkdir(folder)
    try:
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch, "link", "set", "bridge", "up")
        for number, name in enumerate(names):
            port, address = f"port{number}", f"10.213.0.{number + 1}"
            _ip("netns", "add", name)
            disk = os.path.join(base, str(number))
            os.mkdir(disk)
            made.append(Host(name, address, switch, port, folder, disk))
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip("-n", switch, "link", "set", port, "master", "bridge", "up")
            _ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            # It leads nowhere, but programs find their own address by looking up the route to a public one.
            _ip("-n", name, "route", "add", "default", "via", "10.213.0.254")
        yield made
    finally:
        for host in made:
            host.kill_all()
            _ip("netns", "del", host.name)
        with contextlib.suppress(NamespacesRefusedError):
            _ip("netns", "del", switch)
        shutil.rmtree(base, ignore_errors=True)
        at_exit.cancel()
