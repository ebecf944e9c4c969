"""The page of all MoE architectures, docs/architectures.md, from the table that refuses them.

python -m cluster.reference.architectures_page > docs/architectures.md
"""

from __future__ import annotations

from collections.abc import Iterator

from experts.checkpoint.architectures.table import ARCHITECTURES, DRAFT, STATES, State

_HEAD = """# Architectures

Made by `python -m cluster.reference.architectures_page`; tests keep it true, and name what the registry of the
installed vllm has beyond it (vllm 0.32).

What becomes of each architecture that vLLM's registry knows and that may have routed experts. Ask it about a model,
before a gigabyte is fetched:

```console
$ expertmesh check config.json
```

Comparisons with vLLM are of small random models in float32 on a CPU, with the experts on 2 and on 3 shards. A model
whose `text_config` is one of these is read likewise, and so is one of an architecture that has no line here if its
model type has. CONTRIBUTING.md shows how a new one is added."""

_TITLES = {
    State.parity: "Compared with vLLM",
    State.read: "Read",
    State.refused: "Refused",
    State.dense: "Without experts",
}


def page() -> str:
    """Markdown: a table for each state."""
    lines = [_HEAD]
    for state, title in _TITLES.items():
        lines += ["", f"## {title}", "", f"{STATES[state][0].upper()}{STATES[state][1:]}.", *_table(state)]
    lines += ["", f"A model that vLLM registers as a draft (`speculative_config`) is refused: {DRAFT}."]
    return "\n".join(lines) + "\n"


def _table(state: State) -> Iterator[str]:
    entries = sorted((entry for entry in ARCHITECTURES if entry.state is state), key=lambda entry: entry.name.lower())
    columns = {State.refused: ("architecture", "why"), State.dense: ("architecture",)}
    shown = columns.get(state, ("architecture", "model type", "note"))
    yield ""
    yield f"| {' | '.join(shown)} |"
    yield f"|{'---|' * len(shown)}"
    for entry in entries:
        cells = {"architecture": f"`{entry.name}`", "model type": f"`{entry.model_type}`"}
        yield f"| {' | '.join(cells.get(column, entry.note) for column in shown)} |"


if __name__ == "__main__":
    print(page(), end="")
