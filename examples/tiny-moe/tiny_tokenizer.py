"""The tokenizer: byte-level BPE over the training documents, single digits, and a chat template."""

import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from chats import ASSISTANT, END, SYSTEM, USER
from corpus import Document
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD, SYSTEM, USER, ASSISTANT, END)
END_OF_TEXT_ID, PAD_ID, END_ID = 0, 1, 5
CHARACTERS_PER_DOMAIN = 1_500_000

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('role ' ~ message['role'] ~ ': expected system, user or assistant') -}}"
    "{%- endif -%}"
    "{{- '<|' ~ message['role'] ~ '|>\\n' ~ message['content'] ~ '<|end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"
)


def sample_texts(documents: Iterable[Document]) -> list[str]:
    """The same amount of text from every domain, drawn with a fixed seed, so that none dominates the vocabulary."""
    by_domain: dict[str, list[str]] = {}
    for document in documents:
        by_domain.setdefault(document.domain, []).append(document.text)
    sample = []
    for domain in sorted(by_domain):
        texts = by_domain[domain]
        random.Random(0).shuffle(texts)
        taken = 0
        for text in texts:
            if taken >= CHARACTERS_PER_DOMAIN:
                break
            sample.append(text)
            taken += len(text)
    return sample


def train_tokenizer(documents: Iterable[Document], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with `vocab_size` entries, including special tokens and the 256 bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"\d"), behavior="isolated"
            ),  # digit by digit, since code points and offsets count up
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample_texts(documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        bos_token=END_OF_TEXT,
        pad_token=PAD,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT, END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def encode_documents(tokenizer: PreTrainedTokenizerFast, documents: list[Document]) -> np.ndarray:
    """One stream of token ids, uint16 [N]: an end-of-text token before each document and at the end."""
    pieces: list[int] = []
    for start in range(0, len(documents), 256):
        texts = [document.text for document in documents[start : start + 256]]
        for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False):
            pieces.append(END_OF_TEXT_ID)
            pieces.extend(encoding.ids)
    pieces.append(END_OF_TEXT_ID)
    return np.asarray(pieces, dtype=np.uint16)


def encode_corpus(
    tokenizer: PreTrainedTokenizerFast | None, vocab_size: int, max_length: int, limit_modules: int | None = None
) -> tuple[dict[str, np.ndarray], PreTrainedTokenizerFast]:
    """Token streams `train.<domain>` and `held_out.<domain>`, and their tokenizer, trained if none is given."""
    from chats import split_chats
    from corpus import DOMAINS, build_corpus

    train, held_out = build_corpus(limit_modules)
    chat_train, chat_held_out = split_chats(limit_modules)
    tokenizer = tokenizer or train_tokenizer([*train, *chat_train], vocab_size, max_length)
    streams = {}
    for side, documents in (("train", [*train, *chat_train]), ("held_out", [*held_out, *chat_held_out])):
        for domain in (*DOMAINS, "chat"):
            streams[f"{side}.{domain}"] = encode_documents(tokenizer, [d for d in documents if d.domain == domain])
    return streams, tokenizer


def load_or_encode(cache: Path, vocab_size: int, max_length: int, limit_modules: int | None) -> dict[str, np.ndarray]:
    """The token streams for training, made once and kept in `cache` beside their tokenizer."""
    stored = cache / "tokens.npz"
    if stored.exists():
        with np.load(stored) as streams:
            return dict(streams)
    streams, tokenizer = encode_corpus(None, vocab_size, max_length, limit_modules)
    cache.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(cache / "tokenizer")
    np.savez(stored, **streams)
    return streams
