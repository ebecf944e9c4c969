"""The tiny model that ships with the project: files, data split, training script, committed figures."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "tiny-moe"
sys.path.insert(0, str(FOLDER))

DOMAINS = ("code", "prose", "unicode", "bytecode")


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads((FOLDER / "config.json").read_text())


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(FOLDER)


def test_everything_that_ships_fits_in_20_megabytes() -> None:
    shipped = [path for path in FOLDER.iterdir() if path.is_file()]
    assert (FOLDER / "model.safetensors") in shipped
    assert sum(path.stat().st_size for path in shipped) <= 20_000_000


def test_config_describes_a_qwen3_moe_with_many_small_experts(config: dict) -> None:
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["num_experts"] >= 32
    assert config["num_hidden_layers"] >= 4
    assert config["num_experts_per_tok"] == 4
    assert config["norm_topk_prob"] is True
    assert config["max_position_embeddings"] >= 2048
    assert config["head_dim"] in (32, 64, 128)


def test_checkpoint_loads_into_transformers_and_predicts(config: dict, tokenizer) -> None:
    import torch
    from transformers import Qwen3MoeForCausalLM

    model, report = Qwen3MoeForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = tokenizer("import os\nimport sys\n\nclass Error(Exception):\n    pass\n", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        loss = model.eval()(input_ids=ids, labels=ids).loss.item()
    assert loss < 0.6 * math.log(config["vocab_size"])  # far better than chance


def test_training_model_and_transformers_agree(tmp_path: Path) -> None:
    """transformers is the oracle of the hand-written layers, with the same weights exported."""
    import torch
    from export import export
    from tiny_model import TinyMoe, TinyMoeConfig
    from transformers import Qwen3MoeForCausalLM

    torch.manual_seed(0)
    sizes = TinyMoeConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_experts=8, head_dim=32, moe_intermediate_size=16
    )
    ours = TinyMoe(sizes)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.copy_((parameter * 5).bfloat16())  # exact in the export, large enough to matter
    export(ours, tmp_path)
    theirs = Qwen3MoeForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    for length in (1, 2, 37, 300):
        ids = torch.randint(0, 97, (1, length + 1))
        with torch.no_grad():
            logits = theirs(input_ids=ids[:, :-1]).logits
            expected = torch.nn.functional.cross_entropy(logits[0], ids[0, 1:])
            actual, _ = ours(ids[:, :-1], ids[:, 1:])
        assert actual.item() == pytest.approx(expected.item(), abs=2e-4)  # fp32 sums in another order


def test_expert_gradients_match_a_plain_computation() -> None:
    import torch
    import torch.nn.functional as F
    from tiny_model import SparseMoe, TinyMoeConfig

    torch.manual_seed(0)
    moe = SparseMoe(TinyMoeConfig(hidden_size=16, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=8))
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x_TD = torch.randn(11, 16, requires_grad=True)
    moe(x_TD, torch.float32)[0].square().sum().backward()
    actual = [x_TD.grad, *(parameter.grad for parameter in moe.parameters())]
    x_TD.grad = None
    moe.zero_grad(set_to_none=True)

    weights_TK, ids_TK = F.linear(x_TD, moe.gate).softmax(-1).topk(2, dim=-1)
    weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
    rows = []
    for x_D, weights_K, ids_K in zip(x_TD, weights_TK, ids_TK.tolist(), strict=True):
        total = torch.zeros(16)
        for weight, expert in zip(weights_K, ids_K, strict=True):
            gate_F, up_F = (x_D @ moe.gate_up[expert]).chunk(2)
            total = total + weight * ((F.silu(gate_F) * up_F) @ moe.down[expert])
        rows.append(total)
    torch.stack(rows).square().sum().backward()
    for ours, plain in zip(actual, [x_TD.grad, *(parameter.grad for parameter in moe.parameters())], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "def f(x):\n    return x + 1\n",
        "U+1F600 So GRINNING FACE\n",
        "Grüße, 世界 \U0001f600\x00\t end",
        "1234567890 " * 3,
    ],
)
def test_tokenizer_round_trips(tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_special_tokens_agree_with_the_config(tokenizer, config: dict) -> None:
    generation = json.loads((FOLDER / "generation_config.json").read_text())
    assert len(tokenizer) == config["vocab_size"]
    assert tokenizer.eos_token_id == config["eos_token_id"]
    assert tokenizer.pad_token_id == config["pad_token_id"] != tokenizer.eos_token_id
    assert generation["eos_token_id"] == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]


def test_chat_template_renders_what_the_training_dialogues_look_like(tokenizer) -> None:
    from chats import render

    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "Bye"},
    ]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt + "Bye!<|end|>\n" == render([("Hello", "Hi!"), ("Bye", "Bye!")], "Be brief.")
    with pytest.raises(Exception, match="role tool: expected system, user or assistant"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


@pytest.fixture(scope="module")
def corpus_sides() -> tuple[list, list]:
    from corpus import build_corpus

    return build_corpus(limit_modules=40)


def test_held_out_text_is_not_in_the_training_text(corpus_sides: tuple[list, list]) -> None:
    from chats import split_chats
    from corpus import is_held_out, text_key

    train, held_out = corpus_sides
    chat_train, chat_held_out = split_chats(limit_modules=40)
    assert {document.domain for document in train} == set(DOMAINS) == {document.domain for document in held_out}
    assert not any(is_held_out(document.group) for document in train)
    assert all(is_held_out(document.group) for document in held_out)
    assert not {text_key(d.text) for d in train} & {text_key(d.text) for d in held_out}
    assert not {d.text for d in chat_train} & {d.text for d in chat_held_out}
    assert not {d.group for d in [*train, *chat_train]} & {d.group for d in [*held_out, *chat_held_out]}


def test_corpus_names_no_path_or_address_of_this_machine(corpus_sides: tuple[list, list]) -> None:
    import sysconfig

    stdlib = sysconfig.get_paths()["stdlib"]
    for document in corpus_sides[0]:
        assert stdlib not in document.text
        if document.domain == "bytecode":
            assert " at 0x" not in document.text


def test_disassembly_does_not_depend_on_the_hash_seed() -> None:
    from corpus import disassemble

    lines = disassemble(compile("x in {'b', 'c', 'a', 'd', 'f', 'e'}", "<test>", "eval")).splitlines()
    assert any(line.endswith("frozenset({'a', 'b', 'c', 'd', 'e', 'f'})") for line in lines)


def test_docstrings_leave_the_code() -> None:
    import ast

    from corpus import without_docstrings

    source = '"""Module."""\nimport os\n\ndef f():\n    """Only."""\n\nclass C:\n    """A\n    b."""\n    x = "kept"\n'
    stripped = without_docstrings(source, ast.parse(source))
    assert '"""' not in stripped
    assert "kept" in stripped
    assert [type(node).__name__ for node in ast.parse(stripped).body] == ["Import", "FunctionDef", "ClassDef"]


