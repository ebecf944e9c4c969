"""Reads touch only the requested bytes and copy only if they must; broken files are named."""

from __future__ import annotations

import json
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from experts.checkpoint import CheckpointError, ExpertCheckpoint
from experts.checkpoint.safetensors_file import SafetensorsFile, TensorStore
from tests.support.hub_names import MAKERS, D, E, I, write


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "dbrx", "llama4"])
def test_reads_no_byte_of_another_expert(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = MAKERS[name]()
    checkpoint = ExpertCheckpoint.open(write(tmp_path, made.config, made.tensors))
    touched: list[tuple[int, int]] = []
    view = SafetensorsFile.view

    def counted(self: SafetensorsFile, start: int, nbytes: int, *args: object) -> torch.Tensor:
        touched.append((start, start + nbytes))
        return view(self, start, nbytes, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(SafetensorsFile, "view", counted)
    seen: set[int] = set()
    for layer in range(checkpoint.spec.num_layers):
        for expert in range(E):
            touched.clear()
            checkpoint.read_expert(layer, expert, torch.float32)
            touched_bytes = {byte for first, last in touched for byte in range(first, last)}
            assert len(touched_bytes) == sum(last - first for first, last in touched) == checkpoint.expert_bytes
            assert not seen & touched_bytes
            seen |= touched_bytes


def test_an_expert_of_a_file_larger_than_memory(tmp_path: Path) -> None:
    """A sparse file of a tebibyte: reading more than one expert would not finish."""
    experts, size_D, size_I = 1024, 16384, 8192
    each = size_D * size_I * 2
    names = [(e, p) for e in range(experts) for p in ("down_proj", "gate_proj", "up_proj")]
    header, offset = {}, 0
    for expert, part in names:
        shape = [size_D, size_I] if part == "down_proj" else [size_I, size_D]
        name = f"model.layers.0.mlp.experts.{expert}.{part}.weight"
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + each]}
        offset += each
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.seek(8 + len(text) + names.index((700, "gate_proj")) * each)
        file.write(torch.full((4,), 1.5, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes())
        file.truncate(8 + len(text) + offset)
    made = MAKERS["qwen3_moe"]()
    made.config |= {"num_hidden_layers": 1, "num_experts": experts, "mlp_only_layers": []}
    made.config |= {"hidden_size": size_D, "moe_intermediate_size": size_I}
    (tmp_path / "config.json").write_text(json.dumps(made.config))
    checkpoint = ExpertCheckpoint.open(tmp_path)
    checkpoint.check()
    got = checkpoint.read_expert(0, 700, torch.bfloat16)
    assert got.w13_2ID.shape == (2 * size_I, size_D)
    assert got.w13_2ID[0, :5].tolist() == [1.5, 1.5, 1.5, 1.5, 0.0]
    assert got.w2_DI.shape == (size_D, size_I)
    assert got.w2_DI[-1, -1].item() == 0.0


def test_neighbours_of_the_right_dtype_are_not_copied(tmp_path: Path) -> None:
    made = MAKERS["qwen3_moe"]()
    # The writer pads the header to 8 bytes and sorts by name: down, gate, up.
    checkpoint = ExpertCheckpoint.open(write(tmp_path, made.config, made.tensors))
    first, second = (checkpoint.read_expert(1, 2, torch.float32) for _ in range(2))
    assert first.w13_2ID.data_ptr() == second.w13_2ID.data_ptr()
    assert first.w2_DI.data_ptr() == second.w2_DI.data_ptr()
    converted = [checkpoint.read_expert(1, 2, torch.bfloat16).w2_DI for _ in range(2)]
    assert converted[0].data_ptr() != converted[1].data_ptr()


def test_writing_to_a_view_does_not_reach_the_file(tmp_path: Path) -> None:
    made = MAKERS["qwen3_moe"]()
    folder = write(tmp_path, made.config, made.tensors)
    before = (folder / "model.safetensors").read_bytes()
    ExpertCheckpoint.open(folder).read_expert(0, 0, torch.float32).w2_DI.zero_()
    assert (folder / "model.safetensors").read_bytes() == before


def test_a_view_outlives_its_checkpoint(tmp_path: Path) -> None:
    made = MAKERS["olmoe"]()
    weights = ExpertCheckpoint.open(write(tmp_path, made.config, made.tensors)).read_expert(0, 1, torch.float32)
    assert torch.equal(weights.w2_DI, made.experts[0, 1][2])


@pytest.mark.parametrize("fate", ["deleted", "replaced"])
def test_a_checked_checkpoint_outlives_its_files(tmp_path: Path, fate: str) -> None:
    """A router first reads an expert when its last shard is lost, perhaps days after the start."""
    made = MAKERS["olmoe"]()
    folder = write(tmp_path, made.config, made.tensors, num_files=2)
    checkpoint = ExpertCheckpoint.open(folder)
    checkpoint.check()
    for path in folder.glob("*.safetensors"):
        if fate == "replaced":
            other = path.with_suffix(".new")
            other.write_bytes(bytes(path.stat().st_size))
            other.rename(path)
        else:
            path.unlink()
    weights = checkpoint.read_expert(0, 1, torch.float32)
    assert torch.equal(weights.w2_DI, made.experts[0, 1][2])


@pytest.mark.parametrize("shift", [1, 2, 4])
def test_unaligned_tensors_are_read(tmp_path: Path, shift: int) -> None:
    """Older writers did not pad the header, so data may start at any offset."""
    made = MAKERS["mixtral"]()
    folder = write(tmp_path, made.config, made.tensors)
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    longer = struct.pack("<Q", length + shift) + data[8 : 8 + length] + b" " * shift + data[8 + length :]
    (folder / "model.safetensors").write_bytes(longer)
    got = ExpertCheckpoint.open(folder).read_expert(1, 2, torch.float32)
    assert torch.equal(got.w13_2ID, torch.cat(made.experts[1, 2][:2]))


def test_several_threads_read_at_once(tmp_path: Path) -> None:
    made = MAKERS["mixtral"]()
    checkpoint = ExpertCheckpoint.open(write(tmp_path, made.config, made.tensors, num_files=3))
    barrier = threading.Barrier(4)

    def read_all(_: int) -> bool:
        barrier.wait(30)
        return all(
            torch.equal(checkpoint.read_expert(layer, expert, torch.float32).w2_DI, made.experts[layer, expert][2])
            for layer in range(2)
            for expert in range(E)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read_all, range(4)))


