"""The command line of `size`, and its exit status."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.config.parse import ConfigError
from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.sizes.find import find_facts
from experts.checkpoint.sizes.known_models import known_models
from placement.sizing.demand import Demand
from placement.sizing.errors import NoLayoutError, SizingError
from placement.sizing.gpus import gpu_named, gpus

if TYPE_CHECKING:
    from placement.sizing.sizing import Sizing

KV_VALUE_BYTES = {"auto": 2.0, "fp8": 1.0}


def add_size(commands: Any) -> None:
    """Add `size` to the subparsers of a parser."""
    parser = commands.add_parser(
        "size",
        help="how many routers and shards on which GPUs a load takes",
        description="Say how many routers and shards on which GPUs serve a load, from config.json and the headers of "
        "safetensors files alone. Exit status: 0 sized, 1 nothing serves the load or the config would be refused, 2 "
        "wrong usage, an unknown model or GPU, 130 interrupted.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("model", nargs="?", help="folder, hub id, s3:// or gs:// folder, or a name of --models")
    parser.add_argument("--models", action="store_true", help="print the table of known models instead")
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(gpus())} (%(default)s)")
    parser.add_argument("--isl", type=int, default=2000, help="tokens of a prompt (%(default)s)")
    parser.add_argument("--osl", type=int, default=300, help="tokens of an answer (%(default)s)")
    parser.add_argument("--rate", type=float, default=10.0, help="requests a second (%(default)g)")
    parser.add_argument("--tpot-ms", type=float, default=50.0, help="longest mean time between tokens (%(default)g)")
    parser.add_argument("--ttft-ms", type=float, default=1000.0, help="longest mean time to the first (%(default)g)")
    parser.add_argument("--headroom", type=float, default=0.25, help="share of memory kept free (%(default)g)")
    parser.add_argument("--spare-slots", type=int, default=1, help="empty slots a layer and shard (%(default)s)")
    parser.add_argument("--lost-shards", type=int, default=1, help="shards that may be lost (%(default)s)")
    parser.add_argument("--skew", type=float, default=0.5, help="sigma of experts' popularity (%(default)g)")
    parser.add_argument("--kv-dtype", choices=KV_VALUE_BYTES, default="auto", help="of the KV cache (%(default)s)")
    parser.add_argument("--max-gpus", type=int, default=512, help="where the search ends (%(default)s)")
    parser.add_argument("--price-per-gpu-hour", type=_price, metavar="PRICE", help="print prices too")
    parser.add_argument("--alternatives", type=int, default=4, help="further layouts to show (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON, every figure with unit and origin")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the config of one service")


def run(options: argparse.Namespace) -> int:
    """Answer; returns the exit status."""
    try:
        return _run(options)
    except NoLayoutError as error:
        return _refused(error, 1)
    except ConfigError as error:
        return _refused(error, 1)
    except (SizingError, CheckpointError, OSError) as error:
        return _refused(error, 2)
    except KeyboardInterrupt:
        return 130


def _run(options: argparse.Namespace) -> int:
    from cluster.sizing_command.figures import as_json, model_as_json
    from cluster.sizing_command.text import lines_of, table_of

    if options.models:
        models = [known.facts() for known in known_models().values()]
        print(json.dumps([model_as_json(facts) for facts in models]) if options.json else "\n".join(table_of(models)))
        return 0
    if options.model is None:
        raise SizingError("a model is missing: name a folder, a hub id or an entry of --models")
    sizing, path = _size(options)
    if options.write is not None:
        from cluster.sizing_command.serve_config import write_config

        write_config(sizing, path, options.write)
    print(json.dumps(as_json(sizing), allow_nan=False) if options.json else "\n".join(lines_of(sizing)))
    if options.write is not None:
        print(f"{options.write}: written, and accepted by the checks that need no GPU", file=sys.stderr)
    return 0


def _size(options: argparse.Namespace) -> tuple[Sizing, str]:
    """The answer, and `model.path` of a config."""
    from placement.sizing.sizing import size  # imports numba, which other commands do without

    if options.alternatives < 0:
        raise SizingError(f"alternatives is {options.alternatives}, expected at least 0")
    gpu = gpu_named(options.gpu)
    demand = Demand(
        isl=options.isl,
        osl=options.osl,
        rate=options.rate,
        tpot_ms=options.tpot_ms,
        ttft_ms=options.ttft_ms,
        headroom=options.headroom,
        spare_slots=options.spare_slots,
        lost_shards=options.lost_shards,
        skew=options.skew,
        kv_value_bytes=KV_VALUE_BYTES[options.kv_dtype],
        max_gpus=options.max_gpus,
    )
    facts, path = find_facts(options.model)
    price = options.price_per_gpu_hour
    return size(facts, gpu, demand, price_per_gpu_hour=price, alternatives=options.alternatives), path


def _refused(error: Exception, status: int) -> int:
    print(f"size: {error}", file=sys.stderr)
    return status


def _price(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no price") from None
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no price of at least 0")
    return value
