"""Takes the tiny checkpoint apart in random ways, reproducibly: the files of a folder, and what is at fault in them.

A case changes what both sides read, or only the router's or only the shards' folder. What no reader can notice is left
out: other values of the same shape in a folder that both sides share.
"""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from experts.checkpoint.header import DTYPES, read_header

TINY = Path(__file__).parents[2] / "examples" / "tiny-moe"
INDEX = "model.safetensors.index.json"
SIDES = ("both", "router", "shard")


@dataclass(frozen=True)
class Stored:
    """A tensor as a file holds it."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def tensor(self) -> torch.Tensor:
        """Its values."""
        dtype = getattr(torch, DTYPES[self.dtype][0])
        return torch.frombuffer(bytearray(self.data), dtype=dtype).view(self.shape)


def stored(tensor: torch.Tensor) -> Stored:
    """The inverse of `Stored.tensor`."""
    names = {getattr(torch, name): short for short, (name, _) in DTYPES.items()}
    data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return Stored(names[tensor.dtype], tuple(tensor.shape), data)


def tiny_tensors() -> dict[str, Stored]:
    """Those of examples/tiny-moe."""
    path = TINY / "model.safetensors"
    data = path.read_bytes()
    return {
        name: Stored(entry.dtype_name, entry.shape, data[entry.start : entry.start + entry.nbytes])
        for name, entry in read_header(path).items()
    }


def tiny_config() -> dict[str, Any]:
    """Its config.json."""
    return json.loads((TINY / "config.json").read_text())


@dataclass
class Case:
    """A folder in the making. `files`: tensors by file; `raw`: files whose bytes are set, None for a directory."""

    random: random.Random
    files: dict[str, dict[str, Stored]]
    index: dict[str, str] | None
    config: dict[str, Any]
    raw: dict[str, bytes | None] = field(default_factory=dict)
    side: str = "both"
    steps: list[str] = field(default_factory=list)
    culprits: set[str] = field(default_factory=set)
    """Tensors and files at fault, of which a refusal has to name one; empty if nothing is."""

    def pick(self, wanted: Callable[[str, Stored], bool] = lambda name, tensor: True) -> tuple[str, str]:
        """(file, tensor) at random, of those wanted; dense ones as often as experts."""
        expert = self.random.random() < 0.5
        found = [(f, n) for f, held in self.files.items() for n, t in held.items() if wanted(n, t)]
        half = [(f, n) for f, n in found if (".experts." in n) == expert]
        return self.random.choice(sorted(half or found))

    def write(self, folder: Path) -> Path:
        """Write it all."""
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        if self.index is not None:
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": self.index}))
        for name, tensors in self.files.items():
            (folder / name).write_bytes(file_bytes(tensors))
        for name, data in self.raw.items():
            (folder / name).unlink(missing_ok=True)
            if data is None:
                (folder / name).mkdir()
            else:
                (folder / name).write_bytes(data)
        return folder


def file_bytes(tensors: dict[str, Stored]) -> bytes:
    """A safetensors file with the tensors in this order."""
    header, at = {}, 0
    for name, tensor in tensors.items():
        end = at + len(tensor.data)
        header[name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return b"".join([struct.pack("<Q", len(text)), text, *(tensor.data for tensor in tensors.values())])


def make_case(seed: int, tensors: dict[str, Stored], config: dict[str, Any]) -> Case:
    """The case of a seed: files and order at random, then one or two steps of `STEPS`."""
    rng = random.Random(seed)
    names = list(tensors)
    rng.shuffle(names)
    count = rng.choice([1, 1, 2, 3, 5])
    files: dict[str, dict[str, Stored]] = {
        f"model-{n + 1:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors": {
            name: tensors[name] for name in names[n::count]
        }
        for n in range(count)
    }
    index = {name: file for file, held in files.items() for name in held} if count > 1 or rng.random() < 0.3 else None
    case = Case(rng, files, index, dict(config), side=rng.choice(SIDES))
    for name in rng.sample(sorted(STEPS), rng.choice([1, 1, 1, 2])):
        case.steps.append(name)
        STEPS[name](case)
    return case


# --- the steps ----------------------------------------------------------------------------------------------------


def drop(case: Case) -> None:
    file, name = case.pick()
    where = case.random.choice(["file", "index", "both"]) if case.index is not None else "file"
    if where != "index":
        del case.files[file][name]
    if where != "file":
        assert case.index is not None
        case.index.pop(name, None)
    case.culprits.add(name)


def other_values(case: Case, tensor: Stored) -> Stored:
    """One value changed, or all."""
    data = bytearray(tensor.data)
    spots = range(len(data)) if case.random.random() < 0.5 else [case.random.randrange(len(data) // 2) * 2]
    for spot in spots:
        data[spot] ^= 0x01
    return replace(tensor, data=bytes(data))


def duplicate(case: Case) -> None:
    """A stale copy in a file of its own: harmless where an index decides."""
    file, name = case.pick()
    case.files["zz-stale.safetensors"] = {name: other_values(case, case.files[file][name])}
    if case.index is None:
        case.culprits |= {name, "zz-stale.safetensors"}
    elif len(case.files) > 2 and case.random.random() < 0.5:
        stale = case.files.pop("zz-stale.safetensors")
        other = case.random.choice(sorted(set(case.files) - {file}))
        case.files[other] |= stale


def truncate(case: Case) -> None:
    file = case.random.choice(sorted(case.files))
    whole = file_bytes(case.files[file])
    case.raw[file] = case.random.choice(
        [
            whole[: case.random.randrange(len(whole))],
            whole[:-1],
            b"",
            struct.pack("<Q", 1 << 62) + whole[8:],
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
            None,
        ]
    )
    case.culprits.add(file)


def same_shape(case: Case, name: str) -> list[tuple[str, str]]:
    shape = next(held[name].shape for held in case.files.values() if name in held)
    return sorted((f, n) for f, held in case.files.items() for n, t in held.items() if t.shape == shape and n != name)


def swap(case: Case) -> None:
    """Two tensors change places: of one shape on one side only, else of two shapes."""
    file, name = case.pick(lambda n, _: ".experts." in n or n.endswith("_proj.weight"))
    if case.side == "both":
        shape = case.files[file][name].shape
        other_file, other = case.pick(lambda _, t: t.shape != shape)
    else:
        other_file, other = case.random.choice(same_shape(case, name))
    first, second = case.files[file][name], case.files[other_file][other]
    case.files[file][name], case.files[other_file][other] = second, first
    case.culprits |= {name, other}


def one_sided_values(case: Case) -> None:
    if case.side == "both":
        return
    # Of larger tensors only windows are compared, and just one value may differ.
    file, name = case.pick(lambda _, t: len(t.data) <= 128 << 10)
    case.files[file][name] = other_values(case, case.files[file][name])
    case.culprits.add(name)


def reorder(case: Case) -> None:
    for file, held in case.files.items():
        names = list(held)
        case.random.shuffle(names)
        case.files[file] = {name: held[name] for name in names}


def reindex(case: Case) -> None:
    if case.index is None:
        case.index = {name: file for file, held in case.files.items() for name in held}
        case.culprits -= {"zz-stale.safetensors"}
    _, name = case.pick(lambda n, _: n in (case.index or {}))
    kind = case.random.choice(["shuffled", "moved", "nowhere", "invented"])
    if kind == "shuffled":
        names = list(case.index)
        case.random.shuffle(names)
        case.index = {n: case.index[n] for n in names}
    elif kind == "moved":
        others = [f for f, held in case.files.items() if name not in held]
        if others:
            case.index[name] = case.random.choice(sorted(others))
            case.culprits |= {name, case.index[name]}
    elif kind == "nowhere":
        case.index[name] = "gone.safetensors"
        case.culprits |= {"gone.safetensors", name}
    else:
        case.index["model.layers.1.invented.weight"] = case.index[name]
        case.culprits.add("model.layers.1.invented.weight")


def fuse(case: Case) -> None:
    """The experts of one layer, or of all, in two tensors as transformers may write them."""
    num_layers, E = case.config["num_hidden_layers"], case.config["num_experts"]
    layers = range(num_layers) if case.random.random() < 0.5 else [case.random.randrange(num_layers)]
    where = {n: f for f, held in case.files.items() for n in held if ".experts." in n and f not in case.raw}
    for layer in layers:
        stem = f"model.layers.{layer}.mlp.experts."
        names = [[f"{stem}{e}.{p}_proj.weight" for e in range(E)] for p in ("gate", "up", "down")]
        if not all(name in where for part in names for name in part):
            return
        gate, up, down = ([case.files[where[n]].pop(n).tensor() for n in part] for part in names)
        if len({t.shape for t in [*gate, *up]} | {t.t().shape for t in down}) > 1:
            return
        made = {
            stem + "gate_up_proj": stored(torch.stack([torch.cat(pair) for pair in zip(gate, up, strict=True)])),
            stem + "down_proj": stored(torch.stack(down)),
        }
        file = case.random.choice(sorted(set(case.files) - set(case.raw)))
        case.files[file] |= made
        if case.index is not None:
            for name in (n for part in names for n in part):
                case.index.pop(name, None)
            case.index |= dict.fromkeys(made, file)
        if len(layers) == 1 or case.side != "both":
            case.culprits |= {n for part in names for n in part}
            case.culprits |= {f"model.layers.{n}.mlp.experts.gate_up_proj" for n in range(num_layers)}


def quantize(case: Case) -> None:
    """A tensor as FP8 without a scale, or a quantization that the tensors do not have."""
    if case.random.random() < 0.7:
        file, name = case.pick(lambda _, t: len(t.shape) == 2)
        case.files[file][name] = stored(case.files[file][name].tensor().to(torch.float8_e4m3fn))
        case.culprits.add(name)
    else:
        case.config["quantization_config"] = {"quant_method": "awq"}
        case.culprits.add("awq")


def rename(case: Case) -> None:
    file, name = case.pick()
    new = case.random.choice([name + "s", name.replace("weight", "wait"), name.replace("layers.1", "layers.7"), "x"])
    if new == name:
        return
    case.files[file][new] = case.files[file].pop(name)
    if case.index is not None and name in case.index:
        case.index[new] = case.index.pop(name)
    case.culprits |= {name, new, new.removesuffix(".weight").removesuffix(".weights").removesuffix(".wait")}


def change_dtype(case: Case) -> None:
    """Wider without a loss, or as integers."""
    file, name = case.pick()
    kind = case.random.choice([torch.float32, torch.float64, torch.int8])
    case.files[file][name] = stored(case.files[file][name].tensor().to(kind))
    if kind == torch.int8 or case.side != "both":
        case.culprits.add(name)


def change_shape(case: Case) -> None:
    file, name = case.pick(lambda _, t: math.prod(t.shape) > 1)
    tensor = case.files[file][name].tensor()
    ways = [tensor[..., :-1], tensor[:1], tensor.flatten(), torch.cat([tensor, tensor]), tensor[None]]
    if tensor.dim() == 2:
        ways += [tensor.t(), torch.cat([tensor, tensor], 1), tensor[:-1]]
    changed = case.random.choice([way for way in ways if way.shape != tensor.shape])
    case.files[file][name] = stored(changed)
    case.culprits.add(name)


STEPS: dict[str, Callable[[Case], None]] = {
    step.__name__: step
    for step in (
        *(drop, duplicate, truncate, swap, one_sided_values, reorder, reindex, fuse, quantize, rename, change_dtype),
        change_shape,
    )
}
