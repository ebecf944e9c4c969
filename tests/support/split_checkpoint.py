"""A checkpoint whose tensors are spread over files as a test wants them."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file

TINY = Path(__file__).parents[2] / "examples" / "tiny-moe"
NOT_WEIGHTS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


def split_tiny(folder: Path, file_of: Callable[[str], str]) -> Path:
    """The tiny model in `folder`, each tensor in the file that `file_of` names, with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in NOT_WEIGHTS:
        shutil.copy(TINY / name, folder / name)
    tensors = load_file(TINY / "model.safetensors")
    weight_map = {name: file_of(name) for name in tensors}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name, its in weight_map.items() if its == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def experts_apart(name: str) -> str:
    """A file for the rest, and two for the experts of each layer: experts 0 to 15, and 16 to 31."""
    found = re.search(r"layers\.(\d+)\.mlp\.experts\.(\d+)\.", name)
    return f"layer-{found[1]}-{'low' if int(found[2]) < 16 else 'high'}.safetensors" if found else "rest.safetensors"
