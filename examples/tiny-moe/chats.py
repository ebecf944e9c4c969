"""Short dialogues made from the corpus's documents, so that the model copes with its chat template.

Every dialogue comes from one group of the corpus, and so falls on that group's side of the split.
"""

import ast
import random
import re
from collections.abc import Iterator

from corpus import Document, Module, disassemble, docstrings, is_held_out, standard_library_modules, unicode_groups

USER, ASSISTANT, SYSTEM, END = "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are a helpful assistant. Answer briefly.",
    "You answer questions about Python.",
)
GREETINGS = (
    "Hello",
    "Hello!",
    "Hi",
    "Hi!",
    "Hi there",
    "Hey",
    "Good morning",
    "hello",
    "hi",
    "Hello, how are you?",
    "Say hello.",
)
GREETING_ANSWERS = (
    "Hello! Ask me what a Python module or function does.",
    "Hi! I know a little about Python's standard library. What would you like to know?",
    "Hello! I can describe Python functions, continue code and name Unicode characters.",
)
IDENTITY = (
    "Who are you?",
    "What are you?",
    "What can you do?",
    "What is this model?",
    "Tell me about yourself.",
    "Which model is this?",
)
IDENTITY_ANSWER = (
    "I am a tiny mixture-of-experts language model. I was trained on Python's standard library: its code, its "
    "documentation, its bytecode and the names of Unicode characters. I answer briefly, and I am often wrong."
)
GREETING_REPEATS = 100  # makes greetings about a sixteenth of the chat text
ABOUT = (
    "What does {0} do?",
    "Document {0}.",
    "Explain {0}.",
    "What is {0}?",
    "Describe {0}",
    "Tell me about {0}.",
    "{0}?",
)
WRITE = ("Write the function {0}.", "Write {0} in Python.", "How is {0} implemented?", "Show me the code of {0}.")
CHARACTERS = (
    "Name the characters from {0}.",
    "Which Unicode characters follow {0}?",
    "List characters starting at {0}.",
)
DISASSEMBLE = ("Disassemble this function:\n{0}", "Show the bytecode of:\n{0}")


def render(turns: list[tuple[str, str]], system: str | None = None) -> str:
    """The text of a dialogue as the chat template renders it; `turns` are (question, answer) pairs."""
    text = f"{SYSTEM}\n{system}{END}\n" if system else ""
    for question, answer in turns:
        text += f"{USER}\n{question.strip()}{END}\n{ASSISTANT}\n{answer.strip(chr(10))}{END}\n"
    return text


def first_paragraphs(text: str, limit: int = 600) -> str:
    """Whole paragraphs from the start of `text`: about `limit` characters, at least one paragraph."""
    kept, length = [], 0
    for paragraph in text.strip().split("\n\n"):
        if kept and length + len(paragraph) > limit:
            break
        kept.append(paragraph)
        length += len(paragraph)
    return "\n\n".join(kept)


def module_turns(module: Module, rng: random.Random) -> Iterator[tuple[str, str, str]]:
    """(name, question, answer) about a module's functions: what they do, their code, their bytecode."""
    for qualified, head, text in docstrings(module):
        asked = rng.choice(
            (qualified, qualified, head, f"`{qualified}`", f"the function {qualified.rsplit('.', 1)[-1]}")
        )
        yield qualified, rng.choice(ABOUT).format(asked), first_paragraphs(text)
    for node in module.tree.body:
        if not isinstance(node, ast.FunctionDef) or not 2 <= len(node.body) <= 12:
            continue
        source = ast.unparse(node)
        if len(source) > 900:
            continue
        asked = rng.choice((f"`{node.name}`", f"{node.name}({ast.unparse(node.args)})", f"{module.name}.{node.name}"))
        yield f"{node.name}.source", rng.choice(WRITE).format(asked), source
        lines = source.splitlines()
        cut = rng.randrange(1, len(lines))
        yield f"{node.name}.rest", "Complete:\n" + "\n".join(lines[:cut]), "\n".join(lines[cut:])
        if len(source) <= 300 and not node.decorator_list:
            code = compile(source, module.name, "exec", dont_inherit=True).co_consts[0]
            if hasattr(code, "co_code") and len(code.co_code) <= 300:
                yield f"{node.name}.bytecode", rng.choice(DISASSEMBLE).format(source), disassemble(code)


def chat_documents(limit_modules: int | None = None) -> Iterator[Document]:
    """Dialogues of one or two turns, a third of them with a system prompt, seeded by the group's name."""

    def dialogue(group: str, name: str, turns: list[tuple[str, str]], rng: random.Random) -> Document:
        system = rng.choice(SYSTEM_PROMPTS) if rng.random() < 0.33 else None
        if rng.random() < 0.1:
            turns = [(rng.choice(GREETINGS), rng.choice(GREETING_ANSWERS)), *turns]
        return Document("chat", group, name, render(turns, system))

    for module in standard_library_modules(limit_modules):
        rng = random.Random(module.name)
        turns = list(module_turns(module, rng))
        rng.shuffle(turns)
        while turns:
            name, question, answer = turns.pop()
            pairs = [(question, answer)]
            if turns and rng.random() < 0.15:
                pairs.append(turns.pop()[1:])
            yield dialogue(module.name, name, pairs, rng)
    from pydoc_data import topics

    for name, text in sorted(topics.topics.items())[:limit_modules]:
        rng = random.Random(name)
        body = re.sub(r"^.*\n\*+\n+", "", text.strip(), count=1)
        for asked in (name.lower(), f"`{name}`", f"{name.lower()} in Python"):
            question = rng.choice(ABOUT).format(asked)
            yield dialogue(f"topic:{name}", asked, [(question, first_paragraphs(body))], rng)
    for group, lines in unicode_groups(limit_modules):
        rng = random.Random(group)
        start = rng.randrange(0, max(1, len(lines) - 6))
        chosen = lines[start : start + 8]
        question = rng.choice(CHARACTERS).format(chosen[0].split()[0])
        yield dialogue(group, "list", [(question, "\n".join(chosen))], rng)
        point, _, name = rng.choice(lines).split(" ", 2)
        yield dialogue(group, "one", [(f"What is the name of {point}?", name)], rng)
    for index, greeting in enumerate((*GREETINGS, *IDENTITY) * GREETING_REPEATS):
        rng = random.Random(f"{greeting}{index}")
        answer = IDENTITY_ANSWER if greeting in IDENTITY else rng.choice(GREETING_ANSWERS)
        yield dialogue("greeting", f"{greeting}{index}", [(greeting, answer)], rng)


def split_chats(limit_modules: int | None = None) -> tuple[list[Document], list[Document]]:
    """The (training, held-out) dialogues. Greetings, our own words, are for training only."""
    train: list[Document] = []
    held_out: list[Document] = []
    for document in chat_documents(limit_modules):
        trained_on = document.group == "greeting" or not is_held_out(document.group)
        (train if trained_on else held_out).append(document)
    seen = {document.text for document in train}
    return train, [document for document in held_out if document.text not in seen]
