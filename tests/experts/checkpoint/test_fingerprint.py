"""Fingerprints tell folders apart by their tensors, and not by how those lie in files."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from experts.checkpoint.fingerprint import WHOLE_BYTES, WINDOW_BYTES, Fingerprint, fingerprint_of
from experts.checkpoint.safetensors_file import TensorStore
from tests.support.hub_names import MAKERS, write

LARGE = WHOLE_BYTES + 5000


def fingerprint(folder: Path, tensors: dict[str, torch.Tensor], num_files: int = 1) -> Fingerprint:
    return fingerprint_of(TensorStore(write(folder, {}, tensors, num_files)))


def bytes_at(nbytes: int, changed: int | None = None) -> dict[str, torch.Tensor]:
    data = torch.arange(nbytes, dtype=torch.int64).to(torch.uint8)
    if changed is not None:
        data[changed] ^= 1
    return {"t": data, "other": torch.zeros(3)}


def test_the_same_tensors_in_other_files_are_the_same(tmp_path: Path) -> None:
    tensors = MAKERS["mixtral"]().tensors
    one, three = fingerprint(tmp_path / "one", tensors), fingerprint(tmp_path / "three", tensors, num_files=3)
    assert one == three
    assert sorted(one.name_of.values()) == sorted(tensors)
    assert len(one.to_bytes()) == 4 * len(tensors)
    assert one.differing(three.to_bytes()) == []


@settings(max_examples=20)
@given(st.integers(0, WHOLE_BYTES - 1))
def test_any_bit_of_a_tensor_that_is_hashed_whole_counts(
    tmp_path_factory: pytest.TempPathFactory, changed: int
) -> None:
    folder = tmp_path_factory.mktemp("bit")
    one = fingerprint(folder / "one", bytes_at(WHOLE_BYTES))
    other = fingerprint(folder / "other", bytes_at(WHOLE_BYTES, changed))
    assert one.differing(other.to_bytes()) == other.differing(one.to_bytes()) == ["t"]


def test_a_larger_tensor_is_hashed_at_its_ends_and_once_between(tmp_path: Path) -> None:
    one = fingerprint(tmp_path / "one", bytes_at(LARGE)).to_bytes()
    seen = []
    for start in range(0, LARGE, WINDOW_BYTES // 2):
        changed = fingerprint(tmp_path / "changed", bytes_at(LARGE, min(start, LARGE - 1)))
        seen.append(bool(changed.differing(one)))
    assert seen[:2] == [True, True]
    assert 5 <= sum(seen) <= 7
    last = fingerprint(tmp_path / "last", bytes_at(LARGE, LARGE - 1))
    assert last.differing(one) == ["t"]


def test_name_dtype_and_shape_count(tmp_path: Path) -> None:
    zeros = torch.zeros(4, 2)
    one = fingerprint(tmp_path / "one", {"t": zeros}).to_bytes()
    for number, (name, tensor) in enumerate([("u", zeros), ("t", zeros.t()), ("t", zeros.to(torch.int32))]):
        assert fingerprint(tmp_path / str(number), {name: tensor.contiguous()}).differing(one) == [name]


def test_what_one_side_did_not_fetch_is_not_compared(tmp_path: Path) -> None:
    tensors = MAKERS["mixtral"]().tensors
    whole = fingerprint(tmp_path, tensors, num_files=2)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    store = TensorStore(tmp_path)
    partial = fingerprint_of(store)
    assert len(partial.name_of) + len(partial.absent) == len(tensors)
    assert whole.differing(partial.to_bytes()) == partial.differing(whole.to_bytes()) == []
    here = next(name for name in tensors if store.is_here(name))
    away = next(name for name in tensors if not store.is_here(name))
    for name, noticed in ((here, True), (away, False)):
        changed = fingerprint(tmp_path / name, {**tensors, name: tensors[name] + 1})
        assert changed.differing(partial.to_bytes()) == ([name] if noticed else [])


def test_bytes_that_are_no_fingerprint_are_refused(tmp_path: Path) -> None:
    found = fingerprint(tmp_path, {"t": torch.zeros(1)})
    assert found.differing(b"") == ["t"]
    with pytest.raises(ValueError, match="a fingerprint of 5 bytes, expected a multiple of 4"):
        found.differing(b"12345")


def test_hashes_are_the_same_on_every_machine(tmp_path: Path) -> None:
    """Routers and shards may run on different ones."""
    save_file({"t": torch.arange(3, dtype=torch.int32)}, tmp_path / "model.safetensors")
    data = b"".join(number.to_bytes(4, "little") for number in range(3))
    expected = hashlib.blake2b(b"t\0I32\0(3,)\0" + data, digest_size=4).digest()
    assert fingerprint_of(TensorStore(tmp_path)).to_bytes() == expected
