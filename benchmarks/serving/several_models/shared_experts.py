"""What two engines with different options hold in memory: two routers over one pool of experts, and two vLLM servers.

    python -m benchmarks.serving.several_models.shared_experts [--dtype float32]

The model is the random one of `benchmarks.common.bench_model`; the options are those of the two versions in
configs/tiny-two-models.yaml. Memory is what processes have for themselves (PSS of anonymous and shared memory, without
pages of files), as weights are in both.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml
from safetensors import safe_open

from benchmarks.common import ROOT, bench_model, print_table, save
from benchmarks.serving.front_door import started, vllm_command, vllm_environment
from cluster.serve_environment import free_ports

SETTLE_S = 5.0  # what starts beside the first token has come up
BYTES = {"float32": 4, "bfloat16": 2}
OPTIONS = ((1024, 64), (2048, 32))  # max_model_len and max_num_seqs of the two


def own_mb(pid: int) -> float:
    """Memory of a process and of all that descend from it, in MB."""
    total = 0
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        with contextlib.suppress(OSError, psutil.Error):
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()[1:]
            pages = {line.split()[0]: int(line.split()[1]) for line in lines}
            total += pages["Pss_Anon:"] + pages["Pss_Shmem:"]
    return total * 1024 / 1e6


def replicas(name: str) -> list[int]:
    """Process ids of a deployment's replicas on this machine."""
    found = psutil.process_iter(["pid", "cmdline"])
    return [each.info["pid"] for each in found if name in " ".join(each.info["cmdline"] or ())]


def mesh_config(model: Path, dtype: str, folder: Path) -> Path:
    """The first model of configs/tiny-two-models.yaml with its two versions, over another checkpoint and one shard."""
    config = yaml.safe_load((ROOT / "configs" / "tiny-two-models.yaml").read_text())
    kept = [each for each in config["applications"] if each["name"] in ("experts", "llm", "llm-canary", "gateway")]
    for app in kept[:3]:
        app["args"]["model"] |= {"path": str(model), "dtype": dtype}
    kept[0]["deployments"][0]["num_replicas"] = 1
    gateway = kept[3]["deployments"][0]["user_config"]
    gateway["models"] = {"tiny-moe": gateway["models"]["tiny-moe"]}
    path = folder / "mesh.yaml"
    path.write_text(yaml.safe_dump({**config, "applications": kept}, sort_keys=False))
    return path


def of_mesh(model: Path, dtype: str, folder: Path) -> dict[str, float]:
    """MB by part of the service."""
    [port] = free_ports(1)
    command = [
        sys.executable,
        "-m",
        "cluster.command",
        "serve",
        str(mesh_config(model, dtype, folder)),
        "--port",
        str(port),
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with started("mesh", command, port, env, folder / "mesh.log"):
        time.sleep(SETTLE_S)
        parts = {"shard": "experts:ExpertShard", "router": "llm:Router", "other router": "llm-canary:Router"}
        return {part: sum(map(own_mb, replicas(f"ServeReplica:{name}"))) for part, name in parts.items()}


def of_vllm(model: Path, dtype: str, folder: Path) -> dict[str, float]:
    """MB of each of two plain servers that run side by side."""
    measured = {}
    with contextlib.ExitStack() as stack:
        servers = []
        for number, (max_model_len, max_num_seqs) in enumerate(OPTIONS):
            [port] = free_ports(1)
            command = vllm_command(port)
            for option, value in (
                ("--model", str(model)), ("--dtype", dtype),
                ("--max-model-len", str(max_model_len)), ("--max-num-seqs", str(max_num_seqs)),
            ):  # fmt: skip
                command[command.index(option) + 1] = value
            log = folder / f"vllm-{number}.log"
            servers.append(stack.enter_context(started("vllm", command, port, vllm_environment(1), log)))
        time.sleep(SETTLE_S)
        for number, server in enumerate(servers):
            measured[f"vllm {number + 1}"] = own_mb(server.process.pid)
    return measured


def expert_mb(model: Path, dtype: str) -> float:
    """The routed experts' weights, in MB."""
    with safe_open(model / "model.safetensors", "np") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys() if ".experts." in name]  # noqa: SIM118
    return sum(rows * columns for rows, columns in shapes) * BYTES[dtype] / 1e6


def main() -> None:
    """Measure both sides, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=sorted(BYTES), default="float32")
    args = parser.parse_args()
    model = bench_model()
    sides: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, measure in (("expertmesh", of_mesh), ("two vLLM servers", of_vllm)):
            sides[name] = measure(model, args.dtype, Path(folder))
            print(json.dumps({name: sides[name]}), flush=True)
    rows: list[list[Any]] = [[side, part, mb] for side, parts in sides.items() for part, mb in parts.items()]
    rows += [[side, "all", sum(parts.values())] for side, parts in sides.items()]
    experts = expert_mb(model, args.dtype)
    print_table("Memory of two engines (MB)", ["side", "process and its children", "MB"], rows)
    print(f"\nthe routed experts' weights are {experts:.0f} MB: held once by the shard, and by each of vLLM's servers")
    save("shared_experts", {"rows": rows, "experts_mb": experts, "dtype": args.dtype})


if __name__ == "__main__":
    main()
