"""The config of a layout: a Serve config as `serve deploy` takes it, checked as far as that goes without GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from cluster.config.serve_file import CONSOLE_BUILDER, EXPERTS_BUILDER, LLM_BUILDER, MeshConfig
from placement.sizing.memory import ROWS_PER_DISPATCH
from placement.sizing.sizing import Sizing

_CONTEXT_STEP = 1024
_MOST_OF_A_GPU = 0.9  # what vLLM takes at most; pairs and a context are outside its pool


def serve_config(sizing: Sizing, model_path: str) -> dict[str, Any]:
    """The config of one service of the best layout."""
    facts, demand, best = sizing.facts, sizing.demand, sizing.layout
    longest = -(-demand.context // _CONTEXT_STEP) * _CONTEXT_STEP
    engine: dict[str, Any] = {
        "max_model_len": min(longest, facts.max_positions or longest),
        "max_num_seqs": best.point.peak_sequences,
        # vLLM takes no fewer tokens in a step than sequences.
        "max_num_batched_tokens": max(best.chunk, best.point.peak_sequences),
        "gpu_memory_utilization": _MOST_OF_A_GPU,
    }
    if demand.kv_value_bytes == 1:
        engine["kv_cache_dtype"] = "fp8"
    if best.router_gpus > 1:
        engine["tensor_parallel_size"] = best.router_gpus
    model: dict[str, Any] = {"id": facts.name.lower(), "path": model_path, "dtype": "bfloat16"}
    if facts.mtp_router_bytes is not None:
        model["mtp"] = True
        engine["speculative_config"] = {"method": "mtp", "num_speculative_tokens": 1}
    placement: dict[str, Any] = {"policy": "linear", "spare_slots": demand.spare_slots}
    if best.replicas > 1:
        placement["min_replicas"] = best.replicas
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": "0.0.0.0", "port": 8000},
        "applications": [
            {
                "name": "experts",
                "route_prefix": None,
                "import_path": EXPERTS_BUILDER,
                "args": {
                    "model": model,
                    "shards": {
                        "device": "cuda",
                        "slots_per_rank": best.slots,
                        "max_rows_per_dispatch": ROWS_PER_DISPATCH,
                        "join_timeout_s": 3600,
                        "ray_actor_options": {"num_cpus": 2, "num_gpus": 1, "accelerator_type": sizing.gpu.ray},
                    },
                },
                "deployments": [
                    {"name": "ExpertShard", "num_replicas": best.shards},
                    {"name": "PlacementController", "user_config": {"placement": placement}},
                ],
            },
            {
                "name": "llm",
                "route_prefix": "/",
                "import_path": LLM_BUILDER,
                "args": {
                    "model": model,
                    "routers": {
                        "count": best.routers,
                        "accelerator": "gpu",
                        "accelerator_type": sizing.gpu.ray,
                        "engine_kwargs": engine,
                        "placement_group_config": {"bundle_per_worker": {"CPU": 4, "GPU": 1}},
                        # Every GPU is taken, so that no new router can load beside an old one.
                        "deployment_config": {"max_surge_percent": 0},
                    },
                    "transport": {"name": "auto", "max_rows_per_dispatch": ROWS_PER_DISPATCH},
                    "deadlines": {"membership_s": 3600},
                    "http": {"max_pending_requests": 4 * best.routers * best.point.peak_sequences},
                },
            },
            {
                "name": "console",
                "route_prefix": "/expertmesh",
                "import_path": CONSOLE_BUILDER,
                "args": {"deployment_config": {"ray_actor_options": {"num_cpus": 0.1}}},
            },
        ],
    }


def check_config(data: dict[str, Any], where: str) -> None:
    """ConfigError with what would be refused when the applications are built, files of the model aside."""
    from cluster.refusals.applications import refuse_experts, refuse_llm

    config = MeshConfig.from_serve_config(data, where)
    refuse_experts(config.experts, f"{where}: {config.experts_name}", complete=False)
    refuse_llm(config.llm, f"{where}: {config.llm_name}", complete=False, keys=False)


def write_config(sizing: Sizing, model_path: str, file: Path) -> None:
    """Write the config of the best layout. ConfigError if it would be refused, OSError if the file cannot be had."""
    data = serve_config(sizing, model_path)
    check_config(data, str(file))
    best, demand = sizing.layout, sizing.demand
    each = f" One of {best.services} services that divide the load." if best.services > 1 else ""
    routers = f"{best.routers} router(s)" + (f" of {best.router_gpus} GPUs" if best.router_gpus > 1 else "")
    opening = (
        f"# {sizing.facts.name}: {routers} and {best.shards} shards, on {sizing.gpu.title}.{each}\n"
        f"# Sized for {demand.rate / best.services:g} requests/s of {demand.isl} + {demand.osl} tokens, at most "
        f"{demand.tpot_ms:g} ms a token and {demand.ttft_ms:g} ms to the first.\n"
    )
    text = yaml.safe_dump(data, sort_keys=False, width=120).replace("&id001", "&model").replace("*id001", "*model")
    file.write_text(opening + text)
