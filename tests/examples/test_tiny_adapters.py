"""The adapters that ship with the project: files, what they change, and how the tiny model answers with them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experts.checkpoint.adapters import adapter_folders, adapter_problems

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
MODEL, ADAPTERS = EXAMPLES / "tiny-moe", EXAMPLES / "tiny-adapters"
STYLES: dict[str, Callable[[str], bool]] = {
    "shout": lambda answer: answer == answer.upper(),
    "whisper": lambda answer: answer == answer.lower() and answer.startswith("("),
}
QUESTIONS = ("Hello!", "Who are you?", "What can you do?", "What does os.path.join do?")


def test_the_folder_has_these_adapters_which_can_be_served() -> None:
    folders = {folder.name: folder for folder in adapter_folders(ADAPTERS)}
    assert folders.keys() == STYLES.keys()
    for folder in folders.values():
        assert list(adapter_problems(folder, max_rank=8)) == []
        assert sum(file.stat().st_size for file in folder.iterdir()) < 150_000


@pytest.mark.parametrize("name", STYLES)
def test_answers_are_in_its_style(name: str) -> None:
    from transformers import AutoTokenizer, Qwen3MoeForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = Qwen3MoeForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    config = json.loads((ADAPTERS / name / "adapter_config.json").read_text())
    tensors = load_file(ADAPTERS / name / "adapter_model.safetensors")
    for key, a_RI in tensors.items():
        if ".lora_A." in key:
            weight_OI = model.get_parameter(key.removeprefix("base_model.model.").replace("lora_A.", ""))
            b_OR = tensors[key.replace("lora_A", "lora_B")]
            with torch.no_grad():
                weight_OI += config["lora_alpha"] / config["r"] * b_OR.float() @ a_RI.float()
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        ids_1T = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out_1T = model.generate(**ids_1T, max_new_tokens=16, do_sample=False)
        answer = tokenizer.decode(out_1T[0, ids_1T["input_ids"].shape[1] :], skip_special_tokens=True)
        assert STYLES[name](answer), answer
        assert any(letter.isalpha() for letter in answer), answer
