"""`--log-format json`: what Serve is told, what its processes make of it, and what the command prints."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ray._private.ray_logging import global_worker_stdstream_dispatcher
from ray._private.worker import print_to_stdstream
from ray.serve.schema import ServeDeploySchema

from cluster import log_format

ROOT = Path(__file__).parents[2]

REPLICA = """
import logging, sys
from ray.serve._private.common import ServeComponentType
from ray.serve._private.logging_utils import configure_component_logger
from ray.serve.schema import LoggingConfig
from cluster.build import quiet
from cluster.ray_joints import logs_are_json, show_data_plane_log

encoding, folder = sys.argv[1:]
configure_component_logger(
    component_name="experts_ExpertShard",
    component_id="abc",
    component_type=ServeComponentType.REPLICA,
    logging_config=LoggingConfig(encoding=encoding, logs_dir=folder),
    max_bytes=10**6,
    backup_count=1,
)
print(logs_are_json(), quiet())
show_data_plane_log(role="shard", rank=1)
show_data_plane_log(epoch=6)
logging.getLogger("experts.shard").info("two\\nlines")
logging.getLogger("ray.serve").warning("of Serve's logger")
logging.shutdown()
"""


def run_replica(tmp_path: Path, encoding: str) -> tuple[str, list[str], list[str]]:
    """(standard output, lines of the log file, lines of standard error) of a process that Serve set up as a replica."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", REPLICA, encoding, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    [file] = tmp_path.glob("*.log")
    return done.stdout.strip(), file.read_text().splitlines(), done.stderr.splitlines()


def test_a_replicas_lines_are_objects_in_its_file_and_on_standard_error(tmp_path: Path) -> None:
    told, in_file, on_stderr = run_replica(tmp_path, "JSON")
    assert told == "True {'enable_access_log': False, 'encoding': 'JSON'}"
    for lines in (in_file, on_stderr):
        ours, serves = map(json.loads, lines)
        assert (ours["message"], serves["message"]) == ("two\nlines", "of Serve's logger")
        for line in (ours, serves):
            assert (line["role"], line["rank"], line["epoch"]) == ("shard", 1, 6)
            assert (line["deployment"], line["replica"]) == ("experts_ExpertShard", "abc")
            assert {"asctime", "levelname", "filename", "lineno", "process"} <= set(line)


def test_text_stays_as_serve_writes_it(tmp_path: Path) -> None:
    told, in_file, on_stderr = run_replica(tmp_path, "TEXT")
    assert told == "False {'enable_access_log': False}"
    for lines in (in_file, on_stderr):
        assert len(lines) == 3
        assert lines[2].endswith("of Serve's logger")
        assert not any("role" in line for line in lines)


def test_the_serve_config_keeps_what_it_says_of_logs() -> None:
    config = {"applications": [], "logging_config": {"log_level": "DEBUG"}}
    made = log_format.with_json_logs(config)
    schema = ServeDeploySchema.model_validate(made)
    assert schema.logging_config is not None
    assert (schema.logging_config.encoding, schema.logging_config.log_level) == ("JSON", "DEBUG")
    assert config["logging_config"] == {"log_level": "DEBUG"}


def test_lines_of_the_cluster_become_objects(capsys: pytest.CaptureFixture[str]) -> None:
    before = list(global_worker_stdstream_dispatcher.handlers)
    global_worker_stdstream_dispatcher.handlers = [("ray_print_logs", print_to_stdstream)]
    told: dict[str, Any] = {
        "lines": ['{"message": "own"}', "a traceback's line", "{not json", '"text"', "{}"],
        "pid": 12,
        "ip": "192.0.2.1",
        "actor_name": "ServeReplica:experts:ExpertShard",
        "is_err": True,
    }
    try:
        log_format.print_json_lines()
        global_worker_stdstream_dispatcher.emit(told)
        global_worker_stdstream_dispatcher.emit({**told, "lines": []})  # as Ray does when workers end
    finally:
        global_worker_stdstream_dispatcher.handlers = before
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("message") for line in lines] == ["own", "a traceback's line", "{not json", '"text"', None]
    for line in lines[1:4]:
        assert (line["process"], line["ip"], line["levelname"]) == (12, "192.0.2.1", "INFO")
        assert line["actor_name"] == "ServeReplica:experts:ExpertShard"


def test_a_line_of_the_command() -> None:
    told = json.loads(log_format.json_line('quotes " and\nlines', "ERROR", role="command"))
    assert (told["message"], told["levelname"], told["role"]) == ('quotes " and\nlines', "ERROR", "command")
    assert len(told["asctime"]) == len("2026-11-26 16:05:57,761")
