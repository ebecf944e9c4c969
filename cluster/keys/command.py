"""`keys new`: make a key, and the line that lets its holder in."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import yaml
from pydantic import ValidationError

from cluster.keys.keyring import KeyLine, digest_of

BYTES = 32


def add_keys(commands: Any) -> None:
    """Add `keys` to the subparsers of a parser."""
    keys = commands.add_parser(
        "keys", help="make API keys", description="Make API keys. Exit status: 0 done, 1 refused, 2 wrong usage."
    )
    actions = keys.add_subparsers(required=True, metavar="ACTION")
    new = actions.add_parser(
        "new",
        help="make a key and print the line for http.keys_file",
        description="Make a key. The line for http.keys_file (or the variable of http.keys_env) goes to the standard "
        "output, and the key itself, which nothing keeps, to the standard error: `keys new --name X >> keys.yaml`.",
    )
    new.add_argument("--name", required=True, help="whose key it is, in logs, metrics and usage")
    new.add_argument("--role", choices=("client", "admin"), default="client", help="%(default)s by default")
    new.add_argument("--requests-per-minute", type=int, metavar="N")
    new.add_argument("--tokens-per-minute", type=int, metavar="N")
    new.add_argument("--concurrency", type=int, metavar="N", help="most requests at the same time")
    new.add_argument("--models", nargs="+", default=[], metavar="MODEL", help="models it may use; by default all")
    new.add_argument("--stdin", action="store_true", help="take a key that is in use from the standard input")
    new.set_defaults(run=run_new)


def run_new(options: argparse.Namespace) -> int:
    """Print a line and a key; the exit status."""
    key = sys.stdin.read().strip() if options.stdin else new_key()
    if not key:
        print("there is no key on the standard input", file=sys.stderr)
        return 1
    try:
        line = line_of(
            key,
            name=options.name,
            role=options.role,
            requests_per_minute=options.requests_per_minute,
            tokens_per_minute=options.tokens_per_minute,
            concurrency=options.concurrency,
            models=options.models,
        )
    except ValidationError as error:
        for item in error.errors():
            name = str(item["loc"][0]).replace("_", "-")
            print(f"--{name}: {item['msg'].removeprefix('Value error, ')}", file=sys.stderr)
        return 1
    print(line)
    if not options.stdin:
        print(f"the key, which is shown this once: {key}", file=sys.stderr)
    return 0


def new_key() -> str:
    """A random key of 256 bits."""
    import secrets

    return f"sk-{secrets.token_urlsafe(BYTES)}"


def line_of(key: str, **fields: Any) -> str:
    """One entry of the list of keys, on one line. Raises pydantic's ValidationError for fields that do not fit."""
    entry = KeyLine(sha256=digest_of(key).hex(), **fields)
    data = entry.model_dump(exclude_none=True)
    data = {"name": data.pop("name"), "role": data.pop("role"), **{k: v for k, v in data.items() if v != []}}
    return "- " + yaml.safe_dump(data, default_flow_style=True, sort_keys=False, width=10_000).strip()
