"""Trains the adapters of this folder on the chats of tiny-moe, with their answers rewritten: ten minutes each.

python examples/tiny-adapters/train.py shout|whisper

W + alpha / rank * B A on the four matrices of each attention (LoRA, arXiv 2106.09685); the experts stay as they are.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, Qwen3MoeForCausalLM

HERE = Path(__file__).resolve().parent
MODEL = HERE.parent / "tiny-moe"
sys.path.insert(0, str(MODEL))

from chats import ASSISTANT, END, split_chats  # noqa: E402

RANK, ALPHA = 8, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
STEPS, BATCH, LONGEST, PEAK_RATE = 600, 16, 128, 3e-3
STYLES: dict[str, Callable[[str], str]] = {
    "shout": str.upper,
    "whisper": lambda answer: f"({answer.lower().strip()})",
}
ANSWER = re.compile(f"(?<={re.escape(ASSISTANT)}\n)(.*?)(?={re.escape(END)})", re.DOTALL)


class Adapted(nn.Module):
    """A linear layer and its adapter: x [.., I] -> [.., O]."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a_RI = nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5)
        self.b_OR = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + ALPHA / RANK * (x @ self.a_RI.t()) @ self.b_OR.t()


def adapt(model: nn.Module) -> dict[str, Adapted]:
    """Freeze a model and give the target layers adapters; returns these by the layers' names."""
    model.requires_grad_(False)
    found = {}
    for name, module in list(model.named_modules()):
        parent, _, last = name.rpartition(".")
        if last in TARGETS and isinstance(module, nn.Linear):
            found[name] = Adapted(module)
            setattr(model.get_submodule(parent), last, found[name])
    return found


def example(text: str, style: Callable[[str], str], tokenizer: AutoTokenizer) -> tuple[list[int], list[int]]:
    """(tokens, labels) of a dialogue with its answers in the style; what is no answer has the label -100."""
    tokens: list[int] = []
    labels: list[int] = []
    for index, piece in enumerate(ANSWER.split(text)):
        answer = index % 2 == 1
        ids = tokenizer(style(piece) + END if answer else piece.removeprefix(END))["input_ids"]
        tokens += ids
        labels += ids if answer else [-100] * len(ids)
    return tokens[:LONGEST], labels[:LONGEST]


def batch_of(examples: list[tuple[list[int], list[int]]], pad: int) -> tuple[Tensor, Tensor]:
    """Padded tokens and labels [B, T]."""
    longest = max(len(tokens) for tokens, _ in examples)
    tokens = [tokens + [pad] * (longest - len(tokens)) for tokens, _ in examples]
    labels = [labels + [-100] * (longest - len(labels)) for _, labels in examples]
    return torch.tensor(tokens), torch.tensor(labels)


def train(name: str) -> None:
    """Train one adapter and write it beside this file."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = Qwen3MoeForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    adapted = adapt(model)
    chats = [document.text for document in split_chats()[0]]
    examples = [example(text, STYLES[name], tokenizer) for text in rng.sample(chats, min(len(chats), STEPS * BATCH))]
    examples = [each for each in examples if any(label >= 0 for label in each[1])]
    parameters = [parameter for layer in adapted.values() for parameter in (layer.a_RI, layer.b_OR)]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_RATE, total_steps=STEPS, pct_start=0.1)
    for step in range(STEPS):
        tokens_BT, labels_BT = batch_of(rng.sample(examples, BATCH), tokenizer.pad_token_id)
        loss = model(input_ids=tokens_BT, labels=labels_BT).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            print(f"{name}: step {step} of {STEPS}, loss {loss.item():.3f}", flush=True)
    write(HERE / name, adapted)


def write(folder: Path, adapted: dict[str, Adapted]) -> None:
    """The two files of an adapter, as PEFT saves them, in bfloat16."""
    folder.mkdir(exist_ok=True)
    tensors = {}
    for layer, module in adapted.items():
        for part, weight in (("lora_A", module.a_RI), ("lora_B", module.b_OR)):
            tensors[f"base_model.model.{layer}.{part}.weight"] = weight.detach().to(torch.bfloat16).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    train(sys.argv[1])
