"""Gate and up as one view of the file where they lie next to each other, and put together where they do not.

Legend: D hidden size, I expert intermediate size.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from experts.checkpoint import CheckpointError, ExpertCheckpoint

D, I = 6, 4
SHAPES = {"gate": (I, D), "up": (I, D), "down": (D, I)}
NAMES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def values(part: str, expert: int, dtype: torch.dtype) -> torch.Tensor:
    """Different integers for every part and expert, exact in every dtype."""
    start = 24 * (3 * expert + list(SHAPES).index(part))
    return torch.arange(start, start + D * I).reshape(SHAPES[part]).to(dtype)


def checkpoint(
    folder: Path, order: list[str], dtypes: dict[str, str] | None = None, second_file: tuple[str, ...] = ()
) -> ExpertCheckpoint:
    """One layer of two experts; parts lie in the file in this order, `hole` is eight bytes of nothing."""
    weight_map = {}
    for file, parts in (("a", [p for p in order if p not in second_file]), ("b", list(second_file))):
        header, data = {}, b""
        for expert in range(2):
            for part in parts:
                if part == "hole":
                    data += bytes(8)
                    continue
                dtype = (dtypes or {}).get(part, "F32")
                name = f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight"
                tensor = values(part, expert, NAMES[dtype])
                end = len(data) + tensor.numel() * tensor.element_size()
                header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [len(data), end]}
                data += tensor.view(torch.uint8).numpy().tobytes()
                weight_map[name] = f"{file}.safetensors"
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        (folder / f"{file}.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"model_type": "olmoe", "num_hidden_layers": 1, "num_experts": 2, "num_experts_per_tok": 1}
    config |= {"hidden_size": D, "intermediate_size": I}
    (folder / "config.json").write_text(json.dumps(config))
    found = ExpertCheckpoint.open(folder)
    found.check()
    return found


@pytest.mark.parametrize(
    ("order", "dtypes", "second_file", "shared"),
    [
        (["gate", "up", "down"], {}, (), torch.float32),
        (["down", "gate", "up"], {}, (), torch.float32),
        (["gate", "up", "hole", "down"], {}, (), torch.float32),
        (["up", "gate", "down"], {}, (), None),
        (["gate", "down", "up"], {}, (), None),
        (["gate", "hole", "up", "down"], {}, (), None),
        (["gate", "up", "down"], {"up": "BF16"}, (), None),
        (["gate", "up", "down"], {"gate": "F16", "up": "F16"}, (), torch.float16),
        (["gate", "up", "down"], {}, ("up",), None),
        (["gate", "up", "down"], {}, ("gate", "up"), torch.float32),
    ],
)
def test_wherever_gate_and_up_lie(
    tmp_path: Path, order: list[str], dtypes: dict[str, str], second_file: tuple[str, ...], shared: torch.dtype | None
) -> None:
    found = checkpoint(tmp_path, order, dtypes, second_file)
    for dtype in NAMES.values():
        for expert in (0, 1):
            read, again = (found.read_expert(0, expert, dtype) for _ in range(2))
            gate, up, down = (values(part, expert, dtype) for part in SHAPES)
            assert torch.equal(read.w13_2ID, torch.cat([gate, up]))
            assert torch.equal(read.w2_DI, down)
            assert {read.w13_2ID.dtype, read.w2_DI.dtype} == {dtype}
            assert read.w13_2ID.is_contiguous()
            # A view of the file, twice the same, or two copies.
            assert (read.w13_2ID.data_ptr() == again.w13_2ID.data_ptr()) == (dtype == shared)
            assert (read.w2_DI.data_ptr() == again.w2_DI.data_ptr()) == (dtype == torch.float32)


def test_bytes_of_an_expert_are_those_of_its_parts(tmp_path: Path) -> None:
    assert checkpoint(tmp_path, ["gate", "up", "down"], {"down": "BF16"}).expert_bytes == (4 + 4 + 2) * D * I


@pytest.mark.parametrize(("layer", "expert"), [(-1, 0), (1, 0), (0, -1), (0, 2)])
def test_a_place_that_is_none_is_named(tmp_path: Path, layer: int, expert: int) -> None:
    what, value, last = ("expert", expert, 1) if layer == 0 else ("layer", layer, 0)
    with pytest.raises(ValueError, match=rf"{what} is {value}, expected 0\.\.{last}"):
        checkpoint(tmp_path, ["gate", "up", "down"]).read_expert(layer, expert, torch.float32)


@pytest.mark.parametrize("missing", [(0, "down"), (1, "gate"), (1, "up"), (1, "down")])
def test_every_tensor_of_every_expert_is_checked(tmp_path: Path, missing: tuple[int, str]) -> None:
    found = checkpoint(tmp_path, ["gate", "up", "down"])
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = f"model.layers.0.mlp.experts.{missing[0]}.{missing[1]}_proj.weight"
    del index["weight_map"][name]
    path.write_text(json.dumps(index))
    found = ExpertCheckpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match=f"tensor {name} is missing"):
        found.check()


def test_as_many_experts_a_token_as_there_are_and_no_more(tmp_path: Path) -> None:
    checkpoint(tmp_path, ["gate", "up", "down"])
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_experts_per_tok": 2}))
    assert ExpertCheckpoint.open(tmp_path).spec.top_k == 2
    path.write_text(json.dumps(config | {"num_experts_per_tok": 3}))
    with pytest.raises(CheckpointError, match=r"config\.json: top-3 of 2 experts"):
        ExpertCheckpoint.open(tmp_path)
