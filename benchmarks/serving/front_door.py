"""What a client gets over HTTP from this service and from vLLM's own server, with the same model on the same cores.

    python -m benchmarks.serving.front_door [--streams 1,16,64] [--turns 3] [--quick]

Both run on this machine; vLLM's server is paused while the service is measured. The service cannot be paused (Ray would
take its nodes for dead), so what it needs while idle is printed too: it is taken from the peer.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from benchmarks.common import ROOT, TINY_MODEL, median, print_table, save
from benchmarks.processes import tied
from benchmarks.serving.streams import Load, requests, run
from cluster.serve_environment import free_ports

MODEL = "tiny-moe"
START_TIMEOUT_S = 600.0
GOALS = {  # (figure, streams): at most (or for tokens_per_s at least) this multiple of vLLM's
    ("gap_p50_ms", 1): 1.15,
    ("gap_p99_ms", 1): 1.3,
    ("first_token_p50_ms", 1): 1.25,
    ("tokens_per_s", 64): 0.9,
    ("first_token_p50_ms", 64): 1.25,
}


@dataclass
class Server:
    """One side, running."""

    name: str
    url: str
    process: subprocess.Popen[str]
    start_s: float  # from its command to its first token
    loads: dict[int, list[Load]] = field(default_factory=dict)  # by number of streams


def vllm_command(port: int) -> list[str]:
    """vLLM's own OpenAI server with the options of configs/tiny-cpu.yaml."""
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(TINY_MODEL), "--port", str(port)),
        *("--host", "127.0.0.1", "--served-model-name", MODEL, "--dtype", "float32", "--max-model-len", "1024"),
        *("--max-num-seqs", "64", "--enforce-eager", "--disable-uvicorn-access-log"),
    ]


def vllm_environment(threads: int) -> dict[str, str]:
    return {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}


def mesh_command(port: int, folder: Path) -> list[str]:
    """The service as `make serve` starts it, without a queue limit in the way."""
    config = yaml.safe_load((ROOT / "configs" / "tiny-cpu.yaml").read_text())
    config["applications"][1]["args"]["http"]["max_pending_requests"] = 4096
    path = folder / "mesh.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return [sys.executable, "-m", "cluster.command", "serve", str(path), "--port", str(port)]


@contextlib.contextmanager
def started(name: str, command: list[str], port: int, env: dict[str, str], log: Path) -> Iterator[Server]:
    """Start a side and wait for its first token. Raises RuntimeError with the end of its log if none comes."""
    url, start_s = f"http://127.0.0.1:{port}", time.monotonic()
    with open(log, "w") as file, tied(command, grace_s=60, cwd=ROOT, env=env, stdout=file, stderr=file) as process:
        while not _generates(url):
            if process.poll() is not None or time.monotonic() - start_s > START_TIMEOUT_S:
                raise RuntimeError(f"{name} does not serve:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
        yield Server(name, url, process, time.monotonic() - start_s)


def _generates(url: str) -> bool:
    body = next(iter(requests(MODEL, 1, 1))).body
    try:
        request = urllib.request.Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=5) as response:
            return b'"text"' in response.read()
    except OSError:
        return False


def measure(server: Server, streams: int, new_tokens: int, rounds: int) -> None:
    """One turn of one side; the first few requests are not counted."""
    run(server.url, requests(MODEL, streams, 16), streams)
    load = run(server.url, requests(MODEL, max(streams, 4) * rounds, new_tokens), streams)
    if load.failed:
        raise RuntimeError(f"{server.name}: {load.failed} of {load.requests} requests failed")
    server.loads.setdefault(streams, []).append(load)


def compare(streams: list[int], turns: int, new_tokens: int, rounds: int, threads: int) -> list[Server]:
    """Both sides in turns, each alone but for the service's idle processes."""
    ports = free_ports(2)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        vllm = stack.enter_context(
            started("vllm", vllm_command(ports[0]), ports[0], vllm_environment(threads), folder / "vllm.log")
        )
        os.killpg(vllm.process.pid, signal.SIGSTOP)
        mesh = stack.enter_context(
            started("mesh", mesh_command(ports[1], folder), ports[1], dict(os.environ), folder / "mesh.log")
        )
        print(f"idle service: {idle_share():.1%} of one core")
        for turn in range(turns):
            for count in streams:
                for server in (vllm, mesh):
                    if server is vllm:
                        os.killpg(vllm.process.pid, signal.SIGCONT)
                    measure(server, count, new_tokens, rounds)
                    if server is vllm:
                        os.killpg(vllm.process.pid, signal.SIGSTOP)
                    print(turn, server.name, server.loads[count][-1], flush=True)
        return [vllm, mesh]


def idle_share(seconds: float = 5.0) -> float:
    """Cores in use on the machine while nothing is asked."""

    def busy() -> float:
        user, nice, system, *_ = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:])
        return (user + nice + system) / os.sysconf("SC_CLK_TCK")

    before = busy()
    time.sleep(seconds)
    return (busy() - before) / seconds


def report(vllm: Server, mesh: Server) -> list[dict[str, Any]]:
    """One row for each number of streams and figure: medians over turns, and the ratio."""
    rows = []
    for count in vllm.loads:
        for figure in ("first_token_p50_ms", "gap_p50_ms", "gap_p99_ms", "gap_max_ms", "tokens_per_s", "chunk_tokens"):
            theirs, ours = (median(getattr(load, figure) for load in side.loads[count]) for side in (vllm, mesh))
            goal = GOALS.get((figure, count))
            rows.append(
                {"streams": count, "figure": figure, "vllm": theirs, "mesh": ours, "ratio": ours / theirs, "goal": goal}
            )
    return rows


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", default="1,16,64")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--new-tokens", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3, help="requests of each stream, one after the other")
    parser.add_argument("--threads", type=int, default=1, help="OMP_NUM_THREADS of vLLM's server")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    streams = [int(count) for count in args.streams.split(",")]
    turns, rounds = (1, 1) if args.quick else (args.turns, args.rounds)
    vllm, mesh = compare(streams, turns, args.new_tokens, rounds, args.threads)
    rows = report(vllm, mesh)
    print_table(
        "HTTP: this service against vLLM's own server (medians)",
        ["streams", "figure", "vllm", "mesh", "ratio", "goal"],
        [[row["streams"], row["figure"], row["vllm"], row["mesh"], row["ratio"], row["goal"] or ""] for row in rows],
    )
    print(f"\ncommand to first token: vllm {vllm.start_s:.1f} s, mesh {mesh.start_s:.1f} s")
    loads = {side.name: {n: [asdict(load) for load in side.loads[n]] for n in side.loads} for side in (vllm, mesh)}
    save("front_door", {"rows": rows, "loads": loads})


if __name__ == "__main__":
    main()
