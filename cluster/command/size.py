"""`expertmesh size`."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

# Read here, since the module that knows them imports numpy.
_GPUS = Path(__file__).parents[2] / "placement" / "sizing" / "gpus.json"
GPUS = [entry["name"] for entry in json.loads(_GPUS.read_text())["gpus"]]


class KvDtype(StrEnum):
    """Data type of the KV cache."""

    auto = "auto"
    fp8 = "fp8"


def size(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Folder, hub id, s3:// or gs:// folder, or a name of --models."),
    ] = None,
    models: Annotated[bool, typer.Option("--models", help="Print the table of known models instead.")] = False,
    gpu: Annotated[
        str, typer.Option(autocompletion=lambda: GPUS, help=f"One of {', '.join(GPUS)}.", metavar="GPU")
    ] = "h100",
    isl: Annotated[int, typer.Option(help="Tokens of a prompt.")] = 2000,
    osl: Annotated[int, typer.Option(help="Tokens of an answer.")] = 300,
    rate: Annotated[float, typer.Option(help="Requests a second.")] = 10.0,
    tpot_ms: Annotated[float, typer.Option(help="Longest mean time between tokens.")] = 50.0,
    ttft_ms: Annotated[float, typer.Option(help="Longest mean time to the first token.")] = 1000.0,
    headroom: Annotated[float, typer.Option(help="Share of memory kept free.")] = 0.25,
    spare_slots: Annotated[int, typer.Option(help="Empty slots a layer and shard.")] = 1,
    lost_shards: Annotated[int, typer.Option(help="Shards that may be lost.")] = 1,
    skew: Annotated[float, typer.Option(help="Sigma of experts' popularity.")] = 0.5,
    kv_dtype: Annotated[KvDtype, typer.Option(help="Of the KV cache.")] = KvDtype.auto,
    max_gpus: Annotated[int, typer.Option(help="Where the search ends.")] = 512,
    router_gpus: Annotated[int, typer.Option(help="GPUs of a router: its tensor_parallel_size.")] = 1,
    mtp: Annotated[
        bool, typer.Option("--mtp", help="Count the layer for multi-token prediction (model.mtp): memory, not time.")
    ] = False,
    price_per_gpu_hour: Annotated[float | None, typer.Option(min=0, metavar="PRICE", help="Print prices, too.")] = None,
    alternatives: Annotated[int, typer.Option(help="Further layouts to show.")] = 4,
    offload: Annotated[
        bool, typer.Option("--offload", help="Size shards that keep some experts in host memory (shards.offload).")
    ] = False,
    shards: Annotated[int, typer.Option(help="With --offload: shards that divide the experts.")] = 1,
    device_gb: Annotated[
        float | None, typer.Option(help="With --offload: memory of a shard's device.", show_default="the GPU's")
    ] = None,
    cpu_shards: Annotated[
        bool, typer.Option("--cpu-shards", help="With --offload: shards on CPUs, whose layers share a shard's memory.")
    ] = False,
    copy_gb_per_s: Annotated[float, typer.Option(help="With --offload: rate from host memory to the device.")] = 25.0,
    trace: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="With --offload: routing (.npz) to predict hits by. By default made up."),
    ] = None,
    write: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the config of one service.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON document, every figure with unit and origin.")
    ] = False,
) -> None:
    """Say how many routers and shards on which GPUs serve a load, from config.json and weight headers alone."""
    if models == (model is not None):
        raise typer.BadParameter("expected either a model (folder, hub id, name) or --models", param_hint="MODEL")
    from cluster.sizing_command import run

    if model is None:
        run.table(as_json)
        return
    demand = {
        "isl": isl,
        "osl": osl,
        "rate": rate,
        "tpot_ms": tpot_ms,
        "ttft_ms": ttft_ms,
        "headroom": headroom,
        "spare_slots": spare_slots,
        "lost_shards": lost_shards,
        "skew": skew,
        "kv_value_bytes": run.KV_VALUE_BYTES[kv_dtype.value],
        "max_gpus": max_gpus,
        "router_gpus": router_gpus,
    }
    if not offload:
        if shards != 1 or device_gb is not None or copy_gb_per_s != 25.0 or trace is not None or cpu_shards:
            raise typer.BadParameter(
                "expected --offload beside --shards, --device-gb, --cpu-shards, --copy-gb-per-s and --trace"
            )
        run.answer(run.Question(model, gpu, demand, price_per_gpu_hour, alternatives, write, mtp), as_json)
        return
    if write is not None or price_per_gpu_hour is not None:
        raise typer.BadParameter("expected neither --write nor --price-per-gpu-hour beside --offload")
    asked = run.OffloadAsked(model, gpu, demand, shards, copy_gb_per_s, device_gb, trace, cpu_shards, mtp)
    run.answer_offload(asked, as_json)