@pytest.mark.parametrize(
    ("layer", "expert", "dtype", "message"),
    [
        (2, 0, torch.float32, "layer is 2, expected 0..1"),
        (-1, 0, torch.float32, "layer is -1, expected 0..1"),
        (0, E, torch.float32, "expert is 3, expected 0..2"),
        (0, 0, torch.float64, "dtype is torch.float64, expected one of torch.float32"),
    ],
)
def test_what_is_not_there_is_not_read(
    tmp_path: Path, layer: int, expert: int, dtype: torch.dtype, message: str
) -> None:
    made = MAKERS["mixtral"]()
    checkpoint = ExpertCheckpoint.open(write(tmp_path, made.config, made.tensors))
    with pytest.raises(ValueError, match=message):
        checkpoint.read_expert(layer, expert, dtype)


@pytest.mark.parametrize("name", ["qwen3_moe", "dbrx", "gpt_oss"])
def test_check_names_the_first_missing_or_misshapen_tensor(tmp_path: Path, name: str) -> None:
    made = MAKERS[name]()
    for index, tensor in enumerate(sorted(made.tensors)):
        rest = {key: value for key, value in made.tensors.items() if key != tensor}
        with pytest.raises(CheckpointError, match=f"tensor {tensor} .*is missing"):
            ExpertCheckpoint.open(write(tmp_path / f"missing{index}", made.config, rest)).check()
        wrong = {**rest, tensor: made.tensors[tensor][..., :-1].clone()}
        with pytest.raises(CheckpointError, match=f"{tensor} has shape .* expected "):
            ExpertCheckpoint.open(write(tmp_path / f"wrong{index}", made.config, wrong)).check()


def test_an_integer_tensor_is_refused(tmp_path: Path) -> None:
    made = MAKERS["mixtral"]()
    name = "model.layers.1.block_sparse_moe.experts.0.w2.weight"
    made.tensors[name] = torch.zeros(D, I, dtype=torch.int32)
    with pytest.raises(CheckpointError, match=f"{name} is I32, expected float32, bfloat16"):
        ExpertCheckpoint.open(write(tmp_path, made.config, made.tensors)).check()


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere is not a folder; expected a downloaded Hugging Face checkpoint"):
        ExpertCheckpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json: the file is missing"):
        ExpertCheckpoint.open(tmp_path)
    made = MAKERS["mixtral"]()
    (tmp_path / "config.json").write_text(json.dumps(made.config))
    with pytest.raises(CheckpointError, match=r"neither model.safetensors.index.json nor a .safetensors file"):
        ExpertCheckpoint.open(tmp_path)
    write(tmp_path, made.config, made.tensors, num_files=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: the file is missing"):
        ExpertCheckpoint.open(tmp_path).check()


def test_files_without_an_index_are_found(tmp_path: Path) -> None:
    made = MAKERS["mixtral"]()
    write(tmp_path, made.config, made.tensors, num_files=3)
    (tmp_path / "model.safetensors.index.json").unlink()
    ExpertCheckpoint.open(tmp_path).check()


def test_an_index_that_is_wrong_is_named(tmp_path: Path) -> None:
    made = MAKERS["mixtral"]()
    write(tmp_path, made.config, made.tensors, num_files=2)
    path = tmp_path / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    name = sorted(index["weight_map"])[0]
    other = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} - {index["weight_map"][name]}
    index["weight_map"][name] = other.pop()
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=f"{name} is missing, though model.safetensors.index.json says"):
        ExpertCheckpoint.open(tmp_path).check()
    path.write_text("[]")
    with pytest.raises(CheckpointError, match="expected an object with a weight_map"):
        ExpertCheckpoint.open(tmp_path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    made = MAKERS["mixtral"]()
    path = write(tmp_path, made.config, made.tensors) / "model.safetensors"
    whole = path.read_bytes()
    for data, message in (
        (whole[:-1], "ends at byte .* the file has .*; is it a partial download"),
        (b"", "header length -1 in a file of 0 bytes"),
        (struct.pack("<Q", 1 << 60) + whole[8:], "header length 1152921504606846976 in a file of"),
        (whole[:8] + b"x" + whole[9:], "the header is not JSON"),
        (struct.pack("<Q", 2) + b"[]", "the header is a JSON list, expected an object"),
        (whole.replace(b'"F32"', b'"F16"', 1), "bytes, expected .* of F16"),
        (whole.replace(b"data_offsets", b"data_0ffsets", 1), "header entry of .* is malformed"),
    ):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=message):
            TensorStore(tmp_path)
