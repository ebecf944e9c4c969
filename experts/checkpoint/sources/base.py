"""What every source of a checkpoint offers, and which of its files are what."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path, PurePosixPath

from experts.checkpoint.errors import GGUF, CheckpointError

CONFIG_NAME = "config.json"
QUANTIZATION_NAME = "hf_quant_config.json"  # where older versions of ModelOpt describe what config.json does not
INDEX_NAME = "model.safetensors.index.json"
WEIGHTS_SUFFIX = ".safetensors"
# At the top of a repository beside the safetensors files: the same weights in other formats, and what is for people.
_OTHER_WEIGHTS = ".bin .pt .pth .ckpt .gguf .ggml .onnx .h5 .msgpack .ot .npz .tflite .mlmodel .nemo .tar .gz .zip"
_FOR_PEOPLE = ".md .pdf .png .jpg .jpeg .gif .webp .svg .mp4 .ipynb"
_UNUSED_SUFFIXES = frozenset(f"{_OTHER_WEIGHTS} {_FOR_PEOPLE}".split())
_USED_FOLDERS = ("additional_chat_templates",)  # of the tokenizer; others hold the weights in other formats


class ModelSource(ABC):
    """A checkpoint by name. `str(source)` is the name, which `open_source` takes again. Needs no torch."""

    @abstractmethod
    def resolved(self) -> ModelSource:
        """The same source with its contents fixed: a commit, or a digest. Asks the server unless it is fixed already.

        CheckpointError names a source that does not exist or may not be read.
        """

    @abstractmethod
    def files(self) -> Mapping[str, int]:
        """Bytes of each file that it has, by name relative to its top. Of a resolved source only."""

    @abstractmethod
    def fetch(self, names: Collection[str]) -> Path:
        """The local folder, with (at least) the files `names` in it, complete. Of a resolved source only.

        Safe from several threads and processes: each file is fetched once a node. CheckpointError names the file that
        cannot be had, and why.
        """

    @property
    @abstractmethod
    def remote(self) -> bool:
        """Whether files are fetched, so that some may not be here yet."""

    def configs(self) -> list[str]:
        """Names of the files that say what the model is. CheckpointError for a model in GGUF alone."""
        names = self.files()
        refuse_gguf(self, names)
        return [CONFIG_NAME, *(name for name in (QUANTIZATION_NAME,) if name in names)]

    def facts(self) -> list[str]:
        """Names of the files that say what the checkpoint is: `configs` and the index, as far as there are any.

        Without an index, only the weight files themselves know which tensors they have.
        """
        names = self.files()
        found = [name for name in (*self.configs(), INDEX_NAME) if name in names]
        return found if INDEX_NAME in names else [*found, *weight_files(names)]

    def other_files(self) -> list[str]:
        """Names of the files that an engine may need besides weights: configs, tokenizer, templates, code."""
        return [name for name in self.files() if is_used(name) and not name.endswith(WEIGHTS_SUFFIX)]


def refuse_gguf(model: object, names: Iterable[str]) -> None:
    """CheckpointError if the files are in GGUF and there are none in safetensors."""
    kinds = {PurePosixPath(name).suffix.lower() for name in names}
    if ".gguf" in kinds and WEIGHTS_SUFFIX not in kinds:
        raise CheckpointError(f"{model}: {GGUF}")


def weight_files(names: Iterable[str]) -> list[str]:
    """The weight files of a checkpoint without an index: all at its top, as `index.py` has it."""
    return sorted(name for name in names if name.endswith(WEIGHTS_SUFFIX) and "/" not in name and name[0] != ".")


def is_used(name: str) -> bool:
    """Whether a router or a shard may need the file: weights in safetensors, configs, tokenizer, templates, code."""
    path = PurePosixPath(name)
    if path.name.startswith(".") or path.suffix.lower() in _UNUSED_SUFFIXES:
        return False
    return path.parent.as_posix() in (".", *_USED_FOLDERS)
