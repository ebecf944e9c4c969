"""`expertmesh serve`, as `make serve` calls it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import urllib.request
from pathlib import Path

import pytest
import yaml

from cluster.serve_environment import free_ports
from tests.support.command import COMMAND, run_command
from tests.support.serve.service import REPOSITORY, session_members, tiny_config
from tests.support.waiting import wait_for


@pytest.mark.parametrize(
    ("text", "told"),
    [("applications: 3", "expected a Serve config with a list of applications"), (None, "cannot be read")],
)
def test_a_bad_config_ends_it_at_once_with_the_reason(tmp_path: Path, text: str | None, told: str) -> None:
    config = tmp_path / "bad.yaml"
    if text is not None:
        config.write_text(text)
    done = run_command("serve", config)
    assert done.returncode == 1
    assert told in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "terminated"])
def test_it_starts_ray_itself_and_leaves_nothing_when_stopped(number: signal.Signals) -> None:
    """Stopped while the applications start: that is when there is most to undo."""
    with tempfile.TemporaryDirectory(prefix="em-", dir="/tmp", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        [port] = free_ports(1)
        config, log = folder / "mesh.yaml", folder / "log.txt"
        config.write_text(yaml.safe_dump(tiny_config(8000, folder), sort_keys=False))
        env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        with open(log, "w") as sink:
            process = subprocess.Popen(
                [*COMMAND, "serve", str(config), "--port", str(port)],
                cwd=REPOSITORY,
                env={**env, "RAY_TMPDIR": str(folder), "PYTHONPATH": str(REPOSITORY)},
                stdout=sink,
                stderr=sink,
                start_new_session=True,
            )
        try:
            wait_for(
                lambda: "experts/ExpertShard" in log.read_text() or process.poll() is not None, 200, "shards to start"
            )
            assert process.poll() is None, log.read_text()
            found = re.search(r"metrics for Prometheus: (\S+)", log.read_text())
            assert found is not None
            url = found[1]
            wait_for(
                lambda: b"ray_" in urllib.request.urlopen(url, timeout=10).read(), 60, "Ray's agent to tell figures"
            )
            process.send_signal(number)
            assert process.wait(90) == 0, log.read_text()
            assert "Traceback" not in log.read_text()
            wait_for(lambda: not session_members(process.pid), 30, "its processes to be gone")
        finally:
            for pid in session_members(process.pid):
                os.kill(pid, signal.SIGKILL)
            process.wait(10)
