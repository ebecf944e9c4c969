"""Trains the tiny model on text of this Python installation and writes it as a Hugging Face checkpoint.

    python examples/tiny-moe/train.py                          # one CPU core, about an hour
    python examples/tiny-moe/train.py --device cuda            # the same on a GPU

The state is saved every few steps; the same command resumes an interrupted run.
"""

import argparse
import json
import math
import os
import time
from pathlib import Path

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")

import numpy as np
import torch
from export import export, export_tokenizer
from muon import Muon
from tiny_model import TinyMoe, TinyMoeConfig
from tiny_tokenizer import load_or_encode
from torch import Tensor

HERE = Path(__file__).resolve().parent
MIX = {"code": 0.30, "prose": 0.28, "unicode": 0.09, "bytecode": 0.17, "chat": 0.16}


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2400, help="optimizer steps in all")
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--context", type=int, default=256, help="sequence length for most of the training")
    parser.add_argument("--long-context", type=int, default=2048, help="sequence length at the end")
    parser.add_argument("--long-share", type=float, default=0.08, help="share of the steps with long sequences")
    parser.add_argument("--learning-rate", type=float, default=4e-3)
    parser.add_argument("--balance", type=float, default=0.01, help="weight of the load-balancing loss")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of the matrix products")
    parser.add_argument("--compile", action="store_true", help="compile attention and loss (needs a C++ compiler)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--limit-modules", type=int, default=None, help="read only this many modules (for tests)")
    parser.add_argument("--work", type=Path, default=HERE / "build", help="folder for tokens and state")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for the checkpoint")
    parser.add_argument(
        "--sizes", type=json.loads, default={}, help="JSON with model sizes that differ from the defaults"
    )
    return parser.parse_args(argv)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 5 % of the steps, then a cosine down to 5 % of the peak."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def draw_batch(streams: dict[str, np.ndarray], rows: int, context: int, seed: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Inputs and targets, int64 [rows, context], from random positions; each row has one domain, drawn as in MIX."""
    rng = np.random.default_rng(seed)
    names = list(MIX)
    offset = rng.random()  # stratified: every batch keeps the mix as closely as its rows allow
    edges = np.cumsum([MIX[name] for name in names])
    picks = np.minimum(np.searchsorted(edges, (np.arange(rows) + offset) / rows), len(names) - 1)
    windows = []
    for pick in picks:
        stream = streams[f"train.{names[pick]}"]
        if len(stream) <= context:
            stream = np.tile(stream, context // len(stream) + 2)
        start = int(rng.integers(0, len(stream) - context))
        windows.append(stream[start : start + context + 1].astype(np.int64))
    batch = torch.from_numpy(np.stack(windows))
    return batch[:, :-1], batch[:, 1:]


@torch.no_grad()
def quick_losses(model: TinyMoe, streams: dict[str, np.ndarray], context: int, device: str) -> dict[str, float]:
    """Held-out loss of each domain's first 16 windows: a rough gauge, not the evaluation."""
    losses = {}
    for name in MIX:
        stream = streams[f"held_out.{name}"].astype(np.int64)
        rows = min(16, (len(stream) - 1) // context)
        if rows:
            ids = torch.from_numpy(stream[: rows * context + 1]).to(device)
            losses[name] = round(model(ids[:-1].view(rows, context), ids[1:].view(rows, context))[0].item(), 3)
    return losses


def make_optimizers(model: TinyMoe, peak: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings, gates and norms."""
    inside = {name: parameter for name, parameter in model.layers.named_parameters() if parameter.dim() >= 2}
    matrices = [parameter for name, parameter in inside.items() if not name.endswith("gate")]
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    adamw = torch.optim.AdamW(others, lr=peak, betas=(0.9, 0.95), eps=1e-9, weight_decay=0.0, fused=True)
    return [Muon(matrices, lr=peak), adamw]


def main(argv: list[str] | None = None) -> None:
    """Prepare the data, train or resume, export."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)
    config = TinyMoeConfig(**arguments.sizes)
    streams = load_or_encode(
        arguments.work / "data", config.vocab_size, config.max_position_embeddings, arguments.limit_modules
    )
    model = TinyMoe(config, getattr(torch, arguments.dtype)).to(arguments.device)
    if arguments.compile:
        for layer in model.layers:
            layer.self_attn.compile(dynamic=False)
        model.head_loss = torch.compile(model.head_loss, dynamic=False)  # type: ignore[method-assign]
    optimizers = make_optimizers(model, arguments.learning_rate)
    total = sum(stream.size for name, stream in streams.items() if name.startswith("train."))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {total:,} training tokens", flush=True)

    state_file, step, elapsed_s = arguments.work / "state.pt", 0, 0.0
    if state_file.exists():
        state = torch.load(state_file, map_location=arguments.device)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, elapsed_s = state["step"], state["elapsed_s"]
        print(f"resuming at step {step}", flush=True)

    def save() -> None:
        partial = state_file.with_suffix(".partial")
        state = {
            "model": model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
            "step": step,
            "elapsed_s": elapsed_s,
        }
        torch.save(state, partial)
        partial.replace(state_file)

    start_s = time.monotonic() - elapsed_s
    long_from = arguments.steps - int(arguments.steps * arguments.long_share)
    while step < arguments.steps:
        context = arguments.context if step < long_from else arguments.long_context
        rows = max(1, arguments.tokens_per_step // context)
        inputs, targets = draw_batch(streams, rows, context, (arguments.seed, step))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(step, arguments.steps, arguments.learning_rate)
        loss, balance = model(inputs.to(arguments.device), targets.to(arguments.device))
        (loss + arguments.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
        step += 1
        elapsed_s = time.monotonic() - start_s
        if step % 20 == 0:
            print(f"step {step} loss {loss.item():.3f} balance {balance.item():.3f} {elapsed_s:.0f} s", flush=True)
        if step % arguments.save_every == 0 or step == arguments.steps:
            save()
            print(
                f"step {step} held-out {quick_losses(model, streams, arguments.context, arguments.device)}", flush=True
            )
    export(model, arguments.out)
    export_tokenizer(arguments.work / "data" / "tokenizer", arguments.out)
    facts = {"steps": step, "tokens": step * arguments.tokens_per_step, "minutes": round(elapsed_s / 60, 1)}
    (arguments.work / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    print(f"wrote {arguments.out}: {facts}", flush=True)


if __name__ == "__main__":
    main()
