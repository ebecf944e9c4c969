"""Which file a tensor comes from: the index decides, or without one the headers; what they leave open is refused."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from experts.checkpoint import CheckpointError
from experts.checkpoint.index import INDEX_NAME, WeightIndex
from experts.checkpoint.safetensors_file import TensorStore

ROOT = Path(__file__).parents[3]


def file_with(folder: Path, name: str, tensors: dict[str, int]) -> None:
    """One byte a tensor."""
    header = {tensor: {"dtype": "U8", "shape": [1], "data_offsets": [at, at + 1]} for at, tensor in enumerate(tensors)}
    text = json.dumps(header).encode()
    (folder / name).write_bytes(struct.pack("<Q", len(text)) + text + bytes(tensors.values()))


def index_with(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def value(folder: Path, name: str) -> int:
    store = TensorStore(folder)
    entry = store.entry(name)
    return int(store.read(entry, entry.start, 1, (1,)).item())


def test_the_index_alone_says_it(tmp_path: Path) -> None:
    index_with(tmp_path, {"b": "two.safetensors", "a": "one.safetensors", "c": "one.safetensors"})
    index = WeightIndex.of_folder(tmp_path)
    assert not index.from_headers
    assert index.files == ("one.safetensors", "two.safetensors")
    assert index.files_of(["a", "c"]) == ("one.safetensors",)
    assert index.path_of("b") == tmp_path / "two.safetensors"
    assert "a" in index
    assert "d" not in index
    with pytest.raises(CheckpointError, match="tensor d is missing"):
        index.files_of(["a", "d"])


def test_a_tensor_in_two_files_comes_from_the_one_that_the_index_names(tmp_path: Path) -> None:
    file_with(tmp_path, "old.safetensors", {"a": 1, "b": 2})
    file_with(tmp_path, "new.safetensors", {"a": 3})
    index_with(tmp_path, {"a": "new.safetensors", "b": "old.safetensors"})
    assert (value(tmp_path, "a"), value(tmp_path, "b")) == (3, 2)


def test_a_file_that_the_index_does_not_name_is_not_opened(tmp_path: Path) -> None:
    file_with(tmp_path, "model.safetensors", {"a": 1})
    (tmp_path / "zz-stale.safetensors").write_bytes(b"no header")
    index_with(tmp_path, {"a": "model.safetensors"})
    assert value(tmp_path, "a") == 1


def test_without_an_index_all_files_count_and_a_tensor_in_two_is_refused(tmp_path: Path) -> None:
    file_with(tmp_path, "model.safetensors", {"a": 1})
    file_with(tmp_path, "more.safetensors", {"b": 2})
    index = WeightIndex.of_folder(tmp_path)
    assert index.from_headers
    assert dict(index.file_of) == {"a": "model.safetensors", "b": "more.safetensors"}
    file_with(tmp_path, "stale.safetensors", {"b": 3})
    message = r"tensor b is in more\.safetensors and in stale\.safetensors, and no .* remove the stale file"
    with pytest.raises(CheckpointError, match=message):
        WeightIndex.of_folder(tmp_path)


def test_hidden_files_do_not_count(tmp_path: Path) -> None:
    """macOS leaves one beside each file that it copies."""
    file_with(tmp_path, "model.safetensors", {"a": 1})
    (tmp_path / "._model.safetensors").write_bytes(b"resource fork")
    assert value(tmp_path, "a") == 1


@pytest.mark.parametrize("file", ["/etc/passwd", "../other/model.safetensors", "", "a/../../b", 3, None, "x\0y"])
def test_an_index_does_not_lead_out_of_its_folder(tmp_path: Path, file: object) -> None:
    index_with(tmp_path, {"a": "one.safetensors", "b": file})  # type: ignore[dict-item]
    with pytest.raises(CheckpointError, match=r"index\.json: b is said to be in .*, expected a file in this folder"):
        WeightIndex.of_folder(tmp_path)


def test_an_index_that_names_two_files_for_a_tensor_is_refused(tmp_path: Path) -> None:
    text = '{"weight_map": {"a": "one.safetensors", "b": "one.safetensors", "a": "two.safetensors"}}'
    with pytest.raises(CheckpointError, match=r"a is said to be in one\.safetensors and in two\.safetensors"):
        WeightIndex.from_json(text, tmp_path)
    assert WeightIndex.from_json(text.replace("two", "one"), tmp_path).files == ("one.safetensors",)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', "", "\xff", "[" * 100_000])
def test_an_index_that_says_nothing_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json: "):
        WeightIndex.of_folder(tmp_path)


def test_an_index_that_cannot_be_read_is_not_taken_for_none(tmp_path: Path) -> None:
    file_with(tmp_path, "model.safetensors", {"a": 1})
    (tmp_path / INDEX_NAME).symlink_to(tmp_path / "gone")
    with pytest.raises(CheckpointError, match=r"index\.json: cannot be read"):
        WeightIndex.of_folder(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    (tmp_path / INDEX_NAME).mkdir()
    with pytest.raises(CheckpointError, match=r"index\.json: cannot be read: .*directory"):
        WeightIndex.of_folder(tmp_path)


def test_the_index_needs_no_torch() -> None:
    code = "import sys, experts.checkpoint.index as i; print(i.INDEX_NAME, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == [INDEX_NAME, "False"], done.stderr
