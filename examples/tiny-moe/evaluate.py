"""Prints the held-out loss by domain beside a trigram baseline, and how experts specialize; writes metrics.json.

    python examples/tiny-moe/evaluate.py

It loads the exported checkpoint through transformers in float32, so it measures what is served. Every choice favours
the baseline: in each domain it is the best mixture of a trigram of that domain and one of all training text, with the
share chosen on the held-out tokens themselves, and it always has two tokens of context, while the model starts each
window with none.
"""

import argparse
import json
import platform
import unicodedata
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from corpus import DOMAINS
from tiny_tokenizer import encode_corpus
from transformers import AutoTokenizer, Qwen3MoeForCausalLM
from trigram import Trigram, best_mixture_loss

HERE = Path(__file__).resolve().parent
TOP = 8


@torch.no_grad()
def score(model: Qwen3MoeForCausalLM, stream: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Losses and routing over consecutive windows of `stream`.

    Returns:
        Loss in nats of each token, float32 [N]; expert loads, int64 [L, E]; pairs chosen together, int64 [L, E, E].
    """
    config = model.config
    shape = (config.num_hidden_layers, config.num_experts)
    losses, loads_LE = [], np.zeros(shape, dtype=np.int64)
    pairs_LEE = np.zeros((*shape, config.num_experts), dtype=np.int64)
    for start in range(0, len(stream) - 1, window):
        ids = torch.from_numpy(stream[start : start + window + 1].astype(np.int64))
        if len(ids) < 2:
            break
        output = model(input_ids=ids[None, :-1], output_router_logits=True, use_cache=False)
        losses.append(F.cross_entropy(output.logits[0].float(), ids[1:], reduction="none").numpy())
        for layer, logits_TE in enumerate(output.router_logits):
            chosen_TE = torch.zeros_like(logits_TE)
            chosen_TE.scatter_(1, logits_TE.topk(config.num_experts_per_tok, dim=-1).indices, 1.0)
            loads_LE[layer] += chosen_TE.sum(0).long().numpy()
            pairs_LEE[layer] += (chosen_TE.T @ chosen_TE).long().numpy()
    return np.concatenate(losses), loads_LE, pairs_LEE


def specialization(loads_DLE: np.ndarray, pairs_LEE: np.ndarray) -> dict[str, object]:
    """How far routing is from even, from loads [domains, L, E] and pairs [L, E, E], domains weighted equally."""
    shares = loads_DLE / loads_DLE.sum(-1, keepdims=True)
    top = np.sort(shares, axis=-1)[..., -TOP:].sum(-1).mean(-1)
    smoothed = (loads_DLE + 0.5) / (loads_DLE + 0.5).sum(-1, keepdims=True)
    kl = [
        (smoothed[a] * np.log(smoothed[a] / smoothed[b])).sum(-1).mean()
        for first, second in combinations(range(len(shares)), 2)
        for a, b in ((first, second), (second, first))
    ]
    upper = np.triu_indices(pairs_LEE.shape[-1], 1)
    pairs = np.sort(np.stack([layer[upper] for layer in pairs_LEE]), axis=-1)[:, ::-1]
    tenth = pairs.shape[-1] // 10
    return {
        "top_experts": TOP,
        "uniform_share_of_top_experts": TOP / loads_DLE.shape[-1],
        "share_of_top_experts": {name: round(float(value), 3) for name, value in zip(DOMAINS, top, strict=True)},
        "mean_pairwise_kl_nats": round(float(np.mean(kl)), 3),
        "share_of_top_tenth_of_pairs": round(float((pairs[:, :tenth].sum(-1) / pairs.sum(-1)).mean()), 3),
        "balancedness_of_experts": round(float((loads_DLE.sum(0).mean(-1) / loads_DLE.sum(0).max(-1)).mean()), 3),
    }


def print_table(metrics: dict) -> None:
    """The losses as a Markdown table, then the routing figures."""
    print("| domain | held-out tokens | this model | trigram | own-domain trigram | pooled trigram |")
    print("|---|---|---|---|---|---|")
    for name, row in metrics["loss_nats_per_token"].items():
        cells = " | ".join(f"{row[key]:.3f}" for key in ("model", "trigram", "trigram_own_domain", "trigram_pooled"))
        print(f"| {name} | {row['tokens']:,} | {cells} |")
    print(json.dumps(metrics["routing"], indent=1))


def main() -> None:
    """Evaluate, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=HERE)
    parser.add_argument("--work", type=Path, default=HERE / "build", help="where train.py noted its time")
    parser.add_argument("--tokens", type=int, default=60_000, help="held-out tokens a domain, at most")
    parser.add_argument("--window", type=int, default=1024, help="tokens that are scored together")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    model = Qwen3MoeForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    config = model.config
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    streams, _ = encode_corpus(tokenizer, config.vocab_size, config.max_position_embeddings)
    domains = (*DOMAINS, "chat")
    pooled = Trigram(np.concatenate([streams[f"train.{name}"] for name in domains]), config.vocab_size)
    rows, loads, pairs_LEE = {}, [], np.zeros(1, dtype=np.int64)
    for name in domains:
        held_out = streams[f"held_out.{name}"][: arguments.tokens]
        losses, loads_LE, domain_pairs_LEE = score(model, held_out, arguments.window)
        own_p = Trigram(streams[f"train.{name}"], config.vocab_size).probabilities(held_out)
        pooled_p = pooled.probabilities(held_out)
        best, share = best_mixture_loss(own_p, pooled_p)
        rows[name] = {
            "tokens": len(own_p),
            "model": round(float(losses[1:].mean()), 4),  # the tokens the trigram scores: from the third on
            "trigram": round(best, 4),
            "trigram_share_of_own_domain": share,
            "trigram_own_domain": round(float(-np.log(own_p).mean()), 4),
            "trigram_pooled": round(float(-np.log(pooled_p).mean()), 4),
        }
        if name in DOMAINS:
            per_token = 30_000 / len(losses)  # equal weight for every domain
            loads.append(loads_LE * per_token)
            pairs_LEE = pairs_LEE + domain_pairs_LEE * per_token
    training = arguments.work / "training.json"
    metrics = {
        "loss_nats_per_token": rows,
        "routing": specialization(np.stack(loads), pairs_LEE),
        "load_share": {
            name: np.round(layer / layer.sum(-1, keepdims=True), 4).tolist()
            for name, layer in zip(DOMAINS, loads, strict=True)
        },
        "training": json.loads(training.read_text()) if training.exists() else None,
        "training_tokens": {name: int(streams[f"train.{name}"].size) for name in domains},
        "corpus": {"python": platform.python_version(), "unicode": unicodedata.unidata_version},
    }
    print_table(metrics)
    (arguments.model / "metrics.json").write_text(json.dumps(metrics) + "\n")
    print(f"wrote {arguments.model / 'metrics.json'}")


if __name__ == "__main__":
    main()
