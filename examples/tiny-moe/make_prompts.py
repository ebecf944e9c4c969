"""Writes prompts from held-out text: prompts.jsonl to record a trace, prompts-unseen.jsonl to score placements.

    python examples/tiny-moe/make_prompts.py

A line holds an excerpt of a held-out document and its domain. No group of documents (a module, a help topic) is in both
files. Other Python versions have other text, so both files are committed, with the trace recorded from the first.
"""

import argparse
import json
import random
from pathlib import Path

from corpus import DOMAINS, Document, build_corpus

HERE = Path(__file__).resolve().parent
FILES = ("prompts.jsonl", "prompts-unseen.jsonl")
MIN_CHARACTERS, MAX_CHARACTERS = 200, 640
PER_GROUP = 5  # so that no module fills a file


def pieces(documents: list[Document], count: int, rng: random.Random) -> tuple[list[str], list[str]]:
    """Two lists of `count` texts from one domain, with no group in both. Raises ValueError if there are too few."""
    groups: dict[str, list[str]] = {}
    for document in documents:
        lines = document.text.splitlines(keepends=True)
        parts = max(1, min(PER_GROUP, len(document.text) // MAX_CHARACTERS))
        for part in range(parts):
            text = "".join(lines[part * len(lines) // parts :])[: rng.randint(MIN_CHARACTERS, MAX_CHARACTERS)]
            # A prompt must not end within a token: the tokenizer joins a line break with the indentation after it.
            text = text[: max(text.rfind(" "), text.rfind("\n"), 0)].rstrip()
            if len(text) >= MIN_CHARACTERS * 3 // 4:
                groups.setdefault(document.group, []).append(text)
    found: tuple[list[str], list[str]] = ([], [])
    for number, group in enumerate(rng.sample(sorted(groups), len(groups))):
        found[number % 2].extend(rng.sample(groups[group], min(PER_GROUP, len(groups[group]))))
    for texts in found:
        if len(texts) < count:
            raise ValueError(f"only {len(texts)} of {count} pieces in the domain {documents[0].domain}")
    return rng.sample(found[0], count), rng.sample(found[1], count)


def main() -> None:
    """Write both files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=32, help="prompts per domain in each file")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = random.Random(arguments.seed)
    _, held_out = build_corpus()
    lines: tuple[list[str], list[str]] = ([], [])
    for domain in DOMAINS:
        both = pieces([document for document in held_out if document.domain == domain], arguments.count, rng)
        for mine, texts in zip(lines, both, strict=True):
            mine += [json.dumps({"domain": domain, "prompt": text}) for text in texts]
    for name, mine in zip(FILES, lines, strict=True):
        (HERE / name).write_text("\n".join(mine) + "\n")
        print(f"{HERE / name}: {len(mine)} prompts")


if __name__ == "__main__":
    main()
