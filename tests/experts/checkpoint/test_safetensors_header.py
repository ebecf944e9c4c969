"""Headers and byte ranges of safetensors files that are written here byte by byte."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from experts.checkpoint import CheckpointError
from experts.checkpoint.header import TensorEntry, read_header
from experts.checkpoint.safetensors_file import SafetensorsFile, TensorStore

DATA = bytes(range(64))


def file_with(folder: Path, header: dict[str, Any] | bytes, data: bytes = DATA, name: str = "model") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = folder / f"{name}.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: Any = "U8", shape: Any = (4,), offsets: Any = (8, 12)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_offsets_count_from_the_end_of_the_header(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "a": entry(), "b": entry("F32", (2, 3), (16, 40))}
    path = file_with(tmp_path, header)
    base = 8 + len(json.dumps(header))
    found = SafetensorsFile(path)
    assert found.entries == {
        "a": TensorEntry(path, "U8", (4,), base + 8, 4),
        "b": TensorEntry(path, "F32", (2, 3), base + 16, 24),
    }
    assert (found.entries["a"].dtype, found.entries["b"].dtype) == (torch.uint8, torch.float32)


@pytest.mark.parametrize(
    ("dtype", "itemsize", "expected"),
    [
        ("F64", 8, torch.float64),
        ("F32", 4, torch.float32),
        ("F16", 2, torch.float16),
        ("BF16", 2, torch.bfloat16),
        ("F8_E4M3", 1, torch.float8_e4m3fn),
        ("F8_E5M2", 1, torch.float8_e5m2),
        ("F8_E8M0", 1, torch.float8_e8m0fnu),
        ("I64", 8, torch.int64),
        ("I32", 4, torch.int32),
        ("I16", 2, torch.int16),
        ("I8", 1, torch.int8),
        ("U8", 1, torch.uint8),
        ("BOOL", 1, torch.bool),
    ],
)
def test_every_dtype_that_torch_has(tmp_path: Path, dtype: str, itemsize: int, expected: torch.dtype) -> None:
    file_with(tmp_path, {"t": entry(dtype, (2, 2), (0, 4 * itemsize))})
    assert TensorStore(tmp_path).entry("t").dtype == expected
    file_with(tmp_path, {"t": entry(dtype, (2, 2), (0, 4 * itemsize + 1))})
    text = rf"t has {4 * itemsize + 1} bytes, expected {4 * itemsize} for shape \[2, 2\] of {dtype}"
    with pytest.raises(CheckpointError, match=text):
        TensorStore(tmp_path)


def test_a_dtype_that_torch_lacks_is_refused_only_where_it_is_wanted(tmp_path: Path) -> None:
    store = TensorStore(file_with(tmp_path, {"odd": entry("F4", (8,), (0, 4)), "t": entry()}).parent)
    assert store.entry("t").dtype == torch.uint8
    with pytest.raises(CheckpointError, match=r"model\.safetensors: dtype .*F4.* one of \['BF16', 'BOOL'"):
        _ = store.entry("odd").dtype


@pytest.mark.parametrize(
    ("spoiled", "message"),
    [
        (entry(offsets=(8,)), "header entry of t is malformed"),
        (entry(offsets=(8, 10, 12)), "header entry of t is malformed"),
        (entry(offsets=None), "header entry of t is malformed"),
        (entry(shape=["x"]), "header entry of t is malformed"),
        (entry(shape=None), "header entry of t is malformed"),
        ({"shape": [4], "data_offsets": [8, 12]}, "header entry of t is malformed"),
        ("U8", "header entry of t is malformed: 'U8'"),
        (entry(offsets=(-4, 0)), "t ends at byte"),
        (entry(offsets=(61, 65)), "is it a partial download"),
        (entry(offsets=(12, 8)), "t has -4 bytes"),
        (entry(shape=(-2, -2)), "header entry of t is malformed"),
        (entry(shape=(4.0,)), "header entry of t is malformed"),
        (entry(shape=(True, 4)), "header entry of t is malformed"),
    ],
)
def test_an_entry_that_cannot_be_is_named(tmp_path: Path, spoiled: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        SafetensorsFile(file_with(tmp_path, {"t": spoiled}))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "header length -1 in a file of 0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "this is a Git LFS pointer of 57 bytes"),
        (struct.pack("<Q", 1 << 62) + b"{}", f"header length {1 << 62} in a file of 10 bytes"),
        (struct.pack("<Q", (1 << 64) - 1) + b"{}", f"header length {(1 << 64) - 1} in a file of 10 bytes"),
        (b"<!DOCTYPE html><html></html>", "is it a safetensors file"),
        (struct.pack("<Q", 4) + b"\xff\xfe{}", "the header is not JSON"),
        (struct.pack("<Q", 60_000) + b"[" * 60_000, "the header is not JSON"),
    ],
)
def test_what_is_no_safetensors_file_is_named(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=message) as found:
        read_header(path)
    assert str(path) in str(found.value)


def test_a_header_that_has_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    text = json.dumps({"a": entry(), "b": entry(offsets=(12, 16))}).replace('"b"', '"a"').encode()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: the header has a twice"):
        read_header(file_with(tmp_path, text))


def test_tensors_that_share_bytes_are_refused(tmp_path: Path) -> None:
    header = {"a": entry(offsets=(8, 12)), "b": entry(offsets=(11, 15)), "none": entry(shape=(0,), offsets=(9, 9))}
    with pytest.raises(CheckpointError, match=r"model\.safetensors: a and b share bytes: one ends at (\d+)"):
        read_header(file_with(tmp_path, header))
    header["b"] = entry(offsets=(12, 16))
    assert set(read_header(file_with(tmp_path, header))) == {"a", "b", "none"}


def test_what_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")  # opening one waits for a writer
    with pytest.raises(CheckpointError, match=r"pipe\.safetensors: cannot be read: it is a special file"):
        read_header(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"folder\.safetensors: cannot be read: it is a directory"):
        read_header(tmp_path / "folder.safetensors")
    path = file_with(tmp_path, {"a": entry()})

    def denied(*_: Any) -> None:  # root may read everything, so that a mode would not do
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", denied)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read: .*Permission denied"):
        read_header(path)


def test_a_tensor_may_reach_to_the_last_byte(tmp_path: Path) -> None:
    store = TensorStore(file_with(tmp_path, {"t": entry(shape=(4,), offsets=(60, 64))}).parent)
    found = store.entry("t")
    assert store.read(found, found.start, found.nbytes, (2, 2)).tolist() == [[60, 61], [62, 63]]


def test_the_smallest_header_and_one_that_fills_the_file(tmp_path: Path) -> None:
    assert SafetensorsFile(file_with(tmp_path, b"{}", b"")).entries == {}
    path = tmp_path / "x.safetensors"
    for data, length in (
        (struct.pack("<Q", 1) + b"{}", 1),
        (struct.pack("<Q", 3) + b"{}", 3),
        (b"1234567", -1),
        (struct.pack("<Q", 100_000_001) + b"{}", 100_000_001),
    ):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=f"header length {length} in a file of {len(data)} bytes") as found:
            SafetensorsFile(path)
        assert "JSON" not in str(found.value)


def test_a_header_of_more_than_the_formats_own_bound_is_refused_though_the_file_is_as_long(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", 100_000_001) + b"{}")
        file.truncate(200_000_000)  # sparse
    with pytest.raises(CheckpointError, match="header length 100000001 in a file of 200000000 bytes"):
        SafetensorsFile(path)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.safetensors: the file is missing"):
        SafetensorsFile(tmp_path / "none.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot be read: .*directory"):
        SafetensorsFile(tmp_path)


@pytest.mark.parametrize("shift", range(9))
def test_a_view_begins_where_it_is_asked_to(tmp_path: Path, shift: int) -> None:
    """Aligned it shares the mapping, else it is a copy; the values are the same."""
    found = SafetensorsFile(file_with(tmp_path, b"{" + b" " * shift + b"}", DATA * 200))
    base = 10 + shift
    for start in (0, 1, 4, 4000, 4096, 4097, 8192):
        expected = (DATA * 200)[start : start + 16]
        view = found.view(base + start, 16, torch.int32, (2, 2))
        assert view.shape == (2, 2)
        assert view.numpy().tobytes() == expected
        again = found.view(base + start, 16, torch.int32, (2, 2))
        assert (again.data_ptr() == view.data_ptr()) == ((base + start) % 4 == 0)


def test_nothing_is_a_view_of_any_place(tmp_path: Path) -> None:
    found = SafetensorsFile(file_with(tmp_path, b"{}"))
    view = found.view(10**9, 0, torch.bfloat16, (0, 7))
    assert (view.shape, view.dtype) == ((0, 7), torch.bfloat16)


# --- folders ------------------------------------------------------------------------------------------------------


def test_files_of_any_name_make_a_folder(tmp_path: Path) -> None:
    for name, tensor in (("x-2", "b"), ("x-1", "a")):
        file_with(tmp_path, {tensor: entry()}, name=name)
    store = TensorStore(tmp_path)
    assert [store.entry(name).file.name for name in ("a", "b")] == ["x-1.safetensors", "x-2.safetensors"]


def test_an_index_says_where_tensors_are_and_headers_are_read_when_needed(tmp_path: Path) -> None:
    file_with(tmp_path, {"a": entry()}, name="one")
    weight_map = {"a": "one.safetensors", "b": "two.safetensors", "c": "one.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    store = TensorStore(tmp_path)
    assert all(name in store for name in "abc")
    found = store.entry("a")
    assert store.read(found, found.start, 4, (4,)).tolist() == [8, 9, 10, 11]
    with pytest.raises(CheckpointError, match=r"two\.safetensors: the file is missing"):
        store.entry("b")
    with pytest.raises(CheckpointError, match="tensor c is missing, though"):
        store.entry("c")


@pytest.mark.parametrize("text", ["{", "[]", '{"weights": {}}', '{"weight_map": 3}', "3"])
def test_an_index_that_cannot_be_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: expected an object with a weight_map"):
        TensorStore(tmp_path)
