"""`python -m serve_app`, as `make serve` calls it: from nothing to a token, and away again on Ctrl-C."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, free_ports, session_members, tiny_config, wait_for


def environment(folder: Path) -> dict[str, str]:
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return {**env, "RAY_TMPDIR": str(folder), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("text", "told"),
    [("applications: 3", "expected a Serve config with a list of applications"), (None, "cannot be read")],
)
def test_a_bad_config_ends_it_at_once_with_the_reason(tmp_path: Path, text: str | None, told: str) -> None:
    config = tmp_path / "bad.yaml"
    if text is not None:
        config.write_text(text)
    command = [sys.executable, "-m", "serve_app", str(config)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_it_serves_prints_a_curl_line_that_works_and_ends_on_ctrl_c() -> None:
    with tempfile.TemporaryDirectory(prefix="em-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        [port] = free_ports(1)
        data = tiny_config(8000)
        data["applications"][0]["args"]["shards"]["count"] = 1
        data["applications"][1]["args"]["http"].pop("api_keys")
        config = folder / "mesh.yaml"
        config.write_text(yaml.safe_dump(data, sort_keys=False))
        log = folder / "log.txt"
        with open(log, "w") as sink:
            process = subprocess.Popen(
                [sys.executable, "-m", "serve_app", str(config), "--port", str(port)],
                cwd=REPOSITORY,
                env=environment(folder),
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        try:
            wait_for(lambda: "Ctrl-C stops it" in log.read_text() or process.poll() is not None, 400, "the welcome")
            text = log.read_text()
            assert process.poll() is None, text
            found = re.search(r"curl http.*?\\\n.*?}'", text, re.DOTALL)
            assert found is not None, text
            curl = shlex.split(found.group(0).replace("\\\n", " "))
            answer = subprocess.run([*curl, "--silent"], capture_output=True, text=True, timeout=120)
            assert '"object":"chat.completion"' in answer.stdout, answer.stdout + answer.stderr
            os.kill(process.pid, signal.SIGINT)
            assert process.wait(60) == 0, log.read_text()
            wait_for(lambda: not session_members(process.pid), 30, "its processes to be gone")
        finally:
            for pid in session_members(process.pid):
                os.kill(pid, signal.SIGKILL)
