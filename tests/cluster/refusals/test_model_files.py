"""What is missing in a checkpoint's folder, and how the line names it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from cluster.refusals.model_files import folder_here, missing_tokenizer, missing_weights, read_config
from experts.checkpoint.index import INDEX_NAME as INDEX

TINY = Path(__file__).parents[3] / "examples" / "tiny-moe"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole checkpoint whose index names five files."""
    files = [f"model-{number}-of-5.safetensors" for number in range(1, 6)]
    for file in files:
        (tmp_path / file).write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {f"tensor{i}": file for i, file in enumerate(files)}}))
    for file in ("config.json", "tokenizer.json"):
        shutil.copy(TINY / file, tmp_path)
    return tmp_path


def test_a_whole_checkpoint_lacks_nothing(folder: Path) -> None:
    assert read_config(folder)["model_type"] == "qwen3_moe"
    assert [*missing_weights(folder), *missing_tokenizer(folder)] == []
    assert [*missing_weights(TINY), *missing_tokenizer(TINY)] == [], "one file without an index"


def test_files_that_the_index_names_are_looked_for(folder: Path) -> None:
    (folder / "model-2-of-5.safetensors").unlink()
    [line] = missing_weights(folder)
    assert line == (
        f"{folder} lacks model-2-of-5.safetensors of the 5 files that model.safetensors.index.json names: download the "
        "rest"
    )
    for number in (1, 3, 4, 5):
        (folder / f"model-{number}-of-5.safetensors").unlink()
    [line] = missing_weights(folder)
    assert "model-1-of-5.safetensors, model-2-of-5.safetensors, model-3-of-5.safetensors and 2 more" in line


def test_no_weights_at_all_are_noticed(folder: Path) -> None:
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    [line] = missing_weights(folder)
    assert line.startswith(f"{folder} holds no *.safetensors file")


@pytest.mark.parametrize("text", ["[", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": ["b"]}}'])
def test_an_index_that_is_none_is_named(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    [line] = missing_weights(folder)
    assert line.startswith(f"{folder / INDEX}: ")


def test_git_lfs_pointers_are_no_weights(folder: Path) -> None:
    (folder / "model-4-of-5.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"
    )
    [line] = missing_weights(folder)
    assert line == f"{folder} holds Git LFS pointers in place of model-4-of-5.safetensors: run git lfs pull there"


def test_a_missing_tokenizer_is_noticed(folder: Path) -> None:
    (folder / "tokenizer.json").rename(folder / "tokenizer_config.json")
    [line] = missing_tokenizer(folder)
    assert line.startswith(f"{folder} holds no tokenizer (tokenizer.json, ")
    for name in ("tokenizer.model.v3", "qwen.tiktoken", "vocab.json", "tekken.json"):
        (folder / name).touch()
        assert list(missing_tokenizer(folder)) == [], name
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("text", "expected"),
    [(None, "the file is missing"), ("{", "cannot be read as JSON"), ("[]", "JSON object")],
)
def test_a_config_json_that_is_none_is_named(folder: Path, text: str | None, expected: str) -> None:
    (folder / "config.json").unlink()
    if text is not None:
        (folder / "config.json").write_text(text)
    with pytest.raises(ValueError, match=expected) as caught:
        read_config(folder)
    assert str(caught.value).startswith(str(folder / "config.json"))


def test_a_folder_is_here_as_a_whole() -> None:
    assert folder_here(str(TINY)) == (TINY, True)