def test_trigram_is_a_probability_distribution_and_prefers_what_it_saw() -> None:
    from trigram import Trigram

    rng = np.random.default_rng(0)
    stream = rng.integers(0, 12, 4000)
    stream[1::2] = stream[0::2] // 2  # structure to learn
    model = Trigram(stream, 16)  # ids 12 to 15 never occur
    for u, v in ((3, 1), (0, 15), (14, 15)):
        total = sum(model.probabilities(np.array([u, v, w]))[0] for w in range(16))
        assert total == pytest.approx(1.0, abs=1e-5)
    seen, unseen = model.probabilities(np.array([9, 8, 4]))[0], model.probabilities(np.array([9, 8, 13]))[0]
    assert seen > unseen > 0


def test_training_script_runs_two_steps_and_exports(tmp_path: Path) -> None:
    import train
    from transformers import AutoTokenizer, Qwen3MoeForCausalLM

    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_experts": 4,
        "moe_intermediate_size": 16,
        "head_dim": 32,
    }
    flags = ["--steps=2", "--tokens-per-step=128", "--context=32", "--long-context=64", "--long-share=0.5"]
    folders = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    train.main([*flags, *folders, "--limit-modules", "5", "--sizes", json.dumps(sizes)])
    assert json.loads((tmp_path / "work" / "training.json").read_text())["steps"] == 2
    Qwen3MoeForCausalLM.from_pretrained(tmp_path / "out")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 300


def test_committed_figures_beat_the_trigram_in_every_domain() -> None:
    metrics = json.loads((FOLDER / "metrics.json").read_text())
    assert set(DOMAINS) <= set(metrics["loss_nats_per_token"])
    for domain, row in metrics["loss_nats_per_token"].items():
        assert row["tokens"] > 10_000, domain
        assert row["model"] < row["trigram"] <= min(row["trigram_own_domain"], row["trigram_pooled"]) + 1e-3, domain


def test_experts_specialize_by_domain() -> None:
    routing = json.loads((FOLDER / "metrics.json").read_text())["routing"]
    for domain, share in routing["share_of_top_experts"].items():
        assert share > 1.5 * routing["uniform_share_of_top_experts"], domain
    assert routing["mean_pairwise_kl_nats"] > 0.3


def test_model_card_quotes_the_committed_figures() -> None:
    card = (FOLDER / "README.md").read_text()
    metrics = json.loads((FOLDER / "metrics.json").read_text())
    for domain, row in metrics["loss_nats_per_token"].items():
        assert f"| {domain} | {row['tokens']:,} | {row['model']:.3f} | {row['trigram']:.3f} |" in card
    assert "expert_load.png" in card
    assert (FOLDER / "expert_load.png").stat().st_size > 10_000


def test_prompts_are_of_all_domains_and_none_is_in_both_files() -> None:
    both = []
    for name in ("prompts.jsonl", "prompts-unseen.jsonl"):
        entries = [json.loads(line) for line in (FOLDER / name).read_text().splitlines()]
        counts = {domain: sum(entry["domain"] == domain for entry in entries) for domain in DOMAINS}
        assert set(counts.values()) == {len(entries) // 4}, counts
        both.append({entry["prompt"] for entry in entries})
    assert not both[0] & both[1]
