"""The plug-in end to end on a GPU: vLLM as a router with two shards against plain vLLM, by tokens and by speed.

    python -m benchmarks.gpu.engine [--quick] [--attention TRITON_ATTN] [--device cpu]

The model is a random Qwen3-MoE of about 1 billion parameters (hidden 1024, 12 layers, 64 experts, top-8, width 384),
made on first use in the temporary folder. Each side is a process of its own and shares the GPU with its shards only.
Decoding is greedy, with all prompts submitted together. `same` counts requests whose tokens all equal plain vLLM's;
`prefix` is the mean share of tokens before the first difference. Random weights leave many near ties, which bfloat16
(and TF32, in vLLM's fused MoE in float32) breaks either way.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import ROOT, TINY_MODEL
from benchmarks.gpu.common import Report, absent, arguments
from benchmarks.processes import run_tied
from experts.transports.nccl_sharing import SHARE_GPUS

SIDE_LIMIT_S = 900.0
SIDES = {"vllm": "plain vLLM", "mesh": "1 router + 2 shards"}
VOCABULARY = 32000


def random_model() -> Path:
    """The folder of the model described above."""
    path = Path(tempfile.gettempdir()) / "expertmesh-gpu-bench-model"
    if (path / "config.json").exists():
        return path
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=VOCABULARY, hidden_size=1024, num_hidden_layers=12, num_attention_heads=16, num_key_value_heads=4,
        head_dim=64, num_experts=64, num_experts_per_tok=8, moe_intermediate_size=384, intermediate_size=2048,
        max_position_embeddings=4096, norm_topk_prob=True, tie_word_embeddings=True, initializer_range=0.05,
    )  # fmt: skip
    building = path.with_suffix(f".{os.getpid()}")
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(building)
    building.rename(path)
    return path


def prompts(count: int, length: int, vocabulary: int) -> list[list[int]]:
    """`count` distinct random prompts of `length` tokens."""
    generator = torch.Generator().manual_seed(count)
    return torch.randint(10, vocabulary, (count, length), generator=generator).tolist()


def engine_arguments(model: Path, dtype: str, eager: bool, device: str, attention: str = "") -> dict[str, Any]:
    """The engine options of both sides; `attention` is vLLM's name of a backend, "" for its choice."""
    found: dict[str, Any] = {"attention_backend": attention} if attention else {}
    found |= {
        "model": str(model),
        "dtype": dtype,
        "enforce_eager": eager,
        "max_model_len": 512,
        "max_num_seqs": 256,
        "max_num_batched_tokens": 4096,
        "enable_prefix_caching": False,
        "skip_tokenizer_init": True,
        "seed": 0,
    }
    # The shards need their share of the GPU.
    return found if device == "cpu" else found | {"gpu_memory_utilization": 0.4}


