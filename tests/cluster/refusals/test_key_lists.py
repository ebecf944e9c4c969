"""Lists of keys that a deployed application could not use."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster.config.apps import ConsoleAppConfig
from cluster.config.parse import ConfigError, parse
from cluster.refusals.applications import refuse_console


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (None, "cannot be read: "),
        ("", "holds no key: add a line that `expertmesh keys new` prints"),
        ("- {name: team, sha256: sk-a-key-itself}", "[0].sha256: expected 64 hexadecimal digits"),
    ],
)
def test_a_list_of_keys_that_cannot_be_used_is_refused(tmp_path: Path, text: str | None, problem: str) -> None:
    file = tmp_path / "keys.yaml"
    if text is not None:
        file.write_text(text)
    config = parse(ConsoleAppConfig, {"http": {"keys_file": str(file)}})
    with pytest.raises(ConfigError) as caught:
        refuse_console(config)
    [line] = str(caught.value).splitlines()
    assert line.startswith(f"args.http.keys_file {file}")
    assert problem in line
    assert "sk-a-key-itself" not in line
    refuse_console(config, keys=False)
