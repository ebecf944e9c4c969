"""Files of a checkpoint that are missing, told from its folder without opening a tensor."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from experts.checkpoint.errors import CheckpointError
from experts.checkpoint.hf_config import read_json_object
from experts.checkpoint.index import INDEX_NAME, WeightIndex
from experts.checkpoint.sources.base import CONFIG_NAME, refuse_gguf
from experts.checkpoint.sources.folder import FolderSource
from experts.checkpoint.sources.opening import open_source

# One of these is there in every checkpoint with a tokenizer: the vocabulary, or the code that knows it.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model*", "tekken.json", "*.tiktoken", "tiktoken.model", "vocab.*", "merges.txt"),
    *("spiece.model", "sentencepiece*.model", "tokenization_*.py"),
)
_LFS = b"version https://git-lfs"
_NAMED = 3  # of a list of missing files


def folder_here(model: str) -> tuple[Path, bool]:
    """(a folder with at least config.json, whether the whole checkpoint is in it) for a model with fixed contents."""
    source = open_source(model)
    return source.fetch([CONFIG_NAME]) if source.remote else Path(model), not source.remote


def read_config(folder: Path) -> dict[str, Any]:
    """The values of config.json. CheckpointError names the file if it is missing or no JSON object, or says that all
    weights of the folder are in GGUF.
    """
    refuse_gguf(folder, FolderSource(folder).files())
    return read_json_object(folder / CONFIG_NAME, "a downloaded Hugging Face checkpoint")


def missing_weights(folder: Path) -> Iterator[str]:
    """One line for files of weights that are named in the index and not there, or if there are none at all."""
    if not (folder / INDEX_NAME).exists():
        if not any(folder.glob("*.safetensors")):
            yield f"{folder} holds no *.safetensors file and no {INDEX_NAME}: download the checkpoint's weights"
        return
    try:
        files = sorted(set(WeightIndex.of_folder(folder).file_of.values()))
    except CheckpointError as error:
        yield str(error)
        return
    gone = [file for file in files if not (folder / file).is_file()]
    if gone:
        yield f"{folder} lacks {_list(gone)} of the {len(files)} files that {INDEX_NAME} names: download the rest"
    pointers = [file for file in files if file not in gone and _is_lfs_pointer(folder / file)]
    if pointers:
        yield f"{folder} holds Git LFS pointers in place of {_list(pointers)}: run git lfs pull there"


def missing_tokenizer(folder: Path) -> Iterator[str]:
    """One line if there is no tokenizer in the folder."""
    names = [path.name for path in folder.iterdir()]
    if not any(fnmatch(name, pattern) for name in names for pattern in TOKENIZER_FILES):
        yield (
            f"{folder} holds no tokenizer ({', '.join(TOKENIZER_FILES[:3])}, ...): download it, or name another folder "
            "in routers.engine_kwargs.tokenizer"
        )


def _is_lfs_pointer(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS


def _list(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