def serve(side: str, model: Path, order: dict[str, Any]) -> dict[str, Any]:
    """Body of a side's process: {batch: {"tokens_per_s", "tokens"}}, and the router's status."""
    from vllm import LLM, SamplingParams

    from benchmarks.shard_processes import ShardProcesses
    from experts.protocol.settings import RouterSettings
    from experts.vllm_plugin.engine_kwargs import router_engine_kwargs

    device = order["device"]
    keywords = engine_arguments(model, order["dtype"], order["eager"], device, order["attention"])
    with contextlib.ExitStack() as stack:
        if side == "mesh":
            shards = stack.enter_context(
                ShardProcesses(model, order["dtype"], num_ranks=2, device=device, connect_timeout_s=120)
            )
            settings = RouterSettings(
                model_path=str(model),
                membership=shards.membership.to_dict(),
                dispatch_timeout_ms=60_000,
                connect_timeout_s=120,
            )
            keywords = router_engine_kwargs(settings, keywords, device)
        llm = LLM(**keywords)
        params = SamplingParams(temperature=0, max_tokens=order["new_tokens"], ignore_eos=True, detokenize=False)
        found: dict[str, Any] = {}
        for batch in order["batches"]:
            asked = [{"prompt_token_ids": ids} for ids in prompts(batch, order["prompt_tokens"], order["vocabulary"])]
            llm.generate(asked, params, use_tqdm=False)  # warm-up
            speeds = []
            for _ in range(order["turns"]):
                start_s = time.perf_counter()
                outputs = llm.generate(asked, params, use_tqdm=False)
                speeds.append(batch * order["new_tokens"] / (time.perf_counter() - start_s))
            found[str(batch)] = {
                "tokens_per_s": sorted(speeds)[len(speeds) // 2],
                "tokens": [list(output.outputs[0].token_ids) for output in outputs],
            }
        if side == "mesh":
            found["status"] = llm.collective_rpc("expertmesh_status")[0]
    return found


def run_side(side: str, model: Path, order: dict[str, Any]) -> dict[str, Any]:
    """`serve` in a process of its own. Raises RuntimeError with the end of its output."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as answer:
        command = [sys.executable, "-m", "benchmarks.gpu.engine", "--device", order["device"], "--serve", side]
        environment = {**os.environ, "VLLM_LOGGING_LEVEL": "WARNING", SHARE_GPUS: "1", "HF_HUB_OFFLINE": "1"}
        if order["device"] == "cpu":
            environment |= {"VLLM_CPU_KVCACHE_SPACE": "1"}
        done = run_tied(
            [*command, "--model", str(model), "--order", json.dumps(order), "--answer", answer.name],
            timeout_s=SIDE_LIMIT_S, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        text = answer.read()
    if done.returncode or not text:
        raise RuntimeError(f"side {side} ended with status {done.returncode}:\n{done.stdout[-4000:]}")
    return dict(json.loads(text))


def agreement(tokens: list[list[int]], expected: list[list[int]]) -> tuple[int, float]:
    """(number of equal requests, mean share of tokens before the first difference)."""
    shares = []
    for got, wanted in zip(tokens, expected, strict=True):
        same = next((at for at, (a, b) in enumerate(zip(got, wanted, strict=True)) if a != b), len(wanted))
        shares.append(same / len(wanted))
    return sum(share == 1.0 for share in shares), sum(shares) / len(shares)


def rows_of(results: dict[str, dict[str, Any]], order: dict[str, Any]) -> list[dict[str, Any]]:
    """The table's rows for one order."""
    rows = []
    for batch in map(str, order["batches"]):
        plain = results["vllm"][batch]
        for side, found in results.items():
            same, prefix = agreement(found[batch]["tokens"], plain["tokens"])
            rows.append(
                {
                    "dtype": order["dtype"],
                    "mode": "eager" if order["eager"] else "graphs",
                    "batch": int(batch),
                    "side": SIDES[side],
                    "tokens/s": found[batch]["tokens_per_s"],
                    "of plain": found[batch]["tokens_per_s"] / plain["tokens_per_s"],
                    "same": f"{same} of {batch}",
                    "prefix": prefix,
                }
            )
    return rows


def main() -> None:
    """Print the table."""

    def more(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--attention", default="", help="vLLM's attention backend; its own choice if left out")
        for name in ("--serve", "--model", "--order", "--answer"):
            parser.add_argument(name, help=argparse.SUPPRESS)

    args = arguments(__doc__, more)
    if args.serve:
        found = serve(args.serve, Path(args.model), json.loads(args.order))
        Path(args.answer).write_text(json.dumps(found))
        return
    on_cpu = args.device == "cpu"
    report = Report("gpu_engine", args.device)
    rows: list[dict[str, Any]] = []
    missing = absent("vllm", "transformers")
    if missing is None:
        model = TINY_MODEL if on_cpu else random_model()
        ways = [("float32", True)] if on_cpu else [("float32", True), ("bfloat16", True), ("bfloat16", False)]
        for dtype, eager in ways[: 2 if args.quick else None]:
            order = {
                "device": args.device, "dtype": dtype, "eager": eager, "turns": 1 if on_cpu or args.quick else 3,
                "batches": [1, 4] if on_cpu else [1, 16, 64, 256], "new_tokens": 8 if on_cpu else 64,
                "prompt_tokens": 16, "vocabulary": 200 if on_cpu else VOCABULARY, "attention": args.attention,
            }  # fmt: skip
            try:
                rows += rows_of({side: run_side(side, model, order) for side in SIDES}, order)
            except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
                report.leave_out(f"{dtype}, {'eager' if eager else 'graphs'}", f"{type(error).__name__}: {error}")
    else:
        report.leave_out("the plug-in end to end", missing)
    report.table("Greedy decoding, 64 new tokens" if not on_cpu else "Greedy decoding, 8 new tokens", rows)
    report.end()


if __name__ == "__main__":
    main()
