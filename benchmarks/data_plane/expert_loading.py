"""Loading a shard's experts from a cold page cache, against plain parallel reading of the same files.

    python -m benchmarks.data_plane.expert_loading [--quick] [--gigabytes 2] [--threads 1,4,8] [--kernel auto]

Makes a random Qwen3-MoE of 2 GB in four files (hidden 2048, expert width 768, bf16), and deletes it at the end. The two
sides take turns: threads that read the files from end to end in pieces of 8 MB and keep nothing, as `dd` does, and the
loader, which fills the slots of a kernel. Before each the files are dropped from the page cache. Goal: the loader's
bytes a second are at least 0.8 of what reading alone gets, in the median of the pairs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.common import TINY_MODEL, median, print_table, save
from experts.checkpoint import ExpertCheckpoint
from experts.kernels import KernelShape, pick_kernel
from experts.shard.slots import SlotTable
from placement.placement import Placement

GOAL = 0.8
HIDDEN, WIDTH, LAYERS, FILES = 2048, 768, 2, 4
PIECE_BYTES = 8 << 20
READING_THREADS = (1, 2, 4)  # the fastest counts


def make_checkpoint(folder: Path, num_experts: int) -> list[Path]:
    """A checkpoint with experts of real size; returns its weight files."""
    config = json.loads((TINY_MODEL / "config.json").read_text())
    config |= {
        "hidden_size": HIDDEN, "moe_intermediate_size": WIDTH, "num_hidden_layers": LAYERS, "num_experts": num_experts,
        "num_local_experts": num_experts, "num_experts_per_tok": 8, "dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    weight_map: dict[str, str] = {}
    generator = torch.Generator().manual_seed(0)
    share = LAYERS * num_experts // FILES
    for number in range(FILES):
        tensors: dict[str, torch.Tensor] = {}
        for index in range(number * share, (number + 1) * share):
            layer, expert = divmod(index, num_experts)
            for name, size in (("gate", (WIDTH, HIDDEN)), ("up", (WIDTH, HIDDEN)), ("down", (HIDDEN, WIDTH))):
                tensors[f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"] = torch.randint(
                    -9999, 9999, size, dtype=torch.int16, generator=generator
                ).view(torch.bfloat16)
        file = f"model-{number + 1:05d}-of-{FILES:05d}.safetensors"
        save_file(tensors, folder / file)
        weight_map |= dict.fromkeys(tensors, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return sorted(folder.glob("*.safetensors"))


def drop_from_cache(files: list[Path]) -> None:
    """Write the files out, and have the kernel forget them."""
    for path in files:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read_all(files: list[Path], num_threads: int) -> float:
    """Seconds to read the files with so many threads."""
    pieces: Iterator[tuple[int, int]]
    handles = [os.open(path, os.O_RDONLY) for path in files]
    pieces = iter([(h, at) for h in handles for at in range(0, os.fstat(h).st_size, PIECE_BYTES)])
    lock = threading.Lock()

    def read() -> None:
        buffer = bytearray(PIECE_BYTES)
        while True:
            with lock:
                piece = next(pieces, None)
            if piece is None:
                return
            os.preadv(piece[0], [buffer], piece[1])

    threads = [threading.Thread(target=read) for _ in range(num_threads)]
    start_s = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start_s
    for handle in handles:
        os.close(handle)
    return seconds


def load_all(folder: Path, kernel_name: str, num_threads: int) -> tuple[float, str]:
    """Seconds to fill the slots of a shard that holds every expert, and the kernel's name."""
    checkpoint = ExpertCheckpoint.open(folder)
    spec = checkpoint.spec
    shape = KernelShape(
        num_layers=spec.num_layers, num_slots=spec.num_experts, hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size, activation=spec.activation, has_bias=False, weight_on_input=False,
        dtype=torch.bfloat16, device="cpu",
    )  # fmt: skip
    kernel = pick_kernel(shape, kernel_name)
    slots = SlotTable(checkpoint, kernel, spec.num_experts, torch.bfloat16)
    placement = Placement.linear(spec.num_layers, spec.num_experts, 1)
    start_s = time.perf_counter()
    slots.load(placement, 0, num_threads)
    return time.perf_counter() - start_s, kernel.name


def main() -> None:
    """Print the table and write bench-results/expert_loading.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a checkpoint of 0.2 GB, one pair")
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint, %(default)s")
    parser.add_argument("--threads", default="1,4,8", help="threads of the loader, %(default)s")
    parser.add_argument("--kernel", default="auto", help="kernel whose slots are filled, %(default)s")
    parser.add_argument("--folder", default=None, help="where the checkpoint is made, the temporary folder")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the checkpoint is deleted
    pairs = 1 if args.quick else 3
    expert_bytes = 3 * HIDDEN * WIDTH * 2
    num_experts = FILES * round((0.2 if args.quick else args.gigabytes) * 1e9 / LAYERS / FILES / expert_bytes)
    rows = []
    with tempfile.TemporaryDirectory(prefix="expertmesh-loading-", dir=args.folder) as made:
        files = make_checkpoint(Path(made), num_experts)
        nbytes = sum(path.stat().st_size for path in files)
        seconds: dict[str, list[float]] = {}
        kernel = ""
        for _ in range(pairs):
            for threads in READING_THREADS:
                drop_from_cache(files)
                seconds.setdefault(f"read {threads}", []).append(read_all(files, threads))
            for threads in map(int, args.threads.split(",")):
                drop_from_cache(files)
                took_s, kernel = load_all(Path(made), args.kernel, threads)
                seconds.setdefault(f"load {threads}", []).append(took_s)
    best_reading_s = [min(seconds[f"read {n}"][i] for n in READING_THREADS) for i in range(pairs)]
    for name, values in seconds.items():
        ratio = median(best / value for best, value in zip(best_reading_s, values, strict=True))
        side, threads = name.split()
        rows.append(
            {"side": side, "threads": int(threads), "mb_s": nbytes / median(values) / 1e6, "of_fastest_reading": ratio}
        )
    print_table(
        f"{nbytes / 1e9:.2f} GB from a cold page cache, kernel {kernel}, medians of {pairs}; goal {GOAL}",
        list(rows[0]),
        [list(row.values()) for row in rows],
    )
    save("expert_loading", {"nbytes": nbytes, "kernel": kernel, "seconds": seconds, "rows": rows, "goal": GOAL})


if __name__ == "__main__":
    main()
